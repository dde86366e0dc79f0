"""A trained adapter as files that diffusers loads, and the lines that load them.

pytorch_lora_weights.safetensors   for load_lora_weights, with peft's settings
conv_in.safetensors                weight and bias of the 8-channel conv_in
raw/                               the same without averaging, where there are averages
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .adapters import NAME, Adapter
from .config import ModelConfig
from .export import public_name
from .families import Family
from .files import cannot_write

LORA_FILE = LORA_WEIGHT_NAME_SAFE
CONV_FILE = "conv_in.safetensors"
RAW_FOLDER = "raw"
MERGED = "merged"  # folder in a run's own, of its whole pipeline
STAGING = ".adapter.partial"
CONV = "conv_in."


def save_adapter(
    folder: Path,
    family: Family,
    unet: UNet2DConditionModel,
    adapter: Adapter,
    trained: Mapping[str, Tensor],
    raw: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter into `folder`, beside whatever else is there.

    Both files are written next door and renamed, the adapter's last: who finds it finds its
    conv_in.

    Args:
        unet: that the adapter is attached to.
        trained: all that is trained, by parameter name; the averages where there are any.
        raw: the same without averaging, where there are averages.

    Raises: UsageError: the folder cannot be written.
    """
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        _write(staging, family, unet, adapter, trained)
        if raw is not None:
            _write(staging / RAW_FOLDER, family, unet, adapter, raw)
        (folder / LORA_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / RAW_FOLDER, ignore_errors=True)
        for name in (RAW_FOLDER, CONV_FILE, LORA_FILE):
            if (staging / name).exists():
                os.replace(staging / name, folder / name)
        shutil.rmtree(staging)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from None


def _write(
    folder: Path,
    family: Family,
    unet: UNet2DConditionModel,
    adapter: Adapter,
    trained: Mapping[str, Tensor],
) -> None:
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    conv = {name.removeprefix(CONV): t for name, t in tensors.items() if name.startswith(CONV)}
    save_file(conv, folder / CONV_FILE)
    layers: dict[str, Any] = {name: t for name, t in tensors.items() if not name.startswith(CONV)}
    settings = adapter.settings.to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])  # a set has any order
    # peft's own names, not diffusers' older ones: those it has for some layers only, and then
    # load_lora_weights would pass over the others.
    family.pipeline.save_lora_weights(
        folder,
        unet_lora_layers=cast(Any, get_peft_model_state_dict(unet, layers, adapter_name=NAME)),
        unet_lora_adapter_metadata=settings,
    )
    for file in (LORA_FILE, CONV_FILE):  # safetensors lets nobody but the owner read
        (folder / file).chmod(folder.stat().st_mode & 0o666)


LOADING = """\
import torch
from diffusers import {pipeline}, UNet2DConditionModel
from diffusers.utils import load_image
from safetensors.torch import load_file

adapter = "{name}"  # this folder; huggingface_hub.snapshot_download() brings it from the hub
base = "{base}"
unet = UNet2DConditionModel.from_pretrained({unet})
unet.conv_in = torch.nn.Conv2d(8, unet.conv_in.out_channels, kernel_size=3, padding=1)
unet.conv_in.load_state_dict(load_file(f"{{adapter}}/{conv}"))
unet.register_to_config(in_channels=8)
pipeline = {pipeline}.from_pretrained(base, unet=unet{options})
pipeline.load_lora_weights(adapter)
pipeline.to("cuda")
"""


def loading(folder: Path, family: Family, section: ModelConfig) -> str:
    """The lines of the model card that make the trained pipeline of base and adapter."""
    source = 'base, subfolder="unet"' if section.unet is None else f'"{public_name(section.unet)}"'
    # The UNet is read from its plain files, whatever the variant.
    revision = {"revision": section.non_ema_revision or section.revision}
    options = {"revision": section.revision, "variant": section.variant}
    return LOADING.format(
        name=folder.resolve().name,
        pipeline=family.pipeline.__name__,
        base=public_name(str(section.pretrained_model_name_or_path)),
        unet=source + _given(revision),
        conv=CONV_FILE,
        options=_given(options),
    )


def _given(options: Mapping[str, str | None]) -> str:
    return "".join(f', {name}="{value}"' for name, value in options.items() if value)
