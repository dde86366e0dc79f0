"""Triton's interpreter, for kernel tests without a GPU: switched on, and made right for bf16.

The interpreter of Triton 3.6 to 3.9 truncates when it rounds fp32 to bf16, and multiplies the raw
bits of bf16 in `tl.dot` (triton-lang/triton#11584, refused). Numpy has no bf16: the interpreter
carries it as uint16, and every conversion is its own affair.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    TensorHandle,
)
from triton.runtime.jit import JITFunction


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, the kernels of fusedit run on the CPU, interpreted.

    Triton decides when a kernel is defined, so the kernels are exchanged in their modules, and what
    other tests of the same process see stays as it was.
    """
    from fusedit.kernels import dispatch

    ours_and_tritons = ("fusedit.kernels.", "triton.language")  # tl.sum is a kernel function too
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(ours_and_tritons)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "INTERPRETED", True)
        patch.setenv("TRITON_INTERPRET", "1")
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(value.fn))
        repair_bf16(patch)
        sum_as_a_gpu_does(patch)
        yield


def repair_bf16(patch: pytest.MonkeyPatch) -> None:
    """Rounds fp32 to bf16 to nearest even, and multiplies values, not bits, in `tl.dot`."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def converted(source: TensorHandle, to: tl.dtype) -> TensorHandle | None:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(to_bf16(source.data), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return TensorHandle(to_fp32(source.data), tl.float32)
        return None

    def right_cast(self, source, to):
        done = converted(source, to)
        return cast(self, source, to) if done is None else done

    def right_fp_to_fp(self, source, to, rounding):
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        done = converted(source, to) if nearest else None
        return fp_to_fp(self, source, to, rounding) if done is None else done

    def values(handle):
        done = converted(handle, tl.float32)
        return handle if done is None else done  # a handle that holds a zero counts as False

    def right_dot(self, a, b, *rest):
        return dot(self, values(a), values(b), *rest)

    patch.setattr(InterpreterBuilder, "cast_impl", right_cast)
    patch.setattr(InterpreterBuilder, "create_fp_to_fp", right_fp_to_fp)
    patch.setattr(InterpreterBuilder, "create_dot", right_dot)


def sum_as_a_gpu_does(patch: pytest.MonkeyPatch) -> None:
    """Adds up several partial sums; numpy goes through any axis but the last one by one."""

    def summed(self, source):
        if self.axis is None:
            total = np.sum(source.handle.data.ravel(), keepdims=self.keep_dims)
        else:
            last = np.ascontiguousarray(np.moveaxis(source.handle.data, self.axis, -1))
            total = np.sum(last, axis=-1)
            total = np.expand_dims(total, self.axis) if self.keep_dims else total
        return self.to_tensor(total, source.dtype)

    patch.setattr(ReduceOps, "sum", summed)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16 as uint16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    rounded = np.where(np.isnan(values), np.uint32(0x7FC0), rounded)
    return rounded.astype(np.uint16).reshape(values.shape)


def to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)
