"""step.json for people: tables, and a picture of where the time of an update goes."""

from pathlib import Path
from textwrap import wrap

from .harness import Record
from .report import drawing, heading, source_of, table
from .tracing import PHASES

COLOURS = {
    "data": "#9aa0a6",
    "encode": "#d93025",
    "forward": "#1f6feb",
    "backward": "#8ab4f8",
    "all-reduce": "#a142f4",
    "optimizer": "#f0883e",
    "rest": "#34a853",
    "idle": "#e8eaed",
}


def of_op(record: Record, op: str) -> list[Record]:
    return [row for row in record["rows"] if row["labels"]["op"] == op]


def name_of(row: Record) -> str:
    labels = row["labels"]
    return f"{labels['preset']}, {labels['pixels']} px, {labels['way']}"


def markdown(record: Record) -> str:
    """Speeds and ratios, then phases, then shares of the roofline."""
    speeds = []
    for row in of_op(record, "step"):
        values, timed = row["values"], row["timings"]
        speeds.append(
            [
                name_of(row),
                f"{values['images_per_s']:.1f}",
                f"{timed['warm']['median_ms']:.0f}" if timed else row["note"],
                f"{values['ratio']:.2f} ({values['ratio_low']:.2f} to {values['ratio_high']:.2f})",
                f"{values['memory_gib']:.2f}",
                f"{values['model_flops_share']:.0%}",
                f"{values['clocks_apart']:.1%}",
            ]
        )
    head = ["", "images/s", "ms an update", "times the script", "GiB", "of matmul", "clocks apart"]
    parts = [heading(record), script_line(record), table(head, speeds)]
    phases = [
        [name_of(row), *(f"{row['values'][phase]:.0f}" for phase in (*PHASES, "idle"))]
        for row in of_op(record, "phases")
    ]
    if phases:
        parts.append("Milliseconds of an update, by a trace, scaled to the time above:")
        parts.append(table(["", *PHASES, "idle"], phases))
    shares = of_op(record, "roofline")
    if shares:
        kinds = list(shares[0]["values"])
        lines = [
            [name_of(row), *(f"{row['values'][kind]:.0%}" for kind in kinds)] for row in shares
        ]
        parts.append("Share of the roofline that the UNet's operations reach:")
        parts.append(table(["", *kinds], lines))
    return "\n\n".join(parts) + "\n"


def script_line(record: Record) -> str:
    found = record["provenance"]["reference"]
    commit = (found["commit"] or "unknown")[:12]
    attention = "PyTorch's own attention, for xformers is left out of the guide's command"
    return (
        f"The script: sha256 {found['sha256'][:12]}, of commit {commit} of diffusers; it runs on "
        f"{attention}. {found['model']}"
    )


def plot(record: Record, path: Path) -> bool:
    """Bars of the phases; False without matplotlib."""
    pyplot = drawing()
    if pyplot is None:
        return False
    rows = of_op(record, "phases")
    figure, axis = pyplot.subplots(figsize=(10, 1.6 + 0.5 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        left = 0.0
        for phase, colour in COLOURS.items():
            width = row["values"][phase]
            label = phase if place == 0 else None
            axis.barh(place, width, left=left, color=colour, label=label, height=0.7)
            left += width
        axis.text(left, place, f" {left:.0f} ms", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [name_of(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("milliseconds of an update")
    axis.legend(ncols=len(COLOURS), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle("\n".join(wrap(source_of(record), 140)), fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
