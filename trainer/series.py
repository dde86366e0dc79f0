"""Long series of numbers, made short enough to draw: no peak is lost, and the trend is seen."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

BUCKETS = 300  # of steps; about one a pixel of a chart, two points each
OUTLIERS = 0.005  # of the points at each end, which do not stretch a chart


LARGEST = 1e300  # of what is drawn


class Series(NamedTuple):
    """Points in the order of their steps."""

    steps: list[int]
    values: list[float]


def smoothed(series: Series, window: float) -> Series:
    """An exponential mean, which is that of all points so far until there are enough.

    Args:
        window: points that it is a mean of, about; 1 or more.
    """
    kept, total, weight, means = 1 - 1 / window, 0.0, 0.0, []
    for value in series.values:
        total, weight = total * kept + value, weight * kept + 1
        means.append(total / weight)
    return Series(series.steps, means)


def thinned(series: Series, buckets: int = BUCKETS) -> Series:
    """The lowest and the highest point of each bucket of points, the first and the last one."""
    count = len(series.values)
    if count <= 2 * buckets:
        return series
    kept = {0, count - 1}
    for bucket in range(buckets):
        within = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        kept |= {min(within, key=series.values.__getitem__)}
        kept |= {max(within, key=series.values.__getitem__)}
    order = sorted(kept)
    return Series([series.steps[i] for i in order], [series.values[i] for i in order])


def extent(many: Sequence[Series]) -> tuple[float, float] | None:
    """From where to where to draw; a few outliers of many points may lie outside."""
    lows, highs = [], []
    for series in many:
        if not series.values:
            continue
        order = sorted(series.values)
        cut = int(OUTLIERS * len(order))
        lows.append(order[cut])
        highs.append(order[-1 - cut])
    return (min(lows), max(highs)) if lows else None


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits, or as it is where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def spread(count: int, most: int) -> list[int]:
    """At most so many of range(count): the last one, and others evenly before it."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def is_number(value: object) -> TypeGuard[float]:
    """Whether JSON gave a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST < value < LARGEST
