"""The UNet that edits: Stable Diffusion's with four more input channels for the original image."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..kernels.unet import fuse
from .errors import UsageError


def grow_conv_in(unet: UNet2DConditionModel, name: str) -> None:
    """Makes a 4-channel UNet take 8; one that takes 8 already is left as it is.

    The new channels start at zero, and weight and bias of the old ones are kept, so that before
    any training the UNet says what it said before, whatever the condition.

    Source: Brooks et al. 2023 (arXiv:2211.09800), section 3.2.
    Raises: UsageError: the UNet takes neither 4 nor 8 channels; `name` says which one it is.
    """
    old = unet.conv_in
    if old.in_channels == 8:
        return
    if old.in_channels != 4:
        raise UsageError(
            f"the UNet of {name} takes {old.in_channels} input channels; 4 (a text-to-image model) "
            "or 8 (an InstructPix2Pix model) can be trained"
        )
    new = nn.Conv2d(8, old.out_channels, old.kernel_size, old.stride, old.padding)  # pyright: ignore
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :4] = old.weight
        new.bias.copy_(old.bias)  # pyright: ignore
    unet.conv_in = new.to(old.weight.device, old.weight.dtype)
    unet.register_to_config(in_channels=8)


def prepare_unet(
    unet: UNet2DConditionModel,
    device: torch.device,
    *,
    gradient_checkpointing: bool,
    fused: bool,
    attention: str = "auto",
) -> tuple[UNet2DConditionModel, list[str]]:
    """Moves a UNet to the device in fp32, every parameter trainable.

    Args:
        fused: puts the kernels of `kernels/unet.py` in the place of its norms, gates and attention.
        attention: which, as `kernels/unet.py` takes it.

    Returns: the UNet, and a line for the log on what was fused and each thing that was not.
    """
    unet = unet.to(device, torch.float32).train().requires_grad_(True)  # pyright: ignore
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if not fused:
        return unet, []
    unet = unet.to(memory_format=torch.channels_last)  # pyright: ignore
    return unet, str(fuse(unet, attention=attention)).splitlines()
