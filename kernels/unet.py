"""`fuse(unet)`: the fused kernels in place of the modules of any diffusers UNet2DConditionModel.

A module keeps its parameters, its name and its place and is given another class, whose `forward`
says the same in fewer passes over memory. So checkpoints, averaged copies, LoRA adapters, DDP and
export do not notice, `isinstance` still holds, and `unfuse` gives the old class back.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from .attention_choice import BACKENDS, explained
from .dispatch import DTYPES
from .geglu import geglu
from .group_norm import group_norm
from .layer_norm import MAX_WIDTH, add_layer_norm, layer_norm
from .unet_attention import install, uninstall

OPS = ("group_norm", "geglu", "layer_norm", "attention")
# Inductor fuses GEGLU and LayerNorm itself, at the speed of memory as far as anyone has measured;
# they join when `fusedit.benchmarks.kernels` shows ours ahead of it on a GPU.
COMPILED_OPS = ("group_norm", "attention")
COPIED_BATCH = 64  # from it on, diffusers' Upsample2D copies to NCHW


@dataclass
class Report:
    """What `fuse` did, module by module.

    Attributes:
        fused: name of a norm, gate or attention -> what runs in its place.
        left: name of one that stays as it is, or of a projection that is not packed -> why.
        plain_when_compiled: ops that torch.compile makes itself.
        attention: which attention runs.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    plain_when_compiled: tuple[str, ...] = ()
    attention: str = ""

    def __str__(self) -> str:
        counts = [f"{count} x {kind}" for kind, count in Counter(self.fused.values()).items()]
        lines = [f"fused: {', '.join(counts) or 'nothing'}"]
        if self.plain_when_compiled:
            lines.append(
                f"left to torch.compile where it traces: {', '.join(self.plain_when_compiled)}"
            )
        lines += [self.attention] if self.attention else []
        lines += [f"left as it is: {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def fuse(
    unet: nn.Module,
    *,
    ops: Collection[str] = OPS,
    compiled_ops: Collection[str] = COMPILED_OPS,
    attention: str = "auto",
    report: bool = False,
) -> Report:
    """Exchanges norms, gates, the additions before them and attention for fused ones, in place.

    Args:
        unet: UNet2DConditionModel of SD 1.x, 2.x or XL, with any number of input channels; its
            weights lie in fp32, bf16 or fp16, on any device.
        ops: which of OPS to fuse.
        compiled_ops: which of them where torch.compile traces too; the others are plain there.
        attention: of BACKENDS in attention_choice.py: "auto" is what was measured to be fastest,
            "triton" ours, "sdpa" PyTorch's own choice, "cudnn" and "flash" one of those.
        report: prints what is returned.

    Returns: what was fused, what was not, and why.
    Raises: ValueError, for an op not in OPS, a backend not in BACKENDS.
    """
    for op in (*ops, *compiled_ops):
        if op not in OPS:
            raise ValueError(f"fuse: ops are {', '.join(OPS)}; got {op!r}")
    if attention not in BACKENDS:
        raise ValueError(f"fuse: attention is one of {', '.join(BACKENDS)}; got {attention!r}")
    unfuse(unet)
    made = Report(plain_when_compiled=tuple(op for op in ops if op not in compiled_ops))
    for site in [site for name, module in unet.named_modules() for site in _sites(name, module)]:
        why_not = site.why_not if site.op in ops else f"{site.op} was not asked for"
        if why_not:
            made.left |= dict.fromkeys(site.parts, why_not)
            continue
        made.fused |= site.parts
        for module, fused in site.classes:
            module.__class__ = fused
            setattr(module, "fused_when_compiled", site.op in compiled_ops)  # noqa: B010
    for name, module in unet.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm, GEGLU)) and name not in made.fused:
            made.left.setdefault(name, "in a place that fuse does not know")
    if "attention" in ops:
        install(unet, attention, "attention" in compiled_ops, made.fused, made.left)
        made.attention = explained(attention, next(unet.parameters()).device)
    else:
        names = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
        made.left |= dict.fromkeys(names, "attention was not asked for")
    if report:
        print(made)
    return made


def unfuse(unet: nn.Module) -> None:
    """Gives every fused module its own class back, and attention its processor."""
    uninstall(unet)
    for module in unet.modules():
        if isinstance(module, Fused):
            module.__class__ = module.plain  # pyright: ignore[reportAttributeAccessIssue]
            del module.fused_when_compiled


