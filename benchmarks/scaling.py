"""From one rank to many: measured here, and a model of Stable Diffusion 1.5 on 8, 64 and 512 GPUs.

    python -m fusedit.benchmarks.scaling --out results
    python -m fusedit.benchmarks.scaling --update results/h100/update.json --out results

Measured: the demo's loop from a cache, each rank with the same batch, in rounds that alternate; on
a CPU 1 and 2 ranks with a core each, on GPUs 1 to all. Measured too: when each bucket of gradients
is ready on one rank, and what its all-reduce takes while nothing else is done. From these the model
(`overlap.py`) says what a step of several ranks takes, and is held against what it took. It knows
of the exchange alone, and cores share caches and memory: on a CPU it starts from the step of as
many runs that are side by side and exchange nothing.

The same model then says what Stable Diffusion 1.5 does on machines that nobody has run it on
(`predicted.py`). Its gradients are ready as measured where there is a GPU, else as counted.

Writes scaling.json, scaling.md and scaling.png. Exit codes: 0 done; 1 the model is further from
what was measured than is allowed, or a run failed; 2 a mistake in the flags.
"""

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from . import gradients, harness, predicted, report, scaling_report
from .demo_steps import RunFailed, Steps, demo_data, demo_flags, run_steps
from .flags import Flags, positive
from .gradients import Backward
from .harness import Record, Timing, say
from .ledger import CACHED
from .overlap import BYTES, Bucket, Exchange, buckets, exchange
from .timing import timing

STEPS, LEAST_STEPS, ROUNDS = 40, 5, 3
BATCH = 16  # of each rank, as each of the demo's two has
BUCKET_MB = 1  # the demo's gradients are 7.6 MB, and shall be several buckets
ALLOWED = 0.1  # between the model's step and the measured one, or what steps differ by
MOST_NOISE = 0.3  # steps that differ by more say nothing of the model


# What is run.


def ranks_here() -> list[int]:
    """1, 2, 4 and so on and all GPUs; 1 and 2 without one."""
    most = torch.cuda.device_count() if torch.cuda.is_available() else 2
    return sorted({most, *(2**power for power in range(most.bit_length()))})


@contextmanager
def cores(ranks: int, first: int = 0) -> Iterator[None]:
    """Inside, what this thread starts has a core for each rank; where there are GPUs, all."""
    allowed = os.sched_getaffinity(0)
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, sorted(allowed)[first : first + ranks])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Demo:
    """The demo's loop from its cache, anew; raises RunFailed."""

    def __init__(self, steps: int, work: Path) -> None:
        self.steps, self.folder = steps, work / "scaling"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.words = [
            *demo_flags(demo_data(work / "data"), BATCH),
            *(flag.format(cache=work / "cache") for flag in CACHED),
            f"--mixed_precision={'bf16' if torch.cuda.is_available() else 'no'}",
            f"--bucket_mb={BUCKET_MB}",
        ]

    def run(self, ranks: int, number: int) -> Steps:
        say(f"demo, ranks: {ranks}, round {number + 1}")
        with cores(ranks):
            return self._run(f"{ranks}-{number}", ranks)

    def side_by_side(self, ranks: int, number: int) -> list[Steps]:
        """Runs of one rank at the same time."""
        say(f"demo, runs side by side: {ranks}, round {number + 1}")

        def run(core: int) -> Steps:
            with cores(1, core):
                return self._run(f"{ranks}-{number}-{core}", 1)

        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(run, range(ranks)))

    def _run(self, name: str, ranks: int) -> Steps:
        return run_steps(self.steps, self.words, self.folder / name, ranks=ranks)

    def backward(self) -> Backward:
        say("demo, gradients")
        with cores(1):
            return gradients.of_demo(self.steps, self.words, self.folder / "gradients")

    def all_reduce_ms(self, made: Sequence[Bucket], ranks: int) -> list[float]:
        """Of each bucket by so many ranks."""
        say(f"demo, all-reduce, ranks: {ranks}")
        sizes = [bytes_of(bucket) for bucket in made]
        with cores(ranks):
            return gradients.all_reduce_ms(sizes, ranks, self.folder / f"exchange-{ranks}")


def bytes_of(bucket: Bucket) -> int:
    return bucket.elements * BYTES["fp32"]


def sd15(batch: int, work: Path) -> Backward:
    """Measured on a GPU, else counted."""
    say("sd15, gradients")
    if torch.cuda.is_available():
        return gradients.of_sd15(batch, work / "scaling" / "sd15")
    return gradients.counted(predicted.PIXELS)


# Rows.


