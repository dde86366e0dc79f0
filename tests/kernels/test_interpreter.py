"""The repairs of Triton's interpreter, beside what it does without them.

Tests that show the fault fail when a Triton without it comes: then the repair can go.
"""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from interpreter import interpreted, to_bf16, to_fp32
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps
from triton.runtime.jit import JITFunction

from fusedit.kernels import dispatch, geglu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted")

FAULTY = {
    name: getattr(InterpreterBuilder, name)
    for name in ("cast_impl", "create_fp_to_fp", "create_dot")
}  # as they are before the package's fixture repairs them
PLAIN_SUM = ReduceOps.sum  # likewise

# fp32 by bits: zeros, ties down and up, just beside ties, largest bf16 and what overflows to
# infinity, subnormals of both, infinities, NaNs of which one has its payload in the low bits.
EDGES = [
    0x00000000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3F817FFF, 0x3F818001,
    0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x007FFFFF, 0x00800000, 0x00000001,
    0x00008000, 0x00008001, 0x00018000, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF,
]  # fmt: skip
EDGES += [bits | 0x80000000 for bits in EDGES]
SIDE = 16  # the least that tl.dot takes


def convert_kernel(source, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at))


def cast_kernel(source, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at).to(tl.bfloat16).to(tl.float32))


def nearest_kernel(source, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    narrow = tl.load(source + at).to(tl.bfloat16, fp_downcast_rounding="rtne")
    tl.store(out + at, narrow.to(tl.float32))


def dot_kernel(a, b, out, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def sum_kernel(source, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    block = tl.load(source + tl.arange(0, ROWS)[:, None] * COLUMNS + column[None, :])
    tl.store(out + column, tl.sum(block, axis=0))


convert, cast, nearest = map(InterpretedFunction, (convert_kernel, cast_kernel, nearest_kernel))
dot, add_up = map(InterpretedFunction, (dot_kernel, sum_kernel))
ways = pytest.mark.parametrize("kernel", [convert, cast, nearest], ids=["store", "to", "rtne"])


@triton.jit
def compiled_elsewhere(out):
    tl.store(out, 1.0)


@pytest.fixture
def unrepaired(monkeypatch):
    for name, method in FAULTY.items():
        monkeypatch.setattr(InterpreterBuilder, name, method)


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))


def bf16_bits(kernel, values: torch.Tensor) -> torch.Tensor:
    """What the kernel stores in bf16, every NaN as the same one."""
    padded = torch.zeros(triton.next_power_of_2(len(values)))
    padded[: len(values)] = values
    out = torch.empty(len(padded), dtype=torch.bfloat16 if kernel is convert else torch.float32)
    kernel[(1,)](padded, out, BLOCK=len(padded))
    return same_nans(out[: len(values)].to(torch.bfloat16))


def same_nans(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values.isnan(), torch.nan, values).view(torch.int16)


@ways
def test_edges_are_rounded_as_torch_rounds_them(kernel):
    values = from_bits(EDGES)
    assert torch.equal(bf16_bits(kernel, values), same_nans(values.to(torch.bfloat16)))


@ways
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_any_bits_are_rounded_as_torch_rounds_them(kernel, bits):
    values = from_bits(bits)
    assert torch.equal(bf16_bits(kernel, values), same_nans(values.to(torch.bfloat16)))


def test_random_bits_are_rounded_as_torch_rounds_them():
    bits = np.random.default_rng(0).integers(0, 2**32, 2**20, np.uint32)
    values = bits.view(np.float32)
    ours = torch.from_numpy(to_bf16(values).view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(same_nans(ours), same_nans(expected))


def test_bf16_widens_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    ours = torch.from_numpy(to_fp32(every.numpy().view(np.uint16)))
    expected = every.view(torch.bfloat16).float()
    assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))
    out = torch.empty(256)
    some = every[:: 2**8].contiguous().view(torch.bfloat16)
    convert[(1,)](some, out, BLOCK=256)
    assert torch.equal(out.nan_to_num(7.0), some.float().nan_to_num(7.0))


