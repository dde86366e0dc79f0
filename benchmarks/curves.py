"""Do the loss curves in bf16 agree with fp32, as far as seeds do? 500 steps of the demo.

    python -m fusedit.benchmarks.curves --out results

Five runs: fp32 with seeds 3, 4 and 5, autocast (--mixed_precision bf16) and bf16 parameters
(--param_dtype bf16 with it) with seed 3. A seed draws the order, the noise, and what is held out.
S(t) is the training loss averaged over the last SMOOTH steps. The seeds' spread is the difference
of the largest and the least S(t) of the fp32 seeds in the mean over t: at a single step three
curves may happen to cross. A bf16 run agrees when at every t from SMOOTH on its S(t) is no further
than that spread from fp32's with the same seed.

Writes curves.json, with S at every SMOOTH steps, and curves.png. All runs are cached: the demo's
images have one crop. Exit codes: 0 done; 1 a run does not agree, or failed; 2 a mistake in the
flags.
"""

import argparse
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from ..launch.demo.run import FULL
from . import harness, report
from .demo_steps import RunFailed, demo_data, demo_flags, run_steps
from .flags import Flags, positive
from .harness import Record, say

STEPS, SMOOTH = 500, 50
SEEDS = ("fp32, seed 3", "fp32, seed 4", "fp32, seed 5")
BF16 = ("--mixed_precision=bf16", "--seed=3")
RUNS = {
    SEEDS[0]: ("--mixed_precision=no", "--seed=3"),
    SEEDS[1]: ("--mixed_precision=no", "--seed=4"),
    SEEDS[2]: ("--mixed_precision=no", "--seed=5"),
    "--mixed_precision bf16": BF16,
    "--param_dtype bf16": (*BF16, "--param_dtype=bf16"),
}
COLOURS = {"--mixed_precision bf16": "#1f6feb", "--param_dtype bf16": "#f0883e"}

Curves = Mapping[str, Sequence[float]]  # of each run, S from step SMOOTH on


def smoothed(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[end - SMOOTH : end]) for end in range(SMOOTH, len(losses) + 1)]


class Agreement(NamedTuple):
    """How far a run is from fp32 of its seed, as a share of the seeds' spread."""

    largest: float  # over the steps
    step: int  # where that is
    mean: float


def spread_of(curves: Curves) -> float:
    each_step = zip(*(curves[seed] for seed in SEEDS), strict=True)
    return statistics.fmean(max(seeds) - min(seeds) for seeds in each_step)


def agreement(curve: Sequence[float], curves: Curves) -> Agreement:
    spread, same_seed = spread_of(curves), curves[SEEDS[0]]
    shares = [abs(own - fp32) / spread for own, fp32 in zip(curve, same_seed, strict=True)]
    return Agreement(max(shares), SMOOTH + shares.index(max(shares)), statistics.fmean(shares))


def rows(curves: Curves, steps: int) -> list[Record]:
    """A row for each run; those in fp32 are what the others are judged by."""
    made = []
    for name, curve in curves.items():
        values = {
            f"loss_at_{step}": curve[step - SMOOTH] for step in range(SMOOTH, steps + 1, SMOOTH)
        }
        found = None if name in SEEDS else agreement(curve, curves)
        if found is not None:
            values |= {"largest_share_at_step": found.step, "mean_share": found.mean}
            values |= {"spread_of_seeds": spread_of(curves)}
        labels = {"op": "curve", "run": name, "steps": steps, "by": "ours"}
        made.append(
            harness.row(
                labels,
                verdict="unchecked" if not found else "right" if found.largest <= 1 else "wrong",
                error=found and found.largest,
                values=values,
            )
        )
    return made


def plot(curves: Curves, source: str, path: Path) -> bool:
    """The curves, and how far they are from fp32 of their seed; False without matplotlib.

    Args:
        source: where they were measured, a long line.
    """
    if find_spec("matplotlib") is None:
        say("no plot: pip install 'fusedit[bench]', and the same command again")
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, figsize=(9, 7), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    seeds = [curves[seed] for seed in SEEDS]
    least, most = ([of(at) for at in zip(*seeds, strict=True)] for of in (min, max))
    spread, steps = spread_of(curves), range(SMOOTH, SMOOTH + len(least))
    above.fill_between(steps, least, most, color="#d0d4d9", label="fp32, between its seeds")
    above.plot(steps, seeds[0], color="black", linewidth=2.5, label=SEEDS[0])
    below.axhspan(-spread, spread, color="#d0d4d9")
    for name, colour in COLOURS.items():
        above.plot(steps, curves[name], color=colour, linewidth=1.2, label=f"{name}, seed 3")
        apart = [own - first for own, first in zip(curves[name], seeds[0], strict=True)]
        below.plot(steps, apart, color=colour)
    above.set_ylabel(f"training loss, mean of {SMOOTH} steps")
    above.set_title("\n".join(wrap(source, 130)), fontsize=8, loc="left")
    above.legend()
    below.set_ylabel(f"less {SEEDS[0]}")
    below.set_xlabel("optimizer step; the band below: the seeds' spread, in the mean over steps")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.curves", str(__doc__))
    flags.add_argument("--out", type=Path, required=True, help="a folder")
    flags.add_argument("--name", default="curves", help="of the files")
    flags.add_argument("--work", type=Path, default=Path("runs/ledger"), help="data, cache, runs")
    flags.add_argument("--steps", type=positive, default=STEPS, help="of each run")
    flags.add_argument("--commit", help="for a tree without .git")
    chosen = flags.parse_args(argv)
    if not SMOOTH <= chosen.steps <= FULL.steps:
        flags.error(f"--steps must be from {SMOOTH} to {FULL.steps}, got {chosen.steps}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    path = flags.out / f"{flags.name}.json"
    words = list(sys.argv[1:] if argv is None else argv)
    fresh = harness.new_record("curves", words, flags.commit)
    record = harness.resumed(path, fresh)
    runs = flags.work / "curves"
    if record is fresh:
        shutil.rmtree(runs, ignore_errors=True)
    harness.write(record, path)  # so that what is stopped here goes on
    data, curves = demo_data(flags.work / "data"), {}
    for name, own in RUNS.items():
        say(name)
        cached = ["--center_crop", f"--cache_latents={flags.work / 'cache'}"]
        output = runs / re.sub(r"\W+", "-", name).strip("-")
        try:
            found = run_steps(flags.steps, [*demo_flags(data), *cached, *own], output)
        except RunFailed as error:
            say(f"fusedit.benchmarks.curves: {name}: {error}")
            return 1
        curves[name] = smoothed(found.losses)
    record["rows"] = rows(curves, flags.steps)
    *_, source = report.heading(record).splitlines()
    plot(curves, source, path.with_suffix(".png"))
    return report.finish(record, path)


if __name__ == "__main__":
    sys.exit(main())
