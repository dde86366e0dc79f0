"""One optimizer update: micro-batches in, parameters moved, numbers to log out."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..kernels.chunks import upload
from .encoders import Samples
from .loss import GROUPS
from .optim import AdamW
from .sharding import no_reduce_between_machines
from .world import World

GROWTH_STEPS = 2000  # good steps before the loss scale doubles, as in torch.amp.GradScaler
MAX_SCALE = 2.0**24
USUAL_STEPS = 100  # over which the usual loss is a mean
KNOWN_STEPS = 20  # before a loss is held against it


class Rates(NamedTuple):
    """What the host decides about one update, on the device: a CUDA graph reads it anew."""

    lr: Tensor  # [] fp64
    ema_weights: Tensor  # [averages] fp64, how far each of the optimizer's averages moves

    @classmethod
    def on(cls, device: torch.device, lr: float, *ema_weights: float) -> "Rates":
        rates = upload(torch.tensor([lr, *ema_weights], dtype=torch.float64), device)
        return cls(rates[0], rates[1:])


class StepResult(NamedTuple):
    """All stay on the device; the logger decides when to read them."""

    loss: Tensor  # [] fp32, summed over the window's samples and all ranks
    samples: Tensor  # [] fp32, how many samples that were
    grad_norm: Tensor  # [] fp32, of the mean gradient over all ranks, before clipping
    applied: Tensor  # [] bool, False: nothing moved; not finite, a spike, or no sample
    spike: Tensor  # [] bool, the loss was far above the usual one
    by_group: Tensor  # [2, GROUPS] fp32, loss and samples of each group that the loss is told by


class LossScale:
    """What the loss is multiplied by so that fp16 gradients do not vanish; 1 in other dtypes.

    Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2, with the constants of
    torch.amp.GradScaler; here it never leaves the device.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, finite: Tensor) -> None:
        """Halves the scale after a step that overflowed, doubles it after many that did not."""
        if not self.enabled:
            return
        good_steps = torch.where(finite, self.good_steps + 1, 0)
        grows = good_steps >= GROWTH_STEPS
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        # In place: a CUDA graph finds them where they were.
        self.scale.mul_(factor).clamp_(1.0, MAX_SCALE)
        self.good_steps.copy_(torch.where(grows, 0, good_steps))


class SpikeGuard:
    """Whether a loss is far above the usual one, its mean over about 100 steps; on the device.

    A spike counts as the highest loss that is none: one does not hide the next, but a loss that
    stays high becomes the usual one.

    Args:
        factor: a loss above so many times the usual one is a spike.
        skips: whether a step of such a loss moves nothing.
    """

    def __init__(self, factor: float, skips: bool, device: torch.device) -> None:
        self.factor, self.skips = factor, skips
        self.usual = torch.zeros((), device=device)  # fp32, a sample
        self.steps = torch.zeros((), device=device)  # that it is a mean of, up to USUAL_STEPS

    def look(self, loss: Tensor, counts: Tensor) -> Tensor:
        """[] bool, whether this is a spike.

        Args:
            loss: [] fp32, a sample.
            counts: [] bool, whether it is a loss at all: finite, of some sample.
        """
        highest = self.factor * self.usual
        known = self.steps >= KNOWN_STEPS
        spike = counts & known & (loss > highest)
        seen = torch.where(known, torch.minimum(loss, highest), loss)
        # In place: a CUDA graph finds them where they were.
        self.steps.copy_(torch.where(counts, (self.steps + 1).clamp(max=USUAL_STEPS), self.steps))
        moved = self.usual + (seen - self.usual) / self.steps.clamp(min=1)
        self.usual.copy_(torch.where(counts, moved, self.usual))
        return spike


def train_step(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Samples, Tensor], Tensor],
    optimizer: AdamW,
    loss_scale: LossScale,
    world: World,
    micro_batches: Sequence[Samples],
    rates: Rates,
    *,
    slots: int,
    max_grad_norm: float,
    guard: SpikeGuard | None = None,
) -> StepResult:
    """Accumulates over the micro-batches, all-reduces once, clips and updates.

    The gradient is that of the mean over the samples of weight 1 in the whole window, however the
    window is cut into ranks and micro-steps and however short it is. All that changes from one call
    to the next comes in tensors, and nothing waits for the host: a CUDA graph can hold it.

    Args:
        model: the UNet, wrapped in DDP or sharded when there is more than one rank.
        loss_fn: (model, samples, by_group) -> [] fp32, the sum over the samples of weight times
            loss, as `EditLoss`.
        micro_batches: this rank's share of the window.
        slots: samples of this rank's whole window, padding too; keeps fp16 gradients in range.
        max_grad_norm: global L2 norm to clip to; inf leaves the gradient as it is.
        guard: looks at the loss, and may have its step move nothing.
    """
    optimizer.zero_grad()
    totals = torch.zeros(2 + 2 * GROUPS, device=world.device)  # loss and samples: all, by group
    by_group = totals[2:].view(2, GROUPS)
    for index, samples in enumerate(micro_batches, start=1):
        last = index == len(micro_batches)
        with nullcontext() if last else no_all_reduce(model):
            loss = loss_fn(model, samples, by_group)
            (loss * (loss_scale.scale / slots)).backward()
        optimizer.take_gradients(last=last)
        totals[:2] += torch.stack((loss.detach(), samples.weights.sum()))
    loss, count = world.sum(totals)[:2]

    # DDP, or FSDP2, has divided by the ranks; the mean is over the samples of the window.
    mean_factor = world.size * slots / (count.clamp(min=1.0) * loss_scale.scale)
    grad_norm = optimizer.grad_norm() * mean_factor
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss)  # of all ranks, and alike on them
    applied, spike = finite & (count > 0), torch.zeros_like(finite)
    if guard is not None:
        spike = guard.look(loss / count.clamp(min=1.0), applied)
        applied = applied & ~spike if guard.skips else applied
    clip = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # 1e-6: as clip_grad_norm_
    optimizer.update(rates.lr, rates.ema_weights, mean_factor * clip, applied)
    loss_scale.update(finite)
    return StepResult(loss, count, grad_norm, applied, spike, by_group)


def discarded_step(model: nn.Module, samples: Samples, loss_fn, optimizer: AdamW) -> None:
    """One backward whose gradients are thrown away, before the first real step of every start.

    DDP orders its buckets by the first backward, and with them the sums over ranks: without this
    a resumed run would add in another order than the run it goes on from.
    """
    loss_fn(model, samples).backward()
    optimizer.take_gradients(last=True)
    optimizer.zero_grad()


def no_all_reduce(model: nn.Module):
    """A micro-step that is not the last of its window keeps its gradients to itself.

    A sharded model has no room for them; they stay within the machine.
    """
    if isinstance(model, FSDPModule):
        return no_reduce_between_machines(model)
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
