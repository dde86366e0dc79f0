"""From samples to their loss: draws, noise, hidden conditions, UNet, squared error."""

from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.edit_input import edit_input
from ..kernels.weighted_mse import weighted_mse
from .conditioning import CONDITIONS, condition_of, drop_masks
from .diffusion import Diffusion
from .draws import Purpose, draw_integers, draw_uniform
from .encoders import Samples
from .families import Text, told_beside


class Purposes(NamedTuple):
    """Which streams of random numbers a batch takes its noise from."""

    posterior: Purpose
    noise: Purpose
    timestep: Purpose
    noise_offset: Purpose | None = None  # None: none is added, whatever the run trains with
    input_perturbation: Purpose | None = None  # the same


TRAINING = Purposes(
    Purpose.POSTERIOR,
    Purpose.NOISE,
    Purpose.TIMESTEP,
    Purpose.NOISE_OFFSET,
    Purpose.INPUT_PERTURBATION,
)
# Noise as it is, and unweighted: the held-out losses of runs with other options can be compared.
HELD_OUT = Purposes(Purpose.HELD_OUT_POSTERIOR, Purpose.HELD_OUT_NOISE, Purpose.HELD_OUT_TIMESTEP)

BANDS = 4  # of timesteps, of equal width
GROUPS = len(CONDITIONS) + BANDS  # that the loss is told by, too: each sample is in two


class EditInput(NamedTuple):
    """One call of the UNet and the answer it should give."""

    latents: Tensor  # [n, 8, h, w] in the compute dtype: noisy target, then condition
    timesteps: Tensor  # [n] int64
    text: Tensor  # [n, tokens, width]
    pooled: Tensor  # [n, pooled]; 0 wide where the UNet takes none
    size_ids: Tensor  # [n, 6] fp32
    target: Tensor  # [n, 4, h, w] fp32


class EditLoss:
    """The loss of InstructPix2Pix, a function of (UNet, samples, seed) alone.

    Args:
        rates: of dropping text alone, both, image alone.
        null_text: of one instruction, what stands for a dropped one.
        autocast_dtype: of the UNet's matrix products and convolutions; fp32 turns autocast off.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        rates: tuple[float, float, float],
        null_text: Text,
        seed: int,
        autocast_dtype: torch.dtype,
    ) -> None:
        self.diffusion = diffusion
        self.rates = rates
        self.null_text = null_text
        self.seed = seed
        self.autocast_dtype = autocast_dtype

    @property
    def groups(self) -> list[str]:
        """What the log calls them: conditions, then bands by first and last timestep."""
        steps = len(self.diffusion.signal)
        ends = [band * steps // BANDS for band in range(BANDS + 1)]
        bands = [f"{start}-{end - 1}" for start, end in pairwise(ends)]
        conditions = [f"loss_by_condition/{name}" for name in CONDITIONS]
        return [*conditions, *(f"loss_by_timestep/{band}" for band in bands)]

    def __call__(self, unet: nn.Module, samples: Samples, by_group: Tensor | None = None) -> Tensor:
        """[] fp32, the sum over the samples of weight times error, conditions dropped by draw.

        The weight is the sample's and that of its timestep, which counts in no mean's divisor.

        Args:
            by_group: [2, GROUPS] fp32; the same sum over each group, and how many samples it has,
                are added to it.
        """
        draw = draw_uniform(self.seed, Purpose.DROPOUT, samples.positions)[:, 0]
        drop_text, drop_image = drop_masks(draw, self.rates)
        given = self.edit_input(samples, drop_text, drop_image, TRAINING)
        weights = samples.weights
        if self.diffusion.loss_weights is not None:
            weights = weights * self.diffusion.loss_weights[given.timesteps]
        loss, errors = self.errors(unet, given, weights)
        if by_group is not None:
            condition = condition_of(drop_text, drop_image)
            band = given.timesteps * BANDS // len(self.diffusion.signal)
            is_in = membership(condition, band)
            # Picked, not multiplied: what is not finite stays in its own groups.
            by_group[0] += torch.where(is_in, weights * errors, 0.0).sum(dim=1)
            by_group[1] += torch.where(is_in, samples.weights, 0.0).sum(dim=1)
        return loss

    @torch.no_grad()
    def edit_input(
        self, samples: Samples, drop_text: Tensor, drop_image: Tensor, purposes: Purposes
    ) -> EditInput:
        """Draws posterior sample, noise and timestep, and hides what the masks say."""
        diffusion, trained = self.diffusion, self.diffusion.timesteps
        timesteps = trained.start + draw_integers(
            self.seed, purposes.timestep, samples.positions, len(trained)
        )
        shifts, perturbs = purposes.noise_offset, purposes.input_perturbation
        latents, target = edit_input(
            samples.target_mean,
            samples.target_std,
            samples.condition,
            samples.positions,
            timesteps,
            drop_image,
            diffusion.signal,
            diffusion.noise,
            seed=self.seed,
            posterior_purpose=purposes.posterior,
            noise_purpose=purposes.noise,
            latent_scale=diffusion.latent_scale,
            prediction_type=diffusion.prediction_type,
            dtype=self.autocast_dtype,
            noise_offset=0.0 if shifts is None else diffusion.noise_offset,
            noise_offset_purpose=shifts or 0,
            input_perturbation=0.0 if perturbs is None else diffusion.input_perturbation,
            input_perturbation_purpose=perturbs or 0,
        )
        text = torch.where(drop_text[:, None, None], self.null_text.states, samples.text)
        pooled = torch.where(drop_text[:, None], self.null_text.pooled, samples.pooled)
        return EditInput(latents, timesteps, text, pooled, samples.size_ids, target)

    def errors(self, unet: nn.Module, given: EditInput, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The UNet's mean squared errors, fp32.

        Returns: [], the sum over the samples of weight times error; [n], each error, through which
            no gradient flows.
        """
        mixed = self.autocast_dtype is not torch.float32
        device_type = given.latents.device.type
        with torch.autocast(device_type, self.autocast_dtype) if mixed else nullcontext():
            predicted = unet(
                given.latents,
                given.timesteps,
                given.text,
                added_cond_kwargs=told_beside(given.pooled, given.size_ids),
                return_dict=False,
            )[0]
        return weighted_mse(predicted, given.target, weights)


def membership(condition: Tensor, band: Tensor) -> Tensor:
    """[GROUPS, n] bool, which samples are in which group."""
    sizes = (len(CONDITIONS), BANDS)
    return torch.cat(
        [
            torch.arange(size, device=of.device)[:, None] == of
            for of, size in zip((condition, band), sizes, strict=True)
        ]
    )
