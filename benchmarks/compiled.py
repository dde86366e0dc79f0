"""What the kernels compile to, without a GPU: registers, spills, shared memory, 16-byte loads.

    python -m fusedit.benchmarks.compiled [--family sm_90] [--op geglu] [--quick] [--write]
                                          [--json FILE]

Compiles every kernel as its op launches it (captured.py), with each family's table, reads the
machine code, and compares it with what is committed for this version of Triton,
`results/compiled-triton-VERSION.json`. Exits 1 with a table of what is worse, 2 on a bad flag.
For a version without a file only the rules hold that need no record: it compiles, nothing spills,
shared memory suffices, and every entry of the tables is reached. --write records what is found.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm
from triton import knobs

from ..kernels.tables import FAMILIES
from .captured import CASES, Captured, Launch, captured
from .flags import Flags
from .harness import provenance
from .machine_code import VERSION, Record, build, dump, load

MODULE = "fusedit.benchmarks.compiled"
COMMITTED = Path(__file__).parent / "results" / f"compiled-triton-{VERSION}.json"
# Bytes a block may have: CUDA C++ programming guide, compute capabilities. sm_80's table serves the
# cards of 8.6, 8.9 and 12.0 too, which have less.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
MORE_REGISTERS = (16, 0.20)  # allowed over the record: the larger of a number and a share
MORE_INSTRUCTIONS = 0.25
MAIN = "sm_90"  # the family of which --quick takes more than the first launch of each kernel
ONE_IN = 3  # of its launches
MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Finding:
    family: str
    kernel: str
    what: str
    recorded: str
    now: str
    launch: str  # arguments and configuration


def wide(accesses: dict[str, int]) -> int:
    """Accesses of 16 bytes; one of 32, which Blackwell has, is two."""
    return accesses.get("128", 0) + 2 * accesses.get("256", 0)


def findings(
    family: str, records: Sequence[Record], committed: Sequence[Record] | None
) -> list[Finding]:
    """What breaks a rule.

    Args:
        committed: of the family and this version of Triton; None where there is no file.
    """
    known = {record.key: record for record in committed or ()}
    found = []
    for record in records:
        broken = list(breaks(record, SHARED_LIMIT[family]))
        if committed is not None and not record.error:
            old = known.get(record.key)
            broken += worse(record, old) if old else [("is not recorded", "-", "see --write")]
        found += [_finding(family, record, *one) for one in broken]
    return found


def _finding(family: str, record: Record, what: str, recorded: str, now: str) -> Finding:
    launch = f"{record.arguments} {record.configuration}"
    return Finding(family, record.kernel, what, recorded, now, launch)


def breaks(record: Record, shared_limit: int) -> Iterator[tuple[str, str, str]]:
    """The rules that need no record."""
    if record.error:
        yield "does not compile", "-", record.error
    if record.local_bytes or record.spills:
        yield "spills", "-", f"{record.local_bytes} bytes, {record.spills} instructions"
    if record.shared_bytes > shared_limit:
        yield "shared memory", f"limit {shared_limit}", str(record.shared_bytes)


def worse(record: Record, old: Record) -> Iterator[tuple[str, str, str]]:
    """The rules against the record of the same launch."""
    if wide(record.loads) < wide(old.loads):
        yield "16-byte loads lost", str(old.loads), str(record.loads)
    if wide(record.stores) < wide(old.stores):
        yield "16-byte stores lost", str(old.stores), str(record.stores)
    if record.mma.keys() != old.mma.keys():
        yield "matrix instructions", str(old.mma), str(record.mma)
    number, share = MORE_REGISTERS
    if record.registers > old.registers + max(number, share * old.registers):
        yield "registers", str(old.registers), str(record.registers)
    if record.instructions > (1 + MORE_INSTRUCTIONS) * old.instructions:
        yield "instructions", str(old.instructions), str(record.instructions)


def coverage(family: str, capture: Captured, committed: Sequence[Record] | None) -> list[Finding]:
    """Table entries that no launch used, and records whose launch is gone."""
    unreached = dict.fromkeys(capture.unreached(family))
    gone = [record for record in committed or () if record.key not in capture.launches]
    return [
        Finding(family, kernel, "in the table, never launched", "-", "-", str(dict(blocks)))
        for kernel, blocks in unreached
    ] + [_finding(family, record, "is not launched", "-", "see --write") for record in gone]


def representatives(launches: Sequence[Launch], one_in: int | None = None) -> list[Launch]:
    """The first launch of each kernel, and of the others one in so many, or none."""
    seen: Counter[str] = Counter()
    chosen = []
    for launch in launches:
        number = seen[launch.kernel]
        if number == 0 or (one_in is not None and number % one_in == 0):
            chosen.append(launch)
        seen[launch.kernel] += 1
    return chosen


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, each as wide as its widest; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def overview(family: str, records: Sequence[Record]) -> str:
    head = (family, "pointers", "configuration", "registers", "spills", "shared", "instructions",
            "loads x bits", "stores x bits", "matrix products")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for one in records:
        pointers = re.findall(r"\*(\w+)", one.arguments)
        rows.append((
            one.kernel, " ".join(dict.fromkeys(pointers)), one.configuration, str(one.registers),
            str(one.spills), str(one.shared_bytes), str(one.instructions),
            *(" ".join(f"{count}x{of}" for of, count in counts.items()) or "-"
              for counts in (one.loads, one.stores, one.mma)),
        ))  # fmt: skip
    return table(rows)


def flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Flags(MODULE, "What the kernels compile to, compared with what is committed.")
    parser.add_argument("--family", choices=FAMILIES, help="one table; default: all")
    parser.add_argument("--op", choices=CASES, help="one op; default: all")
    parser.add_argument(
        "--quick", action="store_true", help=f"one launch of each kernel; of {MAIN} a third of all"
    )
    parser.add_argument("--write", action="store_true", help=f"record in {COMMITTED.name}")
    parser.add_argument("--json", type=Path, help="file for the records and findings of this run")
    chosen = parser.parse_args(arguments)
    if chosen.write and (chosen.quick or chosen.op):
        parser.error("--write records whole tables: leave out --quick and --op")
    if chosen.json and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json {chosen.json}: its folder does not exist")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so that nothing compiles: unset it")
    return chosen


def build_all(jobs: Sequence[tuple[str, Launch]]) -> list[Record]:
    workers = min(MOST_WORKERS, os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        built = pool.map(build, *zip(*jobs, strict=True))
        return list(tqdm(built, "compiling", len(jobs), leave=False, disable=None))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = flags(arguments)
    families = [chosen.family] if chosen.family else FAMILIES
    captures = {
        family: captured(family, [chosen.op] if chosen.op else [*CASES]) for family in families
    }
    jobs = []
    for family, capture in captures.items():
        launches = list(capture.launches.values())
        if chosen.quick:
            launches = representatives(launches, ONE_IN if family == MAIN else None)
        jobs += [(family, one) for one in launches]
    built = build_all(jobs)
    records: dict[str, list[Record]] = {family: [] for family in families}
    for (family, _), record in zip(jobs, built, strict=True):
        records[family].append(record)
    committed = None if chosen.write else load(COMMITTED)
    found = []
    for family in families:
        print(overview(family, records[family]), end="\n\n")
        known = committed.get(family, []) if committed is not None else None
        found += findings(family, records[family], known)
        found += [] if chosen.op else coverage(family, captures[family], known)
    if chosen.json:
        content = {"records": records, "findings": found}
        chosen.json.write_text(json.dumps(content, default=asdict, indent=1))
    origin = provenance(["python", "-m", MODULE, *(arguments or sys.argv[1:])])
    return conclude(found, records, origin if chosen.write else None, committed is not None)


def conclude(
    found: Sequence[Finding],
    records: dict[str, list[Record]],
    write_origin: dict | None,
    compared: bool,
) -> int:
    """Says what came out, and writes it with its origin where asked; the exit code."""
    if found:
        head = [one.name for one in fields(Finding)]
        print(table([head, *(list(asdict(one).values()) for one in found)]))
        print(f"\n{len(found)} findings" + ("; nothing is written" if write_origin else ""))
        return 1
    count = sum(map(len, records.values()))
    if write_origin:
        dump(COMMITTED, write_origin, (load(COMMITTED) or {}) | records)
        print(f"{count} launches written to {COMMITTED.name}")
    elif compared:
        print(f"{count} launches are as in {COMMITTED.name}")
    else:
        print(f"{count} launches break no rule; nothing is committed for Triton {VERSION}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
