"""The UNet that edits: Stable Diffusion's with four more input channels for the original image."""

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..kernels.unet import fuse
from .adapters import Adapter, attach
from .config import AdapterConfig, Format, Keeps
from .errors import UsageError
from .masters import Masters
from .recompute import checkpoint_blocks


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


class Prepared(NamedTuple):
    """A UNet that is ready to be trained."""

    unet: UNet2DConditionModel
    masters: Masters | None  # what the optimizer moves, where the UNet's own weights are bf16
    fused: list[str]  # lines for the log: what was fused, and each thing that was not
    adapter: Adapter | None = None  # with which all that is not in `parameters` is frozen

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name: fp32."""
        if self.masters is not None:
            return self.masters.named
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}


def prepare_unet(
    unet: UNet2DConditionModel,
    device: torch.device,
    *,
    gradient_checkpointing: bool = False,
    checkpointing_keeps: Keeps = "nothing",
    checkpointing_levels: int | None = None,
    fused: bool,
    attention: str = "auto",
    param_dtype: Format = "fp32",
    sums: bool = True,
    adapter: AdapterConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharded: bool = False,
) -> Prepared:
    """Moves a UNet to the device, trainable as a whole, channels_last where that is faster.

    Args:
        checkpointing_keeps, checkpointing_levels: of `checkpoint_blocks`.
        fused: puts the kernels of `kernels/unet.py` in the place of its norms, gates and attention.
        attention: which, as `kernels/unet.py` takes it.
        param_dtype: of its weights; bf16 ones are copies of fp32 masters.
        sums: of `Masters`.
        adapter: with --lora_rank it and conv_in are trainable alone; param_dtype is fp32.
        dtype: of the UNet's products.
        seed: of the adapter's draws.
        sharded: it will be: weights stay contiguous, as FSDP2 wants them, and fp32 without masters.
    """
    unet = unet.to(device, torch.float32).train().requires_grad_(True)  # pyright: ignore
    if gradient_checkpointing:
        checkpoint_blocks(unet, checkpointing_keeps, checkpointing_levels)
    if fused or device.type == "cpu":  # a GPU's norms of PyTorch would copy to NCHW and back
        if sharded:  # from the first convolution on, the input's format is that of all activations
            unet.conv_in.register_forward_pre_hook(_channels_last)
        else:
            unet = unet.to(memory_format=torch.channels_last)  # pyright: ignore
    attached = None  # then, not before: peft's DoRA takes no channels_last convolutions of its own
    if adapter is not None and adapter.lora_rank is not None:
        attached = attach(unet, adapter, dtype, seed)
    masters = Masters(unet, sums=sums) if param_dtype == "bf16" and not sharded else None
    lines = str(fuse(unet, attention=attention)).splitlines() if fused else []
    return Prepared(unet, masters, lines, attached)


def _channels_last(_: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    return given[0].contiguous(memory_format=torch.channels_last)
