"""The same ops by other libraries, for those that are installed; None for those that are not.

Nothing here is installed by us, and what a library computes passes the same bar before it is timed.
Attention has rivals in PyTorch too: each kernel it could choose, alone, and flex_attention.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from ..kernels.attention import attention_reference
from .accuracy import Op

LAYER_NORM_EPS = 1e-5  # the default of all of them, and of ours


def _found(module: str) -> Any:
    """A module of a library, or None; a library that is there and broken raises."""
    return import_module(module) if find_spec(module.partition(".")[0]) else None


_APEX: Any = _found("apex.contrib.group_norm") if find_spec("group_norm_cuda") else None
_FLASH = _found("flash_attn.ops.triton.layer_norm")
_FLASH_ATTENTION = _found("flash_attn")
_LIGER = _found("liger_kernel.ops.layer_norm")


@cache
def _apex_module(groups: int, channels: int, eps: float, act: str) -> torch.nn.Module:
    return _APEX.GroupNorm(groups, channels, eps, device="cuda", act=act)


def _apex_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    add: Tensor | None = None,
) -> Tensor:
    x = x if add is None else x + add[:, :, None, None]
    module = _apex_module(groups, x.shape[1], eps, "silu" if silu else "")
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))


def _flash_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _FLASH.layer_norm_fn(x, weight, bias)


def _flash_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return _FLASH.layer_norm_fn(x, weight, bias, residual=residual, prenorm=True)


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _LIGER.LigerLayerNormFunction.apply(x, weight, bias, LAYER_NORM_EPS)


def _sdpa(backend: SDPBackend) -> Op:
    """PyTorch's attention by one of its kernels, which refuses what that does not serve."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return attention_reference(q, k, v)

    return sdpa


@cache
def _flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flex()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _FLASH_ATTENTION.flash_attn_func(q, k, v)


apex_group_norm: Op | None = _apex_group_norm if _APEX else None
flash_layer_norm: Op | None = _flash_layer_norm if _FLASH else None
flash_add_layer_norm: Op | None = _flash_add_layer_norm if _FLASH else None
liger_layer_norm: Op | None = _liger_layer_norm if _LIGER else None
ATTENTIONS: dict[str, Op | None] = {
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex_attention,
    "flash-attn": _flash_attention if _FLASH_ATTENTION else None,
}
