"""A tiny Stable Diffusion pipeline and a tiny dataset on disk: all parts real, made in a moment."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TEXT_WIDTH = 16
POOLED_WIDTH, SIZE_WIDTH = 12, 4  # of XL: the pooled embedding, and each of six size ids
VAE_FACTOR = 2
BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
INSTRUCTIONS = ("make it red", "make it blue", "add snow", "turn it into a painting")


def save_tiny_pipeline(
    folder: Path, *, in_channels: int = 4, prediction_type: str = "epsilon", xl: bool = False
) -> Path:
    """Writes a pipeline in diffusers' format: text to image with 4 channels, edits with 8.

    The VAE halves each side; weights are the same at every call.
    """
    plain = StableDiffusionPipeline, StableDiffusionInstructPix2PixPipeline
    both = StableDiffusionXLPipeline, StableDiffusionXLInstructPix2PixPipeline
    kind = (both if xl else plain)[in_channels == 8]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = _xl_parts(in_channels) if xl else _plain_parts(in_channels, prediction_type)
    kind(**parts).save_pretrained(folder)
    return Path(folder)


def _plain_parts(in_channels: int, prediction_type: str) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {
        "unet": _unet(in_channels),
        "vae": _vae(),
        "text_encoder": _text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": PNDMScheduler(  # as Stable Diffusion 1.5 has it
            **BETAS, skip_prk_steps=True, set_alpha_to_one=False, prediction_type=prediction_type
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _xl_parts(in_channels: int) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {
        "text_encoder": _text_encoder(tokenizer),
        "text_encoder_2": _text_encoder(tokenizer, CLIPTextModelWithProjection, POOLED_WIDTH),
        "unet": _unet(
            in_channels,
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH,
            projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * SIZE_WIDTH,
            use_linear_projection=True,
        ),
        "vae": _vae(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": EulerDiscreteScheduler(**BETAS),  # as Stable Diffusion XL has it
        "add_watermarker": False,
    }


def _unet(in_channels: int, **other: Any) -> UNet2DConditionModel:
    settings = {"cross_attention_dim": TEXT_WIDTH, **other}
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **settings,
    )
    torch.nn.init.normal_(unet.conv_in.bias)
    return unet


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.18215,
    )


def _text_encoder(
    tokenizer: CLIPTokenizer, kind: type = CLIPTextModel, projection: int = 512
) -> Any:
    return kind(
        CLIPTextConfig(
            projection_dim=projection,
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with 3 merges: reads any text, into at most 16 tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("m", "a"), ("r", "e"), ("i", "t</w>")]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def save_tiny_inputs(folder: Path, count: int = 8, *, xl: bool = False) -> Path:
    """A folder with such a pipeline, base, and such a dataset, data."""
    save_tiny_pipeline(folder / "base", xl=xl)
    save_tiny_dataset(folder / "data", count=count)
    return folder


def save_tiny_dataset(folder: Path, count: int = 8, size: tuple[int, int] = (24, 20)) -> Path:
    """Writes `count` pairs of PNGs of `size` (width, height) and the metadata.jsonl naming them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8)
        names = f"{index:03}_input.png", f"{index:03}_edited.png"
        Image.fromarray(noise).save(folder / names[0])
        Image.fromarray(255 - noise).save(folder / names[1])
        rows.append(
            {
                "input_image": names[0],
                "edited_image": names[1],
                "edit_prompt": INSTRUCTIONS[index % len(INSTRUCTIONS)],
            }
        )
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder
