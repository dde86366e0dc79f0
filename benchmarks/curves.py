"""Do the loss curves in bf16 agree with fp32's, as far as seeds do? 500 steps of the demo.

    python -m fusedit.benchmarks.curves --out results

Seeds 6 to 9 in each precision: fp32, autocast (--mixed_precision bf16), and bf16 parameters
(--param_dtype bf16 with it). A seed draws the order, the noise, and what is held out. A run's curve
is its training loss averaged over the last SMOOTH steps, a precision's curve the mean of its runs'.
The seeds' spread is the difference of the largest and the least of fp32's runs in the mean over the
steps: at a single step four curves may happen to cross. A precision agrees when its curve is at no
step from SMOOTH on further than that spread from fp32's.

Single runs of one seed part after some hundred steps whatever the rounding, for training amplifies
it. One run more shows how far: fp32 with seed 6, each layer's values off by a unit in the last
place. It is not judged.

Writes curves.json, with the curves at every SMOOTH steps, and curves.png. All runs are cached: the
demo's images have one crop. Exit codes: 0 done; 1 a precision does not agree, or a run failed; 2 a
mistake in the flags.
"""

import argparse
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from . import harness, report
from .demo_steps import RunFailed, demo_data, demo_flags, parse_steps, run_steps
from .harness import Record, say

STEPS, SMOOTH = 500, 50
SEEDS = (6, 7, 8, 9)
FP32 = "fp32"
PRECISIONS = {
    FP32: ("--mixed_precision=no",),
    "--mixed_precision bf16": ("--mixed_precision=bf16",),
    "--param_dtype bf16": ("--mixed_precision=bf16", "--param_dtype=bf16"),
}
ROUNDED = "fp32, each layer rounded once more"  # with the first seed alone
COLOURS = {FP32: "black", "--mixed_precision bf16": "#1f6feb", "--param_dtype bf16": "#f0883e"}

Curve = Sequence[float]  # from step SMOOTH on
Curves = Mapping[str, Sequence[Curve]]  # of each precision, a curve for each seed


def smoothed(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[end - SMOOTH : end]) for end in range(SMOOTH, len(losses) + 1)]


def mean_of(runs: Sequence[Curve]) -> list[float]:
    return [statistics.fmean(at) for at in zip(*runs, strict=True)]


def apart(curve: Curve, other: Curve) -> list[float]:
    return [own - its for own, its in zip(curve, other, strict=True)]


def spread_of(runs: Sequence[Curve]) -> float:
    return statistics.fmean(max(at) - min(at) for at in zip(*runs, strict=True))


class Agreement(NamedTuple):
    """How far curves are from fp32's; each but `step` is a share of the seeds' spread."""

    largest: float  # of the means over the seeds, over the steps
    step: int  # where that is
    mean: float  # over seeds and steps, with its sign
    standard_error: float  # of `mean`, over the seeds; 0 of a single one
    largest_of_a_pair: float  # of two runs of one seed


def agreement(runs: Sequence[Curve], fp32: Sequence[Curve]) -> Agreement:
    """Runs of the first seeds, or of all, against fp32's of the same seeds."""
    spread, seeds = spread_of(fp32), len(runs)
    pairs = [apart(own, its) for own, its in zip(runs, fp32[:seeds], strict=True)]
    distances = [abs(value) for value in mean_of(pairs)]
    means = [statistics.fmean(pair) for pair in pairs]
    error = statistics.stdev(means) / seeds**0.5 if seeds > 1 else 0.0
    return Agreement(
        max(distances) / spread,
        SMOOTH + distances.index(max(distances)),
        statistics.fmean(means) / spread,
        error / spread,
        max(abs(value) for pair in pairs for value in pair) / spread,
    )


