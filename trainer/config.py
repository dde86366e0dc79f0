"""What a run is: frozen sections of flags, checked where they are made.

Flag names, meanings and defaults are those of diffusers' train_instruct_pix2pix.py, so that its
command lines run unchanged; flags it does not have are marked "ours". A comment beside a field is
its help text on the command line.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from .errors import UsageError

LrScheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Format = Literal["fp32", "bf16"]
PredictionType = Literal["epsilon", "v_prediction"]
POLYNOMIAL_END = 1e-7  # the learning rate that diffusers' polynomial ends at
LONGEST_EMA = 12**-0.5  # relative standard deviation of the plain mean over all steps
Keeps = Literal["nothing", "attention", "products"]
Sharding = Literal["ddp", "fsdp", "hsdp"]
CACHE_OFF = "off"  # as --cache_latents
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
WARNED_PIXELS = 89_478_485  # of an image: above it Pillow warns of a decompression bomb
REFUSED_PIXELS = 2 * WARNED_PIXELS  # and above this it reads none


def _at_least(flag: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise UsageError(f"--{flag} must be {least} or more, got {value}")


def check_ema_length(told: str, length: float) -> None:
    """Raises UsageError for a relative standard deviation that no power-law average has.

    Args:
        told: the flag and its value.
    """
    if not 0 < length <= LONGEST_EMA:
        raise UsageError(
            f"{told}: a length is above 0 and at most {LONGEST_EMA:.4f}, which is the mean over "
            "all steps; for instance 0.05 and 0.1"
        )


def _share(flag: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise UsageError(f"--{flag} is a probability, from 0 to 1; got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Where the pipeline to start from comes from."""

    pretrained_model_name_or_path: str | None = None  # pipeline folder, or its name on the hub
    pretrained_vae_model_name_or_path: str | None = None  # folder or hub name of another VAE
    unet: str | None = None  # ours: folder of a UNet to start from instead of the pipeline's
    revision: str | None = None  # branch, tag or commit on the hub
    variant: str | None = None  # weight files to take, for instance fp16
    non_ema_revision: str | None = None  # deprecated: means --revision for the UNet
    cache_dir: str | None = None  # where hub downloads are kept


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which pairs are trained on, and how an image becomes a square of pixels."""

    dataset_name: str | None = None  # hub name, or a local folder in any layout of the README
    dataset_config_name: str | None = None  # the dataset's configuration, if it has several
    dataset_split: str = "train"  # ours: the split to train on
    train_data_dir: str | None = None  # a local folder, as for --dataset_name
    original_image_column: str = "input_image"  # column of the image before the edit
    edited_image_column: str = "edited_image"  # column of the image after the edit
    edit_prompt_column: str = "edit_prompt"  # column of the instruction
    max_train_samples: int | None = None  # train on this many rows, drawn with --seed
    held_out: int = 0  # ours: rows kept out of training, for the held-out loss and pictures
    on_bad_sample: Literal["stop", "skip"] = "stop"  # ours: an unreadable image stops or is skipped
    max_bad_fraction: float = 0.05  # ours: of the rows that may be skipped; more stop the run
    max_image_pixels: int = WARNED_PIXELS  # ours: an image of more, by its header, is unreadable
    allow_outside_files: bool = False  # ours: images may be links out of the dataset's folder
    dataloader_num_workers: int = 0  # processes that decode images, for each rank
    dataloader_prefetch: int = 4  # ours: micro-batches each worker keeps ready
    resolution: int = 256  # pixels, side of the square that is trained on
    max_resize: int | None = None  # ours: short side drawn from --resolution to this (paper: 288)
    interpolation: Interpolation = "bicubic"  # ours: of the resize of the short side
    center_crop: bool = False  # crop the middle instead of a random place
    crops_coords_top_left_h: int | None = None  # XL is told this row of each crop, not its own
    crops_coords_top_left_w: int | None = None  # XL is told this column of each crop, not its own
    buckets: bool = False  # ours: pairs keep their shape, in sizes of about resolution x resolution
    random_flip: bool = False  # mirror half of the pairs, decided for each pair
    cache_latents: str | None = None  # ours: folder or URL of encodings, trained from; off: none
    cache_crops: int | None = None  # ours: random crops of each pair that --cache_latents keeps

    def __post_init__(self) -> None:
        _at_least("resolution", self.resolution, 8)
        _at_least("max_train_samples", self.max_train_samples, 1)
        _at_least("held_out", self.held_out, 0)
        _at_least("dataloader_num_workers", self.dataloader_num_workers, 0)
        _at_least("dataloader_prefetch", self.dataloader_prefetch, 1)
        if not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(f"--max_bad_fraction is from 0 to 1, got {self.max_bad_fraction}")
        if not 1 <= self.max_image_pixels <= REFUSED_PIXELS:
            raise UsageError(
                f"--max_image_pixels must be from 1 to {REFUSED_PIXELS}, above which Pillow reads "
                f"no image; got {self.max_image_pixels}"
            )
        if self.max_resize is not None:
            _at_least("max_resize", self.max_resize, self.resolution)
        _at_least("cache_crops", self.cache_crops, 1)

    @property
    def one_crop(self) -> bool:
        """Whether an image has a single crop, that no draw changes."""
        return self.center_crop and self.max_resize in (None, self.resolution)

    def check_cache(self) -> None:
        """Raises UsageError when a cache cannot serve what is asked for."""
        if self.cache_crops is not None and self.one_crop:
            raise UsageError(
                f"--cache_crops {self.cache_crops}: with --center_crop there is one crop; leave "
                "out one of them"
            )
        if self.cache_crops is not None and self.cache_latents == CACHE_OFF:
            raise UsageError(
                f"--cache_crops {self.cache_crops} is not --cache_latents off: leave out one"
            )
        wanted = self.cache_latents not in (None, CACHE_OFF)
        if wanted and self.cache_crops is None and not self.one_crop:
            raise UsageError(
                f"--cache_latents {self.cache_latents} cannot keep every random crop: "
                "--cache_crops 4 keeps 4 of each pair, --center_crop without --max_resize has one"
            )

    def with_cache(self, default: str | None) -> "DataConfig":
        """With the folder or URL of its cache, or None where it has none.

        Args:
            default: where the cache goes that was not asked for, if all crops can be kept.

        Raises: UsageError: crops are to be kept, and nowhere.
        """
        where = self.cache_latents
        if where is None and (self.one_crop or self.cache_crops is not None):
            where = default
        where = None if where == CACHE_OFF else where
        if self.cache_crops is not None and where is None:
            raise UsageError(
                f"--cache_crops {self.cache_crops} needs --cache_latents DIR, where they are kept"
            )
        return replace(self, cache_latents=where)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """How often training hides the instruction, the image, or both (guidance needs all three)."""

    conditioning_dropout_prob: float | None = None  # the rate of each case (paper: 0.05)
    text_dropout_prob: float | None = None  # ours: text alone; overrides the rate above
    image_dropout_prob: float | None = None  # ours: image alone
    both_dropout_prob: float | None = None  # ours: text and image together

    def __post_init__(self) -> None:
        for name in ("conditioning", "text", "image", "both"):
            _share(f"{name}_dropout_prob", getattr(self, f"{name}_dropout_prob"))
        if sum(self.rates) > 1 + 1e-9:
            raise UsageError(
                "the drop rates of text, both and image must sum to 1 or less, got "
                f"{' + '.join(map(str, self.rates))}: lower --conditioning_dropout_prob"
            )

    @property
    def rates(self) -> tuple[float, float, float]:
        """Rates of dropping the text alone, text and image, the image alone."""
        default = self.conditioning_dropout_prob or 0.0
        own = (self.text_dropout_prob, self.both_dropout_prob, self.image_dropout_prob)
        text, both, image = (default if rate is None else rate for rate in own)
        return text, both, image


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """What the UNet learns to predict, from which noise, and how much each timestep counts.

    Names are those of diffusers' train_text_to_image.py where it has them.
    """

    prediction_type: PredictionType | None = None  # ours: instead of what the pipeline predicts
    rescale_betas_zero_snr: bool = False  # ours: the last timestep is pure noise; v_prediction only
    min_timestep: int = 0  # ours: the first timestep that is trained
    max_timestep: int | None = None  # ours: trained are those below; default: all
    snr_gamma: float | None = None  # ours: min-SNR weights of the loss (paper: 5)
    noise_offset: float = 0.0  # ours: of a normal that is added to each channel's noise (0.1)
    input_perturbation: float = 0.0  # ours: of more noise that is not predicted (paper: 0.1)

    def __post_init__(self) -> None:
        _at_least("min_timestep", self.min_timestep, 0)
        _at_least("max_timestep", self.max_timestep, 1)
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise UsageError(
                f"--snr_gamma must be above 0, got {self.snr_gamma}; leave it out for equal weights"
            )
        for name in ("noise_offset", "input_perturbation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"--{name} must be 0 or more, got {getattr(self, name)}")

    def check(self) -> None:
        """Raises UsageError when flags do not go together."""
        if self.max_timestep is not None and self.min_timestep >= self.max_timestep:
            raise UsageError(
                f"--min_timestep {self.min_timestep} must be below --max_timestep "
                f"{self.max_timestep}, which is not trained itself"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UsageError(
                "--rescale_betas_zero_snr is not --prediction_type epsilon, which pure noise has "
                "nothing to learn from: take v_prediction"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """A LoRA in place of the whole UNet; conv_in, which has new channels, is trained in full."""

    lora_rank: int | None = None  # ours: trains an adapter of this rank (pip install fusedit[lora])
    lora_alpha: float | None = None  # ours: the adapter counts alpha / rank; default: the rank
    lora_targets: str = "to_k,to_q,to_v,to_out.0"  # ours: layers that get it, by name's end
    lora_dropout: float = 0.0  # ours: share of its inputs that an adapter does not see in training
    use_dora: bool = False  # ours: DoRA, an adapter with the norm of each output beside it

    def __post_init__(self) -> None:
        _at_least("lora_rank", self.lora_rank, 1)
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise UsageError(f"--lora_alpha must be above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        if not all(self.targets):
            raise UsageError(
                f"--lora_targets is a list of names between commas, got {self.lora_targets!r}"
            )
        if any(target.split(".")[-1] == "conv_in" for target in self.targets):
            raise UsageError(
                f"--lora_targets {self.lora_targets}: conv_in is trained in full; leave it out"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.lora_targets.split(","))

    @property
    def alpha(self) -> float | None:
        """By default the rank."""
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def check_rank(self) -> None:
        """Raises UsageError when a flag says something of an adapter that is not asked for."""
        for field_ in fields(self) if self.lora_rank is None else ():
            value = getattr(self, field_.name)
            if value != field_.default:
                told = "" if value is True else f" {value}"
                raise UsageError(f"--{field_.name}{told} needs --lora_rank; or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule, and the averaged copy of the weights."""

    learning_rate: float = 1e-4  # peak
    scale_lr: bool = False  # multiply the learning rate by the samples of one optimizer step
    lr_scheduler: LrScheduler = "constant"  # counted in optimizer steps
    lr_warmup_steps: int = 500  # optimizer steps; "constant" has no warm-up whatever this says
    lr_num_cycles: int = 1  # ours: waves of cosine_with_restarts
    lr_power: float = 1.0  # ours: of polynomial
    use_8bit_adam: bool = False  # AdamW with 8-bit moments (pip install fusedit[8bit]; needs a GPU)
    adam_moments_dtype: Format = "fp32"  # ours: bf16 rounds by chance, right on average
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global L2 norm, clipped once an optimizer step; inf: never
    use_ema: bool = False  # keep an averaged copy and export it; the raw weights are kept too
    ema_decay: float = 0.9999  # ours: after the warm-up (1 + n) / (10 + n), as in the paper's code
    post_hoc_ema: tuple[float, ...] = ()  # ours: lengths to choose another from later, 0.05 0.1

    def __post_init__(self) -> None:
        _at_least("learning_rate", self.learning_rate, 0)
        _at_least("lr_warmup_steps", self.lr_warmup_steps, 0)
        _at_least("lr_num_cycles", self.lr_num_cycles, 1)
        if not 0 < self.lr_power < float("inf"):
            raise UsageError(f"--lr_power must be above 0, got {self.lr_power}")
        _at_least("adam_weight_decay", self.adam_weight_decay, 0)
        _at_least("adam_epsilon", self.adam_epsilon, 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name} must be from 0 to below 1, got {getattr(self, name)}")
        _share("ema_decay", self.ema_decay)
        if not self.max_grad_norm > 0:
            raise UsageError(
                f"--max_grad_norm must be above 0, got {self.max_grad_norm}; inf turns clipping off"
            )
        if self.use_8bit_adam and self.adam_moments_dtype != "fp32":
            raise UsageError(
                f"--adam_moments_dtype {self.adam_moments_dtype} is not --use_8bit_adam: leave out "
                "one"
            )
        told = f"--post_hoc_ema {' '.join(map(str, self.post_hoc_ema))}"
        for length in self.post_hoc_ema:
            check_ema_length(told, length)
        if len(set(self.post_hoc_ema)) < len(self.post_hoc_ema):
            raise UsageError(f"{told}: each length is kept once; leave out the second")

    @property
    def averages(self) -> int:
        """How many averaged copies move with the weights."""
        return self.use_ema + len(self.post_hoc_ema)

    def check(self) -> None:
        """Raises UsageError when a flag has no meaning in the schedule that was chosen."""
        for flag, value, default, serves in (
            ("lr_num_cycles", self.lr_num_cycles, 1, "cosine_with_restarts"),
            ("lr_power", self.lr_power, 1.0, "polynomial"),
        ):
            if value != default and self.lr_scheduler != serves:
                raise UsageError(
                    f"--{flag} {value} is for --lr_scheduler {serves}, not {self.lr_scheduler}: "
                    "leave out one"
                )
        low = self.learning_rate <= POLYNOMIAL_END and not self.scale_lr
        if self.lr_scheduler == "polynomial" and low:
            raise UsageError(
                f"--learning_rate {self.learning_rate} must be above {POLYNOMIAL_END}, at which "
                "--lr_scheduler polynomial ends"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long a run is, and how an optimizer step is cut up."""

    train_batch_size: int = 16  # samples one rank holds in memory at once
    gradient_accumulation_steps: int = 1  # micro-steps of each rank in one optimizer step
    num_train_epochs: int = 100  # passes over the data, unless --max_train_steps is given
    max_train_steps: int | None = None  # optimizer steps; overrides --num_train_epochs
    bucket_mb: int = 100  # ours: MB of gradients that ranks exchange at once, beside the backward
    timeout_s: float = 1800.0  # ours: how long ranks wait for each other before the run ends
    seed: int = 0  # every draw is a function of it and of the sample's position
    max_skips: int = 50  # ours: steps in a row that may move nothing, till the run stops
    spike_factor: float = 10.0  # ours: a loss so many times the usual one goes to audit.jsonl
    skip_spikes: bool = False  # ours: and its step moves nothing

    def __post_init__(self) -> None:
        _at_least("train_batch_size", self.train_batch_size, 1)
        _at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        _at_least("num_train_epochs", self.num_train_epochs, 1)
        _at_least("max_train_steps", self.max_train_steps, 1)
        _at_least("bucket_mb", self.bucket_mb, 1)
        _at_least("max_skips", self.max_skips, 1)
        if not self.spike_factor > 1:
            raise UsageError(f"--spike_factor must be above 1, got {self.spike_factor}; inf: never")
        _at_least("timeout_s", self.timeout_s, 1)
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed must be from 0 to 2**64 - 1, got {self.seed}")

    def global_batch(self, ranks: int) -> int:
        """Samples in one optimizer step, over all ranks and micro-steps."""
        return self.train_batch_size * self.gradient_accumulation_steps * ranks


Switch = Literal["auto", "on", "off"]
# Fastest as measured; our kernels; PyTorch's own choice; cuDNN's and flash through PyTorch.
Attention = Literal["auto", "triton", "sdpa", "cudnn", "flash"]
Compile = Literal["auto", "off", "blocks", "whole"]  # each transformer block, or the whole UNet


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats and memory."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = (
        None  # default: bf16 on a GPU, no on CPU
    )
    vae_precision: Literal["fp32", "fp16", "bf16"] | None = (
        None  # default: mixed_precision's; fp32 with XL's own VAE
    )
    param_dtype: Format = "fp32"  # ours: of the UNet's weights; bf16 has fp32 masters beside it
    all_reduce_dtype: Format = "fp32"  # ours: of gradients on their way between ranks
    sharding: Sharding = "ddp"  # ours: parts of the UNet on all ranks; hsdp: of a machine
    allow_tf32: bool = False  # TF32 matrix products where fp32 is asked for
    gradient_checkpointing: bool = False  # less memory, a slower backward
    checkpointing_keeps: Keeps = "nothing"  # ours: results that are not made again in the backward
    checkpointing_levels: int | None = None  # ours: the UNet's levels, from the largest maps; all
    attention: Attention = "auto"  # ours: fastest as measured, our kernels, or PyTorch's
    enable_xformers_memory_efficient_attention: bool = False  # no effect: see --attention
    deterministic: bool = False  # ours: the same bits on every run on a GPU too (CPU always has)
    compile: Compile = "auto"  # ours: torch.compile of the UNet; auto is blocks on a GPU, else off
    cuda_graphs: Switch = "auto"  # ours: an update as one CUDA graph; auto: where there is a GPU
    plain: bool = False  # ours: diffusers' own modules on a GPU too, not the fused kernels

    def __post_init__(self) -> None:
        _at_least("checkpointing_levels", self.checkpointing_levels, 1)
        if self.plain and self.attention not in ("auto", "sdpa"):
            raise UsageError(
                f"--attention {self.attention} is not --plain, which is PyTorch's: leave out one"
            )
        if self.plain and self.compile not in ("auto", "off"):
            raise UsageError(f"--compile {self.compile} is not --plain: leave out one")
        if self.plain and self.cuda_graphs == "on":
            raise UsageError("--cuda_graphs on is not --plain: leave out one")
        if self.sharding != "ddp" and self.cuda_graphs == "on":
            raise UsageError(
                f"--sharding {self.sharding} is not --cuda_graphs on: gathers are not captured; "
                "take --cuda_graphs auto"
            )
        if self.sharding != "ddp" and self.compile == "whole":
            raise UsageError(
                f"--sharding {self.sharding} is not --compile whole: a block is gathered when it "
                "runs; take --compile blocks"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Pictures and the held-out loss during training. They cannot change what is trained."""

    val_image_url: str | None = None  # URL or path of an image to edit; also val_image_url_or_path
    validation_prompt: str | None = None  # its instruction
    num_validation_images: int = 4  # edits of that image, each with its own fixed noise
    validation_epochs: int = 1  # validate every so many epochs; XL by steps, unless it is not 1
    validation_steps: int | None = None  # every so many optimizer steps instead; XL: 100
    validation_inference_steps: int = 20  # ours: denoising steps of a picture
    validation_guidance_scale: float = 7.0  # ours: text guidance of a picture
    validation_image_guidance_scale: float = 1.5  # ours: image guidance of a picture

    def __post_init__(self) -> None:
        _at_least("num_validation_images", self.num_validation_images, 0)
        _at_least("validation_epochs", self.validation_epochs, 1)
        _at_least("validation_steps", self.validation_steps, 1)
        _at_least("validation_inference_steps", self.validation_inference_steps, 1)
        if self.validation_guidance_scale > 1:
            _at_least("validation_image_guidance_scale", self.validation_image_guidance_scale, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Measures of held-out edits during training. They cannot change what is trained."""

    eval_steps: int | None = None  # ours: measure the edits of held-out rows every so many steps
    eval_protocol: str = "held-out"  # ours: by this protocol's metrics, sampling and captions
    eval_rows: int = 64  # ours: of the held-out rows, at most so many
    eval_clip: str | None = None  # ours: folder or hub name of CLIP, instead of the protocol's
    eval_dino: str | None = None  # ours: of DINO
    eval_lpips: str | None = None  # ours: of a folder with lpips.safetensors
    keep_best: bool = False  # ours: the best checkpoint by it is never deleted; see best.json

    def __post_init__(self) -> None:
        _at_least("eval_steps", self.eval_steps, 1)
        _at_least("eval_rows", self.eval_rows, 1)

    def check(self, held_out: int) -> None:
        """Raises UsageError when there is nothing to measure, or a flag has nothing to say."""
        for field_ in fields(self) if self.eval_steps is None else ():
            value = getattr(self, field_.name)
            if value != field_.default:
                told = "" if value is True else f" {value}"
                raise UsageError(f"--{field_.name}{told} needs --eval_steps; or leave it out")
        if self.eval_steps is not None and not held_out:
            raise UsageError(
                f"--eval_steps {self.eval_steps} measures held-out rows: give --held_out 64, or "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """What is written where, and sent where."""

    output_dir: str = "instruct-pix2pix-model"  # the exported pipeline, checkpoints and logs
    overwrite: bool = False  # ours: start anew in an output folder that holds a run
    resume_from_checkpoint: str | None = None  # a checkpoint folder, or latest (the default)
    checkpointing_steps: int = 500  # optimizer steps between checkpoints
    checkpoints_total_limit: int | None = None  # newest checkpoints kept; all by default
    ema_snapshot_steps: int | None = None  # ours: of --post_hoc_ema; default: with each checkpoint
    logging_dir: str = "logs"  # TensorBoard's folder, inside --output_dir
    log_every: int = 10  # ours: optimizer steps between lines of the log
    report_to: str = "tensorboard"  # or wandb, mlflow, trackio; a,b for several; all; none
    push_to_hub: bool = False  # send the exported pipeline (never the optimizer state)
    hub_token: str | None = None  # never written anywhere
    hub_model_id: str | None = None  # repository; by default the name of --output_dir

    def __post_init__(self) -> None:
        _at_least("checkpointing_steps", self.checkpointing_steps, 1)
        _at_least("checkpoints_total_limit", self.checkpoints_total_limit, 1)
        _at_least("ema_snapshot_steps", self.ema_snapshot_steps, 1)
        _at_least("log_every", self.log_every, 1)
        unknown = set(self.report_to.split(",")) - {*TRACKERS, "all", "none"}
        if unknown:
            raise UsageError(
                f"--report_to knows {', '.join(TRACKERS)}, all and none; got {self.report_to}"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers asked for, in the order of TRACKERS; "all" is not among them."""
        return tuple(name for name in TRACKERS if name in self.report_to.split(","))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def sums_gradients(self, ranks: int) -> bool:
        """Whether --param_dtype bf16 on a GPU needs fp32 sums beside its bf16 gradients."""
        several = ranks * self.loop.gradient_accumulation_steps > 1
        return several or self.precision.plain or self.optim.use_8bit_adam

    def parts(self, ranks: int) -> int:
        """Over how many of a machine's ranks parameters and all that goes with them are divided."""
        return 1 if self.precision.sharding == "ddp" else ranks

    def check_complete(self) -> None:
        """Raises UsageError when what has no default was not given, or flags do not go together.

        Not done where a section is made: a file of flags may hold one, the command line the other.
        """
        if self.model.pretrained_model_name_or_path is None:
            raise UsageError(
                "--pretrained_model_name_or_path is missing: a pipeline folder or a name on the "
                "hub, for instance stable-diffusion-v1-5/stable-diffusion-v1-5"
            )
        if self.data.dataset_name is None and self.data.train_data_dir is None:
            raise UsageError(
                "--dataset_name or --train_data_dir is missing: a name on the hub or a local folder"
            )
        self.check_together()

    def check_together(self) -> None:
        """Raises UsageError when flags do not go together."""
        self.data.check_cache()
        self.diffusion.check()
        self.optim.check()
        self.evaluation.check(self.data.held_out)
        if self.output.ema_snapshot_steps is not None and not self.optim.post_hoc_ema:
            raise UsageError(
                f"--ema_snapshot_steps {self.output.ema_snapshot_steps} is of --post_hoc_ema, "
                "which was not given: leave it out, or add --post_hoc_ema 0.05 0.1"
            )
        self.check_adapter()
        self.check_checkpointing()

    def check_checkpointing(self) -> None:
        """Raises UsageError when gradient checkpointing does not go with the other flags."""
        section = self.precision
        for name in ("checkpointing_keeps", "checkpointing_levels"):
            value = getattr(section, name)
            if value not in (None, "nothing") and not section.gradient_checkpointing:
                raise UsageError(
                    f"--{name} {value} needs --gradient_checkpointing; or leave it out"
                )
        if section.checkpointing_keeps != "nothing" and section.compile not in ("auto", "off"):
            raise UsageError(
                f"--compile {section.compile} is not --checkpointing_keeps "
                f"{section.checkpointing_keeps}, which must see each operation: take auto"
            )

    def check_adapter(self) -> None:
        """Raises UsageError when an adapter does not go with the other flags."""
        self.adapter.check_rank()
        section = self.precision
        sharding = self.precision.sharding
        if self.adapter.lora_rank is not None and sharding != "ddp":
            raise UsageError(
                f"--sharding {sharding} is not --lora_rank, whose trained weights are few: leave "
                "out one"
            )
        if self.optim.post_hoc_ema and sharding != "ddp":
            raise UsageError(
                f"--sharding {sharding} is not --post_hoc_ema, whose snapshots are whole: leave "
                "out one"
            )
        if self.adapter.lora_rank is not None and self.optim.post_hoc_ema:
            raise UsageError(
                "--post_hoc_ema is not --lora_rank, whose averages make no pipeline: take --use_ema"
            )
        if self.adapter.lora_rank is not None and section.param_dtype != "fp32":
            raise UsageError(
                f"--param_dtype {section.param_dtype} is not --lora_rank, whose frozen weights are "
                "in --mixed_precision's format anyway: leave it out"
            )
        if self.adapter.use_dora and section.compile not in ("auto", "off"):
            raise UsageError(
                f"--compile {section.compile} is not --use_dora, which torch cannot trace as peft "
                "has it: take auto"
            )
