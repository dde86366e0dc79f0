"""What a run will take: memory, images a second, hours, sizes. Counted, then divided by rates.

Bytes and FLOPs are counted op by op on the run's own UNet and encoders (`counting.py`), in eager
mode with the fused ops, or without them for --plain. An op takes the longer of its FLOPs at a rate
and its bytes at another. The rates are estimated, not measured, as is all that follows from them:
GPU by its vendor's sheet (`gpus.py`), times what an H100 was seen to reach of its own, times the
shares below. Ranks are taken to tell each other their gradients within the backward, and where
parameters are sharded to gather them beside the block before.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ..kernels.weighted_mse import weighted_mse
from .adapters import in_one_pass
from .blank import blank_encoders, blank_unet, bytes_of
from .config import OptimConfig, PrecisionConfig, RunConfig
from .counting import KINDS, Work, again_as_on_gpu, at, count
from .data import PixelBatch
from .encoders import Encoders
from .families import SIZE_IDS, text_widths, told_beside
from .gpus import Gpu
from .plan import DTYPES, vae_dtype_of
from .pretrained import Described
from .recompute import checkpoint_blocks
from .sharding import units
from .unet import Prepared, prepare_unet

GIB = 2**30
# Of an H100 SXM's sheet, 989 TFLOP/s and 3.35 TB/s, what one was measured to reach: 790 in a large
# bf16 product, 3.0 in a copy.
PRODUCTS_REACHED, COPIES_REACHED = 790 / 989, 3.0 / 3.35
# Shares of that, estimated: those of the step-time model this project was planned with.
FUSED_SHARES = {"convolution": 0.70, "linear": 0.70, "elementwise": 0.85}
PLAIN_SHARES = {"convolution": 0.55, "linear": 0.54, "elementwise": 0.80}
# Attention by the width of its heads, a power of two or padded to one; fused and plain.
ATTENTION_SHARES = {True: (0.45, 0.33), False: (0.28, 0.21)}
# Allowances, not counted and not measured: the CUDA context with cuBLAS's and cuDNN's workspaces;
# NCCL's buffers; the share of what comes and goes that the allocator cannot hand out again.
CONTEXT_BYTES, NCCL_BYTES, FRAGMENTED = 0.9 * GIB, 0.4 * GIB, 0.05
MOST_IMAGES = 4096  # of a micro-batch


class Counted(NamedTuple):
    """What does not depend on the GPU type or the micro-batch."""

    unet: Work
    encoders: Work | None  # of a micro-batch's pairs; None: they come from a cache
    parameters: int  # of the UNet, those that are trained; without --lora_rank all
    weight_bytes: int  # of all of them, as the products read them
    encoder_bytes: int  # on the device; 0: they are not there
    attention_fits: bool  # heads' widths are powers of two
    block: int  # parameters gathered at once where they are sharded: the most, and the UNet's own


def count_run(config: RunConfig, described: Described) -> Counted:
    """Counts a micro-step of a run whose --mixed_precision is given.

    Raises: UsageError: the text encoder's configuration cannot be read.
    """
    dtype = DTYPES[config.precision.mixed_precision or "no"]
    prepared = _prepare(config, described, dtype)
    weight_bytes = sum(p.nbytes for p in prepared.unet.parameters())
    encoders, blank = _encoders(config, described, dtype), blank_unet(described)
    cached, validation = config.data.cache_latents is not None, config.validation
    shows = validation.val_image_url is not None and validation.validation_prompt is not None
    stays = not cached or shows or config.data.held_out > 0  # a run from a cache only validates
    return Counted(
        unet=_count_unet(prepared.unet, config, described, dtype),
        encoders=None if cached else _count_encoders(encoders, config, described),
        parameters=sum(p.numel() for p in prepared.parameters.values()),
        weight_bytes=weight_bytes,
        encoder_bytes=bytes_of(encoders.vae, encoders.text_encoder) if stays else 0,
        attention_fits=all(
            (width := int(module.inner_dim // module.heads)) & (width - 1) == 0
            for module in blank.modules()
            if isinstance(module, Attention)
        ),
        block=_largest_block(blank),
    )


def _largest_block(unet: UNet2DConditionModel) -> int:
    taken: set[nn.Parameter] = set()
    sizes = []
    for module in (*units(unet), unet):
        own = {*module.parameters()} - taken
        taken |= own
        sizes.append(sum(p.numel() for p in own))
    return max(sizes[:-1]) + sizes[-1]


def _prepare(config: RunConfig, described: Described, dtype: torch.dtype) -> Prepared:
    section = config.precision
    prepared = prepare_unet(
        blank_unet(described),
        torch.device("meta"),
        fused=not section.plain,
        attention="sdpa",  # all keep the same for the backward
        param_dtype=section.param_dtype,
        adapter=config.adapter,
        dtype=dtype,
    )
    if prepared.adapter is not None:
        in_one_pass(prepared.unet)
    return prepared


def _count_unet(
    unet: UNet2DConditionModel, config: RunConfig, described: Described, dtype: torch.dtype
) -> Work:
    section, side = config.precision, config.data.resolution // described.vae_factor
    if section.gradient_checkpointing:
        keeps, levels = section.checkpointing_keeps, section.checkpointing_levels
        checkpoint_blocks(unet, keeps, levels, again_as_on_gpu)
    width, pooled_width = text_widths(described.unet)

    def run(images: int) -> None:
        latents = torch.empty(images, 8, side, side, dtype=dtype)
        text = torch.empty(images, described.tokens, width, dtype=dtype)
        pooled = torch.empty(images, pooled_width, dtype=dtype)
        beside = told_beside(pooled, torch.empty(images, SIZE_IDS))
        timesteps = torch.zeros(images, dtype=torch.int64)
        target, weights = torch.empty(images, 4, side, side), torch.empty(images)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            predicted = unet(latents, timesteps, text, added_cond_kwargs=beside, return_dict=False)[
                0
            ]
        weighted_mse(predicted, target, weights)[0].backward()

    return count(unet, run)


def _encoders(config: RunConfig, described: Described, dtype: torch.dtype) -> Encoders:
    vae, text_encoder = blank_encoders(config.model, described)
    tokens = torch.zeros(1, described.row_length, dtype=torch.int64, device="meta")
    return Encoders(
        vae,
        text_encoder,
        tokens,
        torch.device("meta"),
        dtype,
        vae_dtype=vae_dtype_of(config, described),
        fused=not config.precision.plain,
    )


def _count_encoders(encoders: Encoders, config: RunConfig, described: Described) -> Work:
    side, length = config.data.resolution, described.row_length
    encoders.device = torch.device("cpu")  # of the fake tensors

    def run(images: int) -> None:
        pixels = torch.empty(images, 3, side, side, dtype=torch.uint8)
        tokens = torch.zeros(images, length, dtype=torch.int64)
        size_ids, weights = torch.empty(images, SIZE_IDS), torch.empty(images)
        encoders.encode(PixelBatch(pixels, pixels, tokens, size_ids, tokens[:, 0], weights, ()))

    return count(nn.ModuleList((encoders.vae, encoders.text_encoder)), run)


# Memory.


def memory_bytes(counted: Counted, config: RunConfig, images: int, ranks: int) -> dict[str, float]:
    """Of one GPU, by part, when the most is alive.

    Args:
        images: of a micro-batch.
    """
    shared, in_bf16 = config.parts(ranks), config.precision.param_dtype == "bf16"
    own = counted.parameters / shared  # of whose weights this GPU has the fp32 values
    halves = in_bf16 and shared == 1
    sums = halves and config.sums_gradients(ranks)  # beside the gradients of the copies
    # What is sent by the masters' hook is not given back while a graph lives.
    sent = 2 if config.precision.all_reduce_dtype == "bf16" else 4
    sent *= sums and ranks > 1 and config.precision.cuda_graphs != "off"
    parts = {
        "parameters": counted.weight_bytes if shared == 1 else own * 4,
        "fp32 masters": own * 4 * halves,
        "gradients": own * (2 + 4 * sums if halves else 4),
        "gradients on their way": own * sent,
        "moments": own * moment_bytes(config.optim),
        "averages (EMA)": own * 4 * config.optim.averages,
        "VAE and text encoder": counted.encoder_bytes,
    }
    if shared > 1:
        # A block and the next one as they arrive and as they are used, and the one's gradients, of
        # which a copy is on its way.
        copied = 2 if config.precision.all_reduce_dtype == "bf16" else 4
        parts["gathered blocks"] = counted.block * (4 * (2 if in_bf16 else 4) + copied)
    # Copies are of no micro-batch's size: autocast's of the weights, or gradients of bf16 ones.
    copies, activations = counted.unet.peak(images)
    comes_and_goes = {"low-precision copies": copies, "activations": activations}
    if counted.encoders is not None:  # of the next update's images, beside this one
        comes_and_goes["encoding of images"] = sum(counted.encoders.peak(images))
    fragments = FRAGMENTED * sum(comes_and_goes.values())
    parts |= comes_and_goes
    parts["context and allowances"] = CONTEXT_BYTES + fragments + NCCL_BYTES * (ranks > 1)
    return {name: size for name, size in parts.items() if size}


def moment_bytes(section: OptimConfig) -> float:
    """Of Adam, a parameter; in 8 bits, 256 of them share a scale."""
    if section.use_8bit_adam:
        return 2 * (1 + 4 / 256)
    return 4.0 if section.adam_moments_dtype == "bf16" else 8.0


def largest(fits: Callable[[int], bool], most: int = MOST_IMAGES) -> int:
    """The largest micro-batch that fits, found by doubling, then halving; 0: not even one."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_in(gpu: Gpu, counted: Counted, config: RunConfig, ranks: int) -> Callable[[int], bool]:
    """Whether a micro-batch of so many images does."""
    room = gpu.memory_mib * 2**20
    return lambda images: sum(memory_bytes(counted, config, images, ranks).values()) <= room


