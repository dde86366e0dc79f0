"""Rows become samples: the order of a run, one geometry for both images of a pair, the loader.

A sample is a function of (seed, its position in the run). An epoch is `steps_per_epoch` optimizer
steps; its last slots, beyond the rows, are padding: samples of weight 0, so that shapes are static.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from .buckets import Buckets, Size, square
from .config import DataConfig
from .draws import Purpose, draw_uniform, permutation
from .errors import UsageError
from .rows import BadSample, Rows
from .signals import deaf_children

CENTRE = (0.0, 0.5, 0.5, 0.5)  # draws for the least size, the middle, no mirror


class PixelSample(NamedTuple):
    """One record of `EditPairs`."""

    original: Tensor  # [3, height, width] uint8, of its bucket
    edited: Tensor
    tokens: Tensor  # [length] int64
    size_ids: Tensor  # [6] fp32, as of `Samples`
    position: int
    weight: float  # 1; 0 for padding and for what could not be read
    error: str | None = None


class PixelBatch(NamedTuple):
    """A micro-batch, as it leaves the loader."""

    original: Tensor  # [n, 3, height, width] uint8
    edited: Tensor
    tokens: Tensor  # [n, length] int64
    size_ids: Tensor  # [n, 6] fp32
    positions: Tensor  # [n] int64
    weights: Tensor  # [n] fp32
    errors: tuple[str, ...]  # of its bad samples; a list once pinned


def collate(samples: list[PixelSample]) -> PixelBatch:
    """Stacks records into one micro-batch."""
    return PixelBatch(
        original=torch.stack([sample.original for sample in samples]),
        edited=torch.stack([sample.edited for sample in samples]),
        tokens=torch.stack([sample.tokens for sample in samples]),
        size_ids=torch.stack([sample.size_ids for sample in samples]),
        positions=torch.tensor([sample.position for sample in samples]),
        weights=torch.tensor([sample.weight for sample in samples]),
        errors=tuple(sample.error for sample in samples if sample.error is not None),
    )


def split_rows(
    total: int, max_train_samples: int | None, held_out: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to hold out; the latter do not depend on max_train_samples.

    Raises: UsageError: more rows are asked for than there are.
    """
    rows = total - held_out
    if rows < 1:
        raise UsageError(f"--held_out {held_out} leaves none of the dataset's {total} rows")
    if max_train_samples is not None and max_train_samples > rows:
        raise UsageError(
            f"--max_train_samples {max_train_samples} is above the {rows} rows there are "
            f"({total} in the dataset less --held_out {held_out}); leave it out to train on all"
        )
    order = permutation(seed, Purpose.ROWS, 0, total)
    return order[:rows][:max_train_samples], order[rows:]


class Pixels(NamedTuple):
    """A pair as it is trained on."""

    original: Tensor  # [3, height, width] uint8
    edited: Tensor
    size_ids: Tensor  # [6] fp32, as of `Samples`


def transform(
    original: Image.Image,
    edited: Image.Image,
    section: DataConfig,
    draws: tuple[float, ...],
    size: Size,
) -> Pixels:
    """Resize to cover the size, crop and mirror, the same for both images; nothing is squashed.

    An edited image of another size is first stretched over the original's frame.

    Args:
        draws: uniform in [0, 1): size, row of the crop, column of the crop, mirror.
        size: of what is trained on; --max_resize enlarges what it is cropped from.
    """
    size_draw, row_draw, column_draw, mirror_draw = draws
    side = section.resolution
    short = side + int(size_draw * ((section.max_resize or side) - side + 1))
    cover = max(own / at for own, at in zip(size, original.size, strict=True))
    width, height = (
        max(own, round(at * cover * short / side))
        for own, at in zip(size, original.size, strict=True)
    )
    if section.center_crop:
        row_draw = column_draw = 0.5
    left = int(column_draw * (width - size.width + 1))
    top = int(row_draw * (height - size.height + 1))
    mirror = section.random_flip and mirror_draw < 0.5

    def cut(image: Image.Image) -> Tensor:
        # The crop in the image's own pixels: this equals the crop of the whole, resized.
        box = (
            left * image.width / width,
            top * image.height / height,
            (left + size.width) * image.width / width,
            (top + size.height) * image.height / height,
        )
        tile = image.resize(size, Image.Resampling[section.interpolation.upper()], box)
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else tile
        return torch.from_numpy(np.array(tile)).permute(2, 0, 1)

    # Where the crop lies in what is seen: a mirrored image counts from its own left.
    seen_left = width - size.width - left if mirror else left
    size_ids = size_ids_of(section, original.size, (top, seen_left), size)
    return Pixels(cut(original), cut(edited), size_ids)


