"""Edits rows by a protocol and measures them, by all ranks together.

Rows are cut into blocks, dealt to the ranks in turn. The noise of a row is a function of the seed
and its number, and a block is edited as it stands: so any number of ranks comes to the same bits,
and so does what was killed and goes on.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from PIL import Image

from .curve import Curve, curve_of
from .draws import Purpose, draw_normal
from .errors import UsageError
from .examples import Example, Examples
from .extractors import KINDS, Extractors
from .files import beside, cannot_write
from .metrics import METRICS, Score, Seen, features_of, make_metrics, to_tensor
from .protocols import CURVE, UNPINNED, Protocol
from .rows import BadSample
from .sample import edit_images
from .world import World

FEWEST_ROWS = 2  # of a distance between distributions
LEAST_SIDE = 64  # pixels that LPIPS's networks can halve so often


class Point(NamedTuple):
    """What was measured at one image guidance."""

    image_guidance_scale: float
    metrics: dict[str, float]
    rows: dict[str, dict[int, float]]  # of the metrics that know rows


class Store:
    """Edits on disk, so that what was killed goes on; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def read(self, scale: float, row: int) -> Image.Image | None:
        if self._folder is None or not (path := self._path(scale, row)).is_file():
            return None
        with Image.open(path) as image:
            return image.convert("RGB")

    def write(self, scale: float, row: int, edit: Image.Image) -> None:
        """Whole or not at all. Raises: UsageError: the disk does not take it."""
        if self._folder is None:
            return
        path = self._path(scale, row)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            edit.save(beside(path), "PNG")
            beside(path).rename(path)
        except OSError as error:
            raise cannot_write(path, error) from None

    def _path(self, scale: float, row: int) -> Path:
        return Path(self._folder or "", f"image-guidance-{scale:g}", f"{row:07}.png")


def open_extractors(
    protocol: Protocol, places: Mapping[str, str | None], device: torch.device, flag: str = ""
) -> tuple[Extractors, dict[str, str]]:
    """The networks that the protocol's metrics see by, and why others are not there.

    Args:
        places: folder or hub name of each that was asked for, instead of the protocol's own.
        flag: what begins the name of the flag that gives a place.

    Raises: UsageError: one that was asked for cannot be had, or is not the one that is pinned.
    """
    found, missing = {}, {}
    for kind in {need for name in protocol.metrics for need in METRICS[name].needs} & {*KINDS}:
        pinned, place = protocol.extractors.get(kind), places.get(kind)
        asked = place is not None
        place = pinned.place if place is None and pinned is not None else place
        if place is None:
            missing[kind] = f"the protocol names no {kind}; --{flag}{kind} FOLDER gives one"
            continue
        try:
            one = KINDS[kind](place, device)
        except UsageError as error:
            told = str(error).replace(f"--{kind}", f"--{flag}{kind}", 1)
            if asked:
                raise UsageError(told) from None
            missing[kind] = told
            continue
        if pinned is not None and pinned.sha256 not in (UNPINNED, one.sha256):
            raise UsageError(
                f"--{flag}{kind} {place} has the hash {one.sha256}, the protocol wants "
                f"{pinned.sha256}"
            )
        found[kind] = one
    return Extractors(**found), missing


def split_metrics(
    protocol: Protocol, missing: Mapping[str, str], rows: int
) -> tuple[list[str], dict[str, str]]:
    """The metrics that can be measured, and why others cannot.

    Args:
        missing: why an extractor or a caption is not there.
    """
    left_out = {}
    for name in protocol.metrics:
        lacks = [missing[need] for need in METRICS[name].needs if need in missing]
        if name.startswith(("fid_", "kid_")) and rows < FEWEST_ROWS:
            lacks.append(f"it needs {FEWEST_ROWS} rows or more")
        if name == "lpips" and (protocol.sampling.resolution or LEAST_SIDE) < LEAST_SIDE:
            lacks.append(f"it needs images of {LEAST_SIDE} pixels or more")
        if lacks:
            left_out[name] = lacks[0]
    return [name for name in protocol.metrics if name not in left_out], left_out


def with_sampler(pipeline: Any, protocol: Protocol) -> Any:
    """The pipeline, sampling as the protocol says; its own sampler is replaced, not changed."""
    sampler = protocol.sampling.sampler
    if sampler is not None:
        pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    return pipeline


