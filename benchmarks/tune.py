"""`python -m fusedit.benchmarks.kernels --tune`: the block shapes of each kernel, found by timing.

Each sweep tries its candidates at the UNets' shapes: what computes a wrong answer or does not
launch is out, the fastest wins, the one in the table stays where it is as fast. The table is
written after each sweep, with the card, the commit and the Triton it was measured with; tune.json
beside it has every candidate's time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from ..kernels import tables
from . import accuracy, harness
from .directions import FAILURES, timed, told
from .harness import Record, Timing, say
from .ops import Case, cases, step_work
from .sweeps import SWEEPS, Config, Sweep
from .timing import Timer, ceilings

TOLERANCE = 0.02  # a candidate this close to the fastest is as fast
MOST_SHAPES = 2  # of one size class: those with most work in a step, of any preset

Entries = dict[str, list[dict]]
Times = Mapping[int, Mapping[Config, float]]  # size -> candidate -> milliseconds a step


def select(times: Times, incumbents: Mapping[int, Config], by: str) -> list[dict]:
    """The entries of a kernel: for each size the fastest, changed where that is worth it.

    Of candidates within TOLERANCE of the fastest, the size's incumbent is taken, then the
    next smaller size's choice, so that there are few entries. The last has no bound.
    """
    chosen: list[tuple[int, Config]] = []
    for size, of_size in sorted(times.items()):
        best = min(of_size, key=lambda config: of_size[config])
        allowed = of_size[best] * (1 + TOLERANCE)
        before = chosen[-1][1] if chosen else best
        for config in (incumbents.get(size), before):
            if config is not None and of_size.get(config, float("inf")) <= allowed:
                best = config
                break
        chosen.append((size, best))
    entries: list[dict] = []
    for index, (size, config) in enumerate(chosen):
        if index + 1 < len(chosen) and chosen[index + 1][1] == config:
            continue
        bound = {"up_to": {by: size}} if index + 1 < len(chosen) else {}
        entries.append({**bound, **dict(config)})
    return entries


def kept(entries: list[dict], by: str) -> list[dict]:
    """Entries bounded by what a sweep does not vary: they stay in front."""
    return [entry for entry in entries if set(entry.get("up_to", {})) - {by}]


def layout(table: Record) -> str:
    """A table as it is committed: an entry a line."""
    kernels = [
        f'    "{name}": [\n' + ",\n".join(f"      {json.dumps(entry)}" for entry in of) + "\n    ]"
        for name, of in table["kernels"].items()
    ]
    head = f'{{\n  "measured": {json.dumps(table["measured"])},\n  "kernels": {{\n'
    return head + ",\n".join(kernels) + "\n  }\n}\n"


@contextmanager
def serving(entries: Entries) -> Iterator[list[tuple[str, dict[str, int]]]]:
    """Inside, these entries serve their kernels; yields the kernels and sizes that are picked."""
    picked: list[tuple[str, dict[str, int]]] = []
    real_pick, real_entries = tables.pick, tables.entries

    def pick(kernel: str, device: torch.device, **sizes: int) -> dict[str, int]:
        picked.append((kernel, sizes))
        return real_pick(kernel, device, **sizes)

    package = tables.__name__.rpartition(".")[0] + "."
    users = [m for name, m in list(sys.modules.items()) if name.startswith(package)]
    users = [module for module in users if getattr(module, "pick", None) is real_pick]
    try:
        for module in users:
            setattr(module, "pick", pick)  # noqa: B010  a name of any module
        setattr(tables, "entries", lambda family: {**real_entries(family), **entries})  # noqa: B010
        yield picked
    finally:
        for module in users:
            setattr(module, "pick", real_pick)  # noqa: B010
        tables.entries = real_entries


Measure = Callable[[Sweep, Case, Entries], Timing | str]  # a time, or why there is none


def sweep(
    what: Sweep, shapes: Mapping[int, list[Case]], table: Entries, measure: Measure
) -> tuple[list[dict], list[Record]]:
    """The kernel's new entries, and a row for each candidate at each shape.

    Args:
        shapes: size -> the cases whose launches have it.
        table: what serves so far; the kernel's own entries are the incumbents.
    """
    rows: list[Record] = []
    times: dict[int, dict[Config, float]] = {}
    incumbents: dict[int, Config] = {}
    front = kept(table[what.kernel], what.by)
    own = [entry for entry in table[what.kernel] if entry not in front]
    for size, of_size in sorted(shapes.items()):
        entry = next(e for e in own if size <= e.get("up_to", {}).get(what.by, size))
        incumbents[size] = tuple((name, v) for name, v in entry.items() if name != "up_to")
        for config in dict.fromkeys([incumbents[size], *what.candidates(size)]):
            trial = table | {what.kernel: [*front, dict(config)]}
            total = 0.0
            for case in of_size:
                found = measure(what, case, trial)
                rows.append(_row(what, case, config, found))
                total += (
                    float("inf") if isinstance(found, str) else case.shape.times * found.median_ms
                )
            if total < float("inf"):
                times.setdefault(size, {})[config] = total
        if size not in times:
            raise RuntimeError(f"{what.kernel}: no candidate is right at {what.by} {size}")
    return [*front, *select(times, incumbents, what.by)], rows


def _row(what: Sweep, case: Case, config: Config, found: Timing | str) -> Record:
    by = ",".join(f"{name}={value}" for name, value in config)
    labels = {"kernel": what.kernel, **case.labels, "direction": what.direction, "by": by}
    if isinstance(found, str):
        return harness.row(labels, verdict="failed", note=found)
    return harness.row(labels, verdict="right", timings={"graph": found})


def classes(what: Sweep, table: Entries, flags: argparse.Namespace) -> dict[int, list[Case]]:
    """Size -> the heaviest cases at which the kernel is launched, as found by launching it."""
    found: dict[int, list[Case]] = {}
    ops = [op for op in what.ops if op in flags.op]
    # A whole-group kernel is asked at every size, the others where it is not taken.
    every = cases(ops, flags.shapes, flags.batch, flags.dtype)
    for case in sorted(every, key=step_work, reverse=True):
        with serving(table) as picked:
            inputs = case.inputs("cuda")
            accuracy.run(case.bind(case.op.ours), inputs, _directions(case, inputs))
        size = next((sizes[what.by] for name, sizes in picked if name == what.kernel), None)
        if size is not None and len(found.setdefault(size, [])) < MOST_SHAPES:
            found[size].append(case)
    return found


def _directions(case: Case, inputs: accuracy.Inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = accuracy.as_tuple(case.bind(case.op.ours)(**inputs))
    return [torch.randn_like(value) for value in outputs]


def measurer(timer: Timer) -> Measure:
    """Judges a candidate by the accuracy bar, then times it."""
    known: dict[Case, tuple[accuracy.Inputs, accuracy.Truth]] = {}

    def measure(what: Sweep, case: Case, table: Entries) -> Timing | str:
        if case not in known:
            if len(known) == MOST_SHAPES:
                known.clear()  # gigabytes each
            inputs = case.inputs("cuda")
            known[case] = inputs, accuracy.truth(case.bind(case.op.definition), inputs)
        ours = case.bind(case.op.ours)
        try:
            with serving(table):
                verdict = accuracy.judge(ours, *known[case], normal_ulps=case.op.normal_ulps)
                if verdict.note:
                    return verdict.note
                return timed(case, ours, what.direction, timer, ["graph"])["graph"]
        except FAILURES as failure:
            torch.cuda.synchronize()  # raises, if the GPU itself is lost
            return told(failure)

    return measure


def asked(flags: argparse.Namespace) -> list[Sweep]:
    """The sweeps of the ops, or those of the kernels among them that are named."""
    of_ops = [what for what in SWEEPS if {*what.ops} & {*flags.op}]
    return [what for what in of_ops if not flags.kernel or what.kernel in flags.kernel]


def run(flags: argparse.Namespace, words: list[str]) -> int:
    device = torch.device("cuda")
    timer = Timer(device)
    record = harness.new_record("kernels", words, flags.commit)
    record["benchmark"], record["ceilings"] = "tune", ceilings(timer, device)
    family = tables.family(torch.device("cuda", torch.cuda.current_device()))
    source = tables.FOLDER / f"{family}.json"
    table, out = json.loads(source.read_text()), flags.out or source.parent
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    todo = asked(flags)
    for index, what in enumerate(todo):
        if flags.limit_s and time.monotonic() - started > flags.limit_s:
            say(
                f"--limit_s {flags.limit_s}: not tuned: {', '.join(w.kernel for w in todo[index:])}"
            )
            break
        say(f"{index + 1}/{len(todo)} {what.kernel}")
        shapes = classes(what, table["kernels"], flags)
        if not shapes:
            continue
        entries, rows = sweep(what, shapes, table["kernels"], measurer(timer))
        table["kernels"][what.kernel] = entries
        record["rows"] += rows
        table["measured"] = _measured(table["measured"], what.kernel, record["provenance"])
        (out / f"{family}.json").write_text(layout(table))
        if flags.out:
            harness.write(record, out / "tune.json")
        print(f"{what.kernel}: {json.dumps(entries)}")
    else:
        record["complete"] = True
        if flags.out:
            harness.write(record, out / "tune.json")
    return 0


def _measured(before: Record | None, kernel: str, source: Record) -> Record:
    """What the table says of itself: of another card, commit or Triton nothing is kept."""
    now = {
        "device": source["machine"]["gpu"],
        "commit": source["commit"],
        "triton": source["versions"]["triton"],
    }
    same = before is not None and all(before.get(name) == value for name, value in now.items())
    kernels = before["kernels"] if before and same else []
    return now | {"kernels": [*(name for name in kernels if name != kernel), kernel]}
