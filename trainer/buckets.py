"""Aspect-ratio buckets: sizes of about one area, of which each pair takes the nearest to its shape.

Without them there is one, the square. All samples of an optimizer step are of one bucket, so shapes
are static in it.
Source: Podell et al. 2023 (arXiv:2307.01952), section 2.3 and appendix I.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UsageError
from .rows import BadSample, Rows

LEAST_AREA = 0.85  # of the square's
LONGEST = 2  # sides, from 1/2 of --resolution to 2 of it
SIZES_AT_ONCE = 32  # headers of images that are read beside each other


class Size(NamedTuple):
    """Of an image, in pixels."""

    width: int
    height: int


class Buckets(NamedTuple):
    """The sizes of a run, and which of them each row of the dataset takes."""

    sizes: tuple[Size, ...]
    of_row: Tensor  # [rows] int64


def square(resolution: int, rows: int) -> Buckets:
    """One bucket that all rows take."""
    return Buckets((Size(resolution, resolution),), torch.zeros(rows, dtype=torch.int64))


def find_buckets(resolution: int, unit: int, rows: Rows) -> Buckets:
    """The buckets of a run, by the header of each row's original image.

    Args:
        unit: pixels that a side must be a multiple of.

    Raises: UsageError: the square is none of them.
    """
    sizes = bucket_sizes(resolution, unit)
    with ThreadPoolExecutor(SIZES_AT_ONCE) as pool:
        found = list(pool.map(lambda row: _size(rows, row, resolution), range(len(rows))))
    return Buckets(sizes, nearest(sizes, found))


def bucket_sizes(resolution: int, unit: int) -> tuple[Size, ...]:
    """From the widest to the tallest; no area is above the square's, so it bounds the memory."""
    if resolution % unit:
        below = max(resolution // unit, 1) * unit
        raise UsageError(
            f"--buckets: --resolution {resolution} must be a multiple of {unit}, which the UNet "
            f"halves down to one; try {below} or {below + unit}"
        )
    step = max(unit, resolution // 16 // unit * unit)
    sides = range(-(-resolution // LONGEST // step) * step, LONGEST * resolution + 1, step)
    found = {Size(side, resolution**2 // side // step * step) for side in sides}
    found |= {Size(size.height, size.width) for size in found}
    large = (s for s in found if s.width * s.height >= LEAST_AREA * resolution**2)
    return tuple(sorted(large, key=lambda size: size.height / size.width))


def nearest(sizes: Sequence[Size], images: Sequence[Size]) -> Tensor:
    """[images] int64: the size whose ratio of sides is next to the image's, as a factor."""
    own = torch.tensor([math.log(size.width / size.height) for size in sizes])
    asked = torch.tensor([math.log(size.width / size.height) for size in images])
    return (own[None] - asked[:, None]).abs().argmin(dim=1)


def _size(rows: Rows, row: int, resolution: int) -> Size:
    try:
        return Size(*rows.size(row))
    except BadSample:  # told when it is read
        return Size(resolution, resolution)