def demo_rows(demo: Demo, rounds: int) -> list[Record]:
    found: dict[int, list[Steps]] = {ranks: [] for ranks in ranks_here()}
    beside: dict[int, list[Steps]] = {}  # runs that exchange nothing
    for number in range(rounds):
        for ranks, runs in found.items():
            runs.append(demo.run(ranks, number))
            if ranks > 1 and not torch.cuda.is_available():
                beside.setdefault(ranks, []).extend(demo.side_by_side(ranks, number))
    backward = demo.backward()
    made = buckets(backward.gradients, BUCKET_MB)
    rows = [measured_row(found, ranks, demo.steps) for ranks in found]
    checks, takes_ms = [], {}
    for ranks in found:
        if ranks > 1:
            takes_ms[ranks] = demo.all_reduce_ms(made, ranks)
            base = step_of(beside.get(ranks, found[1]), 1)
            backward_ms = backward.share * base.median_ms
            ready_ms = [bucket.ready * backward_ms for bucket in made]
            expected = exchange(ready_ms, takes_ms[ranks], backward_ms)
            checks.append(check_row(ranks, step_of(found[ranks], ranks), base, expected))
    return [*rows, *bucket_rows(made, backward.share, takes_ms), *checks]


def step_of(runs: Sequence[Steps], ranks: int) -> Timing:
    return timing([ms for run in runs for ms in run.step_ms(BATCH * ranks)])


def measured_row(found: Mapping[int, Sequence[Steps]], ranks: int, steps: int) -> Record:
    """Efficiency is that of two runs in one round."""
    speeds, alone = (
        [statistics.median(run.images_per_s) for run in found[of]] for of in (ranks, 1)
    )
    efficiencies = [own / ranks / one for own, one in zip(speeds, alone, strict=True)]
    values: dict[str, float] = {"rounds": len(speeds)}
    for name, numbers in (("images_per_s", speeds), ("efficiency", efficiencies)):
        values |= {name: statistics.median(numbers)}
        values |= {f"{name}_low": min(numbers), f"{name}_high": max(numbers)}
    return harness.row(
        {"op": "scaling", "what": "demo", "ranks": ranks, "batch": BATCH, "steps": steps}
        | {"by": "ours"},
        verdict="right",
        timings={"warm": step_of(found[ranks], ranks)},
        values=values,
    )


def bucket_rows(
    made: Sequence[Bucket], share: float, takes_ms: Mapping[int, Sequence[float]]
) -> list[Record]:
    """When each is ready is a share of the step, of which the backward takes so much."""
    return [
        harness.row(
            {"op": "scaling", "what": "bucket", "number": number, "by": "ours"},
            values={"bytes": bytes_of(bucket), "ready": share * bucket.ready}
            | {f"all_reduce_ms_{ranks}": takes[number] for ranks, takes in takes_ms.items()},
        )
        for number, bucket in enumerate(made)
    ]


def check_row(ranks: int, took: Timing, base: Timing, expected: Exchange) -> Record:
    """The model's step of several ranks against the measured one; base: without the exchange."""
    model_ms = base.median_ms + expected.exposed_ms
    off = model_ms / took.median_ms - 1
    noise = harness.SPREADS * max(took.spread, base.spread)
    allowed = max(ALLOWED, noise)
    verdict = "right" if abs(off) <= allowed else "wrong"
    note = "" if verdict == "right" else f"the model is off by {off:+.0%}, allowed: {allowed:.0%}"
    if noise > MOST_NOISE:
        verdict, note = "unchecked", f"steps differ by {noise:.0%}: run it on a quieter machine"
    return harness.row(
        {"op": "scaling", "what": "check", "ranks": ranks, "by": "model"},
        verdict=verdict,
        error=None if verdict == "unchecked" else abs(off) / allowed,
        values={
            "model_ms": model_ms,
            "without_exchange_ms": base.median_ms,
            "measured_ms": took.median_ms,
            "relative_difference": off,
            "noise": noise,
            "all_reduce_ms": expected.total_ms,
            "exposed_ms": expected.exposed_ms,
        },
        note=note,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.scaling", str(__doc__))
    flags.add_record()
    flags.add_argument("--work", type=Path, default=Path("runs/ledger"), help="data, cache, runs")
    flags.add_argument("--steps", type=positive, default=STEPS, help="of each run")
    flags.add_argument("--rounds", type=positive, default=ROUNDS, help="of runs")
    predicted.add_flags(flags)
    chosen = flags.parse_args(argv)
    if chosen.steps < LEAST_STEPS:
        flags.error(f"--steps must be {LEAST_STEPS} or more, got {chosen.steps}")
    if not torch.cuda.is_available() and len(os.sched_getaffinity(0)) < 2:
        flags.error("two ranks need two cores, and here is one: run it where there are two")
    predicted.check(flags, chosen)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    path = flags.out / "scaling.json"
    words = list(sys.argv[1:] if argv is None else argv)
    record = harness.new_record("scaling", words, flags.commit)
    try:
        rows = demo_rows(Demo(flags.steps, flags.work), flags.rounds)
        one = predicted.one_gpu(flags, sd15(flags.batch, flags.work))
    except RunFailed as error:
        say(f"fusedit.benchmarks.scaling: {error}")
        return 1
    model = predicted.rows(one, predicted.cluster_of(flags), flags.price_per_gpu_hour)
    record["rows"] = [*rows, *model]
    table = partial(scaling_report.text, one=one, flags=flags)
    code = report.finish(record, path, flags.compare, table)
    scaling_report.plot(record, path.with_suffix(".png"))
    return code


if __name__ == "__main__":
    sys.exit(main())
