"""What each switch changes of the demo's first steps: their loss, their speed, their memory.

    python -m fusedit.benchmarks.ledger --out results

Every switch alone, against the plain run of the same seed, on the same samples. What rounding
explains is measured: by yardsticks, runs whose mathematics is the plain run's and whose rounding
is not. In fp32 they add the same samples up in another order (micro-steps), or round once more what
each layer takes, its weights and what it gives; for bf16 they round these to it, or the weights'
gradients alone. A switch may differ by ALLOWED times the yardstick that differs most: in the
largest difference of a step's loss, and in the mean over the steps.

Without a GPU: one rank, all cores. On a GPU the plain run is --plain in fp32, and kernels, compile,
graphs and attention come in. Writes ledger.json after each row and ledger.md at the end. A run that
was stopped goes on in the same folders.

Exit codes: 0 done; 1 a switch is beyond its bound, or failed; 2 a mistake in the flags.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..launch.demo.run import BATCH
from . import harness, report
from .demo_steps import RunFailed, Steps, demo_data, demo_flags, parse_steps, run_steps
from .harness import Record, say
from .timing import timing

STEPS, LEAST_STEPS = 100, 3
ALLOWED = 3.0  # times the yardstick: a layer may round several times, and where it rounds is chance
CACHED = ("--center_crop", "--cache_latents={cache}")  # the demo's images have one crop
BF16 = "--mixed_precision=bf16"
MASTERS = (BF16, "--param_dtype=bf16")
NO_GPU = "needs a GPU"


class Switch(NamedTuple):
    """A run, by what it has that the plain one has not."""

    name: str
    flags: tuple[str, ...] = ()
    explained_by: str = "fp32"  # which yardsticks' rounding; exact: nothing may change
    loop: str = "ours"
    ranks: int = 1
    micro_steps: int = 1
    kernels: bool = False  # on a GPU, ours instead of diffusers' modules; without one, no run
    yardstick: bool = False

    def words(self, data: Path, cache: Path, on_gpu: bool) -> list[str]:
        """Its flags of `fusedit train`; the samples of a step are the same for all."""
        own = [flag.format(cache=cache) for flag in self.flags]
        if not any(flag.startswith("--mixed_precision") for flag in own):
            own.append("--mixed_precision=no")
        if on_gpu and not self.kernels:
            own.append("--plain")
        batch = BATCH // self.ranks // self.micro_steps
        return [*demo_flags(data, batch), f"--gradient_accumulation_steps={self.micro_steps}", *own]


PLAIN = Switch("plain", explained_by="exact")
REFERENCE = Switch("the reference's optimizer", loop="reference")
CACHE = Switch("--cache_latents", CACHED)
# As the demo runs on two cores.
REFERENCE_RANKS = Switch("2 ranks, the reference's optimizer", loop="reference", ranks=2)
CACHE_RANKS = Switch("2 ranks, --cache_latents", CACHED, ranks=2)
OFF = ("--compile=off", "--cuda_graphs=off")
SWITCHES = (
    PLAIN,
    Switch("2 micro-steps of 16", micro_steps=2, yardstick=True),
    Switch("4 micro-steps of 8", micro_steps=4, yardstick=True),
    Switch("each layer rounded once more", loop="rounded_once_more", yardstick=True),
    Switch("gradients rounded to bf16", (), "gradients", "gradients_to_bf16", yardstick=True),
    Switch("each layer rounded to bf16", (), "bf16", "rounded_to_bf16", yardstick=True),
    REFERENCE,
    CACHE,
    Switch("--dataloader_num_workers 2", ("--dataloader_num_workers=2",), "exact"),
    Switch("--gradient_checkpointing", ("--gradient_checkpointing",)),
    Switch("--adam_moments_dtype bf16", ("--adam_moments_dtype=bf16",), "bf16"),
    Switch("--mixed_precision bf16", (BF16,), "bf16"),
    Switch("--mixed_precision bf16, 4 micro-steps", (BF16,), "bf16", micro_steps=4),
    Switch("--param_dtype bf16", MASTERS, "bf16"),
    Switch("2 ranks", ranks=2),
    REFERENCE_RANKS,
    CACHE_RANKS,
    Switch("2 ranks, --all_reduce_dtype bf16", ("--all_reduce_dtype=bf16",), "gradients", ranks=2),
)
ON_CPU = (Switch("--compile blocks", ("--compile=blocks",)),)
ON_GPU = (
    Switch("kernels, instead of --plain", OFF, kernels=True),
    Switch("kernels, --compile blocks", ("--compile=blocks", OFF[1]), kernels=True),
    Switch("kernels, --cuda_graphs on", (OFF[0], "--cuda_graphs=on"), kernels=True),
    Switch("kernels, --attention sdpa", (BF16, *OFF, "--attention=sdpa"), "bf16", kernels=True),
    Switch("kernels, --attention triton", (BF16, *OFF, "--attention=triton"), "bf16", kernels=True),
    Switch("kernels, --attention cudnn", (BF16, *OFF, "--attention=cudnn"), "bf16", kernels=True),
    Switch("kernels, --attention flash", (BF16, *OFF, "--attention=flash"), "bf16", kernels=True),
    Switch("all defaults, cached", (*MASTERS, *CACHED), "bf16", kernels=True),
)


def switches(devices: int) -> tuple[Switch, ...]:
    """What is listed on a machine of so many GPUs; without one, what needs it as a row too."""
    found = (*SWITCHES, *ON_GPU) if devices else (*SWITCHES, *ON_CPU, *ON_GPU)
    return tuple(switch for switch in found if devices != 1 or switch.ranks == 1)


class Difference(NamedTuple):
    """Of the loss of each step, between two runs."""

    largest: float
    mean: float

    def of(self, allowed: "Difference") -> float:
        """The larger share of what is allowed; above 1 is too much."""
        return max(
            own / most if most else float(own > 0) * 1e9  # a record takes finite numbers
            for own, most in zip(self, allowed, strict=True)
        )


NOTHING = Difference(0.0, 0.0)


def difference(losses: Sequence[float], plain: Sequence[float]) -> Difference:
    steps = [abs(one - other) for one, other in zip(losses, plain, strict=True)]
    return Difference(max(steps), statistics.fmean(steps))


class Ledger:
    """The rows so far, and what later ones are measured by."""

    def __init__(self, record: Record, steps: int, path: Path, work: Path) -> None:
        self.record, self.steps, self.path, self.work = record, steps, path, work
        self.devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.plain: list[float] = []
        self.allowed: dict[str, Difference] = {}

    def fill(self) -> None:
        data = demo_data(self.work / "data")
        done = {row["name"] for row in self.record["rows"]}
        for switch in switches(self.devices):
            empty = harness.row(self._labels(switch))
            say(empty["name"])
            output = self.work / "steps" / switch.name.replace(" ", "-").replace(",", "")
            if empty["name"] not in done:
                self.record["rows"].append(self._row(switch, data, output))
                harness.write(self.record, self.path)
            elif switch == PLAIN or switch.yardstick:
                self._learn(switch, self._run(switch, data, output))

    def _row(self, switch: Switch, data: Path, output: Path) -> Record:
        labels = self._labels(switch)
        if switch.kernels and not self.devices:
            return harness.row(labels, note=NO_GPU)
        try:
            found = self._run(switch, data, output)
        except RunFailed as error:
            if switch == PLAIN or switch.yardstick:
                raise
            return harness.row(labels, verdict="failed", note=str(error))
        apart = self._learn(switch, found)
        error = apart.of(self.allowed.get(self._rounding(switch), NOTHING))
        right = error <= 1
        return harness.row(
            labels,
            verdict="right" if right else "wrong",
            error=error,
            timings={"warm": timing(found.step_ms(BATCH))} if right else None,
            values={
                "largest_difference": apart.largest,
                "mean_difference": apart.mean,
                "images_per_s": statistics.median(found.images_per_s),
                "memory_gib": found.memory_gib,
            },
            note="" if right else f"more than {ALLOWED:g} times what rounding changes",
        )

    def _run(self, switch: Switch, data: Path, output: Path) -> Steps:
        words = switch.words(data, self.work / "cache", bool(self.devices))
        return run_steps(self.steps, words, output, loop=switch.loop, ranks=switch.ranks)

    def _learn(self, switch: Switch, found: Steps) -> Difference:
        """The run's difference from the plain one; a yardstick widens what is allowed."""
        if switch == PLAIN:
            self.plain = found.losses
        apart = difference(found.losses, self.plain)
        if switch.yardstick:
            before = self.allowed.get(switch.explained_by, NOTHING)
            wider = (max(most, ALLOWED * own) for most, own in zip(before, apart, strict=True))
            self.allowed[switch.explained_by] = Difference(*wider)
        return apart

    def _labels(self, switch: Switch) -> dict[str, str | int]:
        labels = {"op": "ledger", "switch": switch.name, "rounding": self._rounding(switch)}
        return labels | {"steps": self.steps, "by": "ours"}

    def _rounding(self, switch: Switch) -> str:
        """A GPU adds in no fixed order, unless it is told to: there no run is exact."""
        exact = switch.explained_by == "exact"
        return "fp32" if exact and self.devices and switch != PLAIN else switch.explained_by


