"""The pipeline a run starts from: what its small files say, then its weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..kernels.edit_input import PREDICTIONS
from .config import ModelConfig
from .errors import UsageError
from .unet import grow_conv_in

CHANNELS = (4, 8)  # of a UNet that can be trained: text-to-image, or already an editing one


class Described(NamedTuple):
    """What the small files of a pipeline say; no weights have been read."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    tokenizer: CLIPTokenizer

    @property
    def vae_factor(self) -> int:
        """Pixels to a latent, along a side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def make_scheduler(self) -> SchedulerMixin:
        """The sampler the pipeline was saved with."""
        return getattr(diffusers, self.scheduler["_class_name"]).from_config(self.scheduler)


def describe(section: ModelConfig) -> Described:
    """Reads configurations and the tokenizer.

    Raises: UsageError: no such folder or hub name, a part is missing, the UNet takes neither 4 nor
        8 channels, or it is a model that cannot be trained here.
    """
    unet = _read_config(section, "unet", "config.json")
    if unet.get("in_channels") not in CHANNELS:
        raise UsageError(
            f"the UNet of {section.unet or section.pretrained_model_name_or_path} takes "
            f"{unet.get('in_channels')} input channels; 4 (text-to-image) or 8 (an InstructPix2Pix "
            "model to go on from) can be trained"
        )
    if unet.get("addition_embed_type") is not None:
        raise UsageError(
            f"{section.pretrained_model_name_or_path} is an SDXL pipeline; so far Stable Diffusion "
            "1.x and 2.x can be trained"
        )
    vae = _read_config(section, "vae", "config.json")
    scheduler = _read_config(section, "scheduler", SCHEDULER_CONFIG_NAME)
    if "block_out_channels" not in vae or "scaling_factor" not in vae:
        raise UsageError(f"{section.pretrained_model_name_or_path}: vae/config.json is incomplete")
    if scheduler.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise UsageError(
            f"{section.pretrained_model_name_or_path}: its scheduler has prediction_type "
            f"{scheduler['prediction_type']}; {' and '.join(PREDICTIONS)} can be trained"
        )
    return Described(
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        tokenizer=_load(CLIPTokenizer, section, "tokenizer"),
    )


def check_resolution(resolution: int, described: Described) -> None:
    """Raises UsageError when the VAE cannot halve the image as often as it has to."""
    factor = described.vae_factor
    if resolution % factor:
        below = max(resolution // factor, 1) * factor
        raise UsageError(
            f"--resolution {resolution} must be a multiple of {factor}, the VAE's factor; "
            f"try {below} or {below + factor}"
        )


def load_unet(section: ModelConfig) -> UNet2DConditionModel:
    """Reads the UNet in fp32, whatever it is stored in; it takes 8 channels."""
    unet = _load(UNet2DConditionModel, section, "unet")
    grow_conv_in(unet, section.unet or str(section.pretrained_model_name_or_path))
    return unet


def load_encoders(section: ModelConfig) -> tuple[AutoencoderKL, CLIPTextModel]:
    """Reads VAE and text encoder in fp32, whatever they are stored in."""
    return _load(AutoencoderKL, section, "vae"), _load(CLIPTextModel, section, "text_encoder")


def _place(section: ModelConfig, part: str) -> tuple[str, str | None, bool]:
    """Folder or hub name, subfolder, whether it is --unet's."""
    if part == "unet" and section.unet is not None:
        return section.unet, None, True
    return str(section.pretrained_model_name_or_path), part, False


def _read_config(section: ModelConfig, part: str, file: str) -> dict[str, Any]:
    source, subfolder, _ = _place(section, part)
    root = Path(source)
    try:
        if root.is_dir():
            path = root / subfolder / file if subfolder else root / file
        else:
            path = Path(
                hf_hub_download(
                    source,
                    file,
                    subfolder=subfolder,
                    revision=_revision(section, part),
                    cache_dir=section.cache_dir,
                )
            )
        return json.loads(path.read_text())
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise _cannot_load(section, part, error) from None


def _load(cls: Any, section: ModelConfig, part: str) -> Any:
    source, subfolder, _ = _place(section, part)
    options: dict[str, Any] = {
        "subfolder": subfolder or "",
        "revision": _revision(section, part),
        "cache_dir": section.cache_dir,
    }
    if cls is not CLIPTokenizer:
        # The reference reads the UNet from its plain files, for they are what is trained.
        options["variant"] = None if part == "unet" else section.variant
    try:
        loaded = cls.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError) as error:
        raise _cannot_load(section, part, error) from None
    return loaded.float() if isinstance(loaded, nn.Module) else loaded


def _revision(section: ModelConfig, part: str) -> str | None:
    """--non_ema_revision once named the branch of the UNet's raw weights."""
    if part == "unet" and section.non_ema_revision is not None:
        return section.non_ema_revision
    return section.revision


def _cannot_load(section: ModelConfig, part: str, error: Exception) -> UsageError:
    source, subfolder, own_unet = _place(section, part)
    flag = "--unet" if own_unet else "--pretrained_model_name_or_path"
    root = Path(source)
    if root.is_dir() and subfolder and not (root / subfolder).is_dir():
        return UsageError(
            f"{flag} {source} has no folder {subfolder}; a pipeline in diffusers format has unet, "
            "vae, text_encoder, tokenizer and scheduler"
        )
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError) or not root.is_dir():
        return UsageError(
            f"{flag} {source}: neither a folder here nor to be had from the hub "
            f"({str(error).splitlines()[0]}); give a pipeline folder, or a hub name when online"
        )
    return UsageError(f"{flag} {source}: its {part} cannot be read: {str(error).splitlines()[0]}")