def rows(curves: Curves, steps: int) -> list[Record]:
    """A row for each precision, and one for the rounded run; fp32's is what they are judged by."""
    made = []
    for name, runs in curves.items():
        curve = mean_of(runs)
        values = {
            f"loss_at_{step}": curve[step - SMOOTH] for step in range(SMOOTH, steps + 1, SMOOTH)
        }
        verdict, error = "unchecked", None
        if name == FP32:
            values["spread_of_seeds"] = spread_of(runs)
        else:
            found = agreement(runs, curves[FP32])
            values |= found._asdict()
            error = found.largest
            if name in PRECISIONS:
                verdict = "right" if found.largest <= 1 else "wrong"
        labels = {"op": "curve", "run": name, "seeds": len(runs), "steps": steps, "by": "ours"}
        made.append(harness.row(labels, verdict=verdict, error=error, values=values))
    return made


def plot(curves: Curves, source: str, path: Path) -> bool:
    """The curves, and how far they are from fp32's; False without matplotlib.

    Args:
        source: where they were measured, a long line.
    """
    pyplot = report.drawing()
    if pyplot is None:
        return False
    figure, (above, below) = pyplot.subplots(
        2, figsize=(9, 8), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    fp32 = curves[FP32]
    least, most = ([of(at) for at in zip(*fp32, strict=True)] for of in (min, max))
    spread, steps = spread_of(fp32), range(SMOOTH, SMOOTH + len(least))
    above.fill_between(steps, least, most, color="#d0d4d9", label="fp32, between its seeds")
    below.axhspan(-spread, spread, color="#d0d4d9")
    for name, colour in COLOURS.items():
        width = 2.5 if name == FP32 else 1.5
        above.plot(steps, mean_of(curves[name]), color=colour, linewidth=width, label=name)
        if name == FP32:
            continue
        pairs = [apart(own, its) for own, its in zip(curves[name], fp32, strict=True)]
        below.plot(steps, mean_of(pairs), color=colour, linewidth=2, label=f"{name}, mean")
        for pair in pairs:
            below.plot(steps, pair, color=colour, linewidth=0.6, alpha=0.6)
    rounding = apart(curves[ROUNDED][0], fp32[0])
    below.plot(steps, rounding, "k:", linewidth=1, label=f"{ROUNDED}, one seed")
    above.set_ylabel(f"training loss, mean of {SMOOTH} steps and {len(SEEDS)} seeds")
    above.set_title("\n".join(wrap(source, 130)), fontsize=8, loc="left")
    above.legend()
    below.set_ylabel("less fp32, same seeds; thin: single runs")
    below.set_xlabel("optimizer step; the band below: the seeds' spread, in the mean over steps")
    below.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return parse_steps(argv, "curves", str(__doc__), STEPS, least=SMOOTH)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    path = flags.out / "curves.json"
    words = list(sys.argv[1:] if argv is None else argv)
    fresh = harness.new_record("curves", words, flags.commit)
    record = harness.resumed(path, fresh)
    runs = flags.work / "curves"
    if record is fresh:
        shutil.rmtree(runs, ignore_errors=True)
    harness.write(record, path)  # so that what is stopped here goes on
    data = demo_data(flags.work / "data")
    cached = ["--center_crop", f"--cache_latents={flags.work / 'cache'}"]

    def curve_of(name: str, own: Sequence[str], seed: int, loop: str = "ours") -> Curve:
        say(f"{name}, seed {seed}")
        output = runs / (re.sub(r"\W+", "-", name).strip("-") + f"-{seed}")
        words = [*demo_flags(data), *cached, *own, f"--seed={seed}"]
        return smoothed(run_steps(flags.steps, words, output, loop=loop).losses)

    try:
        curves: dict[str, list[Curve]] = {
            name: [curve_of(name, own, seed) for seed in SEEDS] for name, own in PRECISIONS.items()
        }
        curves[ROUNDED] = [curve_of(ROUNDED, PRECISIONS[FP32], SEEDS[0], "rounded_once_more")]
    except RunFailed as error:
        say(f"fusedit.benchmarks.curves: {error}")
        return 1
    record["rows"] = rows(curves, flags.steps)
    plot(curves, report.source_of(record), path.with_suffix(".png"))
    return report.finish(record, path, flags.compare)


if __name__ == "__main__":
    sys.exit(main())
