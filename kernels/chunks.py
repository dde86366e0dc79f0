"""One launch over many tensors: each program works on one chunk of one tensor's memory.

Two tables lie on the device: a row of addresses for each tensor, and the chunks, each the number of
its tensor and which part of it. They are made anew only when an address has changed, which the host
sees without asking the device, so a step is a handful of launches whatever the number of tensors.
Tensors are walked in the order of their memory: those of a row must have the same strides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import check_dtypes

OP = "AdamWEma"
TRITON_DTYPES = {
    None: None,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
CHUNK = 65536  # elements; a multiple of every BLOCK, so each part is as aligned as its tensor
WIDE = 16  # bytes of the widest load; also elements, so that a mask holds for whole loads
PER_DRAW = 4  # words of one Philox counter

# Columns of a tensor's row: elements, number of its first chunk, of its first Philox counter, and
# addresses, 0 for what it has not; those of its averages are last.
SIZE, FIRST_CHUNK, FIRST_DRAW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GRAD, PARAMETER, EXP_AVG = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
EXP_AVG_SQ, COPY, AVERAGES = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)


class Row(NamedTuple):
    """What one pass reads and writes of one parameter, of the same shape and strides."""

    grad: Tensor | None
    parameter: Tensor  # fp32: the parameter, or its master
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None  # the parameter where it has a master: bf16 or fp16
    averages: tuple[Tensor, ...]  # fp32


@dataclass(frozen=True, slots=True)
class Launch:
    """Chunks that one compiled kernel serves."""

    grad: torch.dtype | None
    copy: torch.dtype | None
    aligned: bool  # all addresses to 16 bytes, and 16 divides the elements: loads are wide
    chunks: Tensor  # [programs, 2] int32: tensor, part


@dataclass(frozen=True, slots=True)
class Tables:
    addresses: list[tuple]  # as `addresses` gave it, to tell whether all is still where it was
    rows: Tensor  # [tensors, columns] int64
    launches: list[Launch]
    has_grad: Tensor  # [tensors] fp32, 1 where there is a gradient, else 0
    partials: Tensor  # [chunks] fp32, for sums; 0 where there is no gradient


def addresses(rows: Sequence[Row]) -> list[tuple]:
    """Where all tensors lie, and how the gradients, which are not ours, are laid out."""
    found: list[tuple] = []
    for grad, parameter, exp_avg, exp_avg_sq, copy, averages in rows:
        layout = (0,) if grad is None else (grad.data_ptr(), grad.dtype, grad.stride())
        others = (parameter, exp_avg, exp_avg_sq, *averages)
        copies = 0 if copy is None else copy.data_ptr()
        found.append((*layout, copies, *(tensor.data_ptr() for tensor in others)))
    return found


def tables(rows: Sequence[Row], device: torch.device) -> Tables:
    """The tables of these rows, uploaded without waiting for the device.

    Raises: RuntimeError, inside a CUDA graph capture, which would replay addresses of the past.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{OP}: a tensor has moved since the last step, and a CUDA graph is being captured: "
            "run one step before, and keep gradients in place by zero_grad(set_to_none=False)"
        )
    sizes = torch.tensor([row.parameter.numel() for row in rows], dtype=torch.int64)
    parts = _parts(sizes, CHUNK)
    first_chunk, first_draw = parts.cumsum(0) - parts, _parts(sizes, PER_DRAW).cumsum(0)
    first_draw -= _parts(sizes, PER_DRAW)
    pointers = torch.tensor([_pointers(row) for row in rows], dtype=torch.int64)
    table = torch.cat((torch.stack((sizes, first_chunk, first_draw), dim=1), pointers), dim=1)

    tensor = torch.repeat_interleave(torch.arange(len(rows)), parts)
    part = torch.arange(len(tensor)) - first_chunk[tensor]
    chunks = torch.stack((tensor, part), dim=1).to(torch.int32)
    wide = (pointers % WIDE == 0).all(dim=1).tolist()
    kinds = [_kind(row, aligned) for row, aligned in zip(rows, wide, strict=True)]
    launches = []
    for kind in dict.fromkeys(kind for kind in kinds if kind is not None):
        of_kind = torch.tensor([other == kind for other in kinds])
        launches.append(Launch(*kind, upload(chunks[of_kind[tensor]], device)))
    has_grad = torch.tensor([float(row.grad is not None) for row in rows])
    return Tables(
        addresses(rows),
        upload(table, device),
        launches,
        upload(has_grad, device),
        torch.zeros(len(tensor), device=device),
    )