# Time.


def step_ms(counted: Counted, config: RunConfig, gpu: Gpu, ranks: int) -> dict[str, float]:
    """Of an optimizer step on one rank, by part; they add up."""
    images, section = config.loop.train_batch_size, config.precision
    flops, bandwidth = rates(gpu, section, counted.attention_fits)
    shares = PLAIN_SHARES if section.plain else FUSED_SHARES
    copied = bandwidth * shares["elementwise"]

    def parts_s(work: Work) -> dict[str, float]:
        by_op = torch.tensor([flops[kind] for kind in work.kinds], dtype=torch.float64)
        longer = torch.maximum(
            at(work.flops, images) / by_op, at(work.moved_bytes, images) / copied
        )
        kinds = torch.tensor([KINDS.index(kind) for kind in work.kinds])
        return {kind: longer[kinds == n].sum().item() for n, kind in enumerate(KINDS)}

    micro_steps = config.loop.gradient_accumulation_steps
    parts = {kind: micro_steps * time for kind, time in parts_s(counted.unet).items()}
    if counted.encoders is not None:
        parts["encoders"] = micro_steps * sum(parts_s(counted.encoders).values())
    own = counted.parameters / config.parts(ranks)
    parts["optimizer"] = own * _optimizer_bytes(config, ranks) / copied
    return {kind: 1e3 * time for kind, time in parts.items()}


