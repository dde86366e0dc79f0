"""The forward process: how noise is mixed in, and what the UNet is asked to say.

Source: Ho et al. 2020 (arXiv:2006.11239), equation 4; v: Salimans and Ho 2022 (arXiv:2202.00512),
appendix D. The betas, with or without zero terminal SNR, are those of diffusers' DDPMScheduler.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, slots=True)
class Diffusion:
    """A noise schedule on a device."""

    signal: Tensor  # [steps] fp32, sqrt(alpha bar)
    noise: Tensor  # [steps] fp32, sqrt(1 - alpha bar)
    prediction_type: str  # epsilon or v_prediction
    latent_scale: float  # the VAE's scaling_factor, of the target only

    @classmethod
    def from_scheduler(
        cls, config: dict[str, Any], latent_scale: float, device: torch.device
    ) -> "Diffusion":
        """From the config of any diffusers scheduler, the one saved with the pipeline.

        Raises: ValueError: the pipeline predicts something not in PREDICTIONS.
        """
        scheduler: Any = DDPMScheduler.from_config(config)
        kind = scheduler.config["prediction_type"]
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {PREDICTIONS}, got {kind}")
        alpha_bar = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), kind, latent_scale)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [n, 4, h, w] at timesteps [n], in fp32."""
        signal, sigma = self._at(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict, [n, 4, h, w] fp32."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._at(timesteps)
        return signal * noise - sigma * latents

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[timesteps].view(-1, 1, 1, 1), self.noise[timesteps].view(-1, 1, 1, 1)
