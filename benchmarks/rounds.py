"""Runs by turns, each a row of the record once it is made: what was stopped goes on after it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import harness
from .harness import Record, say

Labels = Mapping[str, str | int]


class Run(NamedTuple):
    """What a run came to, its warm-up cut off."""

    update_ms: list[float]  # of some updates each, in the mean
    other_clock_ms: float  # an update, in the mean
    memory_gib: float


def by_turns(
    record: Record,
    path: Path,
    ways: Mapping[str, Labels],
    rounds: int,
    run: Callable[[str], Run],
) -> dict[str, list[Run]]:
    """Each way's runs, a round after the other; those that the record holds are not run again.

    Args:
        path: of the record, which is written after each run.
        ways: their labels, which say all that a run depends on.
    """
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for turn in range(1, rounds + 1):
        for way, labels in ways.items():
            empty = harness.row({"op": "run", **labels, "round": turn})
            row = next((row for row in record["rows"] if row["name"] == empty["name"]), None)
            if row is None:
                say(f"round {turn} of {rounds}: {way}")
                row = empty | {"values": _values(run(way))}
                record["rows"].append(row)
                harness.write(record, path)
            found[way].append(_run(row["values"]))
    return found


def find_row(record: Record, labels: Labels) -> Record | None:
    """The row with these labels and no others."""
    return next((row for row in record["rows"] if row["labels"] == labels), None)


def _values(run: Run) -> dict[str, float]:
    times = {f"update_ms_{index}": ms for index, ms in enumerate(run.update_ms)}
    return {"other_clock_ms": run.other_clock_ms, "memory_gib": run.memory_gib, **times}


def _run(values: Mapping[str, float]) -> Run:
    times: Sequence[float] = [ms for name, ms in values.items() if name.startswith("update_ms_")]
    return Run([*times], values["other_clock_ms"], values["memory_gib"])
