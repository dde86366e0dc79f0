"""Counts kernel launches, on a GPU and under the interpreter alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


class Launches(list[str]):
    """The names of the kernels launched, in order."""


@contextmanager
def counted() -> Iterator[Launches]:
    launches = Launches()

    def recording(run):
        def recorded(self, *args, **kwargs):
            launches.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", recording(kind.run))
        yield launches
