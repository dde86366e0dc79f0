"""diffusers' script and ours on the same model, pairs, device and effective batch, by turns.

    python -m fusedit.benchmarks.step --reference PATH --out results
    python -m fusedit.benchmarks.step --reference PATH --tiny --out results
    python -m fusedit.benchmarks.step --reference PATH --preset tuned --pixels 512 --out results

Four rows a preset: the script, unmodified, in a process of its own; ours with the very same flags;
ours as recommended, that is from a cache, micro-steps merged, without gradient checkpointing, and
with bf16 weights on a GPU; and that without the cache. `as-shipped` is the command of the script's
guide; `tuned` gives the script its best: bf16, TF32, a large batch without checkpointing, and
workers. `sdxl` and `sdxl-tuned` are the same for Stable Diffusion XL and its script, in a call of
their own; ours keeps the script's micro-steps there. xformers is left out of the guide's command:
the script runs on PyTorch's own attention.

Each program runs --rounds times, by turns. Time is taken by the programs' own logs, from outside of
the loop, --warm_up updates cut off; the script's must agree with a hook on its optimizer, ours with
the speed that it says itself. --tiny is the demo's base at 64 px, for a CPU, or a tiny XL; else the
model is the true architecture with random weights (throughput does not depend on them).

Writes step.json, step.md and step.png, which shows where the time of an update goes, by a trace of
one run more. Exit codes: 0 done; 1 a run failed, or two clocks disagree; 2 a mistake in the flags.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ..launch.flags import parse as parse_train
from ..trainer.counting import KINDS, Work
from ..trainer.estimate import count_run
from ..trainer.log import LOG_FILE, read_lines
from ..trainer.pretrained import describe
from . import harness, report, step_report
from .demo_steps import RunFailed, run_module
from .flags import Flags, file_name, positive
from .harness import Record, say
from .reference import Script, data_flags, note, parse_with_script, read_stamps, run_script
from .rooflines import Ceilings, find_ceilings, ideal_ms
from .rounds import Run, by_turns, find_row
from .step_cases import (
    BATCHES,
    PRESETS,
    RECOMMENDED,
    SCRIPT,
    WAYS,
    XL,
    XL_BATCHES,
    Case,
    case_of,
    check_model,
    sizes,
)
from .timing import timing
from .tracing import PHASES, SKIPPED, TRACE, TRACED

EVERY = 5  # updates between two lines of our log, as a run would have it
CLOCKS = 0.05  # two clocks may differ by so much in all


def flags_of(case: Case, way: str, work: Path, updates: int) -> list[str]:
    values = dict(case.flags(way))
    values |= {"pretrained_model_name_or_path": case.model, "max_train_steps": updates}
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in values.items()
        if value is not False
    ]
    flags += data_flags(case.data, work)
    return flags if way == SCRIPT else [*flags, "--overwrite", f"--log_every={EVERY}"]


def run_of(case: Case, way: str, script: Script, work: Path, updates: int, warm_up: int) -> Run:
    """One run, in a process of its own.

    Raises: RunFailed: it did not come to its end.
    """
    folder = work / "step"
    shutil.rmtree(folder, ignore_errors=True)
    flags = flags_of(case, way, work, updates)
    if way == SCRIPT:
        run_script("stamps", script, flags, folder)
        stamps = read_stamps(folder)
        times, other = stamps.logged[warm_up - 1 :: EVERY], stamps.steps[warm_up - 1 :]
        return Run(
            [1e3 * (end - start) / EVERY for start, end in pairwise(times)],
            1e3 * (other[-1] - other[0]) / (len(other) - 1),
            stamps.memory_gib,
        )
    output = folder / "run"
    run_module("launch.train", [*flags, f"--output_dir={output}"], folder)
    kept = [
        line
        for line in read_lines(output / LOG_FILE)
        if line["step"] >= warm_up and "images_per_second" in line
    ]
    pairs = list(pairwise(kept))
    return Run(
        [1e3 * (end["time"] - start["time"]) / EVERY for start, end in pairs],
        statistics.fmean(1e3 * case.images / end["images_per_second"] for _, end in pairs),
        max(line["memory_gib"] for line in kept),
    )


def row_of(
    case: Case, way: str, runs: Mapping[str, Sequence[Run]], ceilings: Ceilings, flops: float
) -> Record:
    """Args: flops: of an update, nothing computed twice."""
    own = runs[way]
    means = {of: [statistics.fmean(run.update_ms) for run in runs[of]] for of in runs}
    ratios = [theirs / ours for ours, theirs in zip(means[way], means[SCRIPT], strict=True)]
    taken = timing([ms for run in own for ms in run.update_ms])
    pairs = zip(own, means[way], strict=True)
    apart = max(abs(run.other_clock_ms / mean - 1) for run, mean in pairs)
    values = {
        "images_per_s": 1e3 * case.images / taken.median_ms,
        "memory_gib": max(run.memory_gib for run in own),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "clocks_apart": apart,
        "model_flops_share": flops / (taken.median_ms / 1e3) / ceilings.flops_per_s,
    }
    labels = {"op": "step", **case.labels(way)}
    if apart > CLOCKS:
        told = f"two clocks differ by {apart:.1%}"
        return harness.row(labels, verdict="wrong", values=values, note=told)
    return harness.row(
        labels, verdict="right", timings={"warm": taken}, flops=round(flops), values=values
    )


def counted(case: Case, way: str, work: Path) -> Work:
    """What the UNet does in a micro-step."""
    config = parse_train([*flags_of(case, way, work, 1), "--output_dir=none"]).run
    return count_run(config, describe(config.model)).unet


def flops_of_image(case: Case, work: Path) -> float:
    """Of the UNet, forward and backward, nothing computed twice."""
    return float(counted(case, RECOMMENDED, work).flops[1].sum())


def traces(
    case: Case, way: str, script: Script, work: Path, update_ms: float, ceilings: Ceilings
) -> list[Record]:
    """Where the time of an update goes: by phase, and against the roofline by kind.

    Ours runs without a CUDA graph, in which a trace sees no operations.
    """
    folder = work / "step"
    shutil.rmtree(folder, ignore_errors=True)
    say(f"{case.preset}, {case.pixels} px, traced: {way}")
    flags = flags_of(case, way, work, SKIPPED + TRACED)
    if way == SCRIPT:
        run_script("trace", script, flags, folder)
    else:
        own = ["--cuda_graphs=off", f"--output_dir={folder / 'run'}"]
        run_module("benchmarks.tracing", [str(folder), *flags, *own], folder)
    found = json.loads((folder / TRACE).read_text())
    phases = {name: sum(found["phases"].get(name, {}).values()) for name in PHASES}
    phases["idle"] = max(0.0, found["wall_ms"] - sum(phases.values()))
    scale = update_ms / sum(phases.values())
    labels = case.labels(way)
    rows = [
        harness.row(
            {"op": "phases", **labels},
            values={name: scale * taken for name, taken in phases.items()} | {"traced": 1 / scale},
        )
    ]
    if way == SCRIPT:
        return rows
    batch, micro_steps = sizes(case.flags(way))
    least = ideal_ms(counted(case, way, work), batch, ceilings)
    taken: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for phase in ("forward", "backward"):
        for kind, milliseconds in found["phases"].get(phase, {}).items():
            taken[kind if kind in KINDS else "elementwise"] += milliseconds
    reached = {
        kind: micro_steps * least[kind] / (scale * taken[kind]) for kind in KINDS if taken[kind]
    }
    return [*rows, harness.row({"op": "roofline", **labels}, values=reached)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.step", str(__doc__))
    usual = [name for name in PRESETS if name not in XL]
    flags.add_argument("--preset", nargs="+", choices=PRESETS, default=usual)
    sides = sorted({*BATCHES, *XL_BATCHES})
    flags.add_argument("--pixels", nargs="+", type=int, choices=sides, help="256; XL: 512")
    flags.add_argument("--tiny", action="store_true", help="a tiny model at 64 px, for a CPU")
    flags.add_argument("--name", type=file_name, default="step", help="of the files")
    flags.add_argument("--rounds", type=positive, default=3)
    flags.add_argument("--updates", type=positive, default=60, help="of a run")
    flags.add_argument("--warm_up", type=positive, default=20, help="of these, not timed")
    chosen = parse_with_script(flags, argv)
    for name in ("updates", "warm_up"):
        if getattr(chosen, name) % EVERY:
            flags.error(f"--{name} {getattr(chosen, name)}: must be a multiple of {EVERY}")
    if chosen.updates < chosen.warm_up + 2 * EVERY:
        flags.error(f"--updates {chosen.updates}: give at least {chosen.warm_up + 2 * EVERY}")
    if not (chosen.tiny or torch.cuda.is_available()):
        flags.error("there is no GPU here for Stable Diffusion 1.5; give --tiny, or run it on one")
    check_model(flags, chosen)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    path = flags.out / f"{flags.name}.json"
    record = harness.resumed(path, harness.new_record("step", words, flags.commit))
    drawn = not flags.tiny or flags.preset[0] in XL
    model = "The model's weights are random." if drawn else "The model is the demo's base."
    note(record, flags.reference, model)
    ceilings = find_ceilings(record)
    try:
        for preset in flags.preset:
            for pixels in flags.pixels:
                case = case_of(preset, pixels, flags.work, tiny=flags.tiny)
                compare(record, case, flags, ceilings, path)
    except RunFailed as error:
        say(f"fusedit.benchmarks.step: {error}")
        return 1
    step_report.plot(record, path.with_suffix(".png"))
    return report.finish(record, path, flags.compare, step_report.markdown)


def compare(
    record: Record, case: Case, flags: argparse.Namespace, ceilings: Ceilings, path: Path
) -> None:
    """Adds the rows of a case that are not there yet; the record is written after each."""
    script, work = flags.reference, flags.work
    say(f"{case.preset}, {case.pixels} px")
    ways = {
        way: {**case.labels(way), "updates": flags.updates, "warm_up": flags.warm_up}
        for way in WAYS
    }

    def run(way: str) -> Run:
        return run_of(case, way, script, work, flags.updates, flags.warm_up)

    runs = by_turns(record, path, ways, flags.rounds, run)
    flops = case.images * flops_of_image(case, work)
    rows = record["rows"]
    for way in WAYS:
        row = find_row(record, {"op": "step", **case.labels(way)})
        if row is None:
            row = row_of(case, way, runs, ceilings, flops)
            rows.append(row)
        if row["timings"] and not find_row(record, {"op": "phases", **case.labels(way)}):
            rows += traces(case, way, script, work, row["timings"]["warm"]["median_ms"], ceilings)
        harness.write(record, path)


if __name__ == "__main__":
    sys.exit(main())
