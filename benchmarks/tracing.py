"""Where the time of an update goes, by phase and kind of operation, from a trace of a few.

The same for diffusers' loop and ours, for what is watched is what both call: the loader, the
encoders, the UNet, the backward, clip, AdamW and averages. An operation belongs to the outermost of
these that it ran in. On a GPU it is counted by its kernels, on a CPU by its own time. DDP's
all-reduces go on beside the backward: they are counted whole, whatever they ran in.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import dataloader
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..launch import train
from ..trainer import optim
from ..trainer.ema import Ema

TRACE = "trace.json"
SKIPPED, TRACED = 3, 4  # updates: those before the trace, those in it
PHASES = ("data", "encode", "forward", "backward", "all-reduce", "optimizer", "rest")
KINDS = ("convolution", "linear", "attention", "elementwise", "host")
WATCHED: tuple[tuple[Any, str, str], ...] = (
    (dataloader._BaseDataLoaderIter, "__next__", "data"),
    (AutoencoderKL, "encode", "encode"),
    (CLIPTextModel, "forward", "encode"),
    (CLIPTextModelWithProjection, "forward", "encode"),
    (UNet2DConditionModel, "forward", "forward"),
    (torch.Tensor, "backward", "backward"),
    (torch.distributed, "all_reduce", "all-reduce"),
    (torch.nn.utils, "clip_grad_norm_", "optimizer"),
    (torch.optim.AdamW, "step", "optimizer"),
    (Optimizer, "zero_grad", "optimizer"),
    (EMAModel, "step", "optimizer"),
    (optim.AdamW, "grad_norm", "optimizer"),
    (optim.AdamW, "update", "optimizer"),
    (optim.OnePass, "grad_norm", "optimizer"),
    (optim.OnePass, "update", "optimizer"),
    (Ema, "update", "optimizer"),
)
OF_KIND = {"conv": "convolution", "mm": "linear", "linear": "linear"}
OF_ATTENTION = ("scaled_dot_product", "attention", "bmm", "softmax")
IN_BACKWARD = "autograd::engine"  # how the events of a thread of its own begin


@contextmanager
def traced(folder: Path) -> Iterator[None]:
    """Inside, updates SKIPPED + 1 to SKIPPED + TRACED are traced, and TRACE is written."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler, updates, started = profile(activities=activities), 0, 0.0

    def updated(*_: object) -> None:
        nonlocal updates, started
        updates += 1
        if updates == SKIPPED:
            _wait()
            profiler.start()
            started = time.perf_counter()
        if updates == SKIPPED + TRACED:
            _wait()
            wall_ms = 1e3 * (time.perf_counter() - started)
            profiler.stop()
            found = summed(profiler.events() or ())
            mean = {phase: _each(kinds, TRACED) for phase, kinds in found.items()}
            (folder / TRACE).write_text(json.dumps({"wall_ms": wall_ms / TRACED, "phases": mean}))

    def one_pass(*args: Any, **kwargs: Any) -> None:  # which PyTorch's hook does not see
        own(*args, **kwargs)
        updated()

    own = optim.OnePass.update
    hook = register_optimizer_step_post_hook(updated)
    with ExitStack() as stack:
        stack.enter_context(patch.object(optim.OnePass, "update", one_pass))
        for owner, name, phase in WATCHED:
            stack.enter_context(patch.object(owner, name, _named(getattr(owner, name), phase)))
        try:
            yield
        finally:
            hook.remove()


def summed(events: Any) -> dict[str, dict[str, float]]:
    """Milliseconds by phase and kind, of a profiler's events."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels are counted with what launched them
        for name, microseconds in _taken(event):
            if microseconds:
                kinds = found.setdefault(phase_of(event, name), {})
                kind = kind_of(event.name)
                kinds[kind] = kinds.get(kind, 0.0) + microseconds / 1e3
    return found


def _taken(event: Any) -> list[tuple[str, float]]:
    """Microseconds, of each kernel by its name, or on a CPU of the event itself."""
    if torch.cuda.is_available():
        return [(kernel.name, kernel.duration) for kernel in event.kernels]
    # Gloo's end on another thread than they began on: such events have no time of their own.
    exchanged = event.is_async and is_all_reduce(event.name)
    return [(event.name, event.cpu_time_total if exchanged else event.self_cpu_time_total)]


def phase_of(event: Any, name: str = "") -> str:
    """Args: name: of what is counted, where it is not the event's: a kernel's."""
    phase = "rest"
    if is_all_reduce(name):
        return "all-reduce"
    while event is not None:
        if is_all_reduce(event.name):
            return "all-reduce"
        if event.name in PHASES:
            phase = event.name
        elif event.name.startswith(IN_BACKWARD) and phase == "rest":
            phase = "backward"
        event = event.cpu_parent
    return phase


def is_all_reduce(name: str) -> bool:
    """gloo:all_reduce, c10d::allreduce_, ncclDevKernel_AllReduce_Sum_f32_RING_LL."""
    return "allreduce" in re.sub("[^a-z]", "", name.lower())


def kind_of(name: str) -> str:
    """Of KINDS, by the name of an event: aten::addmm, fusedit::geglu, a phase's own."""
    if name in PHASES:
        return "host"
    if any(part in name for part in OF_ATTENTION):
        return "attention"
    for part, kind in OF_KIND.items():
        if part in name:
            return kind
    return "elementwise"


def _named(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(phase):
            return function(*args, **kwargs)

    return named


def _each(kinds: dict[str, float], count: int) -> dict[str, float]:
    return {kind: milliseconds / count for kind, milliseconds in kinds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    """Traces ours: `python -m fusedit.benchmarks.tracing OUT FLAGS OF FUSEDIT TRAIN`."""
    folder, *flags = sys.argv[1:] if argv is None else argv
    with traced(Path(folder)):
        return train.main(flags)


if __name__ == "__main__":
    sys.exit(main())
