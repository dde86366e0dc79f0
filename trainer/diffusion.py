"""The noise schedule, as `kernels/edit_input.py` mixes noise in and makes the target by it.

Source: Ho et al. 2020 (arXiv:2006.11239), equation 4. The betas, with or without zero terminal
SNR, are those of diffusers' DDPMScheduler.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from ..kernels.edit_input import PREDICTIONS
from .config import DiffusionConfig
from .errors import UsageError


@dataclass(frozen=True, slots=True)
class Diffusion:
    """A noise schedule on a device, and what training makes of it.

    Source of the offset: Guttenberg 2023, "Diffusion with Offset Noise", and diffusers'
    train_text_to_image.py: it belongs to the noise, so it is predicted. Of the perturbation: Ning
    et al. 2023 (arXiv:2301.11706), algorithm 1: it is in the input alone. Their draws are normals
    of purposes of their own: one for each sample and channel, one for each element.
    """

    signal: Tensor  # [steps] fp32, sqrt(alpha bar)
    noise: Tensor  # [steps] fp32, sqrt(1 - alpha bar)
    prediction_type: str  # epsilon or v_prediction
    latent_scale: float  # the VAE's scaling_factor, of the target only
    timesteps: range  # that are drawn, each as often
    loss_weights: Tensor | None  # [steps] fp32, of min-SNR; None: all are 1
    noise_offset: float  # of the normal that is added to all of a channel's noise
    input_perturbation: float  # of the normals that are added to the noise of the input alone

    @classmethod
    def from_scheduler(
        cls,
        config: Mapping[str, Any],
        latent_scale: float,
        device: torch.device,
        section: DiffusionConfig | None = None,
    ) -> "Diffusion":
        """From the config of any diffusers scheduler, the one saved with the pipeline.

        Args:
            config: as `trained_scheduler` gives it.

        Raises: ValueError: the pipeline predicts something not in PREDICTIONS.
        """
        section = section or DiffusionConfig()
        scheduler: Any = DDPMScheduler.from_config(dict(config))
        kind = scheduler.config["prediction_type"]
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {PREDICTIONS}, got {kind}")
        alpha_bar = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)
        weights = None
        if section.snr_gamma is not None:
            weights = min_snr_weights(alpha_bar, section.snr_gamma, kind)
        return cls(
            signal=alpha_bar.sqrt(),
            noise=(1 - alpha_bar).sqrt(),
            prediction_type=kind,
            latent_scale=latent_scale,
            timesteps=range(section.min_timestep, section.max_timestep or len(alpha_bar)),
            loss_weights=weights,
            noise_offset=section.noise_offset,
            input_perturbation=section.input_perturbation,
        )


def min_snr_weights(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """[steps] fp32, what the squared error of each timestep is weighted by.

    min(SNR, gamma) is the weight of the error of the clean latents; epsilon's error is SNR times as
    large, v's SNR + 1 times. With SNR = alpha bar / (1 - alpha bar) nothing is divided by 0.
    Source: Hang et al. 2023 (arXiv:2303.09556), section 3.4.

    Args:
        alpha_bar: [steps].
        gamma: above 0.
    """
    alpha_bar = alpha_bar.double()
    if prediction_type == "v_prediction":
        weights = torch.minimum(alpha_bar, gamma * (1 - alpha_bar))
    else:
        weights = (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)
    return weights.float()


def trained_scheduler(config: Mapping[str, Any], section: DiffusionConfig) -> dict[str, Any]:
    """The config of the pipeline's sampler, as what is trained needs it: so it is exported.

    With zero terminal SNR it says so and samples from the last timestep on ("trailing"); a sampler
    that cannot say so, as PNDM, becomes DDIM, with which the paper samples.
    Source: Lin et al. 2023 (arXiv:2305.08891), algorithm 1 and sections 3.1 to 3.3.

    Raises: UsageError: flags do not go with the pipeline's schedule.
    """
    config = dict(config)
    steps = config.get("num_train_timesteps", 1000)
    if max(section.min_timestep + 1, section.max_timestep or 0) > steps:
        flag, value, most = "--max_timestep", section.max_timestep, steps
        if section.min_timestep >= steps:
            flag, value, most = "--min_timestep", section.min_timestep, steps - 1
        raise UsageError(f"{flag} {value} must be at most {most}: the schedule has {steps} steps")
    if section.prediction_type is not None:
        config["prediction_type"] = section.prediction_type
    kind = config.get("prediction_type", "epsilon")
    zero_snr = section.rescale_betas_zero_snr or config.get("rescale_betas_zero_snr", False)
    if zero_snr and kind != "v_prediction":
        of = "--" if section.rescale_betas_zero_snr else "the pipeline's scheduler has "
        raise UsageError(
            f"{of}rescale_betas_zero_snr, which needs v-prediction, and predicts {kind}: take "
            "--prediction_type v_prediction"
        )
    return _with_zero_snr(config) if section.rescale_betas_zero_snr else config


def _with_zero_snr(config: dict[str, Any]) -> dict[str, Any]:
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changes.keys() <= _settings(getattr(diffusers, config["_class_name"])):
        return config | changes
    kept = {name: config[name] for name in config.keys() & _settings(DDIMScheduler)}
    clips = {"clip_sample": config.get("clip_sample", False)}  # DDIM's default is for pixels
    return {"_class_name": "DDIMScheduler", **kept, **clips, **changes}


def _settings(scheduler: type) -> set[str]:
    return {*inspect.signature(scheduler).parameters}
