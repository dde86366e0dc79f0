"""Attention at Stable Diffusion's head widths, 40, 64, 80 and 160, straight from the projections.

Other kernels widen 40, 80 and 160 to 64, 96 or 128, and 192 or 256; here 40 is 32 + 16, 80 is
64 + 16, 160 is 128 + 32. Queries, keys and values may lie in one tensor, as one matrix product
makes them, and their gradients come in such a tensor too: nothing is copied or transposed.
The backward keeps the output and the log-sum-exp alone, and its bits are the same on every run.
Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; Dao 2023 (arXiv:2307.08691).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from . import attention_kernels as kernels
from . import short_attention_kernels as short_kernels
from .dispatch import check_dtypes, check_shape, on_its_device, runs_triton
from .tables import pick

MAX_HEAD_WIDTH = 160
ALIGNMENT = 8  # elements: 16 bytes, of which head widths and strides are multiples
SHORT_KEYS = 128  # at most, for a program to hold all of them,
SHORT_SIZE = 80 * 160  # and at most so many elements of theirs: shared memory of 99 KB must do
MAX_SPAN = 2**31  # elements from a sample's first row to its last: offsets inside are 32 bits
LEAST_PART = 16  # of rows or columns, that a matrix instruction takes
LOG2_E = math.log2(math.e)
SMALLEST = torch.finfo(torch.float32).tiny


def attention_reference(*projections: Tensor, scale: float | None = None) -> Tensor:
    """The definition: PyTorch's, which works on [n, heads, rows, width]."""
    q, k, v = (part.transpose(1, 2) for part in unpacked(projections))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def attention(*projections: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v in every head.

    Args:
        projections: (qkv), (q, kv) or (q, k, v), of one dtype:
            qkv [n, rows, 3, heads, width], for self-attention;
            q [n, queries, heads, width]; kv [n, keys, 2, heads, width];
            k, v [n, keys, heads, width]. Width is a multiple of 8 up to 160, keys at least 1.
            bf16 and fp16 run as kernels, with scores and sums in fp32; fp32 is the definition's.
        scale: finite and above 0, in fp32; default width ** -0.5.

    Returns: [n, queries, heads, width].
    Raises: ValueError, for another shape or scale; TypeError, for another dtype.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    first = _check(projections)
    scale = 1 / math.sqrt(first.shape[-1]) if scale is None else scale
    if not SMALLEST <= scale < math.inf:
        raise ValueError(f"attention: scale must be finite and above {SMALLEST:.2g}, got {scale}")
    if not runs_triton(first) or first.dtype == torch.float32:
        return attention_reference(*projections, scale=scale)
    return _attention(first, list(projections[1:]), scale)[0]


def unpacked(projections: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, views of what they came in."""
    *others, last = projections
    q, k, v = (*others, *last.unbind(2)) if len(projections) < 3 else projections
    return q, k, v


def _check(projections: tuple[Tensor, ...]) -> Tensor:
    """Raises for what is not served; returns the first projection."""
    if not 1 <= len(projections) <= 3:
        raise ValueError(f"attention: takes qkv, q and kv, or q, k and v; got {len(projections)}")
    named = dict(zip((("qkv",), ("q", "kv"), ("q", "k", "v"))[len(projections) - 1],
                     projections, strict=True))  # fmt: skip
    check_dtypes("attention", **named)
    first = projections[0]
    for name, tensor in named.items():
        packed = {"qkv": (3,), "kv": (2,)}.get(name, ())
        if tensor.dim() != 4 + len(packed):
            sizes = ", ".join(["n", "rows", *map(str, packed), "heads", "width"])
            raise ValueError(f"attention: {name} must be [{sizes}], got {list(tensor.shape)}")
        rows = tensor.shape[1] if name != "v" else projections[1].shape[1]
        check_shape("attention", name, tensor, (len(first), rows, *packed, *first.shape[-2:]))
        if tensor.dtype != first.dtype:
            raise TypeError(f"attention: {name} must be {first.dtype}, got {tensor.dtype}")
        if tensor.shape[1] * max(tensor.stride(1), math.prod(tensor.shape[2:])) >= MAX_SPAN:
            raise ValueError(f"attention: a sample of {name} spans {MAX_SPAN} elements or more")
        if name != "q" and not tensor.shape[1]:
            raise ValueError(f"attention: {name} must have a row, got {list(tensor.shape)}")
    width = first.shape[-1]
    if width % ALIGNMENT or not 0 < width <= MAX_HEAD_WIDTH:
        raise ValueError(
            f"attention: the heads' width must be a multiple of {ALIGNMENT} up to "
            f"{MAX_HEAD_WIDTH}, got {width}"
        )
    return first


class Parts(NamedTuple):
    """Two powers of two that hold a size, or one and 0 where that is no larger."""

    first: int
    rest: int


def parts(size: int, *, split: bool) -> Parts:
    """How rows or columns are held: 40 as 32 + 16, or unsplit as 64."""
    whole: Any = max(LEAST_PART, triton.next_power_of_2(size))
    half = whole // 2
    # A rest below a quarter of the half would spread too thin over the warps.
    rest: Any = max(LEAST_PART, half // 4, triton.next_power_of_2(size - half))
    return Parts(half, rest) if split and half + rest < whole else Parts(whole, 0)


def _heads(tensor: Tensor) -> Tensor:
    """[n, rows, heads, width] with strides the kernels take; copied only where it has others."""
    *far, head, column = tensor.stride()
    near = column == 1 and (head == tensor.shape[3] or tensor.shape[2] == 1)
    return tensor if near and not any(s % ALIGNMENT for s in far) else tensor.contiguous()


def _inputs(first: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = map(_heads, unpacked([first, *others]))
    return (q, k, v) if k.stride() == v.stride() else (q, k.contiguous(), v.contiguous())


def _far_strides(*tensors: Tensor) -> list[int]:
    """Of each, the distances of samples and of rows, in units of ALIGNMENT elements."""
    return [stride // ALIGNMENT for tensor in tensors for stride in tensor.stride()[:2]]


class Plan(NamedTuple):
    """How a kernel is launched."""

    blocks: dict[str, Any]
    programs: int  # a head; 0: not to be used


def _plan(name: str, q: Tensor, k: Tensor, *, of_keys: bool = False) -> Plan:
    """The table's entry for these sizes, with what follows from it."""
    (n, queries, heads, width), keys = q.shape, k.shape[1]
    blocks = pick(f"attention.{name}", q.device, width=width, keys=keys)
    if not blocks["QUERIES"]:
        return Plan(blocks, 0)
    columns = parts(width, split=bool(blocks.pop("SPLIT")))
    blocks |= {"D": width, "WIDE": columns.first, "NARROW": columns.rest}
    held = blocks.get("KEYS", 0)
    if not held:  # the kernel holds all of them
        rows = parts(keys, split=bool(blocks.pop("SPLIT_KEYS", 0)))
        blocks["KEYS"], held = rows.first, sum(rows)
        if name == "short_forward":
            blocks["MORE_KEYS"] = rows.rest
    blocks["EVEN_Q"] = queries % blocks["QUERIES"] == 0
    blocks["EVEN_K"] = keys % held == 0
    programs: Any = triton.cdiv(keys, held) if of_keys else triton.cdiv(queries, blocks["QUERIES"])
    if "PROGRAMS" in blocks:  # of all heads, which share the tiles
        programs = min(programs, triton.cdiv(blocks.pop("PROGRAMS"), n * heads))
    return Plan(blocks, programs)


def _is_short(k: Tensor) -> bool:
    """Whether a program can hold all keys of a head."""
    _, keys, _, width = k.shape
    return keys <= SHORT_KEYS and keys * width <= SHORT_SIZE


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor):
    """Fills the last two."""
    (n, queries, heads, _), keys = q.shape, k.shape[1]
    short = _is_short(k)
    plan = _plan("short_forward" if short else "forward", q, k)
    sizes = (queries, keys, heads, plan.programs) if short else (queries, keys, heads)
    kernel: Any = short_kernels.forward_kernel if short else kernels.forward_kernel
    kernel[(plan.programs * heads * n,)](
        q, k, v, out, lse, *sizes, *_far_strides(q, k), scale * LOG2_E, **plan.blocks
    )


def _launch_backward(grad_out, q, k, v, out, lse, scale, grad_q, grad_k, grad_v) -> None:
    """Fills the last three."""
    (n, queries, heads, _), keys = q.shape, k.shape[1]
    slopes = scale * LOG2_E, scale
    if _is_short(k):
        plan = _plan("short_backward", q, k)
        if plan.programs:
            _launch_short_backward(
                plan, grad_out, q, k, v, out, lse, slopes, grad_q, grad_k, grad_v
            )
            return
    delta = torch.empty_like(lse)
    plan = _plan("backward_queries", q, k)
    kernel: Any = kernels.backward_queries_kernel
    kernel[(plan.programs * heads * n,)](
        q, k, v, out, lse, grad_out, delta, grad_q,
        queries, keys, heads, *_far_strides(q, k, grad_q), *slopes, **plan.blocks,
    )  # fmt: skip
    plan = _plan("backward_keys", q, k, of_keys=True)
    kernel = kernels.backward_keys_kernel
    kernel[(plan.programs * heads * n,)](
        q, k, v, lse, grad_out, delta, grad_k, grad_v,
        queries, keys, heads, *_far_strides(q, k, grad_k), *slopes, **plan.blocks,
    )  # fmt: skip


def _launch_short_backward(
    plan: Plan, grad_out, q, k, v, out, lse, slopes, grad_q, grad_k, grad_v
) -> None:
    n, queries, heads, width = q.shape
    keys, partials, to_k, to_v, apart = k.shape[1], None, grad_k, grad_v, 0
    if plan.programs > 1:
        shape = plan.programs, 2, n, keys, heads, width
        partials = q.new_empty(shape, dtype=torch.float32)
        to_k, to_v, apart = partials[0, 0], partials[0, 1], partials.stride(0) // ALIGNMENT
    kernel: Any = short_kernels.backward_kernel
    kernel[(plan.programs * heads * n,)](
        q, k, v, out, lse, grad_out, grad_q, to_k, to_v,
        queries, keys, heads, plan.programs, *_far_strides(q, k, grad_q), apart,
        *_far_strides(to_k), *slopes, **plan.blocks,
    )  # fmt: skip
    if partials is not None:
        blocks = pick("attention.sum", q.device)
        rows, columns = n * keys, heads * width
        grid = triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(columns, blocks["COLUMNS"])
        kernel = short_kernels.sum_kernel
        kernel[grid](
            partials, grad_k, grad_v,
            plan.programs, rows, columns // ALIGNMENT, keys, *_far_strides(grad_k), **blocks,
        )  # fmt: skip


def _outputs(first: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the output, and for the log-sum-exp in base 2 of each query's scaled scores."""
    n, queries, *_, heads, width = first.shape
    lse = first.new_empty((n, heads, queries), dtype=torch.float32)
    return first.new_empty((n, queries, heads, width)), lse


@torch.library.custom_op("fusedit::attention", mutates_args=())
@on_its_device
def _attention(first: Tensor, others: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(first)
    if out.numel():
        _launch_forward(*_inputs(first, others), scale, out, lse)
    return out, lse


@torch.library.custom_op("fusedit::attention_backward", mutates_args=())
@on_its_device
def _attention_backward(
    grad_out: Tensor, projections: list[Tensor], out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """The gradient of each projection, contiguous."""
    grads = _grads(projections)
    if out.numel():
        first, *others = projections
        inputs = _inputs(first, others)
        _launch_backward(grad_out.contiguous(), *inputs, out, lse, scale, *unpacked(grads))
    else:
        for grad in grads:
            grad.zero_()
    return grads


def _grads(projections: list[Tensor]) -> list[Tensor]:
    return [projection.new_empty(projection.shape) for projection in projections]


@_attention.register_fake
def _(first, others, scale):
    return _outputs(first)


@_attention_backward.register_fake
def _(grad_out, projections, out, lse, scale):
    return _grads(projections)


def _setup_context(ctx, inputs, output):
    first, others, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # else a gradient of zeros is made for the log-sum-exp
    ctx.save_for_backward(first, *others, *output)


def _backward(ctx, grad_out, _):
    *projections, out, lse = ctx.saved_tensors
    first, *others = _attention_backward(grad_out, projections, out, lse, ctx.scale)
    return first, others, None


_attention.register_autograd(_backward, setup_context=_setup_context)
