"""LayerNorm in one pass each way, with the residual add before it folded in.

A row stays in registers from its load to its store, so that forward reads N and writes N (with the
add: 2N and 2N, where eager takes 3N and 2N), and backward reads 2N (3N) and writes N, weight and
bias gradients included: eager reads everything twice for those. N = rows x width.
Source: Ba et al. 2016 (arXiv:1607.06450), section 3.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from . import layer_norm_kernels as kernels
from .dispatch import as_rows, check_dtypes, check_shape, on_its_device, runs_triton
from .tables import pick

MAX_WIDTH = 8192  # a row must fit in one program's registers
PROGRAMS = 256  # at most, of the backward: two on each of an H100's 132 SMs, and little to sum up


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """The definition, in the widest dtype of the three, rounded to that of x."""
    dtype = x.dtype
    for parameter in (weight, bias):
        dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
    weight, bias = (p if p is None else p.to(dtype) for p in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The definition: the norm of the rounded sum, and the sum."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension.

    Args:
        x: [..., width], fp32, bf16 or fp16, width 1 to MAX_WIDTH; left untouched.
        weight, bias: [width], fp32, bf16 or fp16, each of its own dtype, or None for 1 and 0.

    Returns: [..., width], of x's dtype, contiguous; statistics are fp32.
    Raises: ValueError, for another width or shape; TypeError, for another dtype.
    Source: Ba et al. 2016 (arXiv:1607.06450), section 3.
    """
    _check("layer_norm", x, weight, bias)
    if not runs_triton(x):
        return layer_norm_reference(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The layer_norm of x + residual, and that sum.

    Args:
        x, residual: [..., width], of one shape and dtype; see layer_norm for these and the rest.

    Returns: the norm, and the sum rounded to x's dtype, of which the statistics are; contiguous.
    Raises: as layer_norm, and TypeError, if x and residual differ in dtype.
    """
    _check("add_layer_norm", x, weight, bias)
    check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    if residual.dtype != x.dtype:
        raise TypeError(
            f"add_layer_norm: residual must have x's dtype, {x.dtype}, got {residual.dtype}"
        )
    if not runs_triton(x):
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return _add_layer_norm(x, residual, weight, bias, eps)[:2]


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_dtypes(op, x=x, weight=weight, bias=bias)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: the last dimension of x must be 1 to {MAX_WIDTH}, got {list(x.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_shape(op, name, parameter, (x.shape[-1],))


def _blocks(name: str, tensor: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for, at the width of a tensor."""
    width = tensor.shape[-1]
    blocks = pick(f"layer_norm.{name}", tensor.device, width=width)
    return {"WIDTH": width, "PIECES": triton.cdiv(width, blocks["COLUMNS"]), **blocks}


def _launch_forward(x, residual, weight, bias, eps, normalized, total, mean, rstd) -> None:
    """Fills the last four; total and residual are None together."""
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    rows, blocks = len(x), _blocks("forward", x)
    if rows == 0:
        return
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    kernels.forward_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
        x, residual, weight, bias, normalized, total, mean, rstd, rows, *strides, eps, **blocks
    )


def _launch_backward(
    grad_normalized, grad_total, x, weight, mean, rstd, grad, grad_weight, grad_bias
) -> None:
    """Fills the last three; of weight and bias, those that are not None."""
    rows, blocks = len(x), _blocks("backward", x)
    tiles = triton.cdiv(rows, blocks["ROWS"])
    steps = triton.cdiv(tiles, PROGRAMS)
    programs = triton.cdiv(tiles, steps)
    partials = None
    if grad_weight is not None or grad_bias is not None:
        partials = x.new_empty((programs, 2, x.shape[1]), dtype=torch.float32)
    total_stride = 0 if grad_total is None else grad_total.stride(0)
    strides = grad_normalized.stride(0), total_stride, x.stride(0)
    kernels.backward_kernel[(programs,)](
        grad_normalized, grad_total, x, weight, mean, rstd, grad, partials,
        rows, *strides, STEPS=steps, **blocks,
    )  # fmt: skip
    if partials is not None:
        blocks = _blocks("sum", x)
        grid = (blocks.pop("PIECES"),)
        blocks["ROWS"] = triton.next_power_of_2(programs)
        kernels.sum_kernel[grid](partials, grad_weight, grad_bias, programs, **blocks)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the norm, mean and rstd."""
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@torch.library.custom_op("fusedit::layer_norm", mutates_args=())
@on_its_device
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normalized, mean, rstd = _outputs(x)
    _launch_forward(x, None, weight, bias, eps, normalized, None, mean, rstd)
    return normalized, mean, rstd


@torch.library.custom_op("fusedit::add_layer_norm", mutates_args=())
@on_its_device
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normalized, mean, rstd = _outputs(x)
    total = x.new_empty(x.shape)
    _launch_forward(x, residual, weight, bias, eps, normalized, total, mean, rstd)
    return normalized, total, mean, rstd


@torch.library.custom_op("fusedit::layer_norm_backward", mutates_args=())
@on_its_device
def _layer_norm_backward(
    grad_normalized: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the last two empty where their dtype is None."""
    grads = _grads(x, weight_dtype, bias_dtype)
    if x.numel():
        grad_total = None if grad_total is None else as_rows(grad_total)
        weight = None if weight is None else weight.contiguous()
        wanted = [grad if grad.numel() else None for grad in grads]
        _launch_backward(
            as_rows(grad_normalized), grad_total, as_rows(x), weight, mean, rstd, *wanted
        )
    else:
        for grad in grads:
            grad.zero_()
    return grads


def _grads(
    x: Tensor, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of x, weight and bias."""
    weight, bias = (
        x.new_empty(x.shape[-1] if dtype else 0, dtype=dtype or x.dtype)
        for dtype in (weight_dtype, bias_dtype)
    )
    return x.new_empty(x.shape), weight, bias


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return _outputs(x)


@_add_layer_norm.register_fake
def _(x, residual, weight, bias, eps):
    normalized, mean, rstd = _outputs(x)
    return normalized, x.new_empty(x.shape), mean, rstd


@_layer_norm_backward.register_fake
def _(grad_normalized, grad_total, x, weight, mean, rstd, weight_dtype, bias_dtype):
    return _grads(x, weight_dtype, bias_dtype)


def _setup_context(ctx, inputs, output):
    *_, weight, bias, _ = inputs
    *_, mean, rstd = output
    normed = inputs[0] if len(output) == 3 else output[1]  # x, or the sum
    ctx.save_for_backward(normed, weight, mean, rstd)
    *_, weight_wants, bias_wants, _ = ctx.needs_input_grad[: len(inputs)]
    ctx.dtypes = weight.dtype if weight_wants else None, bias.dtype if bias_wants else None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # zeros for an unused sum would cost a pass over it


def _gradients(ctx, grad_normalized, grad_total):
    """Of the normalized sum, weight and bias; None where nothing flows."""
    if grad_normalized is None:  # only the sum was used
        return grad_total, None, None
    grad, *others = _layer_norm_backward(
        grad_normalized, grad_total, *ctx.saved_tensors, *ctx.dtypes
    )
    return grad, *(other if other.numel() else None for other in others)


def _backward(ctx, grad_normalized, *_):
    return *_gradients(ctx, grad_normalized, None), None


def _add_backward(ctx, grad_normalized, grad_total, *_):
    grad, grad_weight, grad_bias = _gradients(ctx, grad_normalized, grad_total)
    return grad, grad, grad_weight, grad_bias, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
_add_layer_norm.register_autograd(_add_backward, setup_context=_setup_context)
