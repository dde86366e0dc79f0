"""AdamW in one pass over memory: clip, moments, parameter, low-precision copy and averages.

A bf16 gradient with fp32 master, moments and average costs 38 bytes a parameter: the norm reads 2;
the pass reads 2 + 4 + 4 + 4 + 4 and writes 4 + 4 + 4 + 4 + 2. An fp32 parameter with an fp32
gradient costs 40, another average 8 more, and bf16 moments save 8. PyTorch's fused AdamW beside
foreach clip and foreach average moves 64 and 52. Nothing waits for the device, so a graph captures
it.
Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, computed as torch.optim.AdamW.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunks
from .chunks import (
    AVERAGES,
    COPY,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_DRAW,
    GRAD,
    PARAMETER,
    PER_DRAW,
    TRITON_DTYPES,
    Row,
    Tables,
    end_of,
    pointer_to,
)
from .philox import MASK, philox, philox4x32_10
from .tables import pick

# Columns of the scalars of a tensor, made on the device by `adamw_scalars`.
DECAY, WEIGHT, WEIGHT_SQ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STEP_SIZE, CORRECTION, EPS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
SCALARS = tl.constexpr(6)
LOW_HALF, HIGH_HALF = tl.constexpr(0xFFFF), tl.constexpr(0xFFFF0000)
DRAW = tl.constexpr(PER_DRAW)


def adamw_scalars(counts: Tensor, lr: Tensor, settings: Tensor) -> Tensor:
    """What AdamW multiplies by, in fp64 until the last: 1 - beta**t in fp32 loses digits at t = 1.

    Args:
        counts: [tensors] fp32, updates so far, this one included.
        lr: [tensors] fp64.
        settings: [4, tensors] fp64: beta1, beta2, eps, weight decay.

    Returns: [tensors, 6] fp32, in the order of the columns above.
    """
    beta1, beta2, eps, weight_decay = settings.unbind()
    step = counts.double()
    columns = (
        1 - lr * weight_decay,
        1 - beta1,
        1 - beta2,
        lr / (1 - beta1**step),
        (1 - beta2**step).rsqrt(),
        eps,
    )
    return torch.stack(columns, dim=1).float()


def adamw_ema_reference(
    row: Row,
    scalars: Tensor,
    grad_factor: Tensor,
    applies: Tensor,
    ema_weights: Tensor,
    halves: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The definition, for one parameter: all but the gradient move in place.

    Args:
        scalars: [6] fp32, of `adamw_scalars`.
        grad_factor: [] fp32; what the gradient is multiplied by.
        applies: [] bool; False leaves every bit.
        ema_weights: [averages] fp32; 1 - decay.
        halves: for bf16 moments, two of [elements] int64 in [0, 2**16), in the order of memory.
    """
    grad, parameter, exp_avg, exp_avg_sq, copy, averages = row
    new = {}
    moved = parameter
    if grad is not None:
        decay, weight, weight_sq, step_size, correction, eps = scalars.unbind()
        scaled = grad.float() * grad_factor
        mean = torch.lerp(exp_avg.float(), scaled, weight)
        square = torch.lerp(exp_avg_sq.float(), scaled * scaled, weight_sq)
        moved = parameter * decay - step_size * (mean / (square.sqrt() * correction + eps))
        if halves is not None:
            mean, square = (
                round_by_chance(value, half.as_strided(value.shape, value.stride()))
                for value, half in zip((mean, square), halves, strict=True)
            )
        new = {parameter: moved, exp_avg: mean, exp_avg_sq: square}
        new |= {copy: moved} if copy is not None else {}
    for average, weight in zip(averages, ema_weights, strict=True):
        new[average] = torch.lerp(average, moved, weight)
    for tensor, value in new.items():
        tensor.copy_(torch.where(applies, value.to(tensor.dtype), tensor))


def round_by_chance(values: Tensor, half: Tensor) -> Tensor:
    """fp32 to bf16, up as often as the value is near: right on average.

    Args:
        half: int64 in [0, 2**16), added below what bf16 keeps.
    """
    bits = (values.view(torch.int32).long() + half) & 0xFFFF0000
    signed = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    # A NaN of all ones would overflow into -0.
    return torch.where(values.isnan(), values, signed.view(torch.float32)).to(torch.bfloat16)


