"""What every benchmark writes: one JSON record with its provenance, checked, read back, compared.

A record, version 1:

    {"schema": 1, "benchmark": "kernels", "complete": true,  # false: stopped on the way, goes on
     "provenance": {"commit", "dirty", "time", "command", "machine": {...}, "versions": {...}},
     "ceilings": null without a GPU, or {"copy_bytes_per_s", "bf16_flops_per_s",
                 "graph_launch_us", "noise", "sm_clock_mhz"},  # of the card, in this very run
     "rows": [{"name": "geglu/sd15-512/32x4096x2560/bf16/forward/ours",  # unique
               "labels": {"op": "geglu", "by": "ours", ...},
               "least_bytes", "flops": what the work needs, or null,
               "verdict": "right", "wrong", "failed" or "unchecked",
               "error": largest error over what is allowed (above 1 is wrong), or null,
               "timings": {"graph": {"median_ms", "low_ms", "high_ms", "runs"}, ...} or null,
               "values": {"passed": 12, ...}, "note": ""}]}

low and high are the 20th and 80th percentile. A row that is wrong or failed has no timings.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
VERDICTS = ("right", "wrong", "failed", "unchecked")
LEAST_SLOWDOWN = 0.05  # of a median; less is nothing
SPREADS = 3  # a slowdown is told when it passes this many relative spreads

Record = dict[str, Any]


class Timing(NamedTuple):
    """Milliseconds a call."""

    median_ms: float
    low_ms: float  # 20th percentile
    high_ms: float  # 80th percentile
    runs: int

    @property
    def spread(self) -> float:
        """Half the distance between the percentiles, as a share of the median."""
        return (self.high_ms - self.low_ms) / 2 / self.median_ms


def row(
    labels: Mapping[str, str | int],
    *,
    verdict: str = "unchecked",
    error: float | None = None,
    timings: dict[str, Timing] | None = None,
    least_bytes: int | None = None,
    flops: int | None = None,
    values: dict[str, float] | None = None,
    note: str = "",
) -> Record:
    """A row of a record, named by its labels."""
    return {
        "name": "/".join(str(label) for label in labels.values()),
        "labels": dict(labels),
        "least_bytes": least_bytes,
        "flops": flops,
        "verdict": verdict,
        "error": error,
        "timings": timings and {mode: timing._asdict() for mode, timing in timings.items()},
        "values": values or {},
        "note": note,
    }


def new_record(benchmark: str, argv: Sequence[str], commit: str | None = None) -> Record:
    """A record without rows; argv is what follows `python -m fusedit.benchmarks.BENCHMARK`."""
    command = [f"python -m fusedit.benchmarks.{benchmark}", *argv]
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "complete": False,
        "provenance": provenance(command, commit),
        "ceilings": None,
        "rows": [],
    }


def provenance(command: str | Sequence[str], commit: str | None = None) -> Record:
    """Where a number comes from, without a path, host or user of the machine.

    Args:
        command: as typed, a string or its words; of paths that lead outside the name is kept.
        commit: for a tree that came without its .git.
    """
    words = command.split() if isinstance(command, str) else command
    found, dirty = _git_state()
    return {
        "commit": found or commit,
        "dirty": dirty,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(_without_folders(word) for word in words),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        },
    }


def machine() -> Record:
    """CPU and GPU; the clock and the power limit as they are found, never set."""
    described = {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": torch.cuda.device_count()}
    described |= {"gpu": None, "driver": None, "sm_clock_mhz": None, "power_limit_w": None}
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        names = ("driver_version", "clocks.sm", "power.limit")
        driver, clock, power = (_nvidia_smi(name) for name in names)
        described |= {"driver": driver, "sm_clock_mhz": _number(clock)}
        described |= {"power_limit_w": _number(power)}
    return described


def sm_clock_mhz() -> float | None:
    return _number(_nvidia_smi("clocks.sm"))


def check(record: Record) -> Record:
    """The record itself.

    Raises: ValueError, naming what the schema does not allow and where it stands.
    """
    tops = ("schema", "benchmark", "complete", "provenance", "ceilings", "rows")
    _demand(isinstance(record, dict) and set(record) == {*tops}, f"a record has {', '.join(tops)}")
    _demand(record["schema"] == SCHEMA, f"schema must be {SCHEMA}, got {record['schema']!r}")
    _demand(isinstance(record["benchmark"], str), "benchmark must be a name")
    _demand(isinstance(record["complete"], bool), "complete must be true or false")
    for name in ("commit", "dirty", "time", "command", "machine", "versions"):
        _demand(name in record["provenance"], f"provenance has no {name}")
    for name, value in (record["ceilings"] or {}).items():
        _demand(value is None or _is_number(value), f"ceilings.{name} must be a number")
    names = [_checked(row, f"rows[{index}]")["name"] for index, row in enumerate(record["rows"])]
    for name in names:
        _demand(names.count(name) == 1, f"two rows are named {name}")
    return record


def write(record: Record, path: Path) -> None:
    """Whole or not at all: a run that is killed leaves the rows it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(check(record), indent=1) + "\n")
    beside.replace(path)