def test_shapes_and_strides_of_a_block_are_kept():
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert np.array_equal(to_fp32(to_bf16(values)), values)
    assert to_bf16(np.float32(1.5).reshape(())).shape == ()


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """tl.dot of random blocks, and the fp64 product of the same values."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    out = torch.empty(SIDE, SIDE)
    dot[(1,)](a, b, out, SIDE=SIDE)
    return out.double(), a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_multiplies_values(dtype):
    ours, truth = product(dtype)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_dot_multiplies_values_beside_zeros():
    a, b = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    a[3:] = 0
    out = torch.empty(SIDE, SIDE)
    dot[(1,)](a, b, out, SIDE=SIDE)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_dot_takes_an_accumulator():
    def kernel(a, b, out, SIDE: tl.constexpr):
        at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), tl.load(out + at)))

    a, b = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    out = torch.ones(SIDE, SIDE)
    InterpretedFunction(kernel)[(1,)](a, b, out, SIDE=SIDE)
    torch.testing.assert_close(out, 1 + a.float() @ b.float())


def test_long_sums_over_rows_are_as_exact_as_torch():
    source = torch.rand(4096, 2)
    out = torch.empty(2)
    add_up[(1,)](source, out, ROWS=4096, COLUMNS=2)
    truth = source.double().sum(0)
    assert (out - truth).abs().max() <= 2 * max(
        (source.sum(0) - truth).abs().max(), truth.max() * torch.finfo(torch.float32).eps / 2
    )


def test_without_the_repair_a_store_truncates(unrepaired):
    values = from_bits([0x3F80FFFF])  # just below the next bf16
    assert bf16_bits(convert, values).item() == 0x3F80
    assert same_nans(values.to(torch.bfloat16)).item() == 0x3F81


def test_without_the_repair_dot_multiplies_bits(unrepaired):
    ours, truth = product(torch.bfloat16)
    assert (ours - truth).abs().max() > 1e6


def test_without_the_repair_a_sum_over_rows_is_worse(monkeypatch):
    source, sums = torch.rand(4096, 2), []
    truth = source.double().sum(0)
    for repaired in (True, False):
        if not repaired:
            monkeypatch.setattr(ReduceOps, "sum", PLAIN_SUM)
        out = torch.empty(2)
        add_up[(1,)](source, out, ROWS=4096, COLUMNS=2)
        sums.append((out - truth).abs().max())
    assert sums[1] > 4 * sums[0]


def state() -> dict:
    """All that `interpreted` exchanges."""
    return {
        "dispatch": dispatch.INTERPRETED,
        "environment": os.environ.get("TRITON_INTERPRET"),
        "kernel": geglu._forward_kernel,
        "tl.sum": tl.sum,
        "tl.standard": tl.standard.sum,
        "sum": ReduceOps.sum,
        **{name: getattr(InterpreterBuilder, name) for name in FAULTY},
    }


def test_all_is_exchanged_inside_and_put_back_after(monkeypatch):
    monkeypatch.setattr(geglu, "_forward_kernel", compiled_elsewhere)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.delenv("TRITON_INTERPRET")
    before = state()
    with interpreted():
        assert isinstance(geglu._forward_kernel, InterpretedFunction)
        assert dispatch.INTERPRETED
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert not [name for name in FAULTY if before[name] is getattr(InterpreterBuilder, name)]
    assert state() == before


def test_all_is_put_back_after_an_error(monkeypatch):
    monkeypatch.setattr(geglu, "_forward_kernel", compiled_elsewhere)
    before = state()
    with pytest.raises(KeyError), interpreted():
        raise KeyError
    assert state() == before
    assert isinstance(geglu._forward_kernel, JITFunction)


def test_kernels_run_interpreted_here():
    assert isinstance(geglu._forward_kernel, InterpretedFunction)
    assert isinstance(tl.sum, InterpretedFunction)
    assert dispatch.runs_triton(torch.empty(1))
