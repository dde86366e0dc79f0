"""The pipeline a run starts from: what its small files say, then its weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from torch import nn
from transformers import CLIPTokenizer

from ..kernels.edit_input import PREDICTIONS
from .config import ModelConfig
from .errors import UsageError
from .families import Family, Text, TextEncoder, family_by_parts
from .unet import grow_conv_in

INDEX_FILE = "model_index.json"  # diffusers reads it first
PICKLED = (".bin", ".pt", ".pth", ".ckpt")  # weights' files
CHANNELS = (4, 8)  # of a UNet that can be trained: text-to-image, or already an editing one


class Described(NamedTuple):
    """What the small files of a pipeline say; no weights have been read."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    tokenizers: list[CLIPTokenizer]
    family: Family
    zero_null: bool  # an instruction that is left out is zeros, not the encoding of ""

    @property
    def vae_factor(self) -> int:
        """Pixels to a latent, along a side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def tokens(self) -> int:
        """Of an encoded instruction."""
        return self.tokenizers[0].model_max_length

    @property
    def least_size(self) -> int:
        """Pixels to what the UNet halves down to one, along a side."""
        return self.vae_factor * 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def row_length(self) -> int:
        """Tokens of an instruction by all tokenizers, one behind the other."""
        return sum(tokenizer.model_max_length for tokenizer in self.tokenizers)

    def null_text(self, empty: Text) -> Text:
        """What stands for a dropped instruction, as the pipeline will have it.

        Args:
            empty: the encoding of "".
        """
        return Text(*map(torch.zeros_like, empty)) if self.zero_null else empty

    def components(self, vae: AutoencoderKL, text_encoder: TextEncoder) -> dict[str, Any]:
        """The parts of a pipeline around the UNet, by name."""
        tokenizers = zip(self.family.tokenizers, self.tokenizers, strict=True)
        encoders = text_encoder.parts.items()
        scheduler = self.make_scheduler()
        return {"vae": vae, **dict(encoders), **dict(tokenizers), "scheduler": scheduler}

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
    family = _family(section)
    if (unet.get("addition_embed_type") is not None) != family.told_sizes:
        raise UsageError(
            f"{section.pretrained_model_name_or_path} is a {family.name} pipeline by its text "
            "encoders, and its UNet is another's; take --unet and pipeline of one family"
        )
    vae = _read_config(section, "vae", "config.json")
    scheduler = _read_config(section, "scheduler", SCHEDULER_CONFIG_NAME)
    for part in ("unet", "vae", *family.text_encoders):
        _check_weights(section, part)
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
        tokenizers=[_load(CLIPTokenizer, section, part) for part in family.tokenizers],
        family=family,
        zero_null=family.told_sizes and _index(section).get("force_zeros_for_empty_prompt", True),
    )


def _family(section: ModelConfig) -> Family:
    root = Path(str(section.pretrained_model_name_or_path))
    parts = {path.name for path in root.iterdir()} if root.is_dir() else _index(section)
    return family_by_parts(parts)


def _index(section: ModelConfig) -> dict[str, Any]:
    """model_index.json; a folder may do without."""
    source = str(section.pretrained_model_name_or_path)
    if Path(source).is_dir() and not Path(source, INDEX_FILE).is_file():
        return {}
    return _read_config(section, None, INDEX_FILE)


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


def load_encoders(section: ModelConfig) -> tuple[AutoencoderKL, TextEncoder]:
    """Reads VAE and text encoders in fp32, whatever they are stored in."""
    family = _family(section)
    parts = {part: _load(cls, section, part) for part, cls in family.text_encoders.items()}
    return _load(AutoencoderKL, section, "vae"), TextEncoder(family, parts)


def _place(section: ModelConfig, part: str | None) -> tuple[str, str | None, str]:
    """Folder or hub name, subfolder, the flag that names it."""
    if part == "unet" and section.unet is not None:
        return section.unet, None, "--unet"
    if part == "vae" and section.pretrained_vae_model_name_or_path is not None:
        flag = "pretrained_vae_model_name_or_path"
        return section.pretrained_vae_model_name_or_path, None, f"--{flag}"
    return str(section.pretrained_model_name_or_path), part, "--pretrained_model_name_or_path"


def _read_config(section: ModelConfig, part: str | None, file: str) -> dict[str, Any]:
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
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds no settings")
        return found
    except (OSError, ValueError, RecursionError, HfHubHTTPError) as error:
        raise _cannot_load(section, part, error) from None


def _load(cls: Any, section: ModelConfig, part: str) -> Any:
    source, subfolder, _ = _place(section, part)
    options: dict[str, Any] = {
        "subfolder": subfolder or "",
        "revision": _revision(section, part),
        "cache_dir": section.cache_dir,
    }
    if cls is not CLIPTokenizer:
        options["use_safetensors"] = True
        # The reference reads the UNet from its plain files, for they are what is trained.
        options["variant"] = None if part == "unet" else section.variant
    try:
        loaded = cls.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError) as error:
        raise _cannot_load(section, part, error) from None
    return loaded.float() if isinstance(loaded, nn.Module) else loaded


def _check_weights(section: ModelConfig, part: str) -> None:
    """Raises UsageError for a folder whose weights can only be had by running what is in them."""
    source, subfolder, flag = _place(section, part)
    folder = Path(source, subfolder or "")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise UsageError(
            f"{flag} {source}: of its {part} there is {min(pickled)} and no .safetensors; pickled "
            "weights can run code and are never loaded: save it anew with safe_serialization=True "
            "where you trust it"
        )


def _revision(section: ModelConfig, part: str | None) -> str | None:
    """--non_ema_revision once named the branch of the UNet's raw weights."""
    if part == "unet" and section.non_ema_revision is not None:
        return section.non_ema_revision
    return section.revision


def _cannot_load(section: ModelConfig, part: str | None, error: Exception) -> UsageError:
    source, subfolder, flag = _place(section, part)
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
