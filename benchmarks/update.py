"""Our update at Stable Diffusion 1.5's true shapes: images a second, memory, and where time goes.

    python -m fusedit.benchmarks.update --out results
    python -m fusedit.benchmarks.update --case sd15-256:64x1 --way all all-bf16 --out results

Random weights, latents and text as the cache gives them, averages on. A case is PRESET:BATCHxMICRO,
samples of a micro-step and micro-steps of an update. Before a way is timed its first update must
agree with plain PyTorch's, and what is compiled passes the run's own check of its gradients.

Exit codes: 0 done, 1 a wrong answer or one that failed, 2 a mistake in the flags. Needs diffusers,
and a GPU of 80 GB for every case.
"""

import argparse
import gc
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from ..trainer.captured import EAGER_STEPS, Captured, Update
from ..trainer.compiled import check_gradients, compile_unet
from ..trainer.config import Format, OptimConfig, PrecisionConfig
from ..trainer.diffusion import Diffusion
from ..trainer.ema import Ema
from ..trainer.encoders import Samples
from ..trainer.errors import UsageError
from ..trainer.families import SIZE_IDS, Text
from ..trainer.loss import EditLoss
from ..trainer.optim import make_optimizer
from ..trainer.plan import set_numerics
from ..trainer.step import LossScale, Rates, StepResult, train_step
from ..trainer.unet import prepare_unet
from ..trainer.world import World
from . import harness, report
from .directions import FAILURES, told
from .flags import Flags, positive
from .harness import Record, say
from .shapes import TEXT_TOKENS
from .timing import Timer, ceilings

DEVICE = "cuda"
CASES = ("sd15-256:64x1", "sd15-512:32x1", "sd15-256:4x4", "sd15-256:16x1", "sd15-512:4x4")
TARGETS = {"sd15-256:64x1": 680, "sd15-512:32x1": 145, "sd15-256:4x4": 400}  # images a second
FLOPS = {256: 544.7e9, 512: 2473.1e9}  # of an image, forward and backward; shapes.md counts them
CLOSE = {"loss": 1e-2, "grad_norm": 5e-2}  # of plain PyTorch's, in the same autocast dtype
PROFILED = 3  # updates
TOP = 30  # kernels in the profile
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LAYOUT = re.compile("nchwtonhwc|nhwctonchw|transpose", re.IGNORECASE)  # in a kernel's name


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How the update is made."""

    fused: bool = True
    compiled: bool = False
    graph: bool = False
    param_dtype: Format = "fp32"
    moments_dtype: Format = "fp32"


WAYS = {
    "all": Way(compiled=True, graph=True),
    "all-bf16": Way(compiled=True, graph=True, param_dtype="bf16"),
    "plain": Way(fused=False),
    "fused": Way(),
    "fused+graph": Way(graph=True),
    "fused+compile": Way(compiled=True),
    "all-lean": Way(compiled=True, graph=True, param_dtype="bf16", moments_dtype="bf16"),
}


class Case(NamedTuple):
    name: str
    pixels: int
    batch: int
    micro_steps: int

    @property
    def images(self) -> int:
        return self.batch * self.micro_steps


def case_of(text: str) -> Case:
    match = re.fullmatch(r"sd15-(\d+):(\d+)x(\d+)", text)
    numbers = [int(number) for number in match.groups()] if match else [0]
    if min(numbers) < 1 or numbers[0] % 64:
        raise argparse.ArgumentTypeError(
            f"must be as in sd15-256:64x1, pixels divisible by 64, got {text!r}"
        )
    return Case(text, *numbers)


def make_unet() -> Any:
    """Stable Diffusion 1.5's UNet with 8 input channels, random."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64, in_channels=8, cross_attention_dim=768, attention_head_dim=8
    )


