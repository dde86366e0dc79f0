"""A record for people: Markdown tables, and a plot of the share of what the card does at best.

python -m fusedit.benchmarks.report kernels.json ...   # writes .md and .png beside each
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .flags import Flags, existing_file
from .harness import Record, Timing, compare, read, say, write
from .timing import MODES

OF_PRODUCTS = ("attention",)  # ops that matrix products bound, not bytes
NOT_SHIPPED = ("ours", "compile", "flash-attn")  # all others are PyTorch's own attention
COLOURS = {"ours": "#1f6feb", "compile": "#f0883e", "eager": "#9aa0a6"}


def finish(
    record: Record,
    path: Path,
    earlier: Record | None = None,
    told: Callable[[Record], str] | None = None,
) -> int:
    """Writes and prints a complete record, and tells what is not right.

    Args:
        earlier: a record to compare with.
        told: makes what is printed, instead of `markdown`, and written beside the record.

    Returns: the exit code: 1, if an answer is not right or became slower; 2, if the earlier record
        cannot be compared.
    """
    record["complete"] = True
    write(record, path)
    if told is not None:
        path.with_suffix(".md").write_text(told(record))
    print((told or markdown)(record))
    return judged(record, record["rows"], earlier)


def judged(record: Record, rows: Iterable[Record], earlier: Record | None) -> int:
    """Tells which of the rows are not right, and what became slower; the exit code."""
    findings = [
        f"{row['name']}: {row['verdict']}" + (f": {row['note']}" if row["note"] else "")
        for row in rows
        if row["verdict"] in ("wrong", "failed")
    ]
    if earlier is not None:
        try:
            findings += compare(earlier, record)
        except ValueError as error:
            say(f"fusedit.benchmarks.{record['benchmark']}: --compare: {error}")
            return 2
    for finding in findings:
        say(finding)
    return int(bool(findings))


def markdown(record: Record) -> str:
    """Where it was measured, what did not go right, the times, and their sums over a step.

    Before the times of attention: forward and backward together against the best of PyTorch's.
    """
    parts = [heading(record)]
    plain = [row for row in record["rows"] if not row["timings"]]
    if plain:
        parts.append(_untimed(plain))
    timed = [row for row in record["rows"] if row["timings"]]
    products = [row for row in timed if of_products(row)]
    others = [row for row in timed if not of_products(row)]
    parts.append(_against_best(products))
    parts += [_times(rows, record["ceilings"]) for rows in (products, others) if rows]
    parts.append(_steps(timed))
    return "\n\n".join(part for part in parts if part) + "\n"


def source_of(record: Record) -> str:
    """A line: where, by what and of which commit it was measured."""
    source = record["provenance"]
    machine, versions = source["machine"], source["versions"]
    changed = " with changes" if source["dirty"] else ""
    return (
        f"{machine['gpu'] or machine['cpu'] + ', no GPU'}; torch {versions['torch']}, triton "
        f"{versions['triton']}; commit {(source['commit'] or 'unknown')[:12]}{changed}; "
        f"{source['time']}; `{source['command']}`"
    )


def heading(record: Record) -> str:
    found, whole = record["ceilings"], record["complete"]
    lines = [f"# {record['benchmark']}" + ("" if whole else ", not complete"), ""]
    lines += [source_of(record)]
    if found:
        lines += [
            "",
            f"Ceilings found in this run: copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s (read + "
            f"written), bf16 product {found['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s, a launch in a "
            f"graph {found['graph_launch_us']:.1f} us; the same copy twice differed by "
            f"{found['noise']:.1%}.",
        ]
    return "\n".join(lines)


def drawing() -> Any:
    """matplotlib's pyplot, without a screen; None, and a line, where it is not installed."""
    if find_spec("matplotlib") is None:
        say("no picture: pip install 'fusedit[bench]', and the same command again")
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def of_products(row: Record) -> bool:
    return row["labels"].get("op") in OF_PRODUCTS