class Site(NamedTuple):
    """Norms or gates that are exchanged together."""

    op: str
    parts: dict[str, str]  # name -> what runs in its place
    classes: Sequence[tuple[nn.Module, type[nn.Module]]]
    why_not: str  # empty: nothing speaks against it


def _sites(name: str, module: nn.Module) -> Iterator[Site]:
    """Where this module holds something that can be fused."""
    prefix = f"{name}." if name else ""
    if type(module) is ResnetBlock2D:
        added = "time embedding + " if module.time_emb_proj is not None else ""
        parts = {"norm1": "GroupNorm + SiLU", "norm2": f"{added}GroupNorm + SiLU"}
        classes, why_not = [(module, FusedResnetBlock)], _resnet_block_why_not(module)
        yield Site("group_norm", _under(prefix, parts), classes, why_not)
    elif type(module) is Transformer2DModel and module.is_input_continuous:
        classes = [(module.norm, FusedGroupNorm), (module, FusedTransformer)]
        parts, why_not = {f"{prefix}norm": "GroupNorm"}, _norm_why_not(module.norm)
        yield Site("group_norm", parts, classes, why_not)
    elif type(module) is Upsample2D and _is_nearest(module):
        yield Site("group_norm", {}, [(module, FusedUpsample)], "")
    elif type(module) is BasicTransformerBlock:
        parts = {"norm1": "LayerNorm"} | dict.fromkeys(("norm2", "norm3"), "residual + LayerNorm")
        classes, why_not = [(module, FusedTransformerBlock)], _transformer_block_why_not(module)
        yield Site("layer_norm", _under(prefix, parts), classes, why_not)
    elif type(module) is GEGLU:
        yield Site("geglu", {name: "GEGLU"}, [(module, FusedGEGLU)], "")
    elif type(module) is UNet2DConditionModel and module.conv_norm_out is not None:
        norm, activation = cast(Any, (module.conv_norm_out, module.conv_act))
        why_not = _norm_why_not(norm) or _activation_why_not(activation)
        classes = [(norm, FusedGroupNormSilu), (activation, SiluDoneBefore)]
        yield Site("group_norm", {f"{prefix}conv_norm_out": "GroupNorm + SiLU"}, classes, why_not)


def _under(prefix: str, parts: dict[str, str]) -> dict[str, str]:
    return {prefix + part: kind for part, kind in parts.items()}


def _is_nearest(block: Upsample2D) -> bool:
    """Nearest neighbours, then the convolution; nothing else."""
    own = block.interpolate and block.use_conv and block.name == "conv"
    return own and block.norm is None and not block.use_conv_transpose


def _resnet_block_why_not(block: ResnetBlock2D) -> str:
    if block.time_embedding_norm != "default":
        return f"its block's time_embedding_norm is {block.time_embedding_norm}"
    if block.up or block.down:
        return "its block resamples"
    norms = _norm_why_not(block.norm1) or _norm_why_not(block.norm2)
    return norms or _activation_why_not(block.nonlinearity)


def _transformer_block_why_not(block: BasicTransformerBlock) -> str:
    if block.norm_type != "layer_norm":
        return f"its block's norm_type is {block.norm_type}"
    if block.attn2 is None or block.pos_embed is not None:
        return "its block is not self-attention, cross-attention and feed-forward alone"
    return next(filter(None, map(_norm_why_not, (block.norm1, block.norm2, block.norm3))), "")


def _norm_why_not(norm: Any) -> str:
    if type(norm) not in (nn.GroupNorm, nn.LayerNorm):
        return f"it is a {type(norm).__name__}"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it has forward hooks, which fused code would not call"
    if isinstance(norm, nn.LayerNorm):
        *outer, width = norm.normalized_shape
        if outer or width > MAX_WIDTH:
            return f"it normalizes over {[*outer, width]}; served is one width to {MAX_WIDTH}"
    elif norm.weight is None:
        return "it has no weight"
    if norm.weight is not None and norm.weight.dtype not in DTYPES:
        return f"its weight is {norm.weight.dtype}"
    return ""


def _activation_why_not(activation: Any) -> str:
    return (
        "" if type(activation) is nn.SiLU else f"{type(activation).__name__} follows it, not SiLU"
    )


