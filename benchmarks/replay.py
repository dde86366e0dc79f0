"""What diffusers' script drew (recording.py), drawn again: by our step, and in fp64.

`Ours` is the trainer's own update: its encoders, loss, accumulation, clip, AdamW and averages; the
recorded draws stand where Philox would be asked. `Truth` is the mathematics of the script written
once more in plain PyTorch, in a dtype where rounding does not show. Both start from the weights
that the script started from.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..kernels import edit_input
from ..trainer import loss
from ..trainer.config import OptimConfig, RunConfig
from ..trainer.data import PixelBatch, make_tokenize
from ..trainer.diffusion import Diffusion
from ..trainer.draws import Purpose
from ..trainer.ema import Ema
from ..trainer.encoders import Encoders
from ..trainer.families import SIZE_IDS
from ..trainer.optim import make_optimizer
from ..trainer.plan import DTYPES
from ..trainer.pretrained import Described, load_encoders, load_unet
from ..trainer.step import LossScale, Rates, train_step
from ..trainer.unet import prepare_unet
from ..trainer.world import World

Named = dict[str, Tensor]


class Update(NamedTuple):
    """What an update came to; all in fp32 or wider, on the CPU."""

    losses: Tensor  # [micro-steps], means over the samples
    grad_norm: Tensor  # [], before clipping
    gradients: Named  # before clipping
    weights: Named  # after it
    averages: Named


class Recorded:
    """An update of the script, from its file.

    Args:
        tensors: as recording.py names them.
        micro_steps: of a whole window.
    """

    def __init__(self, tensors: Named, micro_steps: int, device: torch.device) -> None:
        self.tensors, self.micro_steps, self.device = tensors, micro_steps, device
        self.count = sum(name.endswith(".loss") for name in tensors)
        self.lr = float(tensors["update.lr"])
        self.whole = any(name.startswith("weight.") for name in tensors)

    @property
    def share(self) -> float:
        """Of a whole window. The script divides by the window, however many there are: defect 6."""
        return self.count / self.micro_steps

    def of(self, name: str) -> list[Tensor]:
        """A tensor for each micro-step."""
        return [self.tensors[f"{at}.{name}"].to(self.device) for at in range(self.count)]

    def named(self, kind: str) -> Named:
        start = f"{kind}."
        return {
            name.removeprefix(start): value
            for name, value in self.tensors.items()
            if name.startswith(start)
        }

    def result(self) -> Update:
        kinds = (self.named(kind) for kind in ("gradient", "weight", "average"))
        return Update(torch.stack(self.of("loss")).cpu(), self.tensors["update.grad_norm"], *kinds)


class Parts(NamedTuple):
    """What both replays need to know."""

    config: RunConfig
    described: Described
    start: Named
    device: torch.device

    def unet(self) -> Any:
        unet = load_unet(self.config.model)
        unet.load_state_dict(self.start)
        return unet

    def null_tokens(self) -> Tensor:
        return make_tokenize(self.described.tokenizers)("")[None].to(self.device)


class Ours:
    """The trainer's own update, on recorded draws."""

    def __init__(self, parts: Parts, *, fused: bool) -> None:
        config, self.device = parts.config, parts.device
        dtype = DTYPES[config.precision.mixed_precision or "no"]
        prepared = prepare_unet(parts.unet(), self.device, fused=fused)
        self.unet, self.named = prepared.unet, prepared.parameters
        encoders = load_encoders(config.model)
        self.encoders = Encoders(*encoders, parts.null_tokens(), self.device, dtype, fused=fused)
        scale = parts.described.vae["scaling_factor"]
        diffusion = Diffusion.from_scheduler(parts.described.scheduler, scale, self.device)
        rates = config.conditioning.rates
        self.loss_fn = loss.EditLoss(diffusion, rates, self.encoders.null_text, 0, dtype)
        self.ema = Ema(self.named, config.optim.ema_decay)
        self.own_averages = Ema(self.named, config.optim.ema_decay)  # as a run has them
        self.optimizer = make_optimizer(self.named, config.optim, self.ema, fused=fused)
        self.loss_scale = LossScale(False, self.device)
        self.max_grad_norm, self.updates = config.optim.max_grad_norm, 0

    def update(self, recorded: Recorded) -> Update:
        batches = [self._batch(recorded, index) for index in range(recorded.count)]
        losses: list[Tensor] = []
        gradients: Named = {}

        def kept_loss(model: nn.Module, samples: Any, _: Tensor) -> Tensor:
            found = self.loss_fn(model, samples)
            losses.append(found.detach() / len(samples.positions))
            return found * recorded.share  # as the script has it

        own, weight = self.optimizer.grad_norm, self.ema.weight
        slots = sum(len(batch.positions) for batch in batches)

        def kept_norm() -> Tensor:
            # Gradients lie divided by the slots: here those are all of the window's samples.
            if recorded.whole:
                gradients.update({n: wide(_grad(value)) for n, value in self.named.items()})
            return own()

        with replayed(recorded), patch.object(self.optimizer, "grad_norm", kept_norm):
            result = train_step(
                self.unet,
                kept_loss,
                self.optimizer,
                self.loss_scale,
                World(device=self.device),
                [self.encoders.encode(batch) for batch in batches],
                # diffusers' averages start one update later: the first one copies.
                Rates.on(self.device, recorded.lr, weight(self.updates) if self.updates else 1.0),
                slots=slots,
                max_grad_norm=self.max_grad_norm,
            )
        self.updates += 1
        own_weight = torch.tensor(self.own_averages.weight(self.updates), device=self.device)
        self.own_averages.update(own_weight, torch.ones_like(own_weight))
        moved = (kept(kind, recorded) for kind in (self.named, self.ema.averages))
        return Update(torch.stack(losses).cpu(), wide(result.grad_norm), gradients, *moved)

    def _batch(self, recorded: Recorded, index: int) -> PixelBatch:
        edited, original = (
            ((recorded.of(name)[index].float() + 1) * 127.5).round().to(torch.uint8)
            for name in ("edited", "original")
        )
        count = len(edited)
        positions = torch.arange(count, device=self.device) + index * count
        weights = torch.ones(count, device=self.device)
        return PixelBatch(
            original,
            edited,
            recorded.of("tokens")[index],
            torch.zeros(count, SIZE_IDS, device=self.device),  # told to XL alone
            positions,
            weights,
            errors=(),
        )


