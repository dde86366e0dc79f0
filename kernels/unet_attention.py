"""The attention processor that `fuse` installs: one product for q, k and v, then our kernels.

The parameters stay those of to_q, to_k and to_v, which are laid together for each product: that
copies 37 M numbers for the 16 self-attentions of SD 1.5 and keeps them until the backward, 74 MB in
bf16, against reading every token three times. An adapter on one of the three, also one that comes
later, is called as ever, and q, k and v stay apart.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import ALIGNMENT, MAX_HEAD_WIDTH, attention
from .attention_choice import CUDNN_MAX_WIDTH, DEFAULT, choose, shipped
from .dispatch import DTYPES


class FusedAttention:
    """Attention by the backend that is asked for, or that is fastest.

    What the stock processor does beside attention (masks, images not yet in rows) is left to it.

    Args:
        plain: the stock processor; None: a new one, as diffusers' IP adapters ask for.
        backend: of attention_choice.BACKENDS.
        when_compiled: whether it is itself where torch.compile traces, or plain.
    """

    def __init__(
        self,
        plain: AttnProcessor2_0 | None = None,
        backend: str = "auto",
        when_compiled: bool = True,
    ) -> None:
        self.plain = plain or AttnProcessor2_0()
        self.backend = backend
        self.when_compiled = when_compiled

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        given: Any = (hidden_states, encoder_hidden_states, attention_mask, temb)
        ours: Any = attn
        backend = self.backend
        if attention_mask is not None or hidden_states.dim() != 3 or self._plain_here():
            backend = DEFAULT
        elif backend == "auto":
            width, queries = ours.inner_dim // ours.heads, hidden_states.shape[1]
            keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            dtype = product_dtype(hidden_states)
            backend = choose(hidden_states.device, dtype, width, queries, keys)
        if backend != "triton":
            alone = self.backend != "auto"
            with shipped(backend if hidden_states.is_cuda else DEFAULT, alone=alone):
                return self.plain(ours, *given, *args, **kwargs)
        if encoder_hidden_states is None:
            projections = project(hidden_states, [ours.to_q, ours.to_k, ours.to_v], ours.heads)
        else:
            projections = project(hidden_states, [ours.to_q], ours.heads)
            projections += project(encoder_hidden_states, [ours.to_k, ours.to_v], ours.heads)
        out = attention(*projections).flatten(2)
        return ours.to_out[1](ours.to_out[0](out))

    def _plain_here(self) -> bool:
        return torch.compiler.is_compiling() and not self.when_compiled


def product_dtype(states: Tensor) -> torch.dtype:
    """Of a linear layer's output."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def project(states: Tensor, linears: Sequence[nn.Linear], heads: int) -> list[Tensor]:
    """The linears of the states: packed, [n, rows, linears, heads, width], or one by one."""
    if len(linears) == 1 or not all(map(bare, linears)):
        return [linear(states).unflatten(-1, (heads, -1)) for linear in linears]
    dtype = product_dtype(states)  # cast first: what is laid together is kept for the backward
    weights: list[Tensor] = [linear.weight.to(dtype) for linear in linears]
    biases: list[Any] = [linear.bias for linear in linears]
    weight, bias = torch.cat(weights), None if biases[0] is None else torch.cat(biases)
    return [F.linear(states, weight, bias).unflatten(-1, (len(linears), heads, -1))]


def bare(linear: nn.Module) -> bool:
    """Whether a projection is its weight and nothing else: no adapter, no hook, no packed type."""
    own: Any = linear
    hooks = (
        own._forward_hooks or own._forward_pre_hooks
        or own._backward_hooks or own._backward_pre_hooks
    )  # fmt: skip
    return (
        type(linear) is nn.Linear
        and not hooks
        and "forward" not in vars(linear)  # as accelerate and diffusers hook it
        and type(own.weight) in (nn.Parameter, Tensor)
        and own.weight.dtype in DTYPES
    )


def install(
    unet: nn.Module, backend: str, when_compiled: bool, fused: dict[str, str], left: dict[str, str]
) -> None:
    """Gives every attention that can have it the processor; says in fused and left what it did."""
    for name, module in unet.named_modules():
        if not isinstance(module, Attention):
            continue
        if why_not := _why_not(module, backend):
            left[name] = why_not
            continue
        fused[name] = f"{'cross' if module.is_cross_attention else 'self'}-attention"
        left |= _apart(name, module)
        attn: Any = module
        attn.set_processor(FusedAttention(attn.processor, backend, when_compiled))


def uninstall(unet: nn.Module) -> None:
    """Gives every attention the processor back that it had."""
    for module in unet.modules():
        attn: Any = module
        if isinstance(module, Attention) and isinstance(attn.processor, FusedAttention):
            attn.set_processor(attn.processor.plain)


def _why_not(attn: Attention, backend: str) -> str:
    """What speaks against the processor; empty: nothing."""
    module: Any = attn
    if type(module.processor) is not AttnProcessor2_0:
        return f"its processor is {type(module.processor).__name__}"
    if any(parameter.dtype == torch.float64 for parameter in module.to_q.parameters()):
        return "its weights are torch.float64"
    norms = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
    for name in norms:
        if getattr(module, name) is not None:
            return f"it has a {name}"
    if module.add_k_proj is not None or module.inner_kv_dim != module.inner_dim:
        return "its keys are not those of its heads alone"
    if module.residual_connection or module.rescale_output_factor != 1:
        return "it adds its input, or rescales its output"
    width = module.inner_dim // module.heads
    if width % ALIGNMENT or width > MAX_HEAD_WIDTH:
        return (
            f"its heads are {width} wide; served are multiples of {ALIGNMENT} to {MAX_HEAD_WIDTH}"
        )
    if backend == "cudnn" and width > CUDNN_MAX_WIDTH:
        return f"its heads are {width} wide, and cuDNN's backward stops at {CUDNN_MAX_WIDTH}"
    return ""


def _apart(name: str, attn: Attention) -> dict[str, str]:
    """Which projections keep their group from being one product, and why."""
    module: Any = attn
    return {
        f"{name}.{part}": f"it carries an adapter or a hook ({type(linear).__name__}): "
        "q, k and v are projected one by one"
        for part in ("to_q", "to_k", "to_v")
        if not bare(linear := getattr(module, part))
    }
