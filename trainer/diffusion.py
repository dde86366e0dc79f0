"""The noise schedule, as `kernels/edit_input.py` mixes noise in and makes the target by it.

Source: Ho et al. 2020 (arXiv:2006.11239), equation 4. The betas, with or without zero terminal
SNR, are those of diffusers' DDPMScheduler.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..kernels.edit_input import PREDICTIONS


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
