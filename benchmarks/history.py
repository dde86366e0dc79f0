"""Figures over commits: how fast each row of a result was, every time that it was committed.

    python -m fusedit.benchmarks.history --out runs/history
    python -m fusedit.benchmarks.history benchmarks/results/cpu/data.json --out runs/history

Reads every version that git has of each record, also under its former names, and draws a figure
for each file: a panel for each row of ours, its time with the 20th and 80th percentile as a band,
or its images a second where it has no time, over the commits that were measured. A hollow point is
of another machine than the newest. Then, for each row, prints the change between the two newest
versions, beside what is noise. What is no record is named and passed over.

Exit codes: 0 done; 1 nothing to draw; 2 a mistake in the flags.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import harness
from .flags import Flags
from .harness import LEAST_SLOWDOWN, ROOT, SPREADS, Record, Timing, say
from .report import drawing
from .timing import MODES

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS, MOST_PANELS = 3, 24
OURS = "#1f6feb"


class Point(NamedTuple):
    """A row in a version."""

    value: float
    low: float
    high: float
    unit: str  # ms, or images/s

    @property
    def spread(self) -> float:
        return (self.high - self.low) / 2 / self.value

    def since(self, was: "Point") -> tuple[float, float, str]:
        """The change, what of it is noise as --compare takes it, and what that makes it."""
        change = self.value / was.value - 1
        noise = max(LEAST_SLOWDOWN, SPREADS * max(was.spread, self.spread))
        if abs(change) <= noise:
            return change, noise, ""
        return change, noise, "slower" if (change > 0) == (self.unit == "ms") else "faster"


def point(row: Record) -> Point | None:
    """Its time, by the first of MODES that it has, or else its speed."""
    for mode in MODES:
        if mode in (row["timings"] or {}):
            found = Timing(**row["timings"][mode])
            return Point(found.median_ms, found.low_ms, found.high_ms, "ms")
    speed = row["values"].get("images_per_s")
    return Point(speed, speed, speed, "images/s") if speed else None


def points(record: Record) -> dict[str, Point]:
    """Those of ours, by the row's name."""
    found = {row["name"]: point(row) for row in record["rows"] if row["labels"].get("by") == "ours"}
    return {name: at for name, at in found.items() if at is not None}


def versions(path: Path) -> list[Record]:
    """The records that were committed as this file, oldest first; tells what is none."""
    found: list[Record] = []
    refused: dict[str, list[str]] = {}  # why -> commits
    log = _git(path.parent, "log", "--follow", "--name-only", "--format=%x00%H", "--", path.name)
    for entry in reversed(log.split("\0")[1:]):
        commit, *names = entry.split("\n")
        name = next((name for name in names if name), "")  # a merge changes no file by itself
        text = _git(path.parent, "show", f"{commit}:{name}") if name else ""
        if not text:  # deleted here
            continue
        try:
            record = harness.check(json.loads(text))
        except ValueError as error:
            refused.setdefault(str(error), []).append(commit[:7])
            continue
        if not found or record["provenance"] != found[-1]["provenance"]:  # a move is no version
            found.append(record)
    for reason, commits in refused.items():
        say(f"{path.name} is passed over as of {', '.join(commits)}: {reason}")
    return found


def _git(folder: Path, *words: str) -> str:
    """What git says; nothing where it fails."""
    command = ("git", "-C", str(folder), "-c", "core.quotePath=off", *words)
    return subprocess.run(command, capture_output=True, text=True).stdout


def commit_of(record: Record) -> str:
    source = record["provenance"]
    return (source["commit"] or "unknown")[:7] + ("+" if source["dirty"] else "")


def machine_of(record: Record) -> str:
    machine = record["provenance"]["machine"]
    return machine["gpu"] or machine["cpu"]


