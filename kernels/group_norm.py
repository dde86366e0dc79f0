"""GroupNorm with SiLU and the addition before it, for channels_last and plain NCHW tensors.

PyTorch normalizes in NCHW, so a channels_last UNet pays two copies, and SiLU and the addition are
passes of their own. Here forward reads 2N and writes N, backward reads 4N and writes N (N = bytes
of the input); a sample whose groups fit on chip is read once, 2N and 3N. A residual that is added
costs one read and one write of N more.

The reduction is split over (rows x channels) tiles, so that one image fills a GPU, in the kernels
of `group_norm_kernels.py`. Source: Wu and He 2018 (arXiv:1803.08494), equations 1 to 3.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from . import group_norm_kernels
from .dispatch import check_dtypes, check_shape, on_its_device, runs_triton
from .tables import pick

MAX_GROUPS = 65535  # of a grid's second axis

kernels: Any = group_norm_kernels  # type checkers take a launch for a call


def group_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """The definition of `group_norm`."""
    if add is not None:
        x = x + (add if add.dim() == 4 else add[:, :, None, None]).to(x.dtype)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    out = F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
    return (F.silu(out) if silu else out).to(x.dtype)


def add_group_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition of `add_group_norm`."""
    total = x + residual
    return group_norm_reference(total, weight, bias, groups, eps, silu=silu), total


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """GroupNorm of x, or of x + add, then SiLU if asked for; statistics in fp32.

    Args:
        x: [n, c, h, w], fp32, bf16 or fp16; read where it lies, channels_last or NCHW.
        weight, bias: [c]; may be fp32 beside a bf16 x, as under autocast.
        groups: divides c.
        add: [n, c], a time embedding, or [n, c, h, w], a residual of x's dtype.

    Returns: [n, c, h, w] in x's dtype and memory format.
    Raises: ValueError, for shapes that do not agree; TypeError, for another dtype.
    Source: Wu and He 2018 (arXiv:1803.08494), equations 1 to 3.
    """
    _check(x, weight, bias, groups, add)
    if not runs_triton(x):
        return group_norm_reference(x, weight, bias, groups, eps, silu=silu, add=add)
    return _group_norm(_collapsible(x), add, weight, bias, groups, eps, silu)[0]


def add_group_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """GroupNorm of x + residual, and the sum itself, rounded to x's dtype before it is normalized.

    Takes, returns and raises as `group_norm`; residual is [n, c, h, w] in x's dtype.
    """
    _check(x, weight, bias, groups, residual)
    if residual.dim() != 4:
        raise ValueError(f"add_group_norm: residual must be 4-D, got {list(residual.shape)}")
    if not runs_triton(x):
        return add_group_norm_reference(x, residual, weight, bias, groups, eps, silu=silu)
    return _group_norm(_collapsible(x), residual, weight, bias, groups, eps, silu)[:2]


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, add: Tensor | None) -> None:
    check_dtypes("group_norm", x=x, weight=weight, bias=bias, add=add)
    if x.dim() != 4:
        raise ValueError(f"group_norm: x must be [n, c, h, w], got {list(x.shape)}")
    if x[0:1].numel() >= 2**31:  # inside an image the kernels count in 32 bits
        raise ValueError(f"group_norm: an image must be below 2**31 elements, got {list(x.shape)}")
    n, channels = x.shape[:2]
    if n and groups > MAX_GROUPS:
        raise ValueError(f"group_norm: groups must be at most {MAX_GROUPS}, got {groups}")
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: groups must divide {channels} channels, got {groups}")
    check_shape("group_norm", "weight", weight, (channels,))
    check_shape("group_norm", "bias", bias, (channels,))
    if add is not None and add.dim() == 4:
        check_shape("group_norm", "add", add, tuple(x.shape))
        if add.dtype != x.dtype:
            raise TypeError(f"group_norm: a residual must be {x.dtype} as x is, got {add.dtype}")
    elif add is not None:
        check_shape("group_norm", "add", add, (n, channels))


def _collapsible(x: Tensor) -> Tensor:
    """x itself where rows and columns can be walked with one stride, else a dense copy."""
    _, _, height, width = x.shape
    if 0 in x.stride():  # `empty_like` of an expanded tensor has strides of its own
        return x.contiguous(memory_format=torch.channels_last)
    if height == 1 or width == 1 or x.stride(2) == width * x.stride(3):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """From image to image, from position to position, from channel to channel."""
    return x.stride(0), x.stride(2) if x.shape[3] == 1 else x.stride(3), x.stride(1)


