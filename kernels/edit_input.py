"""What the UNet of InstructPix2Pix is given, and should answer, in one pass over the latents.

Eager passes over the 64-bit words of every normal some two hundred times; here each pixel draws
where it computes: N latents of the target are read with as many of their deviations and of the
condition, 2N are written, and N in fp32.
Source: Brooks et al. 2023 (arXiv:2211.09800), section 3.2; Ho et al. 2020 (arXiv:2006.11239),
equation 4; v: Salimans and Ho 2022 (arXiv:2202.00512), appendix D; Box and Muller 1958; offset:
Guttenberg 2023, "Diffusion with Offset Noise"; perturbation: Ning et al. 2023 (arXiv:2301.11706).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import DTYPES, check_devices, check_dtypes, check_shape, on_its_device, runs_triton
from .philox import MASK, normal, philox4x32_10, triton_normal, words
from .tables import pick

CHANNELS = 4  # of the latents; the UNet's input has twice as many
PREDICTIONS = ("epsilon", "v_prediction")


@torch.no_grad()
def edit_input_reference(
    target_mean: Tensor,
    target_std: Tensor,
    condition: Tensor,
    positions: Tensor,
    timesteps: Tensor,
    drop_image: Tensor,
    signal: Tensor,
    noise: Tensor,
    *,
    seed: int,
    posterior_purpose: int,
    noise_purpose: int,
    latent_scale: float,
    prediction_type: str,
    dtype: torch.dtype,
    noise_offset: float = 0.0,
    noise_offset_purpose: int = 0,
    input_perturbation: float = 0.0,
    input_perturbation_purpose: int = 0,
) -> tuple[Tensor, Tensor]:
    """The definition: the forward process, in fp32, of a sample of the target's posterior."""

    def drawn(purpose: int, *shape: int) -> Tensor:
        drawn_words = words(seed, purpose, positions, math.prod(shape))
        return normal(drawn_words).reshape(len(positions), *shape)

    shape = target_mean.shape[1:]
    posterior, epsilon = (drawn(purpose, *shape) for purpose in (posterior_purpose, noise_purpose))
    if noise_offset:
        epsilon = epsilon + noise_offset * drawn(noise_offset_purpose, CHANNELS, 1, 1)
    mixed_in = epsilon
    if input_perturbation:
        mixed_in = epsilon + input_perturbation * drawn(input_perturbation_purpose, *shape)
    clean = (target_mean.float() + target_std.float() * posterior) * latent_scale
    alpha, sigma = (table[timesteps].view(-1, 1, 1, 1) for table in (signal, noise))
    noisy = alpha * clean + sigma * mixed_in
    shown = condition.float().masked_fill(drop_image[:, None, None, None], 0.0)
    target = alpha * epsilon - sigma * clean if prediction_type == "v_prediction" else epsilon
    latents = torch.cat((noisy, shown), dim=1).to(dtype)
    return (
        latents.contiguous(memory_format=torch.channels_last),
        target.contiguous(memory_format=torch.channels_last),
    )


