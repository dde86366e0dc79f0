"""Model families: what encodes an instruction, and what the UNet is told beside it.

Stable Diffusion 1.x and 2.x attend to the last states of one text encoder. XL attends to the
penultimate states of two, side by side; beside the timestep it is told the second one's pooled
embedding and the sizes of the image. All that differs between them is here.
Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.1 and 2.2.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_instruct_pix2pix import (
    StableDiffusionXLInstructPix2PixPipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

SIZE_IDS = 6  # height and width before the resize, top and left of the crop, height and width after


class Text(NamedTuple):
    """An encoded instruction."""

    states: Tensor  # [n, tokens, width], what the UNet attends to
    pooled: Tensor  # [n, pooled], beside the timestep; 0 wide where the UNet takes none


def _last_states(encoders: Sequence[nn.Module], tokens: Tensor) -> Text:
    states = encoders[0](tokens).last_hidden_state
    return Text(states, states.new_empty(len(states), 0))


def _penultimate_states(encoders: Sequence[nn.Module], tokens: Tensor) -> Text:
    parts = tokens.chunk(len(encoders), dim=1)
    outs = [
        encoder(part, output_hidden_states=True)
        for encoder, part in zip(encoders, parts, strict=True)
    ]
    states = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    return Text(states, outs[-1].text_embeds)


def _plain_pipeline(*, zero_null: bool, **parts: Any) -> StableDiffusionInstructPix2PixPipeline:
    parts = {"safety_checker": None, "feature_extractor": None, **parts}
    checked = parts["safety_checker"] is not None
    return StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=checked)


def _xl_pipeline(*, zero_null: bool, **parts: Any) -> StableDiffusionXLInstructPix2PixPipeline:
    return StableDiffusionXLInstructPix2PixPipeline(
        **parts, force_zeros_for_empty_prompt=zero_null, add_watermarker=False
    )


class Family(NamedTuple):
    """What differs from one family to another."""

    name: str
    tag: str  # on the hub
    text_encoders: Mapping[str, type]  # part of the pipeline: its class
    tokenizers: tuple[str, ...]  # one for each text encoder
    encode: Callable[[Sequence[nn.Module], Tensor], Text]
    pipeline: Any  # diffusers' class, that edits
    make_pipeline: Callable[..., Any]  # (zero_null, parts by name) -> one of it
    told_sizes: bool  # whether UNet and pipeline are told the image's size
    vae_in_fp32: bool  # unless told otherwise: half precision can overflow
    validation_steps: int | None  # the reference's default; None: by epochs


STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1.x or 2.x",
    tag="stable-diffusion",
    text_encoders={"text_encoder": CLIPTextModel},
    tokenizers=("tokenizer",),
    encode=_last_states,
    pipeline=StableDiffusionInstructPix2PixPipeline,
    make_pipeline=_plain_pipeline,
    told_sizes=False,
    vae_in_fp32=False,
    validation_steps=None,
)
SDXL = Family(
    name="Stable Diffusion XL",
    tag="stable-diffusion-xl",
    text_encoders={
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    },
    tokenizers=("tokenizer", "tokenizer_2"),
    encode=_penultimate_states,
    pipeline=StableDiffusionXLInstructPix2PixPipeline,
    make_pipeline=_xl_pipeline,
    told_sizes=True,
    vae_in_fp32=True,
    validation_steps=100,
)


FAMILIES = (STABLE_DIFFUSION, SDXL)


def family_by_parts(names: Container[str]) -> Family:
    """By the names of a pipeline's parts: XL has a second text encoder."""
    return SDXL if "text_encoder_2" in names else STABLE_DIFFUSION


def family_of(pipeline: Any) -> Family:
    """By the class of an editing pipeline. Raises StopIteration for any other."""
    return next(family for family in FAMILIES if isinstance(pipeline, family.pipeline))


class TextEncoder(nn.Module):
    """The text encoders of a pipeline, as one.

    Args:
        parts: by their names in the pipeline, in the family's order.
    """

    def __init__(self, family: Family, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.family = family
        self.parts = nn.ModuleDict(parts)

    def forward(self, tokens: Tensor) -> Text:
        """[n, length] int64, a row of tokens for each encoder behind each other."""
        return self.family.encode(list(self.parts.values()), tokens)


def text_widths(unet: Mapping[str, Any]) -> tuple[int, int]:
    """Width of the states and of the pooled embedding, by the UNet's configuration."""
    states = unet["cross_attention_dim"]
    if unet.get("addition_embed_type") != "text_time":
        return states, 0
    sizes = SIZE_IDS * unet["addition_time_embed_dim"]
    return states, unet["projection_class_embeddings_input_dim"] - sizes


def told_beside(pooled: Tensor, size_ids: Tensor) -> dict[str, Tensor] | None:
    """What the UNet is told beside the timestep, as it takes it.

    Args:
        pooled: [n, pooled]; 0 wide where it is told nothing.
        size_ids: [n, 6], in fp32: half precision does not hold every number of pixels.
    """
    return {"text_embeds": pooled, "time_ids": size_ids} if pooled.shape[1] else None
