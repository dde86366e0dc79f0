"""Our kernels against eager PyTorch, torch.compile and the libraries that are installed.

    python -m fusedit.benchmarks.kernels --op geglu --shapes sd15-512 --out results

Every op at every shape of the UNets, forward and backward: first its answer, by the bar of
`accuracy.py`, then its time in the three ways of `timing.py`, with the least bytes it must move and
the share of the card's copy bandwidth that makes; attention with its useful operations, and theirs
of the card's matrix products. Writes kernels.json after each shape, and kernels.md and kernels.png
at the end. A run that was stopped goes on in the same folder.

Without a GPU there is no time: the answers alone are checked, of the kernels where
TRITON_INTERPRET=1 is set, else of their definitions, and the rows say which.

Exit codes: 0 done; 1 an answer is wrong, or --compare found a slowdown; 2 a mistake in the flags.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch._dynamo
import torch._functorch.config

from ..kernels import dispatch, tables
from . import accuracy, harness, report, tune
from .accuracy import Inputs
from .accuracy import Op as Function
from .directions import FAILURES, directions, timed, told
from .flags import Flags, existing_record, file_name, positive, several_presets
from .harness import Record, Timing, say
from .ops import DTYPES, OPS, PRESETS, Case, cases
from .sweeps import SWEEPS
from .timing import MODES, Timer, ceilings

RIVALS = list(dict.fromkeys(["eager", "compile", *(by for op in OPS.values() for by in op.rivals)]))
TimeOf = Callable[[Function, str], dict[str, Timing]]  # of a function and a direction


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.kernels", str(__doc__))
    every = ", ".join(OPS)
    flags.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), help=every)
    flags.add_argument("--shapes", type=several_presets, default=list(PRESETS), help="presets")
    flags.add_argument("--batch", type=positive, help=f"default on a GPU: {PRESETS}; else 1")
    flags.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    flags.add_argument(
        "--without", nargs="+", choices=RIVALS, default=[], help="rivals that are not run"
    )
    flags.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of timing")
    flags.add_argument("--out", type=Path, help="a folder; none: the table alone is printed")
    flags.add_argument("--name", type=file_name, default="kernels", help="of the files")
    flags.add_argument("--compare", type=existing_record, help="an earlier one, of such a machine")
    flags.add_argument("--tune", action="store_true", help="write the table of block shapes")
    flags.add_argument(
        "--kernel", nargs="+", choices=[what.kernel for what in SWEEPS], help="of --tune, these"
    )
    flags.add_argument("--limit_s", type=positive, help="stop before a shape after this long")
    flags.add_argument("--only_json", action="store_true", help="neither .md nor .png")
    flags.add_argument("--commit", help="for a tree without .git")
    chosen = flags.parse_args(argv)
    if dispatch.INTERPRETED and chosen.dtype == "bf16":
        flags.error("--dtype bf16: Triton's interpreter is wrong for bf16; use fp16 or fp32")
    if chosen.tune and not torch.cuda.is_available():
        flags.error("--tune: there is no GPU here to tune for; run it where there is one")
    if chosen.kernel and not (chosen.tune and tune.asked(chosen)):
        cure = "give its op by --op" if chosen.tune else "it goes with --tune"
        flags.error(f"--kernel {' '.join(chosen.kernel)}: {cure}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    started = time.monotonic()
    if flags.tune:
        return tune.run(flags, words)
    path = flags.out / f"{flags.name}.json" if flags.out else None
    fresh = harness.new_record("kernels", words, flags.commit)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        here = torch.device("cuda", torch.cuda.current_device())
        fresh["provenance"]["machine"]["family"] = tables.family(here)
    record = harness.resumed(path, fresh)
    device = torch.device("cuda" if on_gpu else "cpu")
    timer = Timer(device) if on_gpu else None
    if timer:
        record["ceilings"] = record["ceilings"] or ceilings(timer, device)
    else:
        what = "the kernels, interpreted" if dispatch.INTERPRETED else "the definitions"
        say(f"no GPU here: answers only, of {what}; nothing is timed")
    todo = list(cases(flags.op, flags.shapes, flags.batch or (None if on_gpu else 1), flags.dtype))
    done = {tuple(row["labels"].values())[:4] for row in record["rows"]}
    for index, case in enumerate(todo):
        if tuple(case.labels.values()) in done:
            continue
        if flags.limit_s and time.monotonic() - started > flags.limit_s:
            say(f"--limit_s {flags.limit_s}: {len(todo) - index} shapes are left for another run")
            break
        say(f"{index + 1}/{len(todo)} {' '.join(map(str, case.labels.values()))}")
        record["rows"] += measured(case, device, timer, flags)
        if path:
            harness.write(record, path)
    else:
        record["complete"] = True
    return finish(record, path, flags.compare, only_json=flags.only_json)


def finish(record: Record, path: Path | None, earlier: Record | None, *, only_json: bool) -> int:
    """Table, plot, comparison, exit code."""
    if path:
        harness.write(record, path)
    if path and not only_json:
        path.with_suffix(".md").write_text(report.markdown(record))
        report.plot(record, path.with_suffix(".png"))
    print(report.markdown(record))
    ours = [row for row in record["rows"] if row["labels"]["by"] in ("ours", "definition")]
    return report.judged(record, ours, earlier)


def measured(
    case: Case, device: torch.device, timer: Timer | None, flags: argparse.Namespace
) -> list[Record]:
    """A row for each implementation and direction."""
    inputs = case.inputs(device)
    definition = case.bind(case.op.definition)
    truth = accuracy.truth(definition, inputs)
    kernels_run = dispatch.runs_triton(next(iter(inputs.values())))
    kernels_run = kernels_run and case.dtype in case.op.kernel_dtypes
    functions = {"ours" if kernels_run else "definition": case.bind(case.op.ours)}
    time_of = partial(timed, case, timer=timer, modes=flags.modes) if timer else None
    if timer:
        torch._dynamo.reset()  # else the ninth shape would silently run eagerly
        rivals = {"eager": definition, "compile": torch.compile(definition, dynamic=False)}
        rivals |= {by: case.bind(f) for by, f in case.op.rivals.items() if f is not None}
        functions |= {by: f for by, f in rivals.items() if by not in flags.without}
    rows = []
    # With donated buffers, a backward that was compiled could run only once after its forward.
    with torch._functorch.config.patch(donated_buffer=False):
        for by, function in functions.items():
            rows += _rows(case, by, function, inputs, truth, time_of)
    if timer:
        torch.cuda.empty_cache()
    return rows


def _rows(
    case: Case,
    by: str,
    function: Function,
    inputs: Inputs,
    truth: accuracy.Truth,
    time_of: TimeOf | None,
) -> list[Record]:
    ways = directions(inputs)
    error, timings = None, {}
    try:
        ulps, poison = case.op.normal_ulps, by == "ours"
        verdict = accuracy.judge(function, inputs, truth, normal_ulps=ulps, poison=poison)
        name, error, note = verdict.name, verdict.error, verdict.note
        if time_of and name == "right":
            timings = {way: time_of(function, way) for way in ways}
    except FAILURES as failure:  # of one implementation: the others go on
        name, note = "failed", told(failure)
        torch.cuda.synchronize()  # raises, if the GPU itself is lost
    if by == "definition":
        served = case.dtype in case.op.kernel_dtypes
        why = "no GPU here" if served else f"no kernel takes {case.dtype}"
        note = note or f"the definition ran: {why}"
    elif not time_of:
        note = note or "interpreted"
    least, flops = case.op.least_bytes(inputs), case.op.flops(inputs)
    return [
        harness.row(
            {**case.labels, "direction": way, "by": by},
            verdict=name,
            error=error,
            timings=timings.get(way),
            least_bytes=least[index],
            flops=flops[index],
            values={"times": case.shape.times},
            note=note,
        )
        for index, way in enumerate(ways)
    ]


if __name__ == "__main__":
    sys.exit(main())