class Fused:
    """What the fused classes share."""

    plain: ClassVar[type[nn.Module]]  # the class that it stands in for
    fused_when_compiled: bool

    def __init_subclass__(cls) -> None:
        # Wrappers, device maps and regional compilation look for modules by the name of their
        # class; pickle goes by the qualified name, which stays its own.
        cls.__name__ = cls.plain.__name__

    def plain_here(self) -> bool:
        return torch.compiler.is_compiling() and not self.fused_when_compiled


class FusedResnetBlock(Fused, ResnetBlock2D):
    """GroupNorm + SiLU in one pass, the time embedding's addition in the second one's load."""

    plain = ResnetBlock2D

    def forward(self, input_tensor: Tensor, temb: Any, *args, **kwargs) -> Tensor:
        if self.plain_here():
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden = self.conv1(_group_norm(self.norm1, input_tensor, silu=True))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden = _group_norm(self.norm2, hidden, silu=True, add=temb)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:  # whose input diffusers copies to NCHW
            input_tensor = self.conv_shortcut(input_tensor)
        hidden = input_tensor + hidden
        # Nearly always by 1, which would be a pass over memory for nothing.
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class FusedTransformer(Fused, Transformer2DModel):
    """Tokens become an image again where they lie, which is channels_last; diffusers copies."""

    plain = Transformer2DModel

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int,
        inner_dim: int,
    ) -> Tensor:  # fmt: skip
        if self.plain_here():
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        image = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (image if self.use_linear_projection else self.proj_out(image)) + residual


class FusedUpsample(Fused, Upsample2D):
    """Large batches stay channels_last; diffusers copies them to NCHW before it doubles them."""

    plain = Upsample2D

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        n, channels, height, width = hidden_states.shape
        small = n < COPIED_BATCH or hidden_states.stride(1) != 1
        if self.plain_here() or small or output_size is not None:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        rows = hidden_states.permute(0, 2, 3, 1)[:, :, None, :, None]
        doubled = rows.expand(n, height, 2, width, 2, channels).reshape(
            n, 2 * height, 2 * width, channels
        )
        return cast(nn.Module, self.conv)(doubled.permute(0, 3, 1, 2))


class FusedGroupNorm(Fused, nn.GroupNorm):
    plain = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.plain_here() else _group_norm(self, input)


class FusedGroupNormSilu(Fused, nn.GroupNorm):
    """The UNet's last norm, with the activation that follows it."""

    plain = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        if self.plain_here():
            return nn.functional.silu(super().forward(input))
        return _group_norm(self, input, silu=True)


class SiluDoneBefore(Fused, nn.SiLU):
    plain = nn.SiLU

    def forward(self, input: Tensor) -> Tensor:
        return input


class FusedGEGLU(Fused, GEGLU):
    plain = GEGLU

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.plain_here():
            return super().forward(hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))


class FusedTransformerBlock(Fused, BasicTransformerBlock):
    """Each addition of a residual goes into the load of the LayerNorm that follows it.

    With GLIGEN's arguments, or a feed-forward in chunks, the block is plain.
    """

    plain = BasicTransformerBlock

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        *args,
        **kwargs,
    ) -> Tensor:
        attention_kwargs = cross_attention_kwargs or {}
        if self.plain_here() or "gligen" in attention_kwargs or self._chunk_size is not None:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                timestep, cross_attention_kwargs, *args, **kwargs,
            )  # fmt: skip
        own = encoder_hidden_states if self.only_cross_attention else None
        # Which classes these are, `fuse` has checked.
        norm1, norm2, norm3, attn2 = cast(Any, (self.norm1, self.norm2, self.norm3, self.attn2))
        normalized = layer_norm(hidden_states, norm1.weight, norm1.bias, norm1.eps)
        attended = self.attn1(normalized, own, attention_mask, **attention_kwargs)
        normalized, hidden_states = _add_layer_norm(norm2, attended, hidden_states)
        attended = attn2(
            normalized, encoder_hidden_states, encoder_attention_mask, **attention_kwargs
        )
        normalized, hidden_states = _add_layer_norm(norm3, attended, hidden_states)
        return self.ff(normalized) + hidden_states


def _group_norm(
    norm: nn.GroupNorm, x: Tensor, silu: bool = False, add: Tensor | None = None
) -> Tensor:
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, add=add)


def _add_layer_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
