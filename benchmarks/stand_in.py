"""A GPU that is none: torch.cuda's streams, events and graphs on the CPU, by the host's clock.

What needs a GPU runs on it anywhere, from its flags to its files. A graph keeps the operations that
ran during its capture, and replays them into the same tensors; unlike a GPU's it has run them once
by then. Compiled functions are traced as ever, run by PyTorch's own operations, and captured as
they are written.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from ..kernels import tables

L2_BYTES = 2**16
CAPABILITY = (9, 0)


class Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


class Event:
    def __init__(self, *, enable_timing: bool) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = time.perf_counter_ns()

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) / 1e6


class Graph:
    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple, dict, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, kept in self.calls:
                _copy_into(kept, function(*args, **kwargs))

    def reset(self) -> None:
        self.calls.clear()


class Capturing(TorchDispatchMode):
    """Inside, every operation is noted; as torch.cuda.graph."""

    def __init__(self, graph: Graph, **_: object) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, result))
        return result


def _copy_into(kept: object, fresh: object) -> None:
    """Tensors to where a capture left them; views, and what was changed in place, are there."""
    for old, new in zip(tree_leaves(kept), tree_leaves(fresh), strict=True):
        if not isinstance(old, Tensor) or old.shape != new.shape:  # or it was resized afterwards
            continue
        if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU lie on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def standing_in(name: str, compile_backend: str = "aot_eager") -> Iterator[None]:
    """Inside, there is one GPU of this name."""
    own_compile: Any = torch.compile

    def compiled(model: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        found = own_compile(model, **settings | {"backend": compile_backend})

        def call(*args: Any, **kwargs: Any) -> Any:
            if isinstance(_get_current_dispatch_mode(), Capturing):  # which notes operations alone
                return model(*args, **kwargs)
            with patch.object(torch.cuda, "is_available", lambda: False):  # of its random numbers
                return found(*args, **kwargs)

        return call

    properties = SimpleNamespace(L2_cache_size=L2_BYTES, uuid="0")
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: name,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_properties": lambda *_: properties,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capturing,
    }
    tables.family.cache_clear()
    try:
        with ExitStack() as stack:
            for attribute, value in replaced.items():
                stack.enter_context(patch.object(torch.cuda, attribute, value))
            stack.enter_context(patch.object(torch, "compile", compiled))
            stack.enter_context(OnCpu())
            yield
    finally:
        tables.family.cache_clear()
