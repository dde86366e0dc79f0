"""The attention processor that `fuse` installs: one product for q, k and v, then our kernels.

The parameters stay those of to_q, to_k and to_v, which are laid together for each product: of
SD 1.5 that copies 37 M numbers a step for all 16 self-attentions, against reading every token
three times. An adapter on one of the three, also one that comes later, is called as ever, and q, k
and v stay apart.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import ALIGNMENT, MAX_HEAD_WIDTH, attention
from .attention_choice import CUDNN_MAX_WIDTH, choose, shipped


class FusedAttention:
    """Attention by the backend that is asked for, or that is fastest.

    What the stock processor does beside attention (masks, images not yet in rows) is left to it.

    Args:
        plain: the stock processor.
        backend: of attention_choice.BACKENDS.
        when_compiled: whether it is itself where torch.compile traces, or plain.
    """

    def __init__(self, plain: AttnProcessor2_0, backend: str, when_compiled: bool) -> None:
        self.plain = plain
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
        backend = self._backend(ours, hidden_states, encoder_hidden_states)
        if backend != "triton" or attention_mask is not None or hidden_states.dim() != 3:
            with shipped(backend):
                return self.plain(ours, *given, *args, **kwargs)
        if encoder_hidden_states is None:
            projections = project(hidden_states, [ours.to_q, ours.to_k, ours.to_v], ours.heads)
        else:
            projections = project(hidden_states, [ours.to_q], ours.heads)
            projections += project(encoder_hidden_states, [ours.to_k, ours.to_v], ours.heads)
        out = attention(*projections, scale=ours.scale).flatten(2)
        return ours.to_out[1](ours.to_out[0](out))

    def _backend(self, attn: Any, states: Tensor, text: Tensor | None) -> str:
        if torch.compiler.is_compiling() and not self.when_compiled:
            return "sdpa"
        if self.backend != "auto":
            return self.backend
        device = states.device
        dtype = states.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        width, queries = attn.inner_dim // attn.heads, states.shape[1]
        return choose(device, dtype, width, queries, queries if text is None else text.shape[1])


def project(states: Tensor, linears: Sequence[nn.Linear], heads: int) -> list[Tensor]:
    """The linears of the states: packed, [n, rows, linears, heads, width], or one by one."""
    if len(linears) == 1 or not all(map(bare, linears)):
        return [linear(states).unflatten(-1, (heads, -1)) for linear in linears]
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Any] = [linear.bias for linear in linears]
    weight, bias = torch.cat(weights), None if biases[0] is None else torch.cat(biases)
    return [F.linear(states, weight, bias).unflatten(-1, (len(linears), heads, -1))]


def bare(linear: nn.Module) -> bool:
    """Whether a projection is its weight and nothing else: no adapter, no hook."""
    return type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)


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
