"""What a run's log becomes on the page: charts of thinned series, the trade-off, time by phase."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from .conditioning import CONDITIONS
from .log import PHASES
from .series import Series, extent, is_number, rounded, smoothed, spread, thinned

Line = Mapping[str, Any]
AT = re.compile(r"eval/(\w+?)_at_([0-9.]+)")  # a metric at an image guidance
COLUMNS = 60  # of time by phase
MOST_CURVES = 12
MOST_GROUPS = 8  # series in a chart
LEAST_TREND = 5.0  # points that a trend is a mean of
GROUPS_TREND = 10  # of losses by group, of which a line of the log knows few samples


class Kind(NamedTuple):
    """A chart of the training's numbers."""

    title: str
    names: str  # a pattern of the log's keys
    about: str
    unit: str = ""
    trend: int = 30  # the smoothed line is a mean over this part of all points; 0: there is none
    raw: bool = True  # whether the points themselves are drawn beside it


KINDS = {
    "loss": (
        Kind("Loss", "loss", "of each line of the log, and its trend"),
        Kind("Held-out loss", "held_out/.*", "same rows, noise and timesteps each time", trend=0),
        Kind(
            "Loss by condition",
            "loss_by_condition/.*",
            "trend of the samples that the UNet saw in full, or with text, image or both hidden",
            trend=GROUPS_TREND,
            raw=False,
        ),
        Kind(
            "Loss by timestep",
            "loss_by_timestep/.*",
            "trend of the samples whose noise level was drawn from each quarter",
            trend=GROUPS_TREND,
            raw=False,
        ),
    ),
    "optimizer": (
        Kind("Learning rate", "lr", "", trend=0),
        Kind("Gradient norm", "grad_norm", "before clipping"),
    ),
    "speed": (
        Kind("Images a second", "images_per_second", "all ranks, without pauses"),
        Kind("Memory", "memory_gib", "peak so far, rank 0", "GiB", trend=0),
    ),
}


def charts(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """All charts that there are numbers for, by section."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    found = []
    for section, kinds in KINDS.items():
        for kind in kinds:
            names = sorted((key for key in keys if re.fullmatch(kind.names, key)), key=_place)
            every = {name: _series(lines, name) for name in names[:MOST_GROUPS]}
            found += _chart(section, kind, every)
    return found + _evaluation(lines, keys)


def _place(name: str) -> int:
    """Of a group among its like: conditions in their order, bands by their first timestep."""
    group = name.rpartition("/")[2]
    start = group.partition("-")[0]
    return [*CONDITIONS].index(group) if group in CONDITIONS else int(start.isdecimal() and start)


def _chart(section: str, kind: Kind, every: Mapping[str, Series]) -> list[dict[str, Any]]:
    """The chart, or none where no line has a number for it."""
    drawn, told = [], []
    for name, series in every.items():
        if not series.values:
            continue
        label = kind.title.lower() if len(every) == 1 else name.rpartition("/")[2].replace("_", " ")
        if kind.trend and kind.raw:
            raw = thinned(series)
            drawn.append(raw)
            told.append(_told(name, "each line", raw, faint=True))
        if kind.trend:
            series = smoothed(series, max(LEAST_TREND, len(series.values) / kind.trend))
        last = thinned(series)
        drawn.append(last)
        told.append(_told(name, "trend" if kind.trend and kind.raw else label, last))
    if not told:
        return []
    chart = {"section": section, "title": kind.title, "about": kind.about, "unit": kind.unit}
    return [{**chart, "extent": extent(drawn), "series": told}]


def _told(name: str, label: str, series: Series, *, faint: bool = False) -> dict[str, Any]:
    values = [rounded(value) for value in series.values]
    return {"name": name, "label": label, "faint": faint, "steps": series.steps, "values": values}


def _series(lines: Sequence[Line], name: str) -> Series:
    """Of the lines that have a number there: what is not finite is null in the log."""
    points = [(int(line["step"]), line[name]) for line in lines if is_number(line.get(name))]
    return Series([step for step, _ in points], [float(value) for _, value in points])


def _evaluation(lines: Sequence[Line], keys: Sequence[str]) -> list[dict[str, Any]]:
    """A chart for each metric, with a line for each image guidance."""
    by_metric: dict[str, dict[str, str]] = {}
    for key in keys:
        if at := AT.fullmatch(key):
            by_metric.setdefault(at[1], {})[f"at {at[2]}"] = key
        elif key.startswith("eval/"):
            by_metric.setdefault(key.removeprefix("eval/"), {})[key] = key
    found = []
    for metric, named in by_metric.items():
        title = metric.replace("_", " ").capitalize().replace("Clip", "CLIP")
        kind = Kind(title, "", "by image guidance" if len(named) > 1 else "", trend=0)
        every = {label: _series(lines, key) for label, key in list(named.items())[:MOST_GROUPS]}
        found += _chart("evaluation", kind, every)
    return found


def curves(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The paper's trade-off at each evaluation: (guidance, direction, image) by step."""
    found: dict[int, dict[str, dict[float, float]]] = {}
    for line in lines:
        for key, value in line.items():
            at = AT.fullmatch(key)
            if at and at[1] in ("clip_direction", "clip_image") and is_number(value):
                named = found.setdefault(int(line["step"]), {})
                named.setdefault(at[1], {})[float(at[2])] = float(value)
    whole = [
        {
            "step": step,
            "points": [
                [scale, rounded(both["clip_direction"][scale]), rounded(both["clip_image"][scale])]
                for scale in sorted(both["clip_direction"])
                if scale in both["clip_image"]
            ],
        }
        for step, both in sorted(found.items())
        if len(both) == 2
    ]
    return [whole[index] for index in spread(len(whole), MOST_CURVES)]


def time_by_phase(lines: Sequence[Line], history: Sequence[Line]) -> dict[str, Any] | None:
    """Seconds of each phase, all together and over the run; None where the log has none."""
    timed = [line for line in lines if any(f"seconds/{phase}" in line for phase in PHASES)]
    ends = [line for line in history if "seconds/update" in line]
    if not timed:
        return None
    count = min(COLUMNS, len(timed))
    cuts = [index * len(timed) // count for index in range(count + 1)]
    columns = [timed[start:end] for start, end in pairwise(cuts)]
    return {
        "phases": [
            {"name": name, "about": about, "seconds": rounded(_seconds([*timed, *ends], name))}
            for name, about in PHASES.items()
        ],
        "columns": [
            {
                "step": int(column[-1]["step"]),
                "seconds": [rounded(_seconds(column, name), 3) for name in PHASES],
            }
            for column in columns
        ],
    }


def _seconds(lines: Sequence[Line], phase: str) -> float:
    values = (line.get(f"seconds/{phase}") for line in lines)
    return sum(value for value in values if is_number(value))