def changes(records: Sequence[Record], title: str) -> str:
    """The two newest versions row by row, as Markdown."""
    head = f"## {title}\n\n"
    if len(records) < 2:
        return head + f"One version, {commit_of(records[-1])}: nothing to compare with.\n"
    old, new = records[-2:]
    if machine_of(old) != machine_of(new):
        told = " and ".join(f"{commit_of(one)} on {machine_of(one)}" for one in (old, new))
        return head + f"Not compared: {told}.\n"
    before, lines = points(old), []
    for name, now in points(new).items():
        was = before.get(name)
        if was is None or was.unit != now.unit:
            lines.append(f"| {name} | - | {now.value:.4g} {now.unit} | | | new |")
            continue
        change, noise, told = now.since(was)
        speeds = f"{was.value:.4g} | {now.value:.4g} {now.unit}"
        lines.append(f"| {name} | {speeds} | {change:+.1%} | {noise:.0%} | {told} |")
    top = f"| row | {commit_of(old)} | {commit_of(new)} | change | noise | |\n{'| --- ' * 6}|\n"
    return head + top + "\n".join(lines) + "\n"


def line(every: Sequence[dict[str, Point]], name: str) -> dict[int, Point]:
    """A row in the versions that have it, in the unit of the newest of them."""
    at = {index: found[name] for index, found in enumerate(every) if name in found}
    unit = at[max(at)].unit
    return {index: one for index, one in at.items() if one.unit == unit}


def plot(pyplot: Any, records: Sequence[Record], title: str, path: Path) -> None:
    """A panel for each row, over the versions."""
    every = [points(record) for record in records]
    names = list(dict.fromkeys(itertools.chain.from_iterable(reversed(every))))
    if names[MOST_PANELS:]:
        say(f"{title}: {MOST_PANELS} rows are drawn, --rows chooses; left out are:")
        say("\n".join(f"  {name}" for name in names[MOST_PANELS:]))
    names = names[:MOST_PANELS]
    height = -(-len(names) // COLUMNS)
    figure, axes = pyplot.subplots(
        height, min(COLUMNS, len(names)), figsize=(13, 1.2 + 2.3 * height), squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    ticks = [f"{commit_of(one)} {one['provenance']['time'][:10]}" for one in records]
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for index, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        found = line(every, name)
        at, shown = list(found), list(found.values())
        axis.plot(at, [one.value for one in shown], color=OURS, linewidth=1)
        low, high = [one.low for one in shown], [one.high for one in shown]
        axis.fill_between(at, low, high, color=OURS, alpha=0.2)
        axis.vlines(at, low, high, color=OURS, alpha=0.4, linewidth=3)
        for place, one in found.items():
            own = machine_of(records[place]) == machine_of(records[-1])
            axis.plot(place, one.value, "o", color=OURS, fillstyle="full" if own else "none")
        axis.set_title(name.removesuffix("/ours"), fontsize=8, loc="left")
        axis.set_ylabel(shown[0].unit, fontsize=8)
        axis.set_ylim(0, 1.15 * max(high))
        axis.set_xlim(-0.5, len(records) - 0.5)
        axis.set_xticks(range(len(records)), ticks, fontsize=7, rotation=90)
        axis.tick_params(labelsize=7, labelbottom=index >= len(names) - COLUMNS)
    figure.suptitle(
        f"{title} on {machine_of(records[-1])}, ours: median, 20th to 80th percentile; hollow: on "
        "another machine",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def chosen_rows(record: Record, texts: Iterable[str]) -> Record:
    rows = [row for row in record["rows"] if all(text in row["name"] for text in texts)]
    return {**record, "rows": rows}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.history", str(__doc__))
    flags.add_argument("files", nargs="*", type=Path, default=[RESULTS], help="or folders of them")
    flags.add_argument("--out", type=Path, required=True, help="a folder")
    flags.add_argument("--rows", nargs="+", default=[], help="those with all this in their name")
    chosen = flags.parse_args(argv)
    for path in chosen.files:
        if not path.exists():
            flags.error(f"{path}: there is no such file; give records, or folders of them")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    drawn = 0
    pyplot = drawing()
    for given in flags.files:
        for path in sorted(given.rglob("*.json")) if given.is_dir() else [given]:
            records = [chosen_rows(record, flags.rows) for record in versions(path.resolve())]
            records = [record for record in records if points(record)]
            if not records:
                say(f"{path.name}: no version in git has a row of ours with a time")
                continue
            title = f"{path.resolve().parent.name}/{path.stem}"
            print(changes(records, title))
            if pyplot is not None:
                plot(pyplot, records, title, flags.out / f"{title.replace('/', '-')}.png")
            drawn += 1
    return int(not drawn)


if __name__ == "__main__":
    sys.exit(main())
