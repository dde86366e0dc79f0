"""GEGLU in one pass each way: eager keeps gelu(gate), here the backward recomputes it.

Forward reads 2N and writes N, backward reads 3N and writes 2N, N = rows x width.
Source: Shazeer 2020 (arXiv:2002.05202), section 2; the exact GELU, by erf, is Stable Diffusion's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .dispatch import as_rows, check_dtypes, on_its_device, runs_triton
from .tables import pick

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


def geglu_reference(projected: Tensor) -> Tensor:
    """The definition: value * gelu(gate), of the two halves of the last dimension."""
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu(projected: Tensor) -> Tensor:
    """value * gelu(gate) with the exact GELU.

    Args:
        projected: [..., 2 * width], fp32, bf16 or fp16: values, then gates; left untouched.

    Returns: [..., width], of the same dtype, contiguous.
    Raises: ValueError, if the last dimension is odd; TypeError, for another dtype.
    Source: Shazeer 2020 (arXiv:2002.05202), section 2.
    """
    check_dtypes("geglu", projected=projected)
    if projected.shape[-1] % 2:
        raise ValueError(f"geglu: the last dimension must be even, got {list(projected.shape)}")
    if not runs_triton(projected):
        return geglu_reference(projected)
    return _geglu(projected)


@triton.jit
def _cdf(gate):
    """Normal CDF at the gate; gate times it is the GELU."""
    return 0.5 * (1.0 + tl.erf(gate * SQRT_HALF))


@triton.jit
def _forward_kernel(
    projected, out, rows, width, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    source = projected + row * row_stride + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value * (gate * _cdf(gate)), mask=inside)


@triton.jit
def _backward_kernel(
    grad_out, projected, grad, rows, width, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    source = projected + row * row_stride + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad_out + row * width + column, mask=inside, other=0.0).to(tl.float32)
    cdf = _cdf(gate)
    density = INVERSE_SQRT_2PI * tl.exp(-0.5 * gate * gate)
    target = grad + row * 2 * width + column
    tl.store(target, incoming * (gate * cdf), mask=inside)
    tl.store(target + width, incoming * value * (cdf + gate * density), mask=inside)


def _launch(kernel, name: str, tensors: tuple[Tensor, ...], projected: Tensor) -> None:
    rows, width = projected.shape[0], projected.shape[1] // 2
    if rows * width == 0:
        return
    blocks = pick(name, projected.device, width=width)
    grid = (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(width, blocks["COLUMNS"]))
    kernel[grid](*tensors, rows, width, projected.stride(0), **blocks)


@torch.library.custom_op("fusedit::geglu", mutates_args=())
@on_its_device
def _geglu(projected: Tensor) -> Tensor:
    out = projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)
    flat = as_rows(projected)
    _launch(_forward_kernel, "geglu.forward", (flat, out), flat)
    return out


@torch.library.custom_op("fusedit::geglu_backward", mutates_args=())
@on_its_device
def _geglu_backward(grad_out: Tensor, projected: Tensor) -> Tensor:
    grad = projected.new_empty(projected.shape)
    flat = as_rows(projected)
    _launch(_backward_kernel, "geglu.backward", (grad_out.contiguous(), flat, grad), flat)
    return grad


@_geglu.register_fake
def _(projected):
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


@_geglu_backward.register_fake
def _(grad_out, projected):
    return projected.new_empty(projected.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    return _geglu_backward(grad_out, *ctx.saved_tensors)


_geglu.register_autograd(_backward, setup_context=_setup_context)
