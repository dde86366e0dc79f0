"""The first steps of the demo's run, each run in a process of its own: loss, speed, memory.

    python -m fusedit.benchmarks.demo_steps 100 ours FLAGS OF FUSEDIT TRAIN

The loop is the trainer's; it is asked to stop when the steps are done. `reference` puts what
diffusers' script does in the place of the optimizer. The others are yardsticks, in fp32: what each
layer takes and gives, its weights, and the gradients of all these, are rounded_to_bf16, or
rounded_once_more in fp32; gradients_to_bf16 rounds the weights' gradients alone.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..launch.demo.run import BATCH, FULL, save_pairs, step_flags
from ..launch.flags import parse
from ..launch.train import make_world, quiet_libraries
from ..trainer import job
from ..trainer.log import LOG_FILE, read_lines
from ..trainer.optim import AdamW
from ..trainer.run import train
from .flags import Flags, positive

WARM_UP = 0.2  # of the steps; not in the speed
CHILD_LOG = "output.txt"


class Steps(NamedTuple):
    """What a run wrote of its steps."""

    losses: list[float]  # mean over the samples of each step
    images_per_s: list[float]  # of each step after the warm-up, all ranks together
    memory_gib: float  # the most: allocated on a GPU, resident in rank 0's process on a CPU

    def step_ms(self, samples: int) -> list[float]:
        """Milliseconds of each step after the warm-up, of as many samples."""
        return [1e3 * samples / speed for speed in self.images_per_s]


class RunFailed(Exception):
    """A run that did not come to its last step: the last line that it printed."""


# What the ledger and the curves call.


def demo_data(folder: Path) -> Path:
    """The demo's pairs, drawn where they are not there yet."""
    if not folder.exists():
        save_pairs(folder, FULL.pairs)
    return folder


def demo_flags(data: Path, batch: int = BATCH) -> list[str]:
    """Those that decide what the demo's steps compute.

    Args:
        batch: of a micro-step of one rank.
    """
    settings = step_flags(FULL, data, batch)
    return ["--use_ema", *(f"--{name}={value}" for name, value in settings.items())]


def parse_steps(
    argv: Sequence[str] | None, name: str, description: str, steps: int, *, least: int
) -> argparse.Namespace:
    """The flags of a benchmark of such runs.

    Args:
        name: of its module.
        steps: of a run by default; `least` is the fewest that can be asked for.
    """
    flags = Flags(f"fusedit.benchmarks.{name}", description)
    flags.add_record()
    flags.add_argument("--work", type=Path, default=Path("runs/ledger"), help="data, cache, runs")
    flags.add_argument("--steps", type=positive, default=steps, help="of each run")
    chosen = flags.parse_args(argv)
    if not least <= chosen.steps <= FULL.steps:
        flags.error(f"--steps must be from {least} to {FULL.steps}, got {chosen.steps}")
    return chosen


def run_steps(
    steps: int, flags: Sequence[str], output: Path, *, loop: str = "ours", ranks: int = 1
) -> Steps:
    """The first steps of a run that neither validates nor exports; what was run is only read.

    Raises: RunFailed: it did not take as many steps.
    """
    log = output / LOG_FILE
    if sum("event" not in line for line in read_lines(log)) == steps:
        return read_steps(log, steps)
    own = unattended(output)
    if any(flag.startswith("--cache_latents") for flag in flags):
        run_module("launch.cache", [*flags, *own], output)
    run_module("benchmarks.demo_steps", [str(steps), loop, *flags, *own], output, ranks)
    return read_steps(log, steps)


def unattended(output: Path) -> list[str]:
    """Flags of a run that starts anew, logs each step, and neither validates nor exports."""
    never = FULL.steps  # steps until a validation or a checkpoint
    return [
        "--overwrite",
        "--report_to=none",
        "--log_every=1",
        f"--validation_steps={never}",
        f"--checkpointing_steps={never}",
        f"--output_dir={output}",
    ]


def run_module(name: str, words: Sequence[str], output: Path, ranks: int = 1) -> None:
    """Runs `python -m fusedit.NAME`, by torchrun where there are several ranks.

    Raises: RunFailed: its exit code was another than 0.
    """
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else ()), f"fusedit.{name}", *words]
    output.mkdir(parents=True, exist_ok=True)
    with (output / CHILD_LOG).open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    if code:
        lines = (output / CHILD_LOG).read_text(errors="replace").split("\n")
        told = next((line for line in reversed(lines) if line.strip()), "nothing was printed")
        raise RunFailed(f"exit code {code}: {told.strip()}")


