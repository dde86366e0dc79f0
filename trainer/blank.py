"""The parts of a pipeline on the meta device, by its small files: shapes without weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig

from .config import ModelConfig
from .errors import UsageError
from .families import TextEncoder
from .pretrained import Described


def blank_unet(described: Described) -> UNet2DConditionModel:
    """The UNet that is trained: it takes 8 channels."""
    with torch.device("meta"):
        return _made(UNet2DConditionModel.from_config({**described.unet, "in_channels": 8}))


def blank_encoders(section: ModelConfig, described: Described) -> tuple[AutoencoderKL, TextEncoder]:
    """VAE and text encoders.

    Raises: UsageError: a text encoder's configuration cannot be read.
    """
    parts = {}
    for part, cls in described.family.text_encoders.items():
        config = _transformers_config(CLIPTextConfig, section, part)
        if config is None:
            raise UsageError(
                f"--pretrained_model_name_or_path {section.pretrained_model_name_or_path}: its "
                f"{part}/config.json cannot be read; give a pipeline in diffusers format"
            )
        with torch.device("meta"):
            parts[part] = cls(config)
    with torch.device("meta"):
        return _made(AutoencoderKL.from_config(described.vae)), TextEncoder(described.family, parts)


def blank_safety_checker(section: ModelConfig) -> nn.Module | None:
    """The base's safety checker, which is exported with the model; None where it has none."""
    config = _transformers_config(CLIPConfig, section, "safety_checker")
    if config is None:
        return None
    with torch.device("meta"):
        return StableDiffusionSafetyChecker(config)


def bytes_of(*modules: nn.Module | None) -> int:
    """What their parameters and buffers take, in their own dtypes."""
    return sum(
        tensor.nbytes
        for module in modules
        if module is not None
        for tensor in module.state_dict().values()
    )


def _made(model: Any) -> Any:
    return model  # from_config is declared to give a pair, and gives a model


def _transformers_config(cls: Any, section: ModelConfig, part: str) -> Any:
    """None where there is none."""
    try:
        values, _ = cls.get_config_dict(
            section.pretrained_model_name_or_path,
            subfolder=part,
            revision=section.revision,
            cache_dir=section.cache_dir,
        )
    except (OSError, ValueError):
        return None
    return cls.from_dict(values) if values else None  # a file that is not there reads as empty