def samples_of(case: Case, width: int, dtype: torch.dtype, device: str) -> list[Samples]:
    """The micro-batches of an update."""
    side = case.pixels // 8
    made = []
    for index in range(case.micro_steps):
        images = torch.randn(3, case.batch, 4, side, side, device=device, dtype=dtype)
        made.append(
            Samples(
                target_mean=images[0],
                target_std=images[1].abs() / 10,
                condition=images[2],
                text=torch.randn(case.batch, TEXT_TOKENS, width, device=device, dtype=dtype),
                pooled=torch.empty(case.batch, 0, device=device, dtype=dtype),
                size_ids=torch.zeros(case.batch, SIZE_IDS, device=device),
                positions=torch.arange(case.batch, device=device) + index * case.batch,
                weights=torch.ones(case.batch, device=device),
            )
        )
    return made


class Job:
    """What an update takes, of one way."""

    def __init__(self, case: Case, way: Way, device: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        prepared = prepare_unet(
            make_unet(),
            self.device,
            fused=way.fused,
            param_dtype=way.param_dtype,
            sums=case.micro_steps > 1 or not way.fused,
        )
        self.unet = prepared.unet
        width = int(self.unet.config["cross_attention_dim"])
        diffusion = Diffusion.from_scheduler(SCHEDULE, 0.18215, self.device)
        null_text = Text(
            torch.zeros(1, TEXT_TOKENS, width, device=device, dtype=torch.bfloat16),
            torch.zeros(1, 0, device=device, dtype=torch.bfloat16),
        )
        self.loss_fn = EditLoss(diffusion, (0.05, 0.05, 0.05), null_text, 0, torch.bfloat16)
        self.samples = samples_of(case, width, torch.bfloat16, device)
        self.ema = Ema(prepared.parameters, 0.9999)
        section = OptimConfig(adam_moments_dtype=way.moments_dtype)
        optimizer = make_optimizer(
            prepared.parameters, section, self.ema, prepared.masters, fused=way.fused
        )
        if way.compiled:
            compile_unet(self.unet, "blocks")
            check_gradients(self.unet, self.loss_fn, self.samples[0], torch.bfloat16, "blocks")
        self.update: Update = partial(
            train_step,
            self.unet,
            self.loss_fn,
            optimizer,
            LossScale(False, self.device),
            World(device=self.device),
            slots=case.images,
            max_grad_norm=1.0,
        )
        self.captured = Captured(self.update) if way.graph else None

    def step(self) -> StepResult:
        rates = Rates.on(self.device, 1e-5, 1e-4)
        return (self.captured or self.update)(self.samples, rates)

    def close(self) -> None:
        if self.captured is not None:
            self.captured.close()


def disagreement(result: StepResult, plain: StepResult | None) -> str:
    """What of the first update is not plain PyTorch's."""
    if not bool(result.applied):
        return "the gradient is not finite"
    if plain is not None:
        for name, bar in CLOSE.items():
            ours, theirs = float(getattr(result, name)), float(getattr(plain, name))
            if not abs(ours - theirs) <= bar * abs(theirs):
                return f"{name} is {ours:.6g}, of plain PyTorch {theirs:.6g}"
    return ""


def labels_of(case: Case, way: str) -> dict[str, str | int]:
    shape = f"{case.batch}x{case.micro_steps}"
    labels: dict[str, str | int] = {"op": "update", "preset": f"sd15-{case.pixels}", "shape": shape}
    return labels | {"dtype": "bf16", "way": way, "by": "ours"}


def first_of_plain(case: Case, device: str) -> StepResult:
    job = Job(case, WAYS["plain"], device)
    return StepResult(*(value.cpu() for value in job.step()))


def measured(case: Case, name: str, plain: StepResult, timer: Timer, device: str) -> Record:
    """A row of a way: its first update against plain PyTorch's, then its time and memory."""
    labels = labels_of(case, name)
    try:
        with timer.stream():
            job = Job(case, WAYS[name], device)
            if torch.cuda.is_available():  # the check of compiled gradients keeps all of them twice
                torch.cuda.reset_peak_memory_stats()
            wrong = disagreement(job.step(), plain)
            if wrong:
                return harness.row(labels, verdict="wrong", note=wrong)
            for _ in range(EAGER_STEPS):  # the last one captures
                job.step()
        taken = timer.measure([job.step], "warm")
        job.close()
    except (UsageError, *FAILURES) as failure:  # memory that is not there, too
        return harness.row(labels, verdict="failed", note=told(failure))
    values = {"images_per_s": 1e3 * case.images / taken.median_ms}
    if torch.cuda.is_available():
        values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if case.name in TARGETS:
        values["target_images_per_s"] = TARGETS[case.name]
    work = round(case.images * FLOPS[case.pixels]) if case.pixels in FLOPS else None
    return harness.row(labels, verdict="right", timings={"warm": taken}, flops=work, values=values)


def profiled(case: Case, timer: Timer, device: str) -> list[Record]:
    """The kernels that an update spends most in, and all that change a layout."""
    with timer.stream():
        job = Job(case, WAYS["fused"], device)
        for _ in range(PROFILED):
            job.step()
        with profile() as found:
            for _ in range(PROFILED):
                job.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    on_gpu, spent = device == "cuda", {}
    for one in found.key_averages():
        if on_gpu and (one.device_type != DeviceType.CUDA or one.is_user_annotation):
            continue  # the host's side of it, which would count its kernels again
        microseconds = one.self_device_time_total if on_gpu else one.self_cpu_time_total
        spent[one.key] = microseconds / 1e3 / PROFILED, one.count
    total = sum(milliseconds for milliseconds, _ in spent.values())
    order = sorted(spent, key=lambda kernel: -spent[kernel][0])
    chosen = order[:TOP] + [kernel for kernel in order[TOP:] if LAYOUT.search(kernel)]
    return [
        harness.row(
            {"op": "profile", "case": case.name, "place": place, "kernel": kernel[:120]},
            verdict="right",
            values={
                "share": spent[kernel][0] / total,
                "ms_an_update": spent[kernel][0],
                "launches_an_update": spent[kernel][1] / PROFILED,
                "changes_layout": float(bool(LAYOUT.search(kernel))),
            },
        )
        for place, kernel in enumerate(chosen)
    ]


@contextmanager
def released() -> Iterator[None]:
    """What was made inside is given back."""
    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.update", str(__doc__))
    flags.add_record()
    flags.add_argument("--case", type=case_of, nargs="+", default=[case_of(text) for text in CASES])
    flags.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    flags.add_argument("--limit_s", type=positive, help="no new row after so long")
    chosen = flags.parse_args(argv)
    flags.demand_gpu()
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    path = flags.out / "update.json"
    record = harness.resumed(path, harness.new_record("update", words, flags.commit))
    set_numerics(PrecisionConfig())  # as a run has them
    timer = Timer(torch.device("cuda"))
    record["ceilings"] = record["ceilings"] or ceilings(timer, torch.device("cuda"))
    whole = measure(record, flags, timer, DEVICE, path)
    if not whole:
        harness.write(record, path)
        return 1
    return report.finish(record, path, flags.compare)


def measure(
    record: Record, flags: argparse.Namespace, timer: Timer, device: str, path: Path
) -> bool:
    """Adds what is not in the record yet; False when the time was up before the end."""
    started = time.monotonic()
    for case in flags.case:
        done = [row["labels"] for row in record["rows"]]
        todo = [name for name in flags.way if labels_of(case, name) not in done]
        plain = None
        for name in todo:
            if flags.limit_s and time.monotonic() - started > flags.limit_s:
                say(f"--limit_s {flags.limit_s}: {case.name} {name} and more are left")
                return False
            say(f"{case.name} {name}")
            with released():
                plain = plain or first_of_plain(case, device)
            with released():
                record["rows"].append(measured(case, name, plain, timer, device))
            harness.write(record, path)
            if WAYS[name].graph and record["rows"][-1]["verdict"] == "failed":
                say("a capture that failed keeps its memory: the rest is left for another run")
                return False
    if not any(row["labels"]["op"] == "profile" for row in record["rows"]):
        say(f"{flags.case[0].name} profile")
        with released():
            record["rows"] += profiled(flags.case[0], timer, device)
    return True


if __name__ == "__main__":
    sys.exit(main())