def rate(row: Record) -> float | None:
    """Bytes a second, of the least that the work must move; of matrix products, operations."""
    work = row["flops"] if of_products(row) else row["least_bytes"]
    return work / (_headline(row).median_ms / 1e3) if row["timings"] and work else None


def share(row: Record, found: Record | None) -> float | None:
    """Of the copy's bytes a second in the same run, or of the matrix product's operations."""
    reached = rate(row)
    if not (reached and found):
        return None
    return reached / found["bf16_flops_per_s" if of_products(row) else "copy_bytes_per_s"]


def plot(record: Record, path: Path) -> bool:
    """Share of the ceiling by op and shape; False, and no file, where nothing was timed."""
    pyplot = drawing()
    if pyplot is None:
        return False
    rows = [row for row in record["rows"] if share(row, record["ceilings"]) is not None]
    if not rows:
        return False
    ops = list(dict.fromkeys(row["labels"]["op"] for row in rows))
    bars = {op: _pivot(row for row in rows if row["labels"]["op"] == op) for op in ops}
    heights = [len(pivot) for pivot in bars.values()]
    figure, axes = pyplot.subplots(
        len(ops), figsize=(9, 1.5 + 0.34 * sum(heights) + 0.8 * len(ops)), squeeze=False,
        height_ratios=heights, sharex=True, layout="constrained",
    )  # fmt: skip
    for axis, (op, pivot) in zip(axes[:, 0], bars.items(), strict=True):
        shown = [by for by in COLOURS if any(by in cells for cells in pivot.values())]
        for index, by in enumerate(shown):
            at = [place + (index - len(shown) / 2 + 0.5) * 0.26 for place in range(len(pivot))]
            values = [
                100 * (share(cells[by], record["ceilings"]) or 0) if by in cells else 0
                for cells in pivot.values()
            ]
            axis.barh(at, values, height=0.24, color=COLOURS[by], label=by)
        axis.set_yticks(range(len(pivot)), [" ".join(name[1:]) for name in pivot], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(op, loc="left", fontsize=10)
        axis.axvline(100, color="black", linewidth=0.6)
        axis.legend(fontsize=7, loc="lower right")
    axes[-1, 0].set_xlabel(
        f"% of what {record['provenance']['machine']['gpu']} does at best, in a graph, on cold "
        f"inputs: bytes of a copy; of a matrix product for {', '.join(OF_PRODUCTS)}"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _headline(row: Record) -> Timing:
    return Timing(**next(row["timings"][mode] for mode in MODES if mode in row["timings"]))


def _pivot(rows: Iterable[Record]) -> dict[tuple[str, ...], dict[str, Record]]:
    """Labels without `by` -> by -> row."""
    pivot: dict[tuple[str, ...], dict[str, Record]] = {}
    for row in rows:
        name = tuple(str(value) for key, value in row["labels"].items() if key != "by")
        pivot.setdefault(name, {})[row["labels"].get("by", "ours")] = row
    return pivot


def by_shape(rows: Iterable[Record]) -> dict[tuple[str, ...], dict[str, dict[str, Record]]]:
    """Labels without direction and `by` -> by -> direction -> row."""
    found: dict[tuple[str, ...], dict[str, dict[str, Record]]] = {}
    for row in rows:
        labels = dict(row["labels"])
        way, by = labels.pop("direction"), labels.pop("by")
        found.setdefault(tuple(labels.values()), {}).setdefault(by, {})[way] = row
    return found


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _times(rows: list[Record], found: Record | None) -> str:
    pivot = _pivot(rows)
    every = list(dict.fromkeys(by for cells in pivot.values() for by in cells))
    first = next(iter(pivot.values()))
    names = [key for key in next(iter(first.values()))["labels"] if key != "by"]
    products = of_products(rows[0])
    unit, per_unit, of = ("TFLOP/s", 1e12, "product") if products else ("GB/s", 1e9, "copy")
    head = [*names, *(f"{by} ms" for by in every), "± %", "cold ms", "warm ms", unit, f"of {of}"]
    lines = []
    for name, cells in pivot.items():
        medians = [f"{_headline(cells[by]).median_ms:.4g}" if by in cells else "-" for by in every]
        line = [*name, *medians]
        ours = cells.get("ours")
        if ours is None:
            lines.append([*line, *["-"] * 5])
            continue
        for mode in ("cold", "warm"):
            timing = ours["timings"].get(mode)
            line.append(f"{timing['median_ms']:.4g}" if timing else "-")
        line.insert(-2, f"{100 * _headline(ours).spread:.1f}")
        reached, part = rate(ours), share(ours, found)
        line.append(f"{reached / per_unit:.0f}" if reached else "-")
        line.append(f"{part:.0%}" if part is not None else "-")
        lines.append(line)
    return table(head, lines)


def _against_best(rows: list[Record]) -> str:
    """TFLOP/s of ours and of the best that PyTorch ships, by forward and backward together."""
    head = ["op", "preset", "shape", "dtype", "PyTorch's best", "forward: ours, best", "backward",
            "both, TFLOP/s", "ours / best"]  # fmt: skip
    lines = []
    for name, cells in by_shape(rows).items():
        rates = {by: _rates(ways) for by, ways in cells.items() if len(ways) == 2}
        theirs = {by: of for by, of in rates.items() if by not in NOT_SHIPPED}
        if "ours" not in rates or not theirs:
            continue
        best = max(theirs, key=lambda by: theirs[by][-1])
        pairs = list(zip(rates["ours"], theirs[best], strict=True))
        told = [f"{own / 1e12:.0f}, {other / 1e12:.0f}" for own, other in pairs]
        lines.append([*name, best, *told, f"{pairs[-1][0] / pairs[-1][1]:.2f}"])
    return table(head, lines) if lines else ""


def _rates(ways: dict[str, Record]) -> tuple[float, float, float]:
    """Operations a second: forward, backward, both together."""
    work = [ways[way]["flops"] for way in ("forward", "backward")]
    seconds = [_headline(ways[way]).median_ms / 1e3 for way in ("forward", "backward")]
    return work[0] / seconds[0], work[1] / seconds[1], sum(work) / sum(seconds)


def _steps(rows: list[Record]) -> str:
    """Milliseconds in one step of the UNet: each shape as often as it occurs, both directions."""
    sums: dict[tuple[str, str], dict[str, float]] = {}
    shapes: dict[tuple[str, str], set[str]] = {}
    ran = {row["labels"].get("by") for row in rows}
    shown = [by for by in ("ours", "compile", "eager") if by in ran or by != "compile"]
    for name, cells in _pivot(row for row in rows if "times" in row["values"]).items():
        if not all(by in cells for by in shown):
            continue
        into = sums.setdefault((name[1], name[0]), dict.fromkeys(shown, 0.0))
        shapes.setdefault((name[1], name[0]), set()).add(name[2])
        for by in shown:
            into[by] += cells[by]["values"]["times"] * _headline(cells[by]).median_ms
    if not sums:
        return ""
    head = ["UNet", "op", "shapes", *(f"{by} ms a step" for by in shown), "eager / ours"]
    lines = [
        [*name, str(len(shapes[name])), *(f"{into[by]:.3g}" for by in shown),
         f"{into['eager'] / into['ours']:.2f}"]
        for name, into in sorted(sums.items())
    ]  # fmt: skip
    return table(head, lines)


def _untimed(rows: list[Record]) -> str:
    head = ["what", "verdict", "error of allowed", "values", "note"]
    lines = [
        [
            row["name"],
            row["verdict"],
            "-" if row["error"] is None else f"{row['error']:.0%}",
            ", ".join(f"{name} {value:.6g}" for name, value in row["values"].items()),
            row["note"].replace("|", "/"),
        ]
        for row in rows
    ]
    return table(head, lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.report", str(__doc__))
    flags.add_argument("files", nargs="+", type=existing_file)
    flags.add_argument("--print", action="store_true", help="the tables alone, to the output")
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    for path in flags.files:
        record = read(path)
        if flags.print:
            print(markdown(record))
            continue
        path.with_suffix(".md").write_text(markdown(record))
        plot(record, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
