"""The optimizer's pass over all of Stable Diffusion 1.5's parameters, against PyTorch's passes.

    python -m fusedit.benchmarks.optimizer --out results

Ours: AdamWEma, clip to a norm, AdamW, average and low-precision copy in one pass. PyTorch: fused
AdamW, foreach clip, foreach average, and foreach copies where the parameters are bf16 and their
masters fp32. Both do the same: a few parameters are compared with fp64 first.

Exit codes: 0 done, 1 a wrong answer, 2 a mistake in the flags. Needs diffusers, and a GPU of 40 GB.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.adamw_ema import AdamWEma
from . import accuracy, harness, report
from .flags import Flags
from .harness import Record, say
from .timing import Timer, ceilings

LR, MAX_NORM, DECAY = 1e-4, 1.0, 0.9999
BYTES = {"fp32": 40, "bf16": 38}  # a parameter; kernels/adamw_ema.py counts them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_STEPS = 5
CHECKED_SHAPES = [(320, 8, 3, 3), (320,), (1280, 320), (640, 640, 3, 3), (4,)]  # of the UNet's

Step = Callable[[], object]


class Ours:
    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: str) -> None:
        self.parameters = parameters(shapes, dtype, device)
        self.averages = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = AdamWEma(
            self.parameters, LR, emas=[self.averages], ema_decays=[DECAY], max_norm=MAX_NORM
        )
        self.step: Step = self.optimizer.step

    def state(self) -> list[Tensor]:
        masters = [self.optimizer.state[p].get("master", p) for p in self.parameters]
        return [*masters, *self.averages]


class Torchs:
    """What a trainer writes with PyTorch's fastest parts; in fp64, the truth."""

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: str) -> None:
        self.parameters = parameters(shapes, dtype, device)
        self.low = dtype == torch.bfloat16
        wide = [p.detach().float().requires_grad_() for p in self.parameters]
        self.masters = wide if self.low else self.parameters
        self.averages = [p.detach().clone() for p in self.masters]
        on_gpu = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.masters, LR, fused=on_gpu, capturable=on_gpu)
        if self.low:
            for master in self.masters:
                master.grad = torch.zeros_like(master)

    @torch.no_grad()
    def step(self) -> None:
        if self.low:
            torch._foreach_copy_(gradients(self.masters), gradients(self.parameters))
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_NORM, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, list(self.masters), 1 - DECAY)
        if self.low:
            torch._foreach_copy_(self.parameters, list(self.masters))

    def state(self) -> list[Tensor]:
        return [*self.masters, *self.averages]


def parameters(shapes: Sequence[torch.Size], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random parameters with random gradients, channels_last where they are images."""
    made = []
    for shape in shapes:
        form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        drawn = torch.randn(shape, device=device).mul_(0.02).to(dtype, memory_format=form)
        drawn.requires_grad_().grad = torch.randn_like(drawn)
        made.append(drawn)
    return made


def gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def checked(dtype: torch.dtype, device: str) -> accuracy.Verdict:
    """After a few steps of the same gradients: masters and averages against fp64."""
    shapes = [torch.Size(shape) for shape in CHECKED_SHAPES]
    runs = [Ours(shapes, dtype, device), Torchs(shapes, dtype, device)]
    exact = Torchs(shapes, torch.float64, device)
    with torch.no_grad():
        for run in (runs[1], exact):
            pairs = zip(run.parameters, runs[0].parameters, strict=True)
            for one, other in pairs:
                one.copy_(other)
            for state in (run.state(), runs[0].state()):
                count = len(run.parameters)
                for master, average in zip(state[:count], state[count:], strict=True):
                    average.copy_(master)
        for master, parameter in zip(runs[1].masters, runs[1].parameters, strict=True):
            master.copy_(parameter)
    for _ in range(CHECKED_STEPS):
        for index, parameter in enumerate(runs[0].parameters):
            drawn = torch.randn_like(parameter)
            for run in (*runs, exact):
                grad = run.parameters[index].grad
                if grad is not None:
                    grad.copy_(drawn)
        for run in (*runs, exact):
            run.step()
    ours, theirs, truth = (
        {str(index): value.detach() for index, value in enumerate(run.state())}
        for run in (*runs, exact)
    )
    return accuracy.compare(ours, accuracy.Truth([], truth, theirs))


def unet_shapes() -> list[torch.Size]:
    """Of Stable Diffusion 1.5's UNet with 8 input channels: 859,532,484 parameters."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=768, sample_size=64)
    return [parameter.shape for parameter in unet.parameters()]


def measure(record: Record, timer: Timer, shapes: Sequence[torch.Size]) -> None:
    count = sum(shape.numel() for shape in shapes)
    for name, dtype in DTYPES.items():
        verdict = checked(dtype, "cuda")
        for by, kind in (("ours", Ours), ("eager", Torchs)):
            say(f"{name} {by}")
            labels = {"op": "optimizer", "preset": "sd15", "shape": str(count), "dtype": name}
            labels |= {"direction": "step", "by": by}
            right = by != "ours" or not verdict.note
            timings = None
            if right:
                with timer.stream():
                    run = kind(shapes, dtype, "cuda")
                timings = {mode: timer.measure([run.step], mode) for mode in ("graph", "warm")}
                del run
                torch.cuda.empty_cache()
            record["rows"].append(
                harness.row(
                    labels,
                    verdict="right" if right else "wrong",
                    error=verdict.error if by == "ours" else None,
                    timings=timings,
                    least_bytes=BYTES[name] * count,
                    note="" if right else verdict.note,
                )
            )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.optimizer", str(__doc__))
    flags.add_record()
    chosen = flags.parse_args(argv)
    flags.demand_gpu()
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    record = harness.new_record("optimizer", words, flags.commit)
    timer = Timer(torch.device("cuda"))
    record["ceilings"] = ceilings(timer, torch.device("cuda"))
    measure(record, timer, unet_shapes())
    return report.finish(record, flags.out / "optimizer.json", flags.compare)


if __name__ == "__main__":
    sys.exit(main())