def measure(
    pipeline: Any,
    protocol: Protocol,
    examples: Examples,
    extractors: Extractors,
    metrics: Sequence[str],
    world: World,
    *,
    batch_size: int,
    store: Store | None = None,
    in_step: bool = False,
    shows: Callable[[int], None] = lambda done: None,
) -> list[Point]:
    """Edits all examples at each image guidance, and measures them; the same on every rank.

    Args:
        pipeline: as `with_sampler` gives it.
        metrics: of `split_metrics`.
        batch_size: chains of edits in a block.
        in_step: ranks without a block edit one that nobody sees: a sharded UNet is run by all.
        shows: told how many blocks this rank has done, of `rounds`.
    """
    store = store or Store()
    blocks = [
        examples.chains[start : start + batch_size]
        for start in range(0, len(examples.chains), batch_size)
    ]
    points, done = [], 0
    for scale in protocol.sampling.image_guidance_scales:
        found = make_metrics(metrics, extractors)
        with world.together(), _still_readable():
            for start in range(0, len(blocks), world.size):
                index = start + world.rank
                mine = blocks[index] if index < len(blocks) else blocks[0] if in_step else None
                if mine is None:
                    continue
                edits = _edit_block(pipeline, protocol, examples, mine, scale, store)
                if index < len(blocks):
                    rows = [chain[-1] for chain in mine]
                    seen = _seen(protocol, examples, extractors, rows, edits)
                    for metric in found.values():
                        metric.update(torch.tensor(rows), seen)
                shows(done := done + 1)
        with warnings.catch_warnings(action="ignore"):  # that a rank may have seen no row
            values = {name: metric.compute().item() for name, metric in found.items()}
            by_row = {
                name: dict(zip(*(column.tolist() for column in metric.by_row()), strict=True))
                for name, metric in found.items()
                if isinstance(metric, Score)
            }
        points.append(Point(scale, values, by_row))
    return points


@contextmanager
def _still_readable() -> Iterator[None]:
    """All rows could be read when they were surveyed."""
    try:
        yield
    except BadSample as error:
        raise UsageError(
            f"{error}; it could be read at the start: the same command goes on"
        ) from None


def rounds(protocol: Protocol, examples: Examples, world: World, batch_size: int) -> int:
    """Blocks of the rank that has most, at all image guidances."""
    blocks = -(-len(examples.chains) // batch_size)
    return -(-blocks // world.size) * len(protocol.sampling.image_guidance_scales)


def _edit_block(
    pipeline: Any,
    protocol: Protocol,
    examples: Examples,
    chains: Sequence[Sequence[int]],
    scale: float,
    store: Store,
) -> list[Image.Image]:
    """The last edit of each chain; each starts from the one before it."""
    current: list[Image.Image | None] = [None] * len(chains)
    for turn in range(max(map(len, chains))):
        here = [index for index, chain in enumerate(chains) if turn < len(chain)]
        rows = [chains[index][turn] for index in here]
        edits = [store.read(scale, row) for row in rows]
        if None in edits:  # all of them again: what shares a batch stays the same
            given = [examples.read(row) for row in rows]
            images = [
                current[index] or one.original for index, one in zip(here, given, strict=True)
            ]
            edits = _edit(pipeline, protocol, rows, images, given, scale)
            for row, edit in zip(rows, edits, strict=True):
                store.write(scale, row, edit)
        for index, edit in zip(here, edits, strict=True):
            current[index] = edit
    return [edit for edit in current if edit is not None]


def _edit(
    pipeline: Any,
    protocol: Protocol,
    rows: Sequence[int],
    images: Sequence[Image.Image],
    given: Sequence[Example],
    scale: float,
) -> list[Image.Image]:
    """The edits, those of one size in one batch."""
    sampling, factor = protocol.sampling, pipeline.vae_scale_factor
    channels = pipeline.vae.config["latent_channels"]
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.size, []).append(index)
    edits: dict[int, Image.Image] = {}
    for (width, height), here in by_size.items():
        shape = (channels, height // factor, width // factor)
        positions = torch.tensor([rows[index] for index in here])
        made = edit_images(
            pipeline,
            [images[index] for index in here],
            [given[index].instruction for index in here],
            draw_normal(sampling.seed, Purpose.VALIDATION_NOISE, positions, shape),
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=scale,
        )
        edits |= zip(here, made, strict=True)
    return [edits[index] for index in range(len(images))]


def _seen(
    protocol: Protocol,
    examples: Examples,
    extractors: Extractors,
    rows: Sequence[int],
    edits: Sequence[Image.Image],
) -> Seen:
    given = [examples.read(row) for row in rows]
    originals = [one.original for one in given]
    truths = [one.truth or one.original for one in given]
    references = truths if protocol.against == "truth" else originals
    captions = {which: [texts[row] for row in rows] for which, texts in examples.captions.items()}
    # Pixels are compared in the reference's size, as MagicBrush's own code does.
    fitted = [
        edit
        if edit.size == reference.size
        else edit.resize(reference.size, Image.Resampling.BICUBIC)
        for edit, reference in zip(edits, references, strict=True)
    ]
    return Seen(
        edits=[to_tensor(image) for image in fitted],
        references=[to_tensor(image) for image in references],
        features=features_of(extractors, edits, references, originals, captions),
    )


def curve_through(points: Sequence[Point]) -> Curve | None:
    """Of several image guidances, where both similarities were measured."""
    if len(points) < 2 or not {"clip_image", "clip_direction"} <= {*points[0].metrics}:
        return None
    return curve_of(
        [point.metrics["clip_direction"] for point in points],
        [point.metrics["clip_image"] for point in points],
        [point.image_guidance_scale for point in points],
    )


def best_value(protocol: Protocol, points: Sequence[Point]) -> float | None:
    """By which checkpoints are ranked, higher is better; None where it was not measured."""
    if protocol.judge == CURVE:
        curve = curve_through(points)
        return None if curve is None else curve.area
    values = [point.metrics.get(protocol.judge) for point in points]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean = sum(known) / len(known)
    return mean if METRICS[protocol.judge].higher_is_better else -mean
