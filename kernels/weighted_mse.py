"""The weighted squared error of each sample, and its gradient in the same pass.

Eager reads predicted and target several times over and writes a tensor for each of difference,
square and gradient. Here one kernel reads both, adds up the squares and writes the gradient before
the incoming factor, in fp32; a second, of one program, adds up the parts. The backward multiplies.
Sums have a fixed order: partials by chunks of a sample, then chunks, then samples.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import check_devices, check_dtypes, check_shape, on_its_device, runs_triton
from .tables import pick

MAX_SAMPLES = 65535  # of a grid's second axis


def weighted_mse_reference(
    predicted: Tensor, target: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, in target's dtype: the weighted sum, and each sample's error."""
    errors = (predicted.to(target.dtype) - target).square().mean(dim=(1, 2, 3))
    return (weights * errors).sum(), errors.detach()


def weighted_mse(predicted: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over samples of weight times mean squared error, and the errors for logging.

    Args:
        predicted: [n, c, h, w], fp32, bf16 or fp16; n may be 0.
        target: [n, c, h, w] fp32, of any strides, without a gradient.
        weights: [n] fp32, without a gradient. A weight of 0 hides no NaN: 0 * inf is NaN.

    Returns: the loss, [] fp32, and the errors, [n] fp32, through which no gradient flows.
    Raises: ValueError, for other shapes, a sample without elements, or a target or weights that
        require a gradient; TypeError, for other dtypes.
    """
    check_dtypes("weighted_mse", predicted=predicted)
    if predicted.dim() != 4 or 0 in predicted.shape[1:]:
        raise ValueError(
            f"weighted_mse: predicted must be [n, c, h, w] with c, h, w of at least 1, "
            f"got {list(predicted.shape)}"
        )
    if len(predicted) > MAX_SAMPLES:
        raise ValueError(f"weighted_mse: n must be at most {MAX_SAMPLES}, got {len(predicted)}")
    check_devices("weighted_mse", predicted=predicted, target=target, weights=weights)
    check_shape("weighted_mse", "target", target, tuple(predicted.shape))
    check_shape("weighted_mse", "weights", weights, (len(predicted),))
    for name, tensor in (("target", target), ("weights", weights)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"weighted_mse: {name} must be fp32, got {tensor.dtype}")
        if tensor.requires_grad:
            raise ValueError(f"weighted_mse: {name} must not require a gradient, but does")
    if not runs_triton(predicted):
        return weighted_mse_reference(predicted, target, weights)
    loss, errors, _ = _weighted_mse(predicted, target, weights)
    return loss, errors


# Elements are numbered in the order in which predicted lies in memory; [slow, middle, fast] are
# c, h, w in that order, and target is addressed by its strides along them where it lies otherwise.


@triton.jit
def _partial_kernel(
    predicted, target, weights, slopes, partials, size, middle, fast,
    stride_sample, stride_slow, stride_middle, stride_fast,
    SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    at = sample * size + element
    if SAME:
        target_at = at
    else:
        line = element // fast
        within = line // middle * stride_slow + line % middle * stride_middle
        target_at = sample * stride_sample + within + element % fast * stride_fast
    value = tl.load(predicted + at, mask=inside, other=0.0).to(tl.float32)
    distance = value - tl.load(target + target_at, mask=inside, other=0.0)
    weight = tl.load(weights + sample)
    tl.store(slopes + at, distance * (2.0 * (weight / size)), mask=inside)
    tl.store(partials + sample * tl.num_programs(0) + chunk, tl.sum(distance * distance, axis=0))


@triton.jit
def _finish_kernel(
    partials, weights, errors, loss, size,
    COUNT: tl.constexpr, CHUNKS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([SAMPLES], tl.float32)
    for first in range(0, COUNT, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        squares = tl.zeros([SAMPLES], tl.float32)
        for start in range(0, CHUNKS, BLOCK):
            chunk = start + tl.arange(0, BLOCK)[None, :]
            inside = (sample[:, None] < COUNT) & (chunk < CHUNKS)
            part = tl.load(partials + sample[:, None] * CHUNKS + chunk, mask=inside, other=0.0)
            squares += tl.sum(part, axis=1)
        error = squares / size
        total += tl.load(weights + sample, mask=sample < COUNT, other=0.0) * error
        tl.store(errors + sample, error, mask=sample < COUNT)
    tl.store(loss, tl.sum(total, axis=0))


@triton.jit
def _backward_kernel(grad_loss, slopes, grad, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slope = tl.load(slopes + at, mask=at < elements, other=0.0)
    tl.store(grad + at, slope * tl.load(grad_loss), mask=at < elements)


def _slopes(predicted: Tensor) -> Tensor:
    """Room for the gradient, dense, in the order of predicted: one sample after the other."""
    order = _order(predicted)
    sizes = [predicted.shape[dim] for dim in order]
    dense = predicted.new_empty(sizes, dtype=torch.float32)
    return dense.permute([order.index(dim) for dim in range(4)])


def _order(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory, samples first."""
    return [0, *sorted((1, 2, 3), key=lambda dim: -tensor.stride(dim))]


@torch.library.custom_op("fusedit::weighted_mse", mutates_args=())
@on_its_device
def _weighted_mse(
    predicted: Tensor, target: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, errors, and the gradient of the loss with respect to predicted, in fp32."""
    count, size = len(predicted), predicted[:1].numel()
    slopes, errors = _slopes(predicted), weights.new_empty(weights.shape)
    if count == 0:
        return weights.new_zeros(()), errors, slopes
    order = _order(predicted)
    predicted, target = predicted.permute(order).contiguous(), target.permute(order)
    weights = weights.contiguous()
    blocks = pick("weighted_mse.partial", predicted.device, size=size)
    chunks = -(-size // blocks["BLOCK"])
    names = ("stride_sample", "stride_slow", "stride_middle", "stride_fast")
    strides = dict(zip(names, target.stride(), strict=True))
    options = dict[str, Any](blocks, SAME=target.is_contiguous(), **strides)
    partials, loss = weights.new_empty(count, chunks), weights.new_empty(())
    _partial_kernel[(chunks, count)](
        predicted, target, weights, slopes, partials, size,
        middle=predicted.shape[2], fast=predicted.shape[3], **options,
    )  # fmt: skip
    blocks = pick("weighted_mse.finish", predicted.device, chunks=chunks)
    options = dict[str, Any](blocks, COUNT=count, CHUNKS=chunks)
    _finish_kernel[(1,)](partials, weights, errors, loss, size, **options)
    return loss, errors, slopes


@torch.library.custom_op("fusedit::weighted_mse_backward", mutates_args=())
@on_its_device
def _weighted_mse_backward(grad_loss: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    grad = torch.empty_like(slopes, dtype=dtype)
    if elements := slopes.numel():
        blocks: dict[str, Any] = pick("weighted_mse.backward", slopes.device)
        grid = (triton.cdiv(elements, blocks["BLOCK"]),)
        _backward_kernel[grid](grad_loss, slopes, grad, elements, **blocks)
    return grad


@_weighted_mse.register_fake
def _(predicted, target, weights):
    return weights.new_empty(()), weights.new_empty(weights.shape), _slopes(predicted)


@_weighted_mse_backward.register_fake
def _(grad_loss, slopes, dtype):
    return torch.empty_like(slopes, dtype=dtype)


def _setup_context(ctx, inputs, output):
    _, errors, slopes = output
    ctx.save_for_backward(slopes)
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(errors, slopes)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return None, None, None
    return _weighted_mse_backward(grad_loss, *ctx.saved_tensors, ctx.dtype), None, None


_weighted_mse.register_autograd(_backward, setup_context=_setup_context)
