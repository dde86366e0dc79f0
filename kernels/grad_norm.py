"""The global norm of all gradients in two launches, summed in an order that is always the same.

Reads every gradient once and writes 4 bytes a chunk; PyTorch's foreach norm reads as much, in
several launches, and its norms of bf16 gradients are rounded to bf16 on the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunks
from .chunks import FIRST_CHUNK, GRAD, TRITON_DTYPES, Tables, end_of, pointer_to
from .tables import pick


def grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """The definition: [] fp32, the L2 norm of all elements, each tensor's norm in fp32."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


def grad_norm(tables: Tables) -> Tensor:
    """[] fp32, the L2 norm of the gradients in the tables; 0 where there are none."""
    norm = torch.empty((), device=tables.rows.device)
    blocks = pick("grad_norm.partial", norm.device)
    for launch in tables.launches:
        if launch.grad is None:
            continue
        compiled_for: dict[str, Any] = {
            "GRAD_DTYPE": TRITON_DTYPES[launch.grad],
            "ALIGNED": launch.aligned,
            "CHUNK": chunks.CHUNK,
        }
        arguments = (launch.chunks, tables.rows, tables.partials, tables.rows.shape[1])
        _partial_kernel[(len(launch.chunks),)](*arguments, **compiled_for, **blocks)
    partials = tables.partials
    _total_kernel[(1,)](partials, norm, len(partials), **pick("grad_norm.total", norm.device))
    return norm


@triton.jit
def _partial_kernel(
    all_chunks, rows, partials, columns,
    GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the squares of one chunk, to the place of the chunk in the order of parameters."""
    chunk = all_chunks + 2 * tl.program_id(0)
    row, part = rows + tl.load(chunk) * columns, tl.load(chunk + 1)
    first = part.to(tl.int64) * CHUNK
    grad = pointer_to(row, GRAD, first, GRAD_DTYPE, ALIGNED)
    end = end_of(row, first, CHUNK, ALIGNED)
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < end:
        at = start + offset
        value = tl.load(grad + at, mask=at < end, other=0.0).to(tl.float32)
        total += value * value
        start += BLOCK
    place = tl.load(row + FIRST_CHUNK) + part
    tl.store(partials + place, tl.sum(total))


@triton.jit
def _total_kernel(partials, norm, count, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < count:
        at = start + offset
        total += tl.load(partials + at, mask=at < count, other=0.0)
        start += BLOCK
    tl.store(norm, tl.sqrt_rn(tl.sum(total)))
