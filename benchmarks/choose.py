"""Which attention runs where, from what was measured: writes kernels/tables/attention.json.

    python -m fusedit.benchmarks.kernels --op attention --out results --name attention
    python -m fusedit.benchmarks.kernels --op attention --batch 4 --out results --name attention-4
    python -m fusedit.benchmarks.choose results/attention.json results/attention-4.json

For each head width, dtype and pair of lengths: whichever of ours, cuDNN's and flash attention was
faster than PyTorch's own choice in every measurement, by more than the noise; of several the one
whose least gain is largest; where there is none, PyTorch's own choice. The time is that of forward
and backward together in a CUDA graph. Only the part of the cards' family is written.

Exit codes: 0 done, 2 a mistake in the flags or files.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..kernels.attention_choice import DEFAULT, DTYPES, TABLE
from ..kernels.tables import FAMILIES
from .flags import Flags, existing_file
from .harness import Record, read, say
from .report import by_shape
from .tune import TOLERANCE

BACKENDS = {"ours": "triton", "sdpa-cudnn": "cudnn", "sdpa-flash": "flash"}  # as rows name them
OWN_CHOICE = "eager"
SHAPE = re.compile(r"\d+x(\d+)x\d+x(\d+)\+(\d+)keys")  # n, queries, heads, width, keys
WAYS = ("forward", "backward")


class Sizes(NamedTuple):
    """What a choice is made for."""

    width: int
    dtype: str
    queries: int
    keys: int


Times = dict[str, float]  # implementation -> milliseconds, forward and backward


def measurements(records: Iterable[Record]) -> dict[Sizes, list[Times]]:
    """Every measurement: a shape in a preset, at a batch, in a record.

    Wanting are implementations that were wrong or failed in one direction.
    """
    found: dict[Sizes, list[Times]] = defaultdict(list)
    for record in records:
        for (_, _, shape, dtype), ways in by_shape(filter(counts, record["rows"])).items():
            match = SHAPE.fullmatch(shape)
            if match:
                queries, width, keys = map(int, match.groups())
                times = {by: in_graph(of) for by, of in ways.items() if both_timed(of)}
                found[Sizes(width, dtype, queries, keys)].append(times)
    return found


def both_timed(ways: dict[str, Record]) -> bool:
    return {way for way, row in ways.items() if row["timings"]} == {*WAYS}


def in_graph(ways: dict[str, Record]) -> float:
    """Milliseconds of all directions together."""
    return sum(row["timings"]["graph"]["median_ms"] for row in ways.values())


def counts(row: Record) -> bool:
    """Whether a row is of attention in a dtype that kernels take, and not timed without a graph."""
    of = row["labels"]
    in_graph = not row["timings"] or "graph" in row["timings"]
    return of.get("op") == "attention" and of["dtype"] in DTYPES.values() and in_graph


def least_gain(by: str, times: Sequence[Times]) -> float:
    """Of PyTorch's own choice over an implementation, the least of all; 0, if one is wanting."""
    return min(
        (of[OWN_CHOICE] / of[by] if {by, OWN_CHOICE} <= {*of} else 0.0 for of in times), default=0.0
    )


def choice(times: Sequence[Times]) -> tuple[str, float]:
    """A backend, and its least gain."""
    gains = {backend: least_gain(by, times) for by, backend in BACKENDS.items()}
    best = max(gains, key=lambda backend: gains[backend])
    return (best, gains[best]) if gains[best] > 1 + TOLERANCE else (DEFAULT, 1.0)


def layout(table: Record) -> str:
    """The table as it is committed: a choice a line."""
    families = []
    for family, of in table.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in of["choices"])
        choices = f"[\n{lines}\n  ]" if lines else "[]"
        measured = json.dumps(of["measured"])
        families.append(f'  "{family}": {{"measured": {measured}, "choices": {choices}}}')
    return "{\n" + ",\n".join(families) + "\n}\n"


def origin(records: Sequence[Record]) -> Record:
    """What the table says of itself; commits may be several."""
    source = records[0]["provenance"]
    commits = dict.fromkeys(record["provenance"]["commit"] or "unknown" for record in records)
    return {
        "device": source["machine"]["gpu"],
        "commit": ", ".join(commits),
        "triton": source["versions"]["triton"],
        "torch": source["versions"]["torch"],
    }


def why_not(record: Record) -> str:
    """What speaks against a record; empty: nothing."""
    if record["benchmark"] != "kernels":
        return f"is of {record['benchmark']}; give what fusedit.benchmarks.kernels wrote"
    if record["provenance"]["machine"].get("family") not in FAMILIES:
        return "names no family of GPUs; run fusedit.benchmarks.kernels where there is a GPU"
    if not any(row["timings"] for row in filter(counts, record["rows"])):
        return "has no time of attention in a graph; measure with --op attention"
    return ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.choose", str(__doc__))
    flags.add_argument("files", nargs="+", type=existing_file, help="of one card, several batches")
    flags.add_argument("--out", type=Path, default=TABLE, help=f"a file; default: {TABLE.name}")
    chosen = flags.parse_args(argv)
    chosen.records = [read(path) for path in chosen.files]
    for path, record in zip(chosen.files, chosen.records, strict=True):
        if reason := why_not(record):
            flags.error(f"{path} {reason}")
    origins = [origin([record]) for record in chosen.records]
    for what in ("device", "triton", "torch"):
        if len({of[what] for of in origins}) > 1:
            pairs = zip(origins, chosen.files, strict=True)
            told = ", ".join(f"{of[what]} in {path}" for of, path in pairs)
            flags.error(f"files are not of one {what}: {told}; choose from each alone")
    if chosen.out.is_dir() or not chosen.out.absolute().parent.is_dir():
        flags.error(f"--out {chosen.out}: give a file in a folder that exists")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    for path, record in zip(flags.files, flags.records, strict=True):
        if not record["complete"]:
            say(f"{path} is not complete: shapes are wanting")
    family = flags.records[0]["provenance"]["machine"]["family"]
    choices = []
    for sizes, times in sorted(measurements(flags.records).items()):
        backend, gain = choice(times)
        choices.append({**sizes._asdict(), "backend": backend})
        print(
            f"{sizes.dtype}, width {sizes.width}, {sizes.queries} queries, {sizes.keys} keys: "
            f"{backend}, {gain:.2f} times PyTorch's own choice or more ({len(times)} measured)"
        )
    table = json.loads(TABLE.read_text())
    table[family] = {"measured": origin(flags.records), "choices": choices}
    flags.out.write_text(layout(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
