"""The frozen half of the model: VAE and text encoders, from pixels and tokens to samples.

Source: Brooks et al. 2023 (arXiv:2211.09800), section 3.2: the target is a sample of the VAE's
posterior, the condition its mode. Both images of a pair go through the VAE in one batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..kernels.unet import fuse
from .data import PixelBatch
from .families import Text, TextEncoder


class Samples(NamedTuple):
    """What the UNet trains on. n samples, f the VAE's factor."""

    target_mean: Tensor  # [n, 4, height / f, width / f], of the edited image's posterior, unscaled
    target_std: Tensor  # the same shape: the posterior is sampled anew at each visit
    condition: Tensor  # the same shape: mode of the original image's posterior, unscaled
    text: Tensor  # [n, tokens, width], what the UNet attends to
    pooled: Tensor  # [n, pooled], beside the timestep; 0 wide where the UNet takes none
    size_ids: Tensor  # [n, 6] fp32: height and width, top and left of the crop, height and width
    positions: Tensor  # [n] int64, place of the sample in the run: the counter of its draws
    weights: Tensor  # [n] fp32, 1, or 0 for padding and skipped samples


class Encoders:
    """Turns pixel batches into samples, without gradients, in one dtype.

    Args:
        null_tokens: [1, length] int64, the empty instruction; encoded once, here.
        dtype: of the text encoders and of the samples; that of mixed_precision in the reference.
        vae_dtype: of the VAE, where it is another.
        fused: the VAE's norms by our kernels.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        null_tokens: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        *,
        vae_dtype: torch.dtype | None = None,
        fused: bool = False,
    ) -> None:
        self.vae = _frozen(vae, device, vae_dtype or dtype)
        if fused or device.type == "cpu":  # a GPU's norms of PyTorch would copy to NCHW and back
            self.vae = self.vae.to(memory_format=torch.channels_last)
        if fused:
            fuse(self.vae.encoder, ops=("group_norm",))
        self.text_encoder = _frozen(text_encoder, device, dtype)
        self.device = device
        self.dtype = dtype
        self.null_text = self.encode_text(null_tokens.to(device))

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Text:
        """[n, length] int64 -> n encoded instructions."""
        return self.text_encoder(tokens)

    @torch.no_grad()
    def encode_images(self, edited: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two [n, 3, height, width] uint8 -> the target's mean and std, the condition."""
        pair = (edited, original)  # each pinned; what torch.cat makes would not be
        images = torch.cat([image.to(self.device, non_blocking=True) for image in pair])
        images = images.float() / 127.5 - 1.0  # [2 n, 3, height, width]
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        edited_mean, condition = posterior.mean.to(self.dtype).chunk(2)
        return edited_mean, posterior.std.chunk(2)[0].to(self.dtype), condition

    @torch.no_grad()
    def encode(self, batch: PixelBatch) -> Samples:
        """Pixels and tokens of n pairs -> samples on the device."""
        target_mean, target_std, condition = self.encode_images(batch.edited, batch.original)
        text = self.encode_text(batch.tokens.to(self.device, non_blocking=True))
        return Samples(
            target_mean=target_mean,
            target_std=target_std,
            condition=condition,
            text=text.states,
            pooled=text.pooled,
            size_ids=batch.size_ids.to(self.device, non_blocking=True),
            positions=batch.positions.to(self.device, non_blocking=True),
            weights=batch.weights.to(self.device, non_blocking=True),
        )


class SideStream:
    """Makes the samples of the next update while the device is still busy with the current one.

    The host runs ahead of the device, so a stream of their own is all it takes. On a CPU there is
    none.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the encoders' weights

    def __call__(self, make: Callable[[], list[Samples]]) -> list[Samples]:
        if self.stream is None:
            return make()
        current = torch.cuda.current_stream(self.stream.device)
        with torch.cuda.stream(self.stream):
            made = make()
        current.wait_stream(self.stream)
        for samples in made:
            for tensor in samples:
                tensor.record_stream(current)  # its memory is not given away before it was read
        return made


def _frozen(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    return module.to(device, dtype).eval().requires_grad_(False)