def size_ids_of(
    section: DataConfig, before: tuple[int, int], corner: tuple[int, int], size: Size
) -> Tensor:
    """[6] fp32, as of `Samples`.

    Args:
        before: width and height of the image before the resize.
        corner: top and left of the crop, in pixels after the resize; the flags override it.

    Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2.
    """
    flags = (section.crops_coords_top_left_h, section.crops_coords_top_left_w)
    top, left = (own if flag is None else flag for own, flag in zip(corner, flags, strict=True))
    ids = [before[1], before[0], top, left, size.height, size.width]
    return torch.tensor(ids, dtype=torch.float32)


class Order:
    """Which row each position of a run takes: all of them once an epoch, and padding.

    Rows are drawn in one order; those of a bucket fill its steps as they come, and steps follow
    each other as their first rows do. Where a bucket's rows end before a step does, it is padded.

    Args:
        selection: [n] int64, the rows that are trained on.
        global_batch: samples of one optimizer step, over all ranks and micro-steps.
        bucket_of: [rows] int64, of each row of the dataset; all are of one by default.
    """

    def __init__(
        self, selection: Tensor, seed: int, global_batch: int, bucket_of: Tensor | None = None
    ) -> None:
        self._selection, self._seed, self._global_batch = selection, seed, global_batch
        self._buckets = torch.zeros_like(selection) if bucket_of is None else bucket_of[selection]
        self._counts = torch.bincount(self._buckets)
        self.steps_per_epoch = int((-(-self._counts // global_batch)).sum())
        self.slots = self.steps_per_epoch * global_batch  # positions of an epoch
        self._epoch = -1  # whose rows and buckets are kept
        self._rows = self._bucket_of_step = torch.empty(0)

    def rows(self, positions: Tensor) -> Tensor:
        """[n] int64 -> [n] int64, the row of each position; -1 for padding."""
        epochs, offsets = positions // self.slots, positions % self.slots
        rows = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            self._lay_out(epoch)
            here = epochs == epoch
            rows[here] = self._rows[offsets[here]]
        return rows

    def bucket(self, position: int) -> int:
        """Of all samples of the position's step."""
        self._lay_out(position // self.slots)
        return int(self._bucket_of_step[position % self.slots // self._global_batch])

    def _lay_out(self, epoch: int) -> None:
        """Finds the row of each slot of an epoch, and the bucket of each step."""
        if epoch == self._epoch:
            return
        drawn = permutation(self._seed, Purpose.ORDER, epoch, len(self._selection))
        # Places in the order drawn, those of a bucket behind each other.
        places = torch.argsort(self._buckets[drawn], stable=True)
        buckets = self._buckets[drawn[places]]
        starts = (self._counts.cumsum(0) - self._counts)[buckets]
        of_bucket = torch.arange(len(places)) - starts
        within = of_bucket % self._global_batch
        first = places[starts + of_bucket - within]  # of its step
        firsts, step = first.unique(return_inverse=True)
        self._rows = torch.full((self.slots,), -1)
        self._rows[step * self._global_batch + within] = self._selection[drawn[places]]
        self._bucket_of_step = self._buckets[drawn[firsts]]
        self._epoch = epoch


class Source(Protocol):
    """What a loader takes micro-batches from. Picklable, for its workers."""

    def __getitems__(self, positions: list[int], /) -> Any: ...

    def collate(self, found: Any, /) -> Any:
        """What `__getitems__` gave, as one micro-batch with the `errors` of its bad samples."""
        ...


class EditPairs(Dataset[PixelSample]):
    """The samples of a run, by position; also the held-out rows, by row.

    Args:
        rows: what is read.
        selection: [n] int64, the rows that are trained on.
        global_batch: as in `Order`.
        tokenize: text to [length] int64.
        buckets: by default the square alone. Held-out rows are seen as squares.
    """

    def __init__(
        self,
        rows: Rows,
        selection: Tensor,
        section: DataConfig,
        seed: int,
        global_batch: int,
        tokenize: Callable[[str], Tensor],
        buckets: Buckets | None = None,
    ) -> None:
        buckets = buckets or square(section.resolution, len(rows))
        self.order = Order(selection, seed, global_batch, buckets.of_row)
        self._sizes = buckets.sizes
        self._rows, self._section = rows, section
        self._seed, self._tokenize = seed, tokenize

    def __getitem__(self, position: int) -> PixelSample:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[PixelSample]:
        """A micro-batch, of one step, at once: its draws then cost those of one sample."""
        at = torch.tensor(positions)
        pair = draw_uniform(self._seed, Purpose.PAIR, at)
        size = draw_uniform(self._seed, Purpose.RESIZE, at)
        place = draw_uniform(self._seed, Purpose.CROP, at, 2)
        mirror = draw_uniform(self._seed, Purpose.FLIP, at)
        draws = torch.cat([pair, size, place, mirror], dim=1).tolist()
        rows = self.order.rows(at).tolist()
        size = self._sizes[self.order.bucket(positions[0])]
        return [
            self._read(row, position, own[0], tuple(own[1:]), size)
            for row, position, own in zip(rows, positions, draws, strict=True)
        ]

    def collate(self, found: list[PixelSample]) -> PixelBatch:
        return collate(found)

    def sample(self, row: int) -> PixelSample:
        """A row that no draw changes: the first of its pairs, centre crop, square, no mirror."""
        return self._read(row, row, 0.0, CENTRE, self._square)

    def instruction(self, row: int) -> str:
        """The text of `sample(row)`. Raises: BadSample."""
        return self._rows.read(row, 0.0)[2]

    def blank(self, bucket: int | None = None) -> PixelSample:
        """A sample of weight 0, in the shapes of all others of a bucket, or of held-out rows."""
        return self._nothing(0, self._square if bucket is None else self._sizes[bucket])

    @property
    def _square(self) -> Size:
        return Size(self._section.resolution, self._section.resolution)

    def _read(
        self, row: int, position: int, pair_draw: float, draws: tuple[float, ...], size: Size
    ) -> PixelSample:
        if row < 0:
            return self._nothing(position, size)
        try:
            original, edited, prompt = self._rows.read(row, pair_draw)
        except BadSample as error:
            return self._nothing(position, size, str(error))
        pixels, edited_pixels, size_ids = transform(original, edited, self._section, draws, size)
        tokens = self._tokenize(prompt)
        return PixelSample(pixels, edited_pixels, tokens, size_ids, position, weight=1.0)

    def _nothing(self, position: int, size: Size, error: str | None = None) -> PixelSample:
        zeros = torch.zeros(3, size.height, size.width, dtype=torch.uint8)
        ids = size_ids_of(self._section, size, (0, 0), size)
        return PixelSample(zeros, zeros, self._tokenize(""), ids, position, 0.0, error)


def positions_of(
    step: int, micro_step: int, rank: int, ranks: int, micro_batch: int, micro_steps: int
) -> range:
    """Positions in the run of one rank's micro-batch."""
    start = ((step * micro_steps + micro_step) * ranks + rank) * micro_batch
    return range(start, start + micro_batch)


class StepSampler(Sampler[list[int]]):
    """One rank's micro-batches of optimizer steps `first_step` up to, not with, `last_step`.

    One pass over the run, across epochs: workers live as long as it does, and a resume skips
    nothing, it starts elsewhere.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        rank: int,
        ranks: int,
        micro_batch: int,
        micro_steps: int,
    ) -> None:
        self._steps, self._micro_steps = range(first_step, last_step), micro_steps
        self._positions = partial(
            positions_of, rank=rank, ranks=ranks, micro_batch=micro_batch, micro_steps=micro_steps
        )

    def __len__(self) -> int:
        return len(self._steps) * self._micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for micro_step in range(self._micro_steps):
                yield list(self._positions(step, micro_step))


def make_tokenize(tokenizers: Sequence[PreTrainedTokenizerBase]) -> Callable[[str], Tensor]:
    """Text to [length] int64, padded or cut to a row for each, one behind the other. Picklable."""
    return partial(_tokenize, tokenizers)


def _tokenize(tokenizers: Sequence[PreTrainedTokenizerBase], text: str) -> Tensor:
    options: dict[str, Any] = {"padding": "max_length", "truncation": True}
    rows = [tokenizer(text, return_tensors="pt", **options) for tokenizer in tokenizers]
    return torch.cat([row.input_ids[0] for row in rows])


class QuietLoader(DataLoader[Any]):
    """A DataLoader whose workers do not hear what asks the run to stop: they end when it does."""

    def __iter__(self) -> Any:
        with deaf_children() if self.num_workers else nullcontext():
            return super().__iter__()


def make_loader(
    source: Source, sampler: Iterable[list[int]], workers: int, prefetch: int, pin_memory: bool
) -> DataLoader[Any]:
    """Micro-batches in the sampler's order; the same whatever the number of workers.

    Workers are spawned, not forked: a fork keeps CUDA's and NCCL's handles and whatever locks their
    threads held, and after a killed rank it holds its GPU memory and ports. They import torch
    anew, once, since they live as long as the run. PyTorch gives each one thread.

    Args:
        workers: processes; 0 reads in this one.
        prefetch: micro-batches each worker keeps ready.
    """
    return QuietLoader(
        cast(Dataset[Any], source),
        batch_sampler=cast(Sampler[list[int]], sampler),
        num_workers=workers,
        collate_fn=source.collate,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=prefetch if workers else None,
    )
