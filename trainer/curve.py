"""The paper's trade-off as a picture and a number.

Each image guidance is a point: how well the edit went where the captions went (CLIP directional
similarity), and how near it stayed to its input (CLIP image similarity). More of one costs some of
the other.

The number is the area that the points dominate: of the rectangle from (0, 0) to (1, 1), the part of
which some point is at least as good in both, the hypervolume of multi-objective optimization with
(0, 0) as its reference. It grows whenever a point becomes better in one and not worse in the other.
`reach` is beside it: by how much the image similarity rises from the least to the most guidance; a
model that was never shown what an edit without its image is has no such knob.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Curve(NamedTuple):
    """Both similarities by image guidance, and what they come to."""

    direction: list[float]
    image: list[float]
    scales: list[float]
    area: float
    reach: float


def curve_of(direction: Sequence[float], image: Sequence[float], scales: Sequence[float]) -> Curve:
    """The curve through the points, in the order of image guidance."""
    order = sorted(range(len(scales)), key=lambda index: scales[index])
    across, up, by = ([values[index] for index in order] for values in (direction, image, scales))
    return Curve(across, up, by, dominated_area(across, up), up[-1] - up[0])


def dominated_area(across: Sequence[float], up: Sequence[float]) -> float:
    """Of the points' rectangles with (0, 0), all together; what is below 0 counts as 0."""
    area = height = 0.0
    for x, y in sorted(zip(across, up, strict=True), reverse=True):
        if y > height:
            area += max(x, 0.0) * (y - height)
            height = y
    return area


def plot(curves: Mapping[str, Curve], source: str, path: Path) -> bool:
    """The curves, named, as a PNG; False without matplotlib.

    Args:
        source: where they were measured, a line.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        label = f"{name}: area {curve.area:.4f}"
        axes.plot(curve.direction, curve.image, marker="o", label=label)
        for scale, x, y in zip(curve.scales, curve.direction, curve.image, strict=True):
            axes.annotate(f"{scale:g}", (x, y), xytext=(4, 4), textcoords="offset points", size=7)
    axes.set_xlabel("CLIP directional similarity")
    axes.set_ylabel("CLIP image similarity, to the input")
    axes.set_title(source, fontsize=8, loc="left")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