@torch.no_grad()
def edit_input(
    target_mean: Tensor,
    target_std: Tensor,
    condition: Tensor,
    positions: Tensor,
    timesteps: Tensor,
    drop_image: Tensor,
    signal: Tensor,
    noise: Tensor,
    *,
    seed: int,
    posterior_purpose: int,
    noise_purpose: int,
    latent_scale: float,
    prediction_type: str,
    dtype: torch.dtype,
    noise_offset: float = 0.0,
    noise_offset_purpose: int = 0,
    input_perturbation: float = 0.0,
    input_perturbation_purpose: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noisy latents beside their condition, and the UNet's answer to them; without gradients.

    Args:
        target_mean: [n, 4, h, w] fp32, bf16 or fp16, of the target's posterior, unscaled.
        target_std: the same shape, one of these dtypes.
        condition: the same shape, one of these dtypes, unscaled.
        positions: [n] int64, not negative: what the draws of a sample belong to.
        timesteps: [n] int64, 0 to steps - 1. On a GPU another one gives NaN, for the host does
            not wait to look; the definition raises IndexError or counts from the end.
        drop_image: [n] bool, True where the condition is hidden: exactly 0, whatever it is.
        signal: [steps] fp32, sqrt(alpha bar).
        noise: [steps] fp32, sqrt(1 - alpha bar).
        seed: 0 to 2**64 - 1.
        posterior_purpose: 0 to 2**32 - 1, the stream of the posterior's sample.
        noise_purpose: 0 to 2**32 - 1, the stream of the diffusion's noise.
        latent_scale: the VAE's scaling factor, of the target only.
        prediction_type: epsilon or v_prediction.
        dtype: of the latents: fp32, bf16 or fp16.
        noise_offset: 0 or more; times a normal of each sample and channel, added to the noise.
        noise_offset_purpose: 0 to 2**32 - 1, the stream of these, four for a sample.
        input_perturbation: 0 or more; times another normal of each element, added to the noise of
            the input alone: the answer does not know of it.
        input_perturbation_purpose: 0 to 2**32 - 1, the stream of these.

    Returns: latents [n, 8, h, w] in `dtype`, noisy target, then condition; target [n, 4, h, w]
        fp32; both channels_last. Element e of [4, h, w] is normal e of the sample's stream.
    Raises: ValueError or TypeError, for other shapes, dtypes, ranges or predictions.
    Source: Brooks et al. 2023 (arXiv:2211.09800), section 3.2.
    """
    tensors = (target_mean, target_std, condition, positions, timesteps, drop_image, signal, noise)
    _check(*tensors)
    purposes: dict[str, Any] = {
        "posterior_purpose": posterior_purpose,
        "noise_purpose": noise_purpose,
        "noise_offset_purpose": noise_offset_purpose,
        "input_perturbation_purpose": input_perturbation_purpose,
    }
    amounts: dict[str, Any] = {
        "noise_offset": noise_offset,
        "input_perturbation": input_perturbation,
    }
    _check_options(seed, purposes, amounts, prediction_type, dtype)
    if not runs_triton(target_mean):
        return edit_input_reference(
            *tensors,
            seed=seed,
            **purposes,
            latent_scale=latent_scale,
            prediction_type=prediction_type,
            dtype=dtype,
            **amounts,
        )
    velocity = prediction_type == "v_prediction"
    key = (seed & MASK, seed >> 32)
    of_call = (*purposes.values(), latent_scale, *amounts.values(), velocity, dtype)
    return _edit_input(*tensors, *key, *of_call)


def _check(*tensors: Tensor) -> None:
    target_mean, target_std, condition, positions, timesteps, drop_image, signal, noise = tensors
    op, shape, steps = "edit_input", tuple(target_mean.shape), tuple(signal.shape)
    check_dtypes(op, target_mean=target_mean, target_std=target_std, condition=condition)
    if len(shape) != 4 or shape[1] != CHANNELS:
        raise ValueError(f"{op}: target_mean must be [n, {CHANNELS}, h, w], got {list(shape)}")
    if len(steps) != 1 or not signal.numel():
        raise ValueError(f"{op}: signal must be [steps], got {list(steps)}")
    names = ("positions", "timesteps", "drop_image", "signal", "noise")
    check_devices(op, target_mean=target_mean, **dict(zip(names, tensors[3:], strict=True)))
    check_shape(op, "target_std", target_std, shape)
    check_shape(op, "condition", condition, shape)
    for name, tensor, expected, dtype in (
        ("positions", positions, shape[:1], torch.int64),
        ("timesteps", timesteps, shape[:1], torch.int64),
        ("drop_image", drop_image, shape[:1], torch.bool),
        ("signal", signal, steps, torch.float32),
        ("noise", noise, steps, torch.float32),
    ):
        check_shape(op, name, tensor, expected)
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")


def _check_options(
    seed: int,
    purposes: dict[str, int],
    amounts: dict[str, float],
    prediction_type: str,
    dtype: torch.dtype,
) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"edit_input: seed must be 0 to 2**64 - 1, got {seed}")
    for name, purpose in purposes.items():
        if not 0 <= purpose <= MASK:
            raise ValueError(f"edit_input: {name} must be 0 to 2**32 - 1, got {purpose}")
    for name, amount in amounts.items():
        if not 0 <= amount < math.inf:
            raise ValueError(f"edit_input: {name} must be 0 or more, got {amount}")
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"edit_input: prediction_type must be one of {PREDICTIONS}, got {prediction_type!r}"
        )
    if dtype not in DTYPES:
        raise TypeError(f"edit_input: dtype must be fp32, bf16 or fp16, got {dtype}")


@triton.jit
def _normals(
    position, purpose, seed_low, seed_high, plane, first, PIXELS: tl.constexpr, QUADS: tl.constexpr
):
    """[4, PIXELS] normals of a sample's stream, from a pixel on.

    The four of one counter are four neighbours of a plane where planes divide by 4 (QUADS); where
    they do not, each element computes the four and keeps its own.
    """
    channel = tl.arange(0, 4)[:, None]
    if QUADS:
        quad = first // 4 + tl.arange(0, PIXELS // 4)[None, :]
        block = channel * (plane // 4) + quad
    else:
        element = channel * plane + first + tl.arange(0, PIXELS)[None, :]
        block = element // 4
    word = philox4x32_10(
        block.to(tl.uint32),
        purpose.to(tl.uint32),
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )
    if QUADS:
        x0, y0 = triton_normal(word[0], word[1])
        x1, y1 = triton_normal(word[2], word[3])
        drawn = tl.reshape(tl.join(tl.join(x0, x1), tl.join(y0, y1)), (4, PIXELS))
    else:
        early = element % 4 < 2
        x, y = triton_normal(tl.where(early, word[0], word[2]), tl.where(early, word[1], word[3]))
        drawn = tl.where(element % 2 == 0, x, y)
    return drawn


# Seed and purposes are arguments of one compiled kernel, whatever their values.
@triton.jit(
    do_not_specialize=[
        "seed_low",
        "seed_high",
        "posterior_purpose",
        "noise_purpose",
        "noise_offset_purpose",
        "input_perturbation_purpose",
    ]
)
def _forward_kernel(
    target_mean,
    target_std,
    condition,
    positions,
    timesteps,
    drop_image,
    signal,
    noise,
    latents,
    target,
    mean_stride,
    std_stride,
    condition_stride,
    plane,
    steps,
    seed_low,
    seed_high,
    posterior_purpose,
    noise_purpose,
    noise_offset_purpose,
    input_perturbation_purpose,
    latent_scale,
    noise_offset,
    input_perturbation,
    VELOCITY: tl.constexpr,
    OFFSET: tl.constexpr,
    PERTURBATION: tl.constexpr,
    QUADS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    blocks = (plane + PIXELS - 1) // PIXELS
    sample = (tl.program_id(0) // blocks).to(tl.int64)  # a batch can pass 2**31 elements
    first = (tl.program_id(0) % blocks).to(tl.int64) * PIXELS
    position = tl.load(positions + sample)
    timestep = tl.load(timesteps + sample)
    known = (timestep >= 0) & (timestep < steps)
    alpha = tl.load(signal + timestep, mask=known, other=float("nan"))
    sigma = tl.load(noise + timestep, mask=known, other=float("nan"))
    shows = tl.load(drop_image + sample) == 0

    pixel = first + tl.arange(0, PIXELS)
    inside = (pixel < plane)[None, :]
    at = tl.arange(0, 4)[:, None] * plane + pixel[None, :]  # [4, PIXELS], a plane is contiguous
    mean = tl.load(target_mean + sample * mean_stride + at, mask=inside, other=0.0)
    std = tl.load(target_std + sample * std_stride + at, mask=inside, other=0.0)
    source = condition + sample * condition_stride + at
    shown = tl.load(source, mask=inside & shows, other=0.0).to(tl.float32)

    posterior = _normals(
        position, posterior_purpose, seed_low, seed_high, plane, first, PIXELS, QUADS
    )
    epsilon = _normals(position, noise_purpose, seed_low, seed_high, plane, first, PIXELS, QUADS)
    if OFFSET:  # a plane of one pixel: the sample's first four normals, one for each channel
        epsilon += noise_offset * _normals(
            position, noise_offset_purpose, seed_low, seed_high, 1, 0, 1, False
        )
    mixed_in = epsilon
    if PERTURBATION:
        mixed_in += input_perturbation * _normals(
            position, input_perturbation_purpose, seed_low, seed_high, plane, first, PIXELS, QUADS
        )
    clean = (mean.to(tl.float32) + std.to(tl.float32) * posterior) * latent_scale
    noisy = alpha * clean + sigma * mixed_in
    answer = alpha * epsilon - sigma * clean if VELOCITY else epsilon

    out = sample * plane + pixel[:, None]  # channels_last: the channels of a pixel are adjacent
    inside = (pixel < plane)[:, None]
    both = tl.permute(tl.join(noisy, shown), (1, 2, 0))  # [PIXELS, noisy or shown, 4]
    both = tl.reshape(both, (PIXELS, 8)).to(latents.dtype.element_ty)
    tl.store(latents + out * 8 + tl.arange(0, 8)[None, :], both, mask=inside)
    tl.store(target + out * 4 + tl.arange(0, 4)[None, :], tl.trans(answer), mask=inside)


def _planes(tensor: Tensor) -> Tensor:
    """[n, 4, h, w] with contiguous samples, without a copy where only the samples are apart."""
    height, width = tensor.shape[2:]
    strides = (height * width, width, 1)
    return tensor if tensor.stride()[1:] == strides else tensor.contiguous()


def _signed(word: int) -> int:
    """The int32 of a word's bits: every word has one type then, and the kernel one version."""
    return word - 2**32 if word >= 2**31 else word


def _channels_last(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    shape = (like.shape[0], channels, *like.shape[2:])
    memory_format = torch.channels_last
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


@torch.library.custom_op("fusedit::edit_input", mutates_args=())
@on_its_device
def _edit_input(
    target_mean: Tensor,
    target_std: Tensor,
    condition: Tensor,
    positions: Tensor,
    timesteps: Tensor,
    drop_image: Tensor,
    signal: Tensor,
    noise: Tensor,
    seed_low: int,
    seed_high: int,
    posterior_purpose: int,
    noise_purpose: int,
    noise_offset_purpose: int,
    input_perturbation_purpose: int,
    latent_scale: float,
    noise_offset: float,
    input_perturbation: float,
    velocity: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    latents = _channels_last(target_mean, 2 * CHANNELS, dtype)
    target = _channels_last(target_mean, CHANNELS, torch.float32)
    if not latents.numel():
        return latents, target
    of_target = [_planes(tensor) for tensor in (target_mean, target_std, condition)]
    of_sample = [t.contiguous() for t in (positions, timesteps, drop_image, signal, noise)]
    strides = [tensor.stride(0) for tensor in of_target]
    plane, steps = target_mean.shape[2] * target_mean.shape[3], len(signal)
    purposes = posterior_purpose, noise_purpose, noise_offset_purpose, input_perturbation_purpose
    drawn = [_signed(word) for word in (seed_low, seed_high, *purposes)]
    blocks = pick("edit_input.forward", target_mean.device, plane=plane)
    constants = {
        "VELOCITY": velocity,
        "OFFSET": noise_offset > 0,
        "PERTURBATION": input_perturbation > 0,
        "QUADS": plane % 4 == 0,
        **blocks,
    }
    launch: Any = _forward_kernel[(len(positions) * triton.cdiv(plane, blocks["PIXELS"]),)]
    tensors = (*of_target, *of_sample, latents, target)
    amounts = latent_scale, noise_offset, input_perturbation
    arguments = (*tensors, *strides, plane, steps, *drawn, *amounts)
    launch(*arguments, **constants)
    return latents, target


@_edit_input.register_fake
def _(target_mean, *rest):
    latents = _channels_last(target_mean, 2 * CHANNELS, rest[-1])
    return latents, _channels_last(target_mean, CHANNELS, torch.float32)
