"""The one rule for what runs: Triton on a GPU or under its interpreter, else the definition.

Every public op asks `runs_triton` and nothing else; there is no fallback from a kernel to its
definition. What neither serves, each op refuses by the checks below, on every machine alike.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton reads the variable when a kernel is defined, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def runs_triton(tensor: Tensor) -> bool:
    """True where the kernel runs on this tensor, False where its PyTorch definition does."""
    return tensor.is_cuda or INTERPRETED


Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_its_device(launcher: Launcher) -> Launcher:
    """Makes a launcher's first tensor's GPU the current one, on which Triton launches."""

    @wraps(launcher)
    def launch(tensor: Tensor, *args, **kwargs):
        if not tensor.is_cuda:
            return launcher(tensor, *args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launcher(tensor, *args, **kwargs)

    return cast(Launcher, launch)


def check_dtypes(op: str, **tensors: Tensor | None) -> None:
    """Raises for tensors whose dtype is none of DTYPES, or which do not share a device.

    Keywords are the tensors' names. Raises: TypeError, ValueError.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be fp32, bf16 or fp16, got {tensor.dtype}")
    check_devices(op, **given)


def check_devices(op: str, **tensors: Tensor) -> None:
    """Raises ValueError, if tensors do not share a device."""
    (first, tensor), *others = tensors.items()
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(
                f"{op}: {name} must be on {first}'s {tensor.device}, got {other.device}"
            )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError, if a tensor has another shape than it must."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def as_rows(tensor: Tensor) -> Tensor:
    """[rows, last dimension] with adjacent columns, without a copy wherever strides allow."""
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    return flat if flat.stride(1) == 1 else flat.contiguous()