class _Tiling:
    """How a tensor is cut: into tiles of rows x channels, or into whole groups of one image."""

    def __init__(self, x: Tensor, groups: int, embedding: Tensor | None) -> None:
        self.n, self.channels, height, width = x.shape
        self.size, self.groups, self.device = height * width, groups, x.device
        self.width = self.channels // groups  # channels of a group
        self.sizes = {
            "channels_last": int(x.stride(1) == 1),
            "size": self.size,
            "width": self.width,
            "elements": x.numel(),
            "embedding": int(embedding is not None),
        }

    def whole(self, kernel: str) -> dict[str, Any] | None:
        """Blocks for a program that keeps all positions of a few groups, if they fit on chip."""
        blocks = pick(kernel, self.device, **self.sizes)
        most = min(blocks["CHANNELS"] // self.width, self.groups)  # groups in a program
        if not most:
            return None
        # So many that each program starts at a multiple of 16 bytes, where any number does that.
        aligned = [count for count in range(1, most + 1) if count * self.width % 8 == 0]
        return blocks | {
            "ROWS": triton.next_power_of_2(self.size),
            "WIDTH": self.width,
            "TOGETHER": max(aligned, default=most),
        }

    def tiles(self, kernel: str) -> tuple[tuple[int], dict[str, Any], int]:
        """Grid, blocks and the number of tiles that the positions are split into."""
        blocks = pick(kernel, self.device, **self.sizes)
        splits = -(-self.size // blocks["ROWS"])
        tiles = -(-self.channels // blocks["CHANNELS"])
        return (self.n * splits * tiles,), blocks, splits

    def per_group(self) -> dict[str, Any]:
        """Blocks for the programs, one for each group of an image, that add up the tiles."""
        return {"WIDTH": triton.next_power_of_2(self.width), "SPLITS": 32, "num_warps": 4}


@torch.library.custom_op("fusedit::group_norm", mutates_args=())
@on_its_device
def _group_norm(
    x: Tensor,
    add: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, sum (empty without a residual), and mean and reciprocal deviation [2, n, groups]."""
    out, total, statistics = _empty_outputs(x, add, weight, bias, groups, eps, silu)
    if x.numel() == 0:
        return out, total, statistics
    weight, bias = weight.contiguous(), bias.contiguous()
    mean, rstd = statistics.unbind()
    residual = _collapsible(add) if add is not None and add.dim() == 4 else None
    embedding = add.contiguous() if add is not None and add.dim() == 2 else None
    added = residual if residual is not None else embedding if embedding is not None else x
    added_strides = _strides(residual) if residual is not None else (0, 0, 0)
    adds = {"EMBEDDING": embedding is not None, "RESIDUAL": residual is not None}
    tiling = _Tiling(x, groups, embedding)
    shape = tiling.size, tiling.channels, groups
    if blocks := tiling.whole("group_norm.whole"):
        grid = (tiling.n, triton.cdiv(groups, blocks["TOGETHER"]))
        kernels.whole_kernel[grid](
            x, added, weight, bias, out, total, mean, rstd, eps,
            *_strides(x), *added_strides, *_strides(out), *shape, SILU=silu, **adds, **blocks,
        )  # fmt: skip
        return out, total, statistics
    grid, blocks, splits = tiling.tiles("group_norm.partial")
    means, squares = mean.new_empty(2, tiling.n, splits, tiling.channels).unbind()
    kernels.partial_kernel[grid](
        x, added, total, means, squares,
        *_strides(x), *added_strides, *_strides(out), *shape, splits, **adds, **blocks,
    )  # fmt: skip
    kernels.statistics_kernel[(tiling.n, groups)](
        means, squares, mean, rstd, eps, *shape, splits, ROWS=blocks["ROWS"], **tiling.per_group()
    )
    grid, blocks, splits = tiling.tiles("group_norm.apply")
    source = total if residual is not None else x
    kernels.apply_kernel[grid](
        source, added, weight, bias, mean, rstd, out, *_strides(source), *_strides(out),
        *shape, splits, EMBEDDING=embedding is not None, SILU=silu, **blocks,
    )  # fmt: skip
    return out, total, statistics


@_group_norm.register_fake
def _empty_outputs(x, add, weight, bias, groups, eps, silu):
    has_residual = add is not None and add.dim() == 4
    total = torch.empty_like(x) if has_residual else x.new_empty(0)
    return torch.empty_like(x), total, x.new_empty(2, x.shape[0], groups, dtype=torch.float32)


@torch.library.custom_op("fusedit::group_norm_backward", mutates_args=())
@on_its_device
def _group_norm_backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    embedding: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    silu: bool,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the embedding (or empty), of bias and weight ([2, c] fp32, or empty)."""
    grad, grad_embedding, grad_affine = _empty_grads(
        grad_out, grad_total, x, embedding, weight, bias, statistics, silu, affine
    )
    if x.numel() == 0:
        return grad, grad_embedding.zero_(), grad_affine.zero_()
    weight, bias = weight.contiguous(), bias.contiguous()
    mean, rstd = statistics.unbind()
    tiling = _Tiling(x, mean.shape[1], embedding)
    shape = tiling.size, tiling.channels, tiling.groups
    grad_out = _collapsible(grad_out)
    direct = x if grad_total is None else _collapsible(grad_total)
    added = x if embedding is None else embedding.contiguous()
    switches = {"EMBEDDING": embedding is not None, "SILU": silu}
    per_channel = mean.new_empty(2, tiling.n, tiling.channels)  # summed over positions
    strides = *_strides(grad_out), *_strides(direct), *_strides(x), *_strides(grad)
    if blocks := tiling.whole("group_norm.backward_whole"):
        grid = (tiling.n, triton.cdiv(tiling.groups, blocks["TOGETHER"]))
        kernels.backward_whole_kernel[grid](
            grad_out, direct, x, added, weight, bias, mean, rstd, grad, grad_embedding,
            *per_channel.unbind(), *strides, *shape,
            DIRECT=grad_total is not None, **switches, **blocks,
        )  # fmt: skip
        return grad, grad_embedding, _sum_images(per_channel, grad_affine)
    grid, blocks, splits = tiling.tiles("group_norm.backward_partial")
    partial = mean.new_empty(3, tiling.n, splits, tiling.channels).unbind()
    kernels.backward_partial_kernel[grid](
        grad_out, x, added, weight, bias, mean, rstd, *partial,
        *_strides(grad_out), *_strides(x), *shape, splits, **switches, **blocks,
    )  # fmt: skip
    per_group = mean.new_empty(2, tiling.n, tiling.groups).unbind()
    kernels.backward_statistics_kernel[(tiling.n, tiling.groups)](
        *partial, weight, rstd, *per_channel.unbind(), *per_group, grad_embedding,
        *shape, splits, EMBEDDING=embedding is not None, **tiling.per_group(),
    )  # fmt: skip
    grid, blocks, splits = tiling.tiles("group_norm.backward_apply")
    kernels.backward_apply_kernel[grid](
        grad_out, direct, x, added, weight, bias, mean, rstd, *per_group, grad,
        *strides, *shape, splits, DIRECT=grad_total is not None, **switches, **blocks,
    )  # fmt: skip
    return grad, grad_embedding, _sum_images(per_channel, grad_affine)


def _sum_images(per_channel: Tensor, out: Tensor) -> Tensor:
    return torch.sum(per_channel, dim=1, out=out) if out.numel() else out


@_group_norm_backward.register_fake
def _empty_grads(grad_out, grad_total, x, embedding, weight, bias, statistics, silu, affine):
    # The gradient of an embedding keeps its dtype but not its strides, which may be none.
    shape = (0,) if embedding is None else embedding.shape
    like = x if embedding is None else embedding
    sums = x.new_empty((2, x.shape[1]) if affine else (0,), dtype=torch.float32)
    return torch.empty_like(x), like.new_empty(shape), sums


def _setup_context(ctx, inputs, output):
    x, add, weight, bias, _, _, silu = inputs
    _, total, statistics = output
    ctx.residual = add is not None and add.dim() == 4
    ctx.silu = silu
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    embedding = None if ctx.residual else add
    ctx.save_for_backward(total if ctx.residual else x, embedding, weight, bias, statistics)


def _backward(ctx, grad_out, grad_total, _):
    x, embedding, weight, bias, statistics = ctx.saved_tensors
    if not ctx.residual:
        grad_total = None
    if grad_out is None:  # only the sum was used
        return grad_total, grad_total, None, None, None, None, None
    affine = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grad, grad_embedding, sums = _group_norm_backward(
        grad_out, grad_total, x, embedding, weight, bias, statistics, ctx.silu, affine
    )
    grad_bias = sums[0].to(bias.dtype) if affine else None
    grad_weight = sums[1].to(weight.dtype) if affine else None
    added = grad if ctx.residual else None if embedding is None else grad_embedding
    return grad, added, grad_weight, grad_bias, None, None, None


_group_norm.register_autograd(_backward, setup_context=_setup_context)
