"""A CUDA graph for a CPU: what a call did to tensors, done again without its Python.

As a graph does, it replays the same operations on the same memory. What the host decided when the
call was recorded, a number or a branch, stays as it was then; and recording moves nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple, dict, Any]] = []
        self.made: set[int] = set()  # addresses of memory that the call made
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that was there, and its values

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        # Detached: the memory is wanted, not the history that would keep all of it alive.
        given = tree_map_only(Tensor, lambda t: t.detach(), (arguments, named))
        for tensor in _tensors(given):
            address = tensor.untyped_storage().data_ptr()
            if address not in self.made and address not in self.before:
                self.before[address] = _whole(tensor), _whole(tensor).clone()
        result = function(*arguments, **named)
        kept = tree_map_only(Tensor, lambda t: t.detach(), result)
        for tensor in _tensors(kept):
            address = tensor.untyped_storage().data_ptr()
            if address not in self.before:
                self.made.add(address)
        self.done.append((function, *given, kept))
        return result

    def undo(self) -> None:
        """Puts all memory back that was there before."""
        for memory, values in self.before.values():
            memory.copy_(values)

    def replay(self) -> None:
        with torch.no_grad():
            for function, arguments, named, kept in self.done:
                result = function(*arguments, **named)
                for old, new in zip(_tensors(kept), _tensors(result), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.done.clear()


def _whole(tensor: Tensor) -> Tensor:
    """[bytes], all the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def record(call: Callable[[], Any], beside: Recorded | None = None) -> tuple[Recorded, Any]:
    """As `record_graph`."""
    recorded = Recorded()
    with recorded:
        result = call()
    recorded.undo()
    return recorded, result
