"""Small kernels with a known fault, captured and compiled: what test_compiled.py runs in a process
of its own, because the tests' process has Triton's functions exchanged for interpreted ones.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from fusedit.benchmarks.captured import Captured, Launch, recorded
from fusedit.benchmarks.machine_code import Record, build


@triton.jit
def copy(source, out, size, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, tl.load(source + at * stride, mask=inside), mask=inside)


@triton.jit
def product(a, b, out, SIDE: tl.constexpr):
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    at = row * SIDE + column
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def softmax(source, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(source + at)
    exponential = tl.exp(row - tl.max(row))
    tl.store(out + at, exponential / tl.sum(exponential))


@triton.jit
def wrong(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.arange(0, BLOCK - 1))


def bf16(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16)


def capture(kernel, *arguments, **blocks) -> Launch:
    with recorded("sm_90") as record:
        kernel[(1,)](*arguments, **blocks)
    (launch,) = record.launches.values()
    return launch


def specialized() -> tuple[Launch, Launch]:
    """An address off by two bytes and a 1; numbers that 16 does not divide, and of 64 bits."""
    return (
        capture(copy, bf16(65)[1:], bf16(64), 48, 1, BLOCK=64, num_warps=2),
        capture(copy, bf16(64), bf16(64), 33, 2**40, BLOCK=64),
    )


def not_run() -> torch.Tensor:
    out = torch.zeros(64)
    capture(copy, torch.ones(64), out, 64, 1, BLOCK=64)
    return out


def repeated() -> Captured:
    """48 and 64 are both multiples of 16, 65 is none."""
    with recorded("sm_90") as record:
        for size in (48, 64, 65):
            copy[(1,)](bf16(128), bf16(128), size, 1, BLOCK=64)
    return record


def aligned_and_not() -> list[Record]:
    sources = [bf16(1088)[start : start + 1024] for start in (0, 1)]
    return [
        build("sm_90", capture(copy, source, bf16(1024), 1024, 1, BLOCK=1024)) for source in sources
    ]


def in_few_registers() -> list[Record]:
    """The same launch, free to use registers, and held to 32 of them."""
    launch = capture(softmax, torch.empty(4096), torch.empty(4096), BLOCK=4096, num_warps=1)
    held = replace(launch, options={**launch.options, "maxnreg": 32})
    return [build("sm_90", one) for one in (launch, held)]


def products(family: str) -> Record:
    return build(family, capture(product, *(bf16(4096) for _ in range(3)), SIDE=64, num_warps=4))


def uncompilable() -> Record:
    return build("sm_90", capture(wrong, bf16(64), BLOCK=64))
