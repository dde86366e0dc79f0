"""From samples to the loss of each: draws, noise, hidden conditions, UNet, squared error."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .conditioning import drop_masks
from .diffusion import Diffusion
from .draws import Purpose, draw_integers, draw_normal, draw_uniform
from .encoders import Samples


class Purposes(NamedTuple):
    """Which streams of random numbers a batch takes its noise from."""

    posterior: Purpose
    noise: Purpose
    timestep: Purpose


TRAINING = Purposes(Purpose.POSTERIOR, Purpose.NOISE, Purpose.TIMESTEP)
HELD_OUT = Purposes(Purpose.HELD_OUT_POSTERIOR, Purpose.HELD_OUT_NOISE, Purpose.HELD_OUT_TIMESTEP)


class EditInput(NamedTuple):
    """One call of the UNet and the answer it should give."""

    latents: Tensor  # [n, 8, h, w] fp32: noisy target, then condition
    timesteps: Tensor  # [n] int64
    text: Tensor  # [n, tokens, width]
    target: Tensor  # [n, 4, h, w] fp32


class EditLoss:
    """The loss of InstructPix2Pix, a function of (UNet, samples, seed) alone.

    Args:
        rates: of dropping text alone, both, image alone.
        null_text: [1, tokens, width], what stands for a dropped instruction.
        autocast_dtype: of the UNet's matrix products and convolutions; fp32 turns autocast off.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        rates: tuple[float, float, float],
        null_text: Tensor,
        seed: int,
        autocast_dtype: torch.dtype,
    ) -> None:
        self.diffusion = diffusion
        self.rates = rates
        self.null_text = null_text
        self.seed = seed
        self.autocast_dtype = autocast_dtype

    def __call__(self, unet: nn.Module, samples: Samples) -> Tensor:
        """[n] fp32, the mean squared error of each sample, its conditions dropped by draw."""
        draw = draw_uniform(self.seed, Purpose.DROPOUT, samples.positions)[:, 0]
        return self.error(unet, self.edit_input(samples, *drop_masks(draw, self.rates), TRAINING))

    @torch.no_grad()
    def edit_input(
        self, samples: Samples, drop_text: Tensor, drop_image: Tensor, purposes: Purposes
    ) -> EditInput:
        """Draws posterior sample, noise and timestep, and hides what the masks say, all in fp32."""
        positions, shape = samples.positions, samples.target_mean.shape[1:]
        posterior = draw_normal(self.seed, purposes.posterior, positions, shape)
        noise = draw_normal(self.seed, purposes.noise, positions, shape)
        timesteps = draw_integers(
            self.seed, purposes.timestep, positions, len(self.diffusion.signal)
        )
        latents = samples.target_mean.float() + samples.target_std.float() * posterior
        latents = latents * self.diffusion.latent_scale
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        condition = samples.condition.float().masked_fill(drop_image[:, None, None, None], 0.0)
        return EditInput(
            latents=torch.cat((noisy, condition), dim=1),
            timesteps=timesteps,
            text=torch.where(drop_text[:, None, None], self.null_text, samples.text),
            target=self.diffusion.target(latents, noise, timesteps),
        )

    def error(self, unet: nn.Module, given: EditInput) -> Tensor:
        """[n] fp32, the UNet's mean squared error on each sample."""
        mixed = self.autocast_dtype is not torch.float32
        device_type = given.latents.device.type
        with torch.autocast(device_type, self.autocast_dtype) if mixed else nullcontext():
            predicted = unet(given.latents, given.timesteps, given.text, return_dict=False)[0]
        return (predicted.float() - given.target).square().mean(dim=(1, 2, 3))
