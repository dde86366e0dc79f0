"""`fusedit compare`: two results of one protocol side by side, what parts them, and how surely."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import UsageError
from .metrics import METRICS

DRAWS, DRAWS_SEED = 10_000, 0  # of rows, with replacement
LEVEL = 95  # percent
ROWS_FILE = "rows.jsonl"
SAME = ("protocol_sha256", "rows")  # beside the networks of what is compared

Rows = Mapping[tuple[float, int], Mapping[str, float]]  # by image guidance and row


class Line(NamedTuple):
    """A metric at an image guidance, of both."""

    metric: str
    image_guidance_scale: float
    values: tuple[float, float]
    interval: tuple[float, float] | None  # of the difference; None where no rows are known


def compare(one: Path, other: Path) -> tuple[list[Line], list[dict[str, Any]]]:
    """The lines, and what others published.

    Raises: UsageError: a file is no results, or they are not of one protocol; it says what differs.
    """
    results = [_read(path) for path in (one, other)]
    differing = unlike(*results)
    if differing:
        raise UsageError(f"{one} and {other} cannot be compared: {'; '.join(differing)}")
    rows = [read_rows(path) for path in (one, other)]
    lines = []
    for mine, its in zip(results[0]["points"], results[1]["points"], strict=True):
        scale = mine["image_guidance_scale"]
        for name in mine["metrics"]:
            if name in its["metrics"]:
                values = mine["metrics"][name], its["metrics"][name]
                interval = _interval(rows, name, scale)
                lines.append(Line(name, scale, values, interval))
    return lines, results[0].get("published", [])


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why two results cannot be compared, in words."""
    found = []
    if one["protocol_sha256"] != other["protocol_sha256"]:
        mine, its = _flat(one["protocol"]), _flat(other["protocol"])
        names = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
        found += [f"{name} is {mine.get(name)} and {its.get(name)}" for name in names]
    if one["rows"]["sha256"] != other["rows"]["sha256"]:
        counts = one["rows"]["measured"], other["rows"]["measured"]
        found.append(f"the rows are others ({counts[0]} and {counts[1]})")
    for name in one["extractors"].keys() & other["extractors"].keys():
        hashes = one["extractors"][name], other["extractors"][name]
        if hashes[0] != hashes[1]:
            found.append(f"{name} is {hashes[0][:12]} and {hashes[1][:12]}")
    return found


def paired_interval(differences: np.ndarray) -> tuple[float, float]:
    """Of the mean difference of rows: percentiles over rows drawn with replacement."""
    draw = np.random.default_rng(DRAWS_SEED)
    means = np.array(
        [
            differences[draw.integers(0, len(differences), len(differences))].mean()
            for _ in range(DRAWS)
        ]
    )
    low, high = np.percentile(means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def table(lines: list[Line], published: list[dict[str, Any]], names: tuple[str, str]) -> list[str]:
    """What is printed, in Markdown: fixed columns read well in a terminal too."""
    several = len({line.image_guidance_scale for line in lines}) > 1
    head = ["metric", *names, "difference", f"{LEVEL}% of rows drawn again", "better"]
    found = []
    for line in lines:
        one, other = line.values
        low, high = line.interval or (float("nan"), float("nan"))
        told = f"{low:+.4f} to {high:+.4f}" if line.interval else "no rows"
        sure = line.interval is not None and not low <= 0 <= high
        better = (other > one) == METRICS[line.metric].higher_is_better
        name = f"{line.metric} at {line.image_guidance_scale:g}" if several else line.metric
        verdict = names[better] if sure else "-"
        found.append([name, f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}", told, verdict])
    text = _table(head, found)
    if published:
        metrics = [*dict.fromkeys(line.metric for line in lines)]
        shown = [
            [
                one["model"],
                *(f"{one['metrics'][m]:.4f}" if m in one["metrics"] else "-" for m in metrics),
            ]
            for one in published
        ]
        text += ["", "published:", *_table(["model", *metrics], shown)]
        text += [f"from {source}" for source in dict.fromkeys(one["source"] for one in published)]
    return text


def totals(results: Mapping[str, Any]) -> list[str]:
    """One model's results as a table, published ones beside."""
    metrics = [*results["points"][0]["metrics"]]
    name = Path(results["model"]["name"]).name
    shown = [
        [
            f"{name}, image guidance {point['image_guidance_scale']:g}",
            *(f"{point['metrics'][metric]:.4f}" for metric in metrics),
        ]
        for point in results["points"]
    ]
    shown += [
        [
            f"{one['model']} *",
            *(f"{one['metrics'][m]:.4f}" if m in one["metrics"] else "-" for m in metrics),
        ]
        for one in results.get("published", [])
    ]
    text = _table(["model", *metrics], shown)
    sources = dict.fromkeys(one["source"] for one in results.get("published", []))
    text += [f"* {source}" for source in sources]
    if results.get("curve"):
        curve = results["curve"]
        text.append(f"curve: area {curve['area']:.4f}, reach {curve['reach']:+.4f}")
    return text


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = [head, ["-" * width for width in widths], *lines]
    return [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]


def _interval(rows: list[Rows], name: str, scale: float) -> tuple[float, float] | None:
    mine, its = rows
    shared = [
        key
        for key in mine
        if key[0] == scale and key in its and name in mine[key] and name in its[key]
    ]
    if not shared:
        return None
    return paired_interval(np.array([its[key][name] - mine[key][name] for key in shared]))


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not {"protocol_sha256", "protocol", "rows", "extractors", "points"} <= {*results}:
            raise ValueError("it has no protocol or no points")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is no results.json of `fusedit evaluate`: {error}") from None
    return results


def read_rows(path: Path) -> Rows:
    """Beside the results; empty where there are none."""
    try:
        text = (path.parent / ROWS_FILE).read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = [json.loads(line) for line in text.splitlines()]
    return {(line["image_guidance_scale"], line["row"]): line for line in lines}


def _flat(told: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found = {}
    for name, value in told.items():
        found |= (
            _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
        )
    return found
