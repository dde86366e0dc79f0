"""What a run will do, found out and checked before any weights are read."""

import dataclasses
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..kernels.attention_choice import LEAST_CAPABILITY
from . import checkpoint
from .adapter_files import LORA_FILE
from .adapters import check_peft
from .buckets import Buckets, Size, find_buckets, square
from .config import TRACKERS, OutputConfig, PrecisionConfig, RunConfig
from .data import Order, split_rows
from .diffusion import trained_scheduler
from .errors import UsageError
from .files import write_text
from .log import PICTURES, QUARANTINE
from .optim import check_8bit
from .power_ema import SNAPSHOTS
from .pretrained import INDEX_FILE, Described, check_resolution, describe
from .protocols import read_protocol
from .rows import Rows, open_rows
from .sample import open_image
from .settings import RUN_FILE, difference, flat, from_toml, to_toml
from .trackers import check_trackers, is_installed
from .world import World

EVALUATION = "evaluation"  # folder of what --eval_steps measured
DTYPES = {
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run whose flags, data, model folder and output folder fit together."""

    config: RunConfig  # with every default that depends on the machine filled in
    asked: RunConfig  # the same, a step cut up as the flags say
    described: Described
    rows: Rows
    buckets: Buckets
    train_rows: Tensor  # [n] int64
    held_out_rows: Tensor  # [m] int64
    global_batch: int  # samples in one optimizer step
    steps_per_epoch: int
    total_steps: int
    resume: Path | None  # the checkpoint to go on from
    validation_image: Image.Image | None  # --val_image_url, as training would see it
    notes: tuple[str, ...]  # for the user to read once

    def facts(self) -> dict[str, int]:
        """What all ranks must have found alike, or they would train different runs as one."""
        return {
            "checkpoints in --output_dir": step_of(self.resume),
            "numbers of rows": len(self.rows),
            "lengths in steps": self.total_steps,
            "shapes of images": zlib.crc32(self.buckets.of_row.numpy().tobytes()),
        }

    @property
    def used_buckets(self) -> list[int]:
        """Those that rows to train on are in."""
        return self.buckets.of_row[self.train_rows].unique().tolist()

    @property
    def output(self) -> Path:
        return Path(self.config.output.output_dir)

    @property
    def dtype(self) -> torch.dtype:
        """Of the text encoders, and of the UNet's products under autocast."""
        return DTYPES[self.config.precision.mixed_precision or "no"]

    @property
    def vae_dtype(self) -> torch.dtype:
        return vae_dtype_of(self.config, self.described)

    def lines(self, world: World) -> list[str]:
        """The plan in words."""
        loop, data = self.config.loop, self.config.data
        source = data.dataset_name or data.train_data_dir
        used = [self.buckets.sizes[bucket] for bucket in self.used_buckets]
        return [
            f"model      {self.config.model.pretrained_model_name_or_path}, "
            f"{self.described.family.name}, "
            f"{self.described.unet['in_channels']} input channels" + _adapter(self.config),
            f"data       {source}: {len(self.train_rows)} rows to train on, "
            f"{len(self.held_out_rows)} held out, {data.resolution} px",
            f"step       {self.global_batch} samples = {loop.train_batch_size} x "
            f"{loop.gradient_accumulation_steps} micro-steps x {world.size} ranks"
            + (
                ""
                if self.config.precision.sharding == "ddp"
                else f", {self.config.precision.sharding}"
            ),
            f"length     {self.total_steps} steps, {self.steps_per_epoch} an epoch",
            *([] if len(used) == 1 else [f"buckets    {told_sizes(used)}"]),
            f"precision  {self.config.precision.mixed_precision} on {world.device.type}",
            f"output     {self.output}"
            + (f", going on from {self.resume.name}" if self.resume else ""),
        ]


def _adapter(config: RunConfig) -> str:
    section = config.adapter
    if section.lora_rank is None:
        return ""
    kind = "DoRA" if section.use_dora else "LoRA"
    return f"; a {kind} of rank {section.lora_rank} and conv_in are trained"


def make_plan(config: RunConfig, world: World) -> Plan:
    """Checks everything that can be known before weights load.

    Raises: UsageError: something does not fit; the message names the flag and the cure.
    """
    config.check_complete()
    asked_cache = config.data.cache_latents
    config = _with_machine_defaults(config, world)
    notes = _notes(config, asked_cache, on_gpu=world.device.type == "cuda")
    notes += _sharding_notes(config.precision, world)
    check_trackers(config.output.trackers)
    if config.evaluation.eval_steps is not None:
        read_protocol(config.evaluation.eval_protocol, "--eval_protocol")
    _check_output(config.output)
    if config.optim.use_8bit_adam:
        check_8bit(world.device.type)
    if config.adapter.lora_rank is not None:
        check_peft()
    asked = config
    resume, passed_over = _find_checkpoint(config)
    if resume is not None:
        config, recut = _with_same_batch(config, resume, world.size)
        notes += recut
    global_batch = config.loop.global_batch(world.size)

    described = describe_trained(config)
    check_resolution(config.data.resolution, described)
    check_vae(config, described)
    rows = open_rows(config.data, config.model.cache_dir)
    train_rows, held_out_rows = split_rows(
        len(rows), config.data.max_train_samples, config.data.held_out, config.loop.seed
    )
    buckets = (
        find_buckets(config.data.resolution, described.least_size, rows)
        if config.data.buckets
        else square(config.data.resolution, len(rows))
    )
    order = Order(train_rows, config.loop.seed, global_batch, buckets.of_row)
    steps_per_epoch = order.steps_per_epoch
    total_steps = config.loop.max_train_steps or config.loop.num_train_epochs * steps_per_epoch
    if step_of(resume) > total_steps:
        raise UsageError(
            f"{resume} has {step_of(resume)} steps behind it, this command asks for {total_steps}: "
            "raise --max_train_steps, or --overwrite to start anew"
        )
    return Plan(
        config=config,
        asked=asked,
        described=described,
        rows=rows,
        buckets=buckets,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        resume=resume,
        validation_image=_validation_image(config),
        notes=(*notes, *passed_over),
    )


def describe_trained(config: RunConfig) -> Described:
    """The pipeline, with the scheduler that the run trains and exports.

    Raises: UsageError, as of `describe` and `trained_scheduler`.
    """
    described = describe(config.model)
    scheduler = trained_scheduler(described.scheduler, config.diffusion)
    return described._replace(scheduler=scheduler)


def told_sizes(sizes: Sequence[Size]) -> str:
    """ "3: 128x64, 64x64, 64x128"."""
    return f"{len(sizes)}: {', '.join(f'{size.width}x{size.height}' for size in sizes)}"


def _sharding_notes(section: PrecisionConfig, world: World) -> list[str]:
    """Raises UsageError where machines cannot each hold the whole."""
    flag = f"--sharding {section.sharding}"
    if section.sharding == "ddp":
        return []
    if world.size == 1:
        return [f"{flag}: one rank has nobody to share with; it keeps all"]
    if section.sharding == "hsdp" and world.size % world.local_size:
        raise UsageError(
            f"{flag} needs machines of as many ranks each, here {world.local_size} of "
            f"{world.size}: take --sharding fsdp"
        )
    if section.sharding == "hsdp" and world.local_size == 1:
        raise UsageError(f"{flag} shares inside a machine, which has 1 rank: take --sharding fsdp")
    if world.device.type == "cuda" and not section.plain and section.cuda_graphs == "auto":
        return [f"{flag}: without CUDA graphs, which do not capture its gathers"]
    return []


def set_numerics(section: PrecisionConfig) -> None:
    """What PyTorch keeps for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = section.allow_tf32
    torch.use_deterministic_algorithms(section.deterministic)
    torch.backends.cudnn.benchmark = not section.deterministic


def claim_output(plan: Plan) -> None:
    """Makes the output folder this run's. Rank 0 alone calls it.

    After --overwrite what another run left is removed; a folder to log to is begun by the log.
    """
    output = plan.output
    try:
        if plan.config.output.overwrite:
            for name in (INDEX_FILE, LORA_FILE, checkpoint.BEST_FILE, QUARANTINE):
                (output / name).unlink(missing_ok=True)
            checkpoint.delete_all(output)
            for name in (PICTURES, EVALUATION, SNAPSHOTS, plan.config.output.logging_dir):
                shutil.rmtree(output / name, ignore_errors=True)
        for folder in (output, output / SNAPSHOTS):
            checkpoint.clean(folder)
            checkpoint.set_aside_later(folder, step_of(plan.resume))
    except OSError as error:
        raise UsageError(f"--output_dir {output} cannot be written: {error}") from None
    write_text(output / RUN_FILE, to_toml(plan.asked))


def step_of(folder: Path | None) -> int:
    """Optimizer steps behind a checkpoint; 0 where there is none."""
    return int(checkpoint.read_state(folder)["step"]) if folder else 0


def _check_output(section: OutputConfig) -> None:
    output, logs = Path(section.output_dir), Path(section.output_dir, section.logging_dir)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir {output} is a file; give a folder")
    if logs.exists() and not logs.is_dir():
        raise UsageError(f"--logging_dir {logs} is a file; give a folder's name")


def _check_attention(section: PrecisionConfig, precision: str, on_gpu: bool) -> None:
    if section.attention in ("auto", "sdpa"):
        return
    flag = f"--attention {section.attention}"
    if not on_gpu:
        raise UsageError(f"{flag} needs a GPU; on a CPU take auto")
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        raise UsageError(f"{flag} needs a GPU of compute capability 8.0 (Ampere); take auto")
    if precision == "no":
        raise UsageError(f"{flag} needs --mixed_precision bf16 or fp16; in fp32 take auto")
    if section.attention == "cudnn" and section.deterministic:
        raise UsageError(f"{flag} is not --deterministic; with that take auto, triton or flash")


def check_precision(config: RunConfig, precision: str, on_gpu: bool) -> None:
    """Raises UsageError for formats and graphs that do not go with this --mixed_precision."""
    section = config.precision
    if section.param_dtype == "bf16" and precision != "bf16":
        raise UsageError(
            f"--param_dtype bf16 needs --mixed_precision bf16, got {precision}; or leave it out"
        )
    if section.sharding != "ddp" and config.optim.use_8bit_adam:
        raise UsageError(
            f"--sharding {section.sharding} is not --use_8bit_adam, whose blocks do not end where "
            "parts do: take --adam_moments_dtype bf16"
        )
    if section.cuda_graphs == "on" and not on_gpu:
        raise UsageError("--cuda_graphs on needs a GPU; on a CPU take auto")
    if section.cuda_graphs == "on" and config.optim.use_8bit_adam:
        raise UsageError(
            "--cuda_graphs on is not --use_8bit_adam, whose step waits for the host: take auto"
        )


def vae_dtype_of(config: RunConfig, described: Described) -> torch.dtype:
    """As --vae_precision says; else of XL's own VAE fp32, of any other that of the samples."""
    section = config.precision
    own = config.model.pretrained_vae_model_name_or_path is None
    if section.vae_precision is not None:
        return DTYPES[section.vae_precision]
    if own and described.family.vae_in_fp32:
        return torch.float32
    return DTYPES[section.mixed_precision or "no"]


def check_vae(config: RunConfig, described: Described) -> None:
    """Raises UsageError for a VAE that overflows in fp16, by its own configuration."""
    in_fp16 = vae_dtype_of(config, described) is torch.float16
    if in_fp16 and described.family.vae_in_fp32 and described.vae.get("force_upcast", True):
        raise UsageError(
            "--vae_precision fp16: this VAE overflows in fp16, as force_upcast in its config.json "
            "says; take fp32 or bf16, or a --pretrained_vae_model_name_or_path made for fp16"
        )


def default_cache(config: RunConfig) -> str | None:
    """Where a run on a GPU keeps encodings, unless told otherwise."""
    return None if config.precision.plain else str(Path(config.output.output_dir, "cache"))


def _with_machine_defaults(config: RunConfig, world: World) -> RunConfig:
    precision = config.precision.mixed_precision
    on_gpu = world.device.type == "cuda"
    if precision is None:
        native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "no"
    if precision == "fp16" and not on_gpu:
        raise UsageError("--mixed_precision fp16 needs a GPU; on a CPU take bf16 or no")
    _check_attention(config.precision, precision, on_gpu)
    check_precision(config, precision, on_gpu)
    default = default_cache(config) if on_gpu else None
    report_to = config.output.report_to
    if "all" in report_to.split(","):  # those that are installed
        report_to = ",".join(name for name in TRACKERS if is_installed(name))
    return dataclasses.replace(
        config,
        data=config.data.with_cache(default),
        precision=dataclasses.replace(config.precision, mixed_precision=precision),
        output=dataclasses.replace(config.output, report_to=report_to),
    )


def _validation_image(config: RunConfig) -> Image.Image | None:
    source, side = config.validation.val_image_url, config.data.resolution
    if source is None or config.validation.validation_prompt is None:
        return None
    try:
        image = open_image(source)
    except UsageError as error:
        raise UsageError(f"--val_image_url {error}") from None
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def _notes(config: RunConfig, asked_cache: str | None, on_gpu: bool) -> list[str]:
    notes = []
    if on_gpu and config.data.cache_latents is None and asked_cache is None:
        crops = "" if config.data.one_crop else " --cache_crops 4 (or --center_crop)"
        notes.append(
            "every epoch encodes every image again, about half of the work of a step: "
            f"--cache_latents DIR{crops} encodes them once"
        )
    if config.precision.enable_xformers_memory_efficient_attention:
        notes.append(
            "--enable_xformers_memory_efficient_attention: not needed, PyTorch's own "
            "memory-efficient attention (SDPA) is always on"
        )
    if config.model.non_ema_revision is not None:
        notes.append(
            "--non_ema_revision is deprecated: it is taken as the --revision of the UNet alone"
        )
    if (config.validation.val_image_url is None) != (config.validation.validation_prompt is None):
        notes.append(
            "--val_image_url and --validation_prompt go together: one alone shows no picture"
        )
    if config.output.resume_from_checkpoint not in (None, "latest"):
        notes.append(
            "--resume_from_checkpoint names a checkpoint: each start goes back to it; leave it out "
            "to go on from the newest"
        )
    if config.diffusion.snr_gamma is not None and config.diffusion.rescale_betas_zero_snr:
        notes.append(
            "--snr_gamma with --rescale_betas_zero_snr: the last timestep, whose SNR is 0, has "
            "weight 0, so it is learned only from its neighbours"
        )
    if config.conditioning.rates == (0.0, 0.0, 0.0):
        notes.append(
            "no --conditioning_dropout_prob: the model will not learn guidance; the paper has 0.05"
        )
    return notes


def _find_checkpoint(config: RunConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, after checking that it is of this same run."""
    output, asked = Path(config.output.output_dir), config.output.resume_from_checkpoint
    if config.output.overwrite:
        if asked is not None:
            raise UsageError("--overwrite starts anew: leave out --resume_from_checkpoint")
        return None, []
    if (output / RUN_FILE).exists():
        _check_same_run(config, flat(from_toml(output / RUN_FILE, flag="--output_dir: ")), output)

    if asked is None or asked == "latest":
        found, passed_over = checkpoint.newest(output)
        if found is None and asked == "latest":
            passed_over.append(f"no whole checkpoint in {output}: starting from step 0")
    else:
        found, passed_over = _named_checkpoint(output, asked), []
    if found is not None:
        state = checkpoint.read_state(found)
        if not isinstance(state.get("settings"), dict):
            raise UsageError(f"{found} is no checkpoint of a run: its state.json has no settings")
        if type(state.get("global_batch")) is not int or state["global_batch"] < 1:
            raise UsageError(f"{found} does not say how many samples a step it was trained with")
        _check_same_run(config, state["settings"], found)
    return found, passed_over


def _with_same_batch(config: RunConfig, resume: Path, ranks: int) -> tuple[RunConfig, list[str]]:
    """The samples a step of the checkpoint, where other ranks alone would change them.

    Raises: UsageError: they cannot be shared evenly, or the flags ask for others.
    """
    state, loop = checkpoint.read_state(resume), config.loop
    kept, made = state["global_batch"], loop.global_batch(ranks)
    if made == kept:
        return config, []
    asked = loop.train_batch_size, loop.gradient_accumulation_steps
    before = tuple(
        state["settings"].get(f"loop.{name}")
        for name in ("train_batch_size", "gradient_accumulation_steps")
    )
    each, rest = divmod(kept, ranks)
    if asked != before or rest:
        raise UsageError(
            f"{resume} was trained with {kept} samples a step, this command makes {made}: change "
            "--train_batch_size or --gradient_accumulation_steps so that batch x micro-steps x "
            "ranks stays the same, or --overwrite"
        )
    batch = max(size for size in range(1, asked[0] + 1) if each % size == 0)
    loop = dataclasses.replace(
        loop, train_batch_size=batch, gradient_accumulation_steps=each // batch
    )
    note = (
        f"{ranks} ranks: {batch} x {each // batch} micro-steps each, for the {kept} samples a step "
        "that the run has"
    )
    return dataclasses.replace(config, loop=loop), [note]


def _named_checkpoint(output: Path, asked: str) -> Path:
    """The whole checkpoint that is named, by path or by its name in --output_dir."""
    inside = output / asked
    folder = inside if inside.is_dir() and not Path(asked).is_dir() else Path(asked)
    checkpoint.check(folder)
    return folder


def _check_same_run(config: RunConfig, old: dict, where: Path) -> None:
    new = flat(config)
    differing = difference(old, new)
    if differing:
        told = "; ".join(
            f"--{name.split('.')[1]} was {old.get(name)}, now {new[name]}" for name in differing
        )
        raise UsageError(
            f"{where} holds another run: {told}. Give the same flags to go on, another "
            "--output_dir, or --overwrite to start anew"
        )
