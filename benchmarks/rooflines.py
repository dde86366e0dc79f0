"""The least time that the UNet's work takes on this machine, by kind of operation.

An operation takes the longer of its FLOPs at what a large matrix product reaches here, and its
bytes, inputs read and outputs written once, at what a large copy moves here. Both are counted by
`trainer/counting.py`, with the fused ops, in the run's own dtypes.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..trainer.counting import KINDS, Work, at
from .harness import Record
from .timing import Timer, ceilings

SIDE, COPY_BYTES, REPEATS = 2048, 2**28, 7  # of the product and the copy on a CPU


class Ceilings(NamedTuple):
    flops_per_s: float
    copy_bytes_per_s: float  # read + written


def find_ceilings(record: Record) -> Ceilings:
    """Of the GPU, written into the record as well; else of the CPU in fp32, with all its cores."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        found = record["ceilings"] = record["ceilings"] or ceilings(Timer(device), device)
        return Ceilings(found["bf16_flops_per_s"], found["copy_bytes_per_s"])
    matrix, source = torch.randn(SIDE, SIDE), torch.randn(COPY_BYTES // 4)
    target = torch.empty_like(source)
    product_s = seconds_of(lambda: torch.mm(matrix, matrix))
    return Ceilings(
        2 * SIDE**3 / product_s, 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source))
    )


def seconds_of(call: Callable[[], object]) -> float:
    """The median of some calls, after one."""
    call()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def ideal_ms(work: Work, images: int, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds by kind, for so many images."""
    flops, moved = at(work.flops, images), at(work.moved_bytes, images)
    each = torch.maximum(flops / ceilings.flops_per_s, moved / ceilings.copy_bytes_per_s)
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for kind, seconds in zip(work.kinds, each.tolist(), strict=True):
        found[kind] += 1e3 * seconds
    return found
