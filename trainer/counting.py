"""What a forward and backward takes, op by op: FLOPs, bytes moved, bytes alive. No device is used.

Modules run on fake tensors, which have shapes, dtypes and lifetimes but neither memory nor
arithmetic, by the rules of autocast on a GPU and with our ops where a GPU has them. Every number is
linear in the images of a micro-batch, op by op, so two counts tell those of any micro-batch.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

KINDS = ("convolution", "linear", "attention", "elementwise")
COUNTED = 2, 3  # images; with one, some copies are left out
_KIND_OF = {
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "mm": "linear",
    "addmm": "linear",
    "bmm": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
}


class Work(NamedTuple):
    """Of each op, in order; [2, ops] fp64: of no image, and of each image more."""

    kinds: list[str]  # of KINDS
    flops: Tensor
    moved_bytes: Tensor  # inputs read and outputs written once
    alive_bytes: Tensor  # after the op, beside parameters and their gradients

    def peak(self, images: int) -> tuple[float, float]:
        """Bytes alive when the most is: those of any number of images, those that grow with it."""
        fixed, growing = self.alive_bytes[:, at(self.alive_bytes, images).argmax()].tolist()
        return fixed, images * growing


def at(numbers: Tensor, images: int) -> Tensor:
    """[ops]: a number of Work for so many images."""
    return numbers[0] + images * numbers[1]


def count(module: nn.Module, run: Callable[[int], None]) -> Work:
    """Counts what is done with a module.

    Args:
        module: on the meta device; its tensors are exchanged for fake ones.
        run: what is done with it for so many images; makes its inputs on the CPU.

    Raises: ValueError: another number of images does other ops.
    """
    first, second = (_record(module, run, images) for images in COUNTED)
    if first.kinds != second.kinds:
        raise ValueError(f"other ops for {COUNTED[1]} images than for {COUNTED[0]}")
    slopes = (second.numbers() - first.numbers()) / (COUNTED[1] - COUNTED[0])
    linear = torch.stack((first.numbers() - COUNTED[0] * slopes, slopes), dim=1)
    return Work(first.kinds, *linear)


def again_as_on_gpu() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` of what gradient checkpointing computes again: a backward has no modes."""
    return nullcontext(), _AsOnGpu()


def _record(module: nn.Module, run: Callable[[int], None], images: int) -> "_Recorder":
    with FakeTensorMode():
        standing = list(_make_fake(module))
        with _AsOnGpu(), _Recorder(standing) as recorder:
            run(images)
    return recorder


def _make_fake(module: nn.Module) -> Iterator[Tensor]:
    """Exchanges parameters and buffers for fake ones, and yields them and their gradients."""
    for owner in module.modules():
        for name, old in [*owner.named_parameters(recurse=False)]:
            new = nn.Parameter(_fake_like(old), requires_grad=old.requires_grad)
            setattr(owner, name, new)
            yield new
            if new.requires_grad:  # what a backward gives is added to it
                new.grad = _fake_like(old)
                yield new.grad
        for name, old in [*owner.named_buffers(recurse=False)]:
            setattr(owner, name, _fake_like(old))
            yield owner.get_buffer(name)


def _fake_like(old: Tensor) -> Tensor:
    return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)


class _AsOnGpu(TorchFunctionMode):
    """Fake CPU tensors take the ways of a GPU. A fake GPU tensor needs a GPU or its libraries."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given: dict[str, Any] = kwargs or {}
        if func == Tensor.is_cuda.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return True  # so that our kernels are taken
        if torch.is_autocast_enabled("cpu"):
            if func in (F.group_norm, F.layer_norm):  # fp32 under autocast on a GPU alone
                return func(args[0].float(), *args[1:], **given)
            if func is F.interpolate:  # fp32 under autocast on a CPU alone
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **given)
        return func(*args, **given)


class _Recorder(TorchDispatchMode):
    """Writes down every op.

    Args:
        standing: tensors that are there before and after; they are not counted as alive.
    """

    def __init__(self, standing: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary({one.untyped_storage(): True for one in standing})
        self.alive = 0
        self.kinds: list[str] = []
        self.rows: list[tuple[float, float, float]] = []

    def numbers(self) -> Tensor:
        """[3, ops] fp64: FLOPs, bytes moved, bytes alive."""
        return torch.tensor(self.rows, dtype=torch.float64).T

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        owned = {id(one.untyped_storage()) for one in inputs}
        moves = func._schema.is_mutable or any(
            id(one.untyped_storage()) not in owned for one in outputs
        )
        for tensor in outputs:
            self._meet(tensor.untyped_storage())
        kind = _KIND_OF.get(func._opname, "elementwise")
        flops = _flops(func, args, kwargs or {}, out, inputs)
        moved = sum(one.nbytes for one in inputs + outputs) if moves else 0
        self.kinds.append(kind)
        self.rows.append((flops, moved, self.alive))
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known[storage] = True
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._leave, storage.nbytes())

    def _leave(self, size: int) -> None:
        self.alive -= size


def _flops(func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor]) -> float:
    """Of the products of an op; two for a multiplication and its addition."""
    if func._opname.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        backward = func._opname.endswith("backward")
        query, key = inputs[1:3] if backward else inputs[:2]
        # Two products forward; backward those of four gradients, and the scores once more.
        return (10 if backward else 4) * query.numel() * key.shape[2]
    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0
