"""AdamW, clipping, averages and the schedule: one update decided on the device, state by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..kernels.adamw_ema import AdamWEma, Current
from .config import OptimConfig
from .draws import Purpose
from .ema import Averages, Ema
from .errors import UsageError
from .masters import Masters, gradients
from .sharding import Shards

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def schedule(
    name: str,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    num_cycles: int = 1,
    power: float = 1.0,
) -> Callable[[int], float]:
    """The learning rate at an optimizer step, from 0, by one of diffusers' schedules.

    Args:
        num_cycles: of cosine_with_restarts.
        power: of polynomial.
    """
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    made = get_scheduler(
        name,
        unused,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        num_cycles=num_cycles,
        power=power,
    )
    factor = made.lr_lambdas[0]
    return lambda step: peak * factor(step)


def make_optimizer(
    named: Mapping[str, nn.Parameter],
    section: OptimConfig,
    ema: Ema | None,
    masters: Masters | None = None,
    *,
    fused: bool,
    seed: int = 0,
    kept: Sequence[Averages] = (),
    shards: Shards | None = None,
) -> "AdamW":
    """The one-pass kernel where fused ops or bf16 moments are wanted; else PyTorch's.

    Args:
        named: what is moved: the masters where there are some.
        seed: of the rounding of bf16 moments.
        kept: more averages of the same parameters.
        shards: whose parts are moved, where the parameters are sharded.
    """
    one_pass = section.adam_moments_dtype == "bf16" or (fused and not section.use_8bit_adam)
    return (OnePass if one_pass else AdamW)(named, section, ema, masters, seed, kept, shards)


class AdamW:
    """AdamW over named parameters, and their averages; the device alone decides what a step does.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2.

    Args:
        ema: averages of the same parameters, moved with them.
        masters: whose copies are written after each update.
        kept: more averages; `update` takes a weight for each, that of `ema` first.
        shards: whose parts the parameters are.

    Raises: UsageError: 8-bit moments were asked for where bitsandbytes cannot serve them.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        section: OptimConfig,
        ema: Ema | None = None,
        masters: Masters | None = None,
        seed: int = 0,
        kept: Sequence[Averages] = (),
        shards: Shards | None = None,
    ) -> None:
        self.parameters, self.ema, self.masters = dict(named), ema, masters
        self.shards = shards
        self.averages: list[Averages] = [*([] if ema is None else [ema]), *kept]
        self.moments_dtype, self.seed = section.adam_moments_dtype, seed
        self.eight_bit = section.use_8bit_adam
        self.optimizer: torch.optim.Optimizer = self._make(
            {
                "betas": (section.adam_beta1, section.adam_beta2),
                "eps": section.adam_epsilon,
                "weight_decay": section.adam_weight_decay,
            }
        )

    def _make(self, settings: dict[str, Any]) -> torch.optim.Optimizer:
        device = next(iter(self.parameters.values())).device
        if self.eight_bit:
            check_8bit(device.type)
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

            return AdamW8bit(self.parameters.values(), lr=0.0, **settings)
        lr = torch.zeros((), device=device)  # a tensor: changing it does not wait
        return torch.optim.AdamW(self.parameters.values(), lr=lr, fused=True, **settings)

    def take_gradients(self, *, last: bool) -> None:
        """After each backward: masters add up what the micro-step gave.

        Args:
            last: of its window; ranks have told each other of it.
        """
        if self.masters is not None:
            self.masters.take_gradients(last=last)
        if self.shards is not None:
            self.shards.take_gradients(last=last)

    def grad_norm(self) -> Tensor:
        """[] fp32, the L2 norm of all gradients as they lie; with sharding, of all ranks."""
        own = self._own_norm()
        return own if self.shards is None else self.shards.norm(own)

    def _own_norm(self) -> Tensor:
        return nn.utils.get_total_norm(gradients(self.parameters))

    def update(self, lr: Tensor, ema_weights: Tensor, grad_factor: Tensor, applies: Tensor) -> None:
        """Moves the parameters by the gradients times a factor, then the averages and copies.

        Args:
            lr: [] fp64.
            ema_weights: [averages] fp64, how far each of them moves.
            grad_factor: [] fp32; clipping, loss scale and sample count in one.
            applies: [] bool; False leaves parameters, moments, count and averages as they are.
        """
        (group,) = self.optimizer.param_groups
        if self.eight_bit:
            if not applies.item():  # bitsandbytes decides on the host: this one waits
                return
            group["lr"] = float(lr)
            for parameter in self.parameters.values():
                parameter.grad.mul_(grad_factor)  # pyright: ignore
        else:
            group["lr"].copy_(lr)
            # PyTorch's fused step takes both from these two, as its own GradScaler hands them.
            self.optimizer.grad_scale = grad_factor.reciprocal()  # pyright: ignore
            self.optimizer.found_inf = (~applies).float()  # pyright: ignore
        self.optimizer.step()
        for averages, weight in zip(self.averages, ema_weights.unbind(), strict=True):
            averages.update(weight, applies)
        if self.masters is not None:
            self.masters.publish()

    def zero_grad(self) -> None:
        # Not to None: DDP's buckets hold the gradients, and a graph finds them where they were.
        if self.masters is not None:
            self.masters.zero_grad()
            return
        if self.shards is not None:
            self.shards.zero_grad()
            return
        if grads := gradients(self.parameters):
            torch._foreach_zero_(grads)

    def state(self) -> dict[str, Tensor]:
        """{"parameter.moment": tensor}, for instance conv_in.weight.exp_avg."""
        return {
            # bitsandbytes shares quantization maps among parameters; safetensors takes no shares.
            f"{name}.{key}": torch.as_tensor(value).clone() if self.eight_bit else value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave, on any device."""
        for path, value in state.items():
            name, key = path.rsplit(".", 1)
            parameter = self.parameters[name]
            if self.eight_bit and key == "step":
                self.optimizer.state[parameter][key] = int(value)
            else:
                if value.shape == parameter.shape:
                    # The fused step walks through memory: in the parameter's order, not the file's.
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                self.optimizer.state[parameter][key] = value.to(parameter.device)


class OnePass(AdamW):
    """The same by `kernels/adamw_ema.py`: norm in one pass, all that moves in another."""

    def _make(self, settings: dict[str, Any]) -> torch.optim.Optimizer:
        names = list(self.parameters)
        self.one_pass = AdamWEma(
            self.parameters.values(),
            lr=0.0,
            emas=[[one.averages[name] for name in names] for one in self.averages],
            copies=None if self.masters is None else [self.masters.copies[name] for name in names],
            moments_dtype=MOMENTS[self.moments_dtype],
            seed=self.seed,
            purpose=Purpose.ROUNDING,
            **settings,
        )
        self.current: Current | None = None  # found by grad_norm, for update
        return self.one_pass

    def _own_norm(self) -> Tensor:
        self.current = self.one_pass.current()
        return self.one_pass.grad_norm(self.current)

    def update(self, lr: Tensor, ema_weights: Tensor, grad_factor: Tensor, applies: Tensor) -> None:
        current, self.current = self.current, None
        self.one_pass.update(lr, grad_factor, applies, ema_weights.float(), current)

    def state(self) -> dict[str, Tensor]:
        # The counts are places in one tensor, and safetensors takes no shares.
        return {
            path: value.clone() if path.endswith(".step") else value
            for path, value in super().state().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for path, value in state.items():
            name, key = path.rsplit(".", 1)
            self.one_pass.state[self.parameters[name]][key].copy_(value)


def check_8bit(device_type: str) -> None:
    """Raises UsageError where --use_8bit_adam cannot be served."""
    if device_type != "cuda":
        raise UsageError("--use_8bit_adam needs a GPU; leave it out on a CPU")
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        raise UsageError(
            "--use_8bit_adam needs bitsandbytes: pip install 'fusedit[8bit]'"
        ) from None