@contextmanager
def replayed(recorded: Recorded) -> Iterator[None]:
    """Inside, the loss draws what the script drew, by position in the window."""
    drawn = {
        Purpose.POSTERIOR: torch.cat(recorded.of("posterior")).float(),
        Purpose.NOISE: torch.cat(recorded.of("noise")).float(),
    }
    timesteps, dropout = (torch.cat(recorded.of(name)) for name in ("timesteps", "dropout"))

    def words(seed: int, purpose: int, positions: Tensor, count: int) -> Tensor:
        return drawn[Purpose(purpose)][positions].reshape(len(positions), count)

    with (
        patch.object(loss, "edit_input", edit_input.edit_input_reference),
        patch.object(edit_input, "words", words),
        patch.object(edit_input, "normal", lambda values: values),
        patch.object(loss, "draw_integers", lambda seed, purpose, at, below: timesteps[at]),
        patch.object(loss, "draw_uniform", lambda seed, purpose, at: dropout[at][:, None]),
    ):
        yield


class Truth:
    """The script's mathematics in one dtype throughout: fp64, or fp32 beside a 16-bit run."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        self.parts, self.dtype, device = parts, dtype, parts.device
        self.unet = parts.unet().to(device, dtype).train()
        found: Any = load_encoders(parts.config.model)
        self.vae, self.text_encoder = (part.to(device, dtype).eval() for part in found)
        self.schedule: Any = DDPMScheduler.from_config(parts.described.scheduler)
        self.schedule.alphas_cumprod = self.schedule.alphas_cumprod.to(dtype)
        with torch.no_grad():
            self.null_text = self.text_encoder(parts.null_tokens()).states
        section: OptimConfig = parts.config.optim
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_epsilon,
            weight_decay=section.adam_weight_decay,
        )
        self.averages = {name: value.detach().clone() for name, value in self._named()}
        self.updates = 0

    def update(self, recorded: Recorded) -> Update:
        losses = []
        for index in range(recorded.count):
            found = self._loss(lambda name, at=index: recorded.of(name)[at])
            (found / recorded.micro_steps).backward()
            losses.append(found.detach())
        gradients = kept({name: _grad(value) for name, value in self._named()}, recorded)
        section = self.parts.config.optim
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), section.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = recorded.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min((1 + self.updates) / (10 + self.updates), section.ema_decay)
        for name, value in self._named():
            self.averages[name].lerp_(value.detach(), 1.0 - decay if self.updates else 1.0)
        self.updates += 1
        moved = (kept(kind, recorded) for kind in (dict(self._named()), self.averages))
        return Update(torch.stack(losses).cpu(), wide(norm), gradients, *moved)

    def _loss(self, given: Callable[[str], Tensor]) -> Tensor:
        rate = self.parts.config.conditioning.rates[0]
        edited, original = given("edited").to(self.dtype), given("original").to(self.dtype)
        with torch.no_grad():
            posterior = self.vae.encode(edited).latent_dist
            latents = posterior.mean + posterior.std * given("posterior").to(self.dtype)
            latents = latents * self.vae.config.scaling_factor
            condition = self.vae.encode(original).latent_dist.mode()
            text = self.text_encoder(given("tokens")).states
        noise, timesteps, draw = given("noise").to(self.dtype), given("timesteps"), given("dropout")
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = noise
        if self.schedule.config["prediction_type"] == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        text = torch.where((draw < 2 * rate)[:, None, None], self.null_text, text)
        hidden = (draw >= rate) & (draw < 3 * rate)
        condition = condition.masked_fill(hidden[:, None, None, None], 0.0)
        predicted = self.unet(torch.cat((noisy, condition), dim=1), timesteps, text).sample
        return F.mse_loss(predicted, target)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.unet.named_parameters())


def kept(named: Mapping[str, Tensor], recorded: Recorded) -> Named:
    """Copies on the CPU, where there is something to compare them with."""
    return {name: wide(value) for name, value in named.items()} if recorded.whole else {}


def _grad(parameter: Tensor) -> Tensor:
    """Zero, where nothing reached it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def wide(value: Tensor) -> Tensor:
    """A copy on the CPU that later updates do not change."""
    return value.detach().to("cpu", copy=True)