def rates(
    gpu: Gpu, section: PrecisionConfig, attention_fits: bool
) -> tuple[dict[str, float], float]:
    """FLOP/s of each kind of op, bytes/s of a plain copy."""
    shares = PLAIN_SHARES if section.plain else FUSED_SHARES
    shares = shares | {"attention": ATTENTION_SHARES[attention_fits][section.plain]}
    if section.mixed_precision == "no":
        products = gpu.tf32_tflops if section.allow_tf32 else gpu.fp32_tflops
        convolutions = gpu.tf32_tflops  # which cuDNN takes unless told otherwise
    else:
        products = convolutions = gpu.half_tflops
    flops = {
        kind: (convolutions if kind == "convolution" else products)
        * 1e12
        * PRODUCTS_REACHED
        * shares[kind]
        for kind in KINDS
    }
    return flops, gpu.gb_per_s * 1e9 * COPIES_REACHED


def _optimizer_bytes(config: RunConfig, ranks: int) -> float:
    """Moved for each parameter by clipping, AdamW, averages and the zeroing of gradients."""
    optim, section = config.optim, config.precision
    read_and_written = 4 + moment_bytes(optim) + 4 * optim.averages
    halves = section.param_dtype == "bf16" and config.parts(ranks) == 1
    sums = config.sums_gradients(ranks)
    gradient = 2 if halves and not sums else 4  # read for its norm and for its step
    moved = 2 * read_and_written + 3 * gradient + 2 * halves
    if halves and sums:  # each micro-step's gradient to the masters'
        moved += 12 * config.loop.gradient_accumulation_steps
    one_pass = optim.adam_moments_dtype == "bf16" or not (section.plain or optim.use_8bit_adam)
    if not one_pass:
        moved += 24 * optim.averages  # the difference, scaled, is written and read between
    if optim.use_8bit_adam:
        moved += 8  # gradients are scaled before
    return moved


# Sizes on disk.


def checkpoint_bytes(counted: Counted, section: OptimConfig) -> float:
    """Weights, moments and averages; as `trainer/run.py` saves them."""
    return counted.parameters * (4 + moment_bytes(section) + 4 * section.averages)


def snapshot_bytes(counted: Counted, section: OptimConfig) -> int:
    """Of the averages of --post_hoc_ema, as they are kept beside the checkpoints."""
    return counted.parameters * 4 * len(section.post_hoc_ema)


def pipeline_bytes(counted: Counted, section: OptimConfig, others: int) -> int:
    """Of the exported pipeline, or adapter, in fp32; with averages the raw weights are kept too.

    Args:
        others: bytes of VAE, text encoder and safety checker in fp32; 0 beside an adapter.
    """
    return counted.parameters * 4 * (2 if section.use_ema else 1) + others