def halves_reference(
    elements: int, first_draw: int, step: Tensor, seed: int, purpose: int
) -> tuple[Tensor, Tensor]:
    """The random halves of every element, in the order of memory: exp_avg's, exp_avg_sq's.

    Element i of a parameter has word i % 4 of counter (first_draw + i / 4, purpose, step, 0).
    """
    draws = first_draw + torch.arange(-(-elements // PER_DRAW), device=step.device)
    zero = torch.zeros_like(draws)
    counter = (draws & MASK, zero + purpose, zero + step.long(), zero)
    words = philox((seed & MASK, seed >> 32), counter)
    word = torch.stack(words, dim=-1).flatten()[:elements]
    return word & 0xFFFF, word >> 16


def update(
    tables: Tables,
    counts: Tensor,
    scalars: Tensor,
    key: Tensor,
    grad_factor: Tensor,
    applies: Tensor,
    ema_weights: Tensor,
    moments: torch.dtype,
) -> None:
    """The same as the definition for all tensors of the tables.

    Args:
        counts: [tensors] fp32; with the key, what the roundings of bf16 moments are drawn by.
        scalars: [tensors, 6] fp32.
        key: [3] int64; seed low and high, purpose.
    """
    for launch in tables.launches:
        compiled_for: dict[str, Any] = {
            "GRAD_DTYPE": TRITON_DTYPES[launch.grad],
            "COPY_DTYPE": TRITON_DTYPES[launch.copy],
            "MOMENTS": TRITON_DTYPES[moments],
            "EMAS": len(ema_weights),
            "ALIGNED": launch.aligned,
            "CHUNK": chunks.CHUNK,
            **pick("adamw_ema.update", counts.device),
        }
        _kernel[(len(launch.chunks),)](
            launch.chunks, tables.rows, tables.rows.shape[1], counts, scalars, key,
            grad_factor, applies, ema_weights,
            **compiled_for,
        )  # fmt: skip


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp: exact at both ends."""
    way = end - start
    return tl.where(weight < 0.5, start + weight * way, end - (1.0 - weight) * way)


@triton.jit
def _halves(draw, step, key, BLOCK: tl.constexpr):
    """[BLOCK] uint32 from counter `draw` on, four words of each."""
    counter = (draw + tl.arange(0, BLOCK // DRAW)).to(tl.uint32)
    nothing = tl.zeros([BLOCK // DRAW], tl.uint32)
    low, high = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    purpose = tl.load(key + 2).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(
        counter, nothing + purpose, nothing + step, nothing, nothing + low, nothing + high
    )
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])


@triton.jit
def _round_by_chance(values, half):
    bits = (values.to(tl.uint32, bitcast=True) + half) & HIGH_HALF
    rounded = bits.to(tl.float32, bitcast=True)
    return tl.where(values == values, rounded, values)


@triton.jit
def _kernel(
    all_chunks, rows, columns, counts, scalars, key, grad_factor, applies, ema_weights,
    GRAD_DTYPE: tl.constexpr, COPY_DTYPE: tl.constexpr, MOMENTS: tl.constexpr,
    EMAS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = all_chunks + 2 * tl.program_id(0)
    tensor, part = tl.load(chunk), tl.load(chunk + 1)
    row, scalar = rows + tensor * columns, scalars + tensor * SCALARS
    first = part.to(tl.int64) * CHUNK
    end = tl.where(tl.load(applies), end_of(row, first, CHUNK, ALIGNED), 0)
    if ALIGNED:
        end = tl.multiple_of(end, 16)
    parameter = pointer_to(row, PARAMETER, first, tl.float32, ALIGNED)
    exp_avg = pointer_to(row, EXP_AVG, first, MOMENTS, ALIGNED)
    exp_avg_sq = pointer_to(row, EXP_AVG_SQ, first, MOMENTS, ALIGNED)
    factor = tl.load(grad_factor)
    decay, eps = tl.load(scalar + DECAY), tl.load(scalar + EPS)
    weight, weight_sq = tl.load(scalar + WEIGHT), tl.load(scalar + WEIGHT_SQ)
    step_size, correction = tl.load(scalar + STEP_SIZE), tl.load(scalar + CORRECTION)
    if GRAD_DTYPE is not None:
        grad = pointer_to(row, GRAD, first, GRAD_DTYPE, ALIGNED)
    if COPY_DTYPE is not None:
        copy = pointer_to(row, COPY, first, COPY_DTYPE, ALIGNED)
    offset = tl.arange(0, BLOCK)
    start = 0
    while start < end:
        at = start + offset
        inside = at < end
        value = tl.load(parameter + at, mask=inside, other=0.0)
        if GRAD_DTYPE is not None:
            scaled = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
            mean = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
            square = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
            mean = _lerp(mean, scaled, weight)
            square = _lerp(square, scaled * scaled, weight_sq)
            ratio = mean / (tl.sqrt(square) * correction + eps)
            value = value * decay - step_size * ratio
        for index in tl.static_range(EMAS):  # before other stores, which loads could not pass
            average = pointer_to(row, AVERAGES + index, first, tl.float32, ALIGNED)
            before = tl.load(average + at, mask=inside, other=0.0)
            after = _lerp(before, value, tl.load(ema_weights + index))
            tl.store(average + at, after, mask=inside)
        if GRAD_DTYPE is not None:
            if tl.bfloat16 == MOMENTS:
                draw = tl.load(row + FIRST_DRAW) + (first + start) // DRAW
                word = _halves(draw, tl.load(counts + tensor).to(tl.uint32), key, BLOCK)
                mean = _round_by_chance(mean, word & LOW_HALF)
                square = _round_by_chance(square, word >> 16)
            tl.store(parameter + at, value, mask=inside)
            tl.store(exp_avg + at, mean, mask=inside)
            tl.store(exp_avg_sq + at, square, mask=inside)
        if COPY_DTYPE is not None:
            tl.store(copy + at, value, mask=inside)
        start += BLOCK
