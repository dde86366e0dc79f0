"""The rows of a dataset as a protocol sees them: which, at what size, with which captions."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from .buckets import Size
from .config import DataConfig
from .data import CENTRE, transform
from .draws import Purpose, permutation
from .errors import UsageError
from .metrics import CAPTIONS
from .protocols import LONG_SIDE_MULTIPLE, Data, Protocol
from .rows import BadSample, Rows
from .validate import pixels_to_image
from .world import World

HASH_BYTES = 32


class Example(NamedTuple):
    """A row."""

    original: Image.Image  # as it is edited
    truth: Image.Image | None  # cut as the original is, or whole where that is
    instruction: str


class Examples:
    """What is measured.

    Args:
        protocol: whose resolution is known.
        chosen: the rows; by default those that the protocol takes.

    Raises: UsageError: sessions are asked for, and the dataset tells none.
    """

    def __init__(self, rows: Rows, protocol: Protocol, chosen: Sequence[int] | None = None) -> None:
        self._rows, self._protocol = rows, protocol
        data = protocol.data
        self.rows = [*(chosen_rows(len(rows), protocol) if chosen is None else chosen)]
        if not self.rows:
            raise UsageError(f"{protocol.name}: of {len(rows)} rows none is left to measure")
        columns = {"before": data.before_column, "after": data.after_column}
        self.captions: dict[str, list[str]] = {}
        self.missing: dict[str, str] = {}  # why there is no such caption
        for which, column in columns.items():
            texts = None if column is None else rows.column(column)
            if texts is None:
                where = "the protocol names" if column is None else "the dataset has"
                called = "" if column is None else f" {column}"
                self.missing[which] = f"{where} no column{called} of captions {which} the edit"
            else:
                self.captions[which] = texts
        self.chains = self._chains()

    def _chains(self) -> list[list[int]]:
        """Rows that are edited one on the other; else each alone."""
        data = self._protocol.data
        if data.session_column is None or data.turn_column is None:
            return [[row] for row in self.rows]
        session_of, turn_of = map(self._rows.column, (data.session_column, data.turn_column))
        if session_of is None or turn_of is None:
            raise UsageError(
                f"{self._protocol.name}: the dataset has no columns {data.session_column} and "
                f"{data.turn_column}, which tell its sessions"
            )
        sessions: dict[str, list[int]] = {}
        for row in self.rows:
            sessions.setdefault(session_of[row], []).append(row)
        return [sorted(rows, key=turn_of.__getitem__) for rows in sessions.values()]

    def without(self, bad: Sequence[int]) -> "Examples":
        """All but these; of a session none is left where one is bad."""
        chains = [chain for chain in self.chains if not {*chain} & {*bad}]
        kept = sorted(row for chain in chains for row in chain)
        return Examples(self._rows, self._protocol, kept)

    def caption(self, row: int) -> dict[str, str]:
        return {which: self.captions[which][row] for which in CAPTIONS if which in self.captions}

    def name(self, row: int) -> str:
        return self._rows.name(row)

    def read(self, row: int) -> Example:
        """Raises: BadSample."""
        original, edited, instruction = self._rows.read(row, 0.0)
        sampling = self._protocol.sampling
        side = sampling.resolution or 0
        if sampling.resize == "square":
            section = DataConfig(resolution=side, center_crop=True)
            cut = transform(original, edited, section, CENTRE, Size(side, side))
            original, edited = pixels_to_image(cut.original), pixels_to_image(cut.edited)
        else:
            size = long_side_size(original.size, side)
            original = ImageOps.fit(original, size, Image.Resampling.LANCZOS)
        truth = None if self._protocol.data.edited_column is None else edited
        return Example(original, truth, instruction)

    def hash(self, row: int) -> bytes:
        """Of the row's pixels as they are stored, and of its texts. Raises: BadSample."""
        original, edited, instruction = self._rows.read(row, 0.0)
        digest = hashlib.sha256()
        for image in (original, edited):
            digest.update(f"{image.size}".encode() + image.tobytes())
        for text in (instruction, *self.caption(row).values()):
            if not isinstance(text, str):
                raise BadSample(self.name(row), f"a caption is {text!r}, not text")
            digest.update(text.encode() + b"\0")
        return digest.digest()


def chosen_rows(total: int, protocol: Protocol) -> list[int]:
    """The rows that a protocol measures, of so many."""
    data = protocol.data
    first = math.floor((1 - data.last_share) * total)
    rows = range(first, total)
    if data.most_rows is None or data.most_rows >= len(rows):
        return [*rows]
    drawn = permutation(protocol.sampling.seed, Purpose.ROWS, 0, len(rows))
    return sorted(rows[index] for index in drawn[: data.most_rows].tolist())


def long_side_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Width and height near `resolution` at the long side, in multiples.

    Source: timothybrooks/instruct-pix2pix, edit_cli.py.
    """
    short = min(size)
    multiples = math.ceil(short * resolution / max(size) / LONG_SIDE_MULTIPLE)
    scale = multiples * LONG_SIDE_MULTIPLE / short
    width, height = (int(side * scale // LONG_SIDE_MULTIPLE) * LONG_SIDE_MULTIPLE for side in size)
    return width, height


def data_config(source: str, data: Data, split: str | None = None) -> DataConfig:
    """As the rows are opened by."""
    return DataConfig(
        dataset_name=source,
        dataset_split=split or data.split,
        original_image_column=data.original_column,
        edited_image_column=data.edited_column or data.original_column,
        edit_prompt_column=data.instruction_column,
    )


class Surveyed(NamedTuple):
    """What was found when all rows were read."""

    examples: Examples  # without those that are bad
    sha256: str  # of those that are left
    bad: list[str]  # names of the others


def survey(examples: Examples, world: World, on_bad_sample: str) -> Surveyed:
    """Reads every row once, all ranks together, before anything is edited.

    Raises: UsageError on all ranks: a row is bad, and on_bad_sample is "stop"; or all are.
    """
    found = torch.zeros(len(examples.rows), 1 + HASH_BYTES, dtype=torch.uint8)
    with world.together():
        for index in range(world.rank, len(examples.rows), world.size):
            try:
                digest = examples.hash(examples.rows[index])
                found[index] = torch.tensor([0, *digest], dtype=torch.uint8)
            except BadSample as error:
                if on_bad_sample == "stop":
                    cure = "--on_bad_sample skip leaves it out"
                    raise UsageError(f"{error}; {cure}") from None
                found[index, 0] = 1
    found = world.sum(found)
    bad = [row for row, flag in zip(examples.rows, found[:, 0].tolist(), strict=True) if flag]
    names = [examples.name(row) for row in bad]
    left = examples.without(bad) if bad else examples
    whole = {*left.rows}
    kept = [index for index, row in enumerate(examples.rows) if row in whole]
    digest = hashlib.sha256(found[kept, 1:].numpy().tobytes()).hexdigest()
    return Surveyed(left, digest, names)


def with_resolution(protocol: Protocol, resolution: int | None) -> Protocol:
    """The protocol at a model's own resolution, where it has none.

    Raises: UsageError: neither has one.
    """
    if protocol.sampling.resolution is not None:
        return protocol
    if resolution is None:
        raise UsageError(
            f"--protocol {protocol.name} takes the model's resolution, which this one does not "
            "tell: give a protocol with a resolution"
        )
    sampling = dataclasses.replace(protocol.sampling, resolution=resolution)
    return dataclasses.replace(protocol, sampling=sampling)
