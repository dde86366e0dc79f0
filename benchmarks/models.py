"""What a comparison is run on where no hub can be reached: base models and pairs, made here.

Throughput does not depend on the weights: they are random where none are at hand, and the records
say so.
"""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL.Image import Image as PILImage
from PIL.Image import Resampling, fromarray
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
    partial = work / ".sd15.partial"
    shutil.rmtree(partial, ignore_errors=True)
    StableDiffusionPipeline(**parts).save_pretrained(partial)
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