def _parts(sizes: Tensor, size: int) -> Tensor:
    return (sizes + (size - 1)) // size


def _pointers(row: Row) -> list[int]:
    tensors = (row.grad, row.parameter, row.exp_avg, row.exp_avg_sq, row.copy, *row.averages)
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _kind(row: Row, aligned: bool) -> tuple[torch.dtype | None, torch.dtype | None, bool] | None:
    """What a launch is compiled for; None, if a tensor has nothing to do."""
    if not row.parameter.numel() or (row.grad is None and not row.averages):
        return None
    grad = None if row.grad is None else row.grad.dtype
    copy = None if row.copy is None or row.grad is None else row.copy.dtype
    return grad, copy, aligned and row.parameter.numel() % WIDE == 0


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A table on the device, without waiting for it."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides that decide the order of memory."""
    return [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[0] != 1]


def check_parameter(parameter: Tensor, device: torch.device) -> None:
    """Raises ValueError or TypeError for a parameter that the passes cannot walk through."""
    check_dtypes(OP, parameter=parameter)
    if hasattr(parameter, "to_local"):
        raise TypeError(f"{OP}: a parameter must be a plain tensor, as its local shard is")
    if parameter.device != device:
        raise ValueError(f"{OP}: parameters must share a device, got {device}, {parameter.device}")
    dense = torch.empty_like(parameter, device="meta")
    if parameter.layout != torch.strided or _order(dense) != _order(parameter):
        raise ValueError(
            f"{OP}: a parameter must fill its memory without gaps, got shape "
            f"{list(parameter.shape)} with strides {list(parameter.stride())}"
        )


def check_averages(parameters: list[Tensor], averages: list[tuple[Tensor, ...]]) -> None:
    """Raises ValueError for an average that is not laid out as its parameter."""
    if len(averages) != len(parameters):
        raise ValueError(f"{OP}: {len(parameters)} parameters, but {len(averages)} averages")
    for parameter, of_one in zip(parameters, averages, strict=True):
        for average in of_one:
            same = average.dtype == torch.float32 and average.device == parameter.device
            if not same or average.shape != parameter.shape or _order(average) != _order(parameter):
                raise ValueError(
                    f"{OP}: an average must be fp32, shaped, laid out and placed as its parameter, "
                    f"{list(parameter.shape)} with strides {list(parameter.stride())}, "
                    f"got {average.dtype} {list(average.shape)} {list(average.stride())}"
                )


def check_copies(parameters: list[Tensor], copies: list[Tensor]) -> None:
    """Raises ValueError for a copy that cannot take its parameter's values in one pass."""
    if len(copies) != len(parameters):
        raise ValueError(f"{OP}: {len(parameters)} parameters, but {len(copies)} copies")
    for parameter, copy in zip(parameters, copies, strict=True):
        low = parameter.dtype == torch.float32 and copy.dtype in (torch.bfloat16, torch.float16)
        same = low and copy.device == parameter.device and copy.shape == parameter.shape
        if not same or _order(copy) != _order(parameter):
            raise ValueError(
                f"{OP}: a copy must be bf16 or fp16, of an fp32 parameter, shaped, laid out and "
                f"placed as it, {list(parameter.shape)} with strides {list(parameter.stride())}, "
                f"got {copy.dtype} {list(copy.shape)} {list(copy.stride())}"
            )


def check_row(row: Row) -> None:
    """Raises ValueError or TypeError for a gradient that is not laid out as its parameter."""
    grad, parameter = row.grad, row.parameter
    if grad is None or not parameter.numel():
        return
    check_dtypes(OP, grad=grad)
    if grad.layout != torch.strided or _order(grad) != _order(parameter):
        raise ValueError(
            f"{OP}: a gradient must lie in memory as its parameter, with strides "
            f"{list(parameter.stride())}, got {grad.layout} with {list(grad.stride())}"
        )


@triton.jit
def pointer_to(row, column, start, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of a tensor's row, `start` elements on."""
    address = tl.load(row + column)
    pointer = address.to(tl.pointer_type(dtype)) + start  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def end_of(row, start, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """How many elements a chunk has that starts at element `start` of its tensor."""
    end = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    if ALIGNED:
        end = tl.multiple_of(end, 16)
    return end
