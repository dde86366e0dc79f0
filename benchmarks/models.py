"""What a comparison is run on where no hub can be reached: base models and pairs, made here.

Throughput does not depend on the weights: they are random where none are at hand, and the records
say so.
"""

import io
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL.Image import Image as PILImage
from PIL.Image import Resampling, fromarray
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ..launch.demo.run import BASE, RESOLUTION, save_pairs
from .shapes import TEXT_TOKENS

DEMO = BASE
GRAIN = 4.0  # of 255, a camera's; JPEGs of drawn scenes would be smaller than photographs
QUALITY = 95


def make_sd15(work: Path) -> Path:
    """Stable Diffusion 1.5's architecture with random weights, 4.3 GB; made once.

    The tokenizer is the demo's: a text is as long, in other words.
    """
    folder = work / "sd15"
    if folder.exists():
        return folder
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    )
    down: Any = ("DownEncoderBlock2D",) * 4
    up: Any = ("UpDecoderBlock2D",) * 4
    widths: Any = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    parts: dict[str, Any] = dict(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=TEXT_TOKENS),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(StableDiffusionPipeline(**parts), folder)


class XL(NamedTuple):
    """Sizes of an architecture like Stable Diffusion XL's."""

    widths: tuple[int, ...]  # of the UNet
    transformers: tuple[int, ...]  # blocks at each of them; 0: no attention
    head: int  # width of one
    norm_groups: int
    size_width: int  # of the embedding of each of six size ids
    sample: int  # side of the latents
    vae_widths: tuple[int, ...]
    vae_layers: int
    text: dict[str, int]  # of the first text encoder
    text_2: dict[str, int]


SDXL = XL(
    (320, 640, 1280), (0, 2, 10), 64, 32, 256, 128, (128, 256, 512, 512), 2,
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
     "num_attention_heads": 12},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
     "num_attention_heads": 20, "projection_dim": 1280},
)  # fmt: skip
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip
TINY_SDXL = XL((32, 64), (0, 1), 16, 8, 8, 8, (8, 8, 8, 16), 1, TINY_TEXT, TINY_TEXT)


def xl_unet(sizes: XL) -> UNet2DConditionModel:
    blocks = ["CrossAttn" if count else "" for count in sizes.transformers]
    config: dict[str, Any] = dict(
        sample_size=sizes.sample,
        block_out_channels=sizes.widths,
        layers_per_block=2,
        norm_num_groups=sizes.norm_groups,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in blocks),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(blocks)),
        transformer_layers_per_block=tuple(count or 1 for count in sizes.transformers),
        attention_head_dim=tuple(width // sizes.head for width in sizes.widths),  # how many heads
        cross_attention_dim=sizes.text["hidden_size"] + sizes.text_2["hidden_size"],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes.size_width,
        projection_class_embeddings_input_dim=sizes.text_2["projection_dim"] + 6 * sizes.size_width,
    )
    return UNet2DConditionModel(**config)


def make_sdxl(work: Path, sizes: XL = SDXL) -> Path:
    """Stable Diffusion XL's architecture with random weights, 13.9 GB; made once.

    The tokenizers are the demo's: a text is as long, in other words.
    """
    folder = work / ("sdxl" if sizes is SDXL else "tiny-sdxl")
    if folder.exists():
        return folder
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=TEXT_TOKENS)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vae: dict[str, Any] = dict(
        block_out_channels=sizes.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=sizes.vae_layers,
        norm_num_groups=min(32, sizes.vae_widths[0]),
        sample_size=8 * sizes.sample,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    parts: dict[str, Any] = dict(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes.text, **ends)),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(**sizes.text_2, **ends, hidden_act="gelu")
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=xl_unet(sizes),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )
    return saved(StableDiffusionXLPipeline(**parts), folder)


def saved(pipeline: Any, folder: Path) -> Path:
    """Whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    partial.rename(folder)
    return folder


def make_pairs(work: Path, side: int, count: int) -> Path:
    """A folder of a dataset, one parquet file: PNGs of the demo's size, else JPEGs; made once."""
    folder = work / f"pairs-{side}-{count}"
    if folder.exists():
        return folder
    if side == RESOLUTION:
        save_pairs(folder, count)
        return folder
    grain = np.random.default_rng(0)

    def photographed(image: PILImage) -> bytes:
        large = image.resize((side, side), Resampling.BICUBIC)
        noisy = np.asarray(large) + grain.normal(0, GRAIN, (side, side, 3))
        stored = io.BytesIO()
        pixels = noisy.clip(0, 255).astype(np.uint8)
        fromarray(pixels).save(stored, "JPEG", quality=QUALITY)
        return stored.getvalue()

    save_pairs(folder, count, photographed)
    return folder
