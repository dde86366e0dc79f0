"""What `scaling.py` found, for people: tables and a picture."""

import argparse
from pathlib import Path
from textwrap import wrap

from . import predicted, report
from .harness import Record, Timing
from .predicted import OneGpu

COLOURS = {"fp32": "#1f6feb", "bf16": "#f0883e"}


def text(record: Record, one: OneGpu, flags: argparse.Namespace) -> str:
    """All of it, as Markdown."""
    parts = [report.heading(record), *measured(record), *prediction(record, one, flags)]
    return "\n\n".join(parts) + "\n"


def rows_of(record: Record, what: str) -> list[Record]:
    return [row for row in record["rows"] if row["labels"]["what"] == what]


def measured(record: Record) -> list[str]:
    """Tables of ranks and of buckets, and what the model says of each number of ranks."""
    lines = []
    for row in rows_of(record, "demo"):
        values, step = row["values"], Timing(**row["timings"]["warm"])
        told = []
        for name, form in (("images_per_s", ".1f"), ("efficiency", ".1%")):
            median, low, high = (format(values[name + end], form) for end in ("", "_low", "_high"))
            told.append(f"{median}, {low} to {high}")
        step_ms = f"{step.median_ms:.1f}", f"{100 * step.spread:.1f}"
        lines.append([f"{row['labels']['ranks']}", *told, *step_ms])
    head = ["ranks", "images/s, of rounds", "of as many single ranks, of rounds", "step ms", "± %"]
    parts = [report.table(head, lines)]
    made = rows_of(record, "bucket")
    names = [name for name in made[0]["values"] if name.startswith("all_reduce")]
    lines = [
        [
            f"{row['labels']['number']}",
            f"{row['values']['bytes'] / 1e6:.2f}",
            f"{row['values']['ready']:.1%}",
            *(f"{row['values'][name]:.2f}" for name in names),
        ]
        for row in made
    ]
    head = ["bucket", "MB", "ready, of the step"]
    head += [f"all-reduce ms, ranks: {name.rpartition('_')[2]}" for name in names]
    parts.append(report.table(head, lines))
    for row in rows_of(record, "check"):
        values = row["values"]
        parts.append(
            f"Ranks: {row['labels']['ranks']}. Without the exchange a step takes "
            f"{values['without_exchange_ms']:.1f} ms. The all-reduces take "
            f"{values['all_reduce_ms']:.1f} ms, of which the model has {values['exposed_ms']:.2f} "
            f"after the backward: a step of {values['model_ms']:.1f} ms, measured "
            f"{values['measured_ms']:.1f}, off by {values['relative_difference']:+.1%}; steps "
            f"differ by {values['noise']:.1%}: {row['verdict']}."
        )
    return parts


def prediction(record: Record, one: OneGpu, flags: argparse.Namespace) -> list[str]:
    """What is known of one GPU and of the links; then tables of GPUs, and of the paper's run."""
    lines, runs = [], []
    for row in rows_of(record, f"sd15-{predicted.PIXELS}"):
        values, sent = row["values"], row["labels"]["sent"]
        numbers = f"{values['images_per_s']:.0f}", f"{values['efficiency']:.1%}"
        times = f"{values['all_reduce_ms']:.1f}", f"{values['exposed_ms']:.2f}"
        lines.append([f"{row['labels']['gpus']}", sent, *numbers, *times])
        if "recipe_hours" in values:
            hours, goal = values["recipe_hours"], values["recipe_of_goal"]
            cost = f"{values['recipe_gpu_hours']:.1f}", f"{values['recipe_cost']:.0f}"
            runs.append([sent, f"{hours:.2f}", f"{goal:.0%}", *cost])
    head = ["GPUs", "gradients sent in", "images/s", "of as many single GPUs"]
    head += ["all-reduce ms", "of it after the backward"]
    of_run = ["gradients sent in", "hours", f"of the goal, {predicted.GOAL_HOURS:g} h"]
    of_run += ["GPU-hours", f"cost at {flags.price_per_gpu_hour:g} each"]
    return [
        f"## Stable Diffusion 1.5 at {predicted.PIXELS} px: a model, not measured",
        f"{one.source} An update is of {one.images} images a GPU and takes one of them "
        f"{one.step_ms:.1f} ms, its backward {one.backward_ms:.1f}. Links, one way, of a GPU: "
        f"{flags.nvlink_gb_per_s:g} GB/s among {flags.gpus_a_node}, {flags.network_gb_per_s:g} "
        f"GB/s between nodes; {flags.link_efficiency:.0%} of that is taken to be reached.",
        report.table(head, lines),
        f"The paper's run on {predicted.PAPER_GPUS} GPUs, {predicted.RECIPE_STEPS:,} steps of "
        f"{predicted.RECIPE_BATCH:,} images. The paper took {predicted.PAPER_HOURS} h on as many "
        f"A100s, {predicted.PAPER_GPUS * predicted.PAPER_HOURS:g} GPU-hours. Prices are assumed.",
        report.table(of_run, runs),
    ]


def plot(record: Record, path: Path) -> bool:
    """Efficiency over ranks, measured and by the model; False without matplotlib."""
    pyplot = report.drawing()
    if pyplot is None:
        return False
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    demo, checks = rows_of(record, "demo"), rows_of(record, "check")
    ranks = [row["labels"]["ranks"] for row in demo]
    low, share, high = (
        [100 * row["values"][f"efficiency{end}"] for row in demo] for end in ("_low", "", "_high")
    )
    bars = [
        [own - least for own, least in zip(share, low, strict=True)],
        [most - own for most, own in zip(high, share, strict=True)],
    ]
    told = "the demo, measured; the bars: its rounds"
    axis.errorbar(ranks, share, bars, fmt="ko", capsize=4, label=told)
    alone_ms = Timing(**demo[0]["timings"]["warm"]).median_ms
    by_model = [100 * alone_ms / row["values"]["model_ms"] for row in checks]
    places = [row["labels"]["ranks"] for row in checks]
    axis.plot(places, by_model, "kx", label="the demo, by the model")
    for sent, colour in COLOURS.items():
        found = [row for row in record["rows"] if row["labels"].get("sent") == sent]
        gpus = [1, *(row["labels"]["gpus"] for row in found)]
        efficiency = [100.0, *(100 * row["values"]["efficiency"] for row in found)]
        label = f"Stable Diffusion 1.5 on GPUs, by the model, gradients sent in {sent}"
        axis.plot(gpus, efficiency, "o--", color=colour, markerfacecolor="white", label=label)
    axis.set_xscale("log", base=2)
    ticks = sorted({1, *ranks, *predicted.GPUS})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_ylim(0, 110)
    axis.set_xlabel("ranks, or GPUs, each with the same batch")
    axis.set_ylabel("% of the images/s of as many single ones")
    source = report.source_of(record)
    axis.set_title("\n".join(wrap(source, 130)), fontsize=8, loc="left")
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
