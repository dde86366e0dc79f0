"""Gradient checkpointing: which blocks' activations are made again in the backward, and which stay.

Source: Chen et al. 2016 (arXiv:1604.06174); what is kept inside a block: selective activation
checkpointing, Korthikanti et al. 2022 (arXiv:2205.05198), section 5, as PyTorch has it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .config import Keeps

# By names, for a build of PyTorch need not have all, nor is a kernel of ours loaded everywhere.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "fusedit::attention",
}
PRODUCTS = ATTENTION | {"aten::mm", "aten::addmm", "aten::bmm", "aten::convolution"}
KEPT: dict[Keeps, set[str]] = {"nothing": set(), "attention": ATTENTION, "products": PRODUCTS}

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint_blocks(
    unet: UNet2DConditionModel,
    keeps: Keeps = "nothing",
    levels: int | None = None,
    around: Contexts | None = None,
) -> None:
    """Has the UNet make the activations of its blocks again in the backward.

    Args:
        keeps: results that stay: of no operation, of attention, of all matrix products.
        levels: of the largest maps, whose blocks are made again, down and up; None: all.
        around: entered around a block, and around what makes it again.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    # Nothing in it draws from a generator, and a CUDA graph could not keep a generator's state.
    options["preserve_rng_state"] = False
    contexts = [around] if around is not None else []
    if KEPT[keeps]:
        contexts.append(
            partial(create_selective_checkpoint_contexts, partial(_policy, KEPT[keeps]))
        )
    if contexts:
        options["context_fn"] = partial(_nested, contexts)
    unet.enable_gradient_checkpointing(partial(checkpoint, **options))
    if levels is not None:
        for down, up in zip(unet.down_blocks, reversed(unet.up_blocks), strict=True):
            levels -= 1
            for module in (*down.modules(), *up.modules()) if levels < 0 else ():
                _leave_out(module)
        for module in unet.mid_block.modules():  # the smallest maps of all
            _leave_out(module)


def _leave_out(module: Any) -> None:
    if hasattr(module, "gradient_checkpointing"):
        module.gradient_checkpointing = False


def _policy(kept: set[str], context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    name = op.name().split(".")[0] if isinstance(op, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _nested(
    contexts: list[Contexts],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward and of what makes it again, each entered in turn."""
    forwards, agains = zip(*(context() for context in contexts), strict=True)
    return _all(forwards), _all(agains)


@contextmanager
def _all(managers: tuple[AbstractContextManager[Any], ...]) -> Iterator[None]:
    if not managers:
        yield
        return
    with managers[0], _all(managers[1:]):
        yield