def read(path: Path) -> Record:
    """Raises: ValueError, if it is no record; OSError, if it cannot be read."""
    try:
        return check(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path.name} is no record of a benchmark: {error}") from None


def resumed(path: Path | None, fresh: Record) -> Record:
    """The record in the folder, if this very commit began it on such a GPU and did not end it."""
    if path is None or not path.exists():
        return fresh
    begun = read(path)
    sources = [record["provenance"] for record in (begun, fresh)]
    commits = {source["commit"] for source in sources}
    gpus = {source["machine"]["gpu"] for source in sources}
    changed = any(source["dirty"] for source in sources)
    if begun["complete"] or len(commits) > 1 or None in commits or len(gpus) > 1 or changed:
        return fresh
    say(f"going on with {path.name}: {len(begun['rows'])} rows are there")
    return begun


def compare(old: Record, new: Record, by: str = "ours") -> list[str]:
    """What became worse between two records of one kind of machine, a line each.

    Rows that only one of them has are not compared: a run may be of few ops.
    Raises: ValueError, if the machines differ or no row is in both.
    """
    machines = [record["provenance"]["machine"] for record in (old, new)]
    was, now = (machine["gpu"] or machine["cpu"] for machine in machines)
    if was != now:
        raise ValueError(f"measured on another machine: {was}, this is {now}")
    before = {row["name"]: row for row in old["rows"] if row["labels"].get("by") == by}
    pairs = [(before[row["name"]], row) for row in new["rows"] if row["name"] in before]
    if not pairs:
        raise ValueError(f"no row of {by!r} is in both")
    return [finding for pair in pairs for finding in _worse(*pair)]


def _worse(old: Record, new: Record) -> list[str]:
    bad = ("wrong", "failed")
    if new["verdict"] in bad:
        return [] if old["verdict"] in bad else [f"{new['name']}: {new['verdict']}"]
    findings = []
    for mode in sorted({*(old["timings"] or {})} & {*(new["timings"] or {})}):
        was, now = Timing(**old["timings"][mode]), Timing(**new["timings"][mode])
        allowed = max(LEAST_SLOWDOWN, SPREADS * max(was.spread, now.spread))
        if now.median_ms > was.median_ms * (1 + allowed):
            slower = now.median_ms / was.median_ms - 1
            findings.append(
                f"{new['name']}: {mode} {now.median_ms:.4g} ms, was {was.median_ms:.4g} ms: "
                f"{slower:.0%} slower, noise {allowed:.0%}"
            )
    return findings


def _checked(row: Record, where: str) -> Record:
    tops = ("name", "labels", "least_bytes", "flops", "verdict", "error", "timings", "values")
    _demand(isinstance(row, dict) and {*row} == {*tops, "note"}, f"{where} has {tops} and a note")
    verdict, timings = row["verdict"], row["timings"]
    _demand(verdict in VERDICTS, f"{where}.verdict must be one of {VERDICTS}, got {verdict!r}")
    for name in ("least_bytes", "flops", "error"):
        value = row[name]
        _demand(value is None or _is_number(value), f"{where}.{name} must be a number or null")
    for name, value in row["values"].items():
        _demand(_is_number(value), f"{where}.values.{name} must be a number, got {value!r}")
    right = verdict in ("right", "unchecked")
    _demand(right or not timings, f"{where} is {verdict} and has timings: it must have none")
    for mode, timing in (timings or {}).items():
        at = f"{where}.timings.{mode}"
        _demand({*timing} == {*Timing._fields}, f"{at} has {Timing._fields}")
        low, median, high = (timing[name] for name in ("low_ms", "median_ms", "high_ms"))
        _demand(0 < low <= median <= high, f"{at} must have 0 < low <= median <= high")
    return row


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _without_folders(word: str) -> str:
    """A word of a command, with the name alone of each path that leads out of this tree."""
    flag, equals, rest = word.partition("=") if word.startswith("-") else ("", "", word)
    paths = [
        Path(path).name if path.startswith(("/", "~")) or ".." in Path(path).parts else path
        for path in rest.split(",")
    ]
    return flag + equals + ",".join(paths)


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and whether the tree differs from it; (None, None) where this is no checkout."""
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return None, None
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return commit, bool(_output("git", "-C", str(ROOT), "status", "--porcelain"))


def _cpu() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _nvidia_smi(query: str) -> str | None:
    """One property of the current GPU, read only; None where nvidia-smi is not there."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    told = ("nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}")
    return _output(*told, "--format=csv,noheader,nounits")


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text) else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def say(line: str) -> None:
    """Progress, for the reader: results alone go to the standard output."""
    print(line, file=sys.stderr, flush=True)
