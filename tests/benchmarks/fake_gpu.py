"""A GPU that is none: torch.cuda's streams, events and graphs on the CPU, with a clock of its own.

What runs on a GPU only can so be run here, from its flags to its files. Times mean nothing: an
event's is the number of events before it.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode


class Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


class Event:
    ticks = itertools.count()

    def __init__(self, *, enable_timing: bool) -> None:
        self.at = None

    def record(self) -> None:
        self.at = next(self.ticks)

    def elapsed_time(self, end: "Event") -> float:
        assert self.at is not None
        assert end.at is not None
        return float(end.at - self.at)


class Graph:
    """Captures nothing: the calls have run once, while they were captured."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        assert self.replays


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU lie on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def faked(l2_bytes: int = 2**16) -> Iterator[None]:
    properties = SimpleNamespace(L2_cache_size=l2_bytes, uuid="0")
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "Fake H100",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: nullcontext(),
    }
    from fusedit.kernels import tables

    with pytest.MonkeyPatch.context() as patch, OnCpu():
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "compile", lambda function, **_: function)
        yield
    tables.family.cache_clear()
