"""A record for people: a Markdown table, and a plot of the share of the card's bandwidth.

python -m fusedit.benchmarks.report kernels.json ...   # writes .md and .png beside each
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .flags import Flags, existing_file
from .harness import Record, Timing, read, say
from .timing import MODES

COLOURS = {"ours": "#1f6feb", "compile": "#f0883e", "eager": "#9aa0a6"}


def markdown(record: Record) -> str:
    """Where it was measured, what did not go right, the times, and their sums over a step."""
    parts = [heading(record)]
    plain = [row for row in record["rows"] if not row["timings"]]
    if plain:
        parts.append(_untimed(plain))
    timed = [row for row in record["rows"] if row["timings"]]
    if timed:
        parts += [_times(timed, record["ceilings"]), _steps(timed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(record: Record) -> str:
    source, found = record["provenance"], record["ceilings"]
    machine, versions = source["machine"], source["versions"]
    changed = " with changes" if source["dirty"] else ""
    lines = [
        f"# {record['benchmark']}" + ("" if record["complete"] else ", not complete"),
        "",
        f"{machine['gpu'] or machine['cpu'] + ', no GPU'}; torch {versions['torch']}, triton "
        f"{versions['triton']}; commit {(source['commit'] or 'unknown')[:12]}{changed}; "
        f"{source['time']}; `{source['command']}`",
    ]
    if found:
        lines += [
            "",
            f"Ceilings found in this run: copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s (read + "
            f"written), bf16 product {found['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s, a launch in a "
            f"graph {found['graph_launch_us']:.1f} us; the same copy twice differed by "
            f"{found['noise']:.1%}.",
        ]
    return "\n".join(lines)


def share(row: Record, found: Record | None) -> float | None:
    """Of the copy bandwidth, by the least bytes the work must move."""
    if not (row["timings"] and row["least_bytes"] and found):
        return None
    return row["least_bytes"] / (_headline(row).median_ms / 1e3) / found["copy_bytes_per_s"]


def plot(record: Record, path: Path) -> bool:
    """Share of the copy bandwidth by op and shape; False, and no file, where nothing was timed."""
    if find_spec("matplotlib") is None:
        say("no plot: pip install 'fusedit[bench]', and python -m fusedit.benchmarks.report FILE")
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

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
        f"% of the copy bandwidth of {record['provenance']['machine']['gpu']}, graph, cold inputs"
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


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _times(rows: list[Record], found: Record | None) -> str:
    pivot = _pivot(rows)
    every = list(dict.fromkeys(by for cells in pivot.values() for by in cells))
    first = next(iter(pivot.values()))
    names = [key for key in next(iter(first.values()))["labels"] if key != "by"]
    head = [*names, *(f"{by} ms" for by in every), "± %", "cold ms", "warm ms", "GB/s", "of copy"]
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
        moved, part = ours["least_bytes"], share(ours, found)
        line.append(f"{moved / _headline(ours).median_ms / 1e6:.0f}" if moved else "-")
        line.append(f"{part:.0%}" if part is not None else "-")
        lines.append(line)
    return _table(head, lines)


def _steps(rows: list[Record]) -> str:
    """Milliseconds in one step of the UNet: each shape as often as it occurs, both directions."""
    sums: dict[tuple[str, str], dict[str, float]] = {}
    shapes: dict[tuple[str, str], set[str]] = {}
    shown = ("ours", "compile", "eager")
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
    return _table(head, lines)


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
    return _table(head, lines)


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