def table(record: Record) -> str:
    """The ledger for people; speeds beside the plain run's and the reference's."""
    rows = {row["labels"]["switch"]: row for row in record["rows"]}

    def speed_of(switch: Switch) -> float | None:
        return rows[switch.name]["values"].get("images_per_s") if switch.name in rows else None

    plain = speed_of(PLAIN)
    lines = [
        "| switch | rounding | largest change of a step's loss | mean | of allowed | images/s "
        "| of plain | GiB | |",
        "| --- " * 9 + "|",
    ]
    for name, row in rows.items():
        told = "" if row["verdict"] == "right" else f"{row['verdict']}: {row['note']}"
        values = row["values"]
        cells = ["-"] * 6
        if values:
            speed = values["images_per_s"]
            cells = [
                *(f"{values[of]:.1e}" for of in ("largest_difference", "mean_difference")),
                f"{row['error']:.0%}",
                f"{speed:.1f}",
                f"{speed / plain:.2f}" if plain else "-",
                f"{values['memory_gib']:.2f}",
            ]
        lines.append(f"| {' | '.join([name, row['labels']['rounding'], *cells, told])} |")
    parts = [report.heading(record), "\n".join(lines)]
    for ranks, ours, theirs in ((1, CACHE, REFERENCE), (2, CACHE_RANKS, REFERENCE_RANKS)):
        cached, reference = speed_of(ours), speed_of(theirs)
        if cached and reference:
            parts.append(
                f"Cache and fused optimizer against the loop without both, ranks: {ranks}. "
                f"{cached:.1f} images/s against {reference:.1f}, {cached / reference:.2f} times."
            )
    return "\n\n".join(parts) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return parse_steps(argv, "ledger", str(__doc__), STEPS, least=LEAST_STEPS)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    path = flags.out / "ledger.json"
    words = list(sys.argv[1:] if argv is None else argv)
    fresh = harness.new_record("ledger", words, flags.commit)
    record = harness.resumed(path, fresh)
    if record is fresh:
        shutil.rmtree(flags.work / "steps", ignore_errors=True)
    try:
        Ledger(record, flags.steps, path, flags.work).fill()
    except RunFailed as error:
        say(f"fusedit.benchmarks.ledger: what the others are measured by failed: {error}")
        return 1
    return report.finish(record, path, flags.compare, table)


if __name__ == "__main__":
    sys.exit(main())