def read_steps(log: Path, steps: int) -> Steps:
    """What a run with --log_every 1 wrote. Raises: RunFailed: steps or a loss are missing."""
    lines = [line for line in read_lines(log) if "event" not in line]
    if len(lines) != steps:
        raise RunFailed(f"{len(lines)} of {steps} steps were taken")
    for line in lines:
        if line["loss"] is None:  # so a log writes what is not finite
            raise RunFailed(f"the loss of step {line['step']} is not finite")
    return Steps(
        [line["loss"] for line in lines],
        [line["images_per_second"] for line in lines[int(WARM_UP * steps) :]],
        max(line["memory_gib"] for line in lines),
    )


# What the process of a run does.


class Reference(AdamW):
    """Clip, AdamW and averages as diffusers' script calls them, each with PyTorch's defaults."""

    def _make(self, settings: dict[str, Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=0.0, **settings)

    def update(self, lr: Tensor, ema_weights: Tensor, grad_factor: Tensor, applies: Tensor) -> None:
        for parameter in self.parameters.values():
            parameter.grad.mul_(grad_factor)  # pyright: ignore
        self.optimizer.param_groups[0]["lr"] = float(lr)
        self.optimizer.step()
        if self.ema is not None:
            self._average(self.ema.averages, float(ema_weights))

    @torch.no_grad()
    def _average(self, averages: dict[str, Tensor], weight: float) -> None:
        for name, parameter in self.parameters.items():  # as diffusers' EMAModel
            averages[name].sub_(weight * (averages[name] - parameter))


def to_bf16(value: Tensor) -> Tensor:
    return value.bfloat16().to(value.dtype)


def once_more(value: Tensor) -> Tensor:
    """Off by a unit in the last place, or by none."""
    return value * 3 / 3


ROUNDINGS = {"rounded_to_bf16": to_bf16, "rounded_once_more": once_more}


class Rounded(torch.autograd.Function):
    """A value rounded, and its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rounding = rounding
        return rounding(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding(grads[0]), None


class RoundedGradients(AdamW):
    """Ours, of gradients that are rounded to bf16 once, when all of them are added up."""

    def update(self, lr: Tensor, ema_weights: Tensor, grad_factor: Tensor, applies: Tensor) -> None:
        for parameter in self.parameters.values():
            parameter.grad.copy_(to_bf16(parameter.grad))  # pyright: ignore
        super().update(lr, ema_weights, grad_factor, applies)


OPTIMIZERS = {"reference": Reference, "gradients_to_bf16": RoundedGradients}


@contextmanager
def each_layer(rounding: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, what each layer takes, its weights and what it gives are rounded, as by autocast."""
    own: dict[nn.Module, dict[str, nn.Parameter | None]] = {}  # weights, while their layer runs

    def rounded(value: object) -> object:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return Rounded.apply(value, rounding) if floats else value

    def before(module: nn.Module, inputs: tuple[object, ...]) -> Any:
        if not is_layer(module):
            return None
        own[module], module._parameters = module._parameters, {}
        module.__dict__.update({name: rounded(value) for name, value in own[module].items()})
        return tuple(map(rounded, inputs))

    def after(module: nn.Module, inputs: object, output: object) -> Any:
        if not is_layer(module):
            return None
        module._parameters = own.pop(module)
        for name in module._parameters:
            del module.__dict__[name]
        return rounded(output)

    hooks = nn.modules.module
    with (
        hooks.register_module_forward_pre_hook(before),
        hooks.register_module_forward_hook(after),
    ):
        yield


def is_layer(module: nn.Module) -> bool:
    """Not what holds layers, and gives what they gave."""
    return next(module.children(), None) is None


def with_loop(name: str) -> AbstractContextManager[object]:
    """Inside, runs take their steps with this loop."""
    if name in OPTIMIZERS:

        def make(named: Any, section: Any, ema: Any, masters: Any, **_: Any) -> AdamW:
            return OPTIMIZERS[name](named, section, ema, masters)

        return patch.object(job, "make_optimizer", make)
    if name in ROUNDINGS:
        return each_layer(ROUNDINGS[name])
    if name != "ours":
        raise ValueError(f"a loop is ours, {', '.join((*OPTIMIZERS, *ROUNDINGS))}; got {name}")
    return nullcontext()


class After:
    """Asks a run to stop: it looks before each step, and its cache, if any, is whole."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def main(argv: Sequence[str] | None = None) -> int:
    steps, loop, *flags = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    world = make_world()
    world.start()
    with with_loop(loop):
        train(parse(flags).run, world, stop_requested=After(int(steps)))
    world.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
