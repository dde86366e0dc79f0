"""Rows become samples: the order of a run, one geometry for both images of a pair, the loader.

A sample is a function of (seed, its position in the run). An epoch is `steps_per_epoch` optimizer
steps; its last slots, beyond the rows, are padding: samples of weight 0, so that shapes are static.
"""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from .config import DataConfig
from .draws import Purpose, draw_uniform, permutation
from .errors import UsageError
from .rows import BadSample, Rows

CENTRE = (0.0, 0.5, 0.5, 0.5)  # draws for the least size, the middle, no mirror


class PixelSample(NamedTuple):
    """One record of `EditPairs`."""

    original: Tensor  # [3, resolution, resolution] uint8
    edited: Tensor
    tokens: Tensor  # [length] int64
    size_ids: Tensor  # [6] fp32, as of `Samples`
    position: int
    weight: float  # 1; 0 for padding and for what could not be read
    error: str | None = None


class PixelBatch(NamedTuple):
    """A micro-batch, as it leaves the loader."""

    original: Tensor  # [n, 3, resolution, resolution] uint8
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

    original: Tensor  # [3, resolution, resolution] uint8
    edited: Tensor
    size_ids: Tensor  # [6] fp32, as of `Samples`


def transform(
    original: Image.Image, edited: Image.Image, section: DataConfig, draws: tuple[float, ...]
) -> Pixels:
    """Resize of the short side, crop and mirror, the same for both images; nothing is squashed.

    An edited image of another size is first stretched over the original's frame.

    Args:
        draws: uniform in [0, 1): size, row of the crop, column of the crop, mirror.
    """
    size_draw, row_draw, column_draw, mirror_draw = draws
    side = section.resolution
    short = side + int(size_draw * ((section.max_resize or side) - side + 1))
    width, height = (round(at * short / min(original.size)) for at in original.size)
    if section.center_crop:
        row_draw = column_draw = 0.5
    left, top = int(column_draw * (width - side + 1)), int(row_draw * (height - side + 1))
    mirror = section.random_flip and mirror_draw < 0.5

    def cut(image: Image.Image) -> Tensor:
        # The crop in the image's own pixels: this equals the crop of the whole, resized.
        box = (
            left * image.width / width,
            top * image.height / height,
            (left + side) * image.width / width,
            (top + side) * image.height / height,
        )
        tile = image.resize((side, side), Image.Resampling[section.interpolation.upper()], box)
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else tile
        return torch.from_numpy(np.array(tile)).permute(2, 0, 1)

    # Where the crop lies in what is seen: a mirrored image counts from its own left.
    seen_left = width - side - left if mirror else left
    size_ids = size_ids_of(section, original.size, (top, seen_left))
    return Pixels(cut(original), cut(edited), size_ids)


def size_ids_of(section: DataConfig, size: tuple[int, int], corner: tuple[float, float]) -> Tensor:
    """[6] fp32, as of `Samples`.

    Args:
        size: width and height of the image before the resize.
        corner: top and left of the crop, in pixels after the resize; the flags override it.

    Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2.
    """
    flags = (section.crops_coords_top_left_h, section.crops_coords_top_left_w)
    top, left = (own if flag is None else flag for own, flag in zip(corner, flags, strict=True))
    side = section.resolution
    return torch.tensor([size[1], size[0], top, left, side, side], dtype=torch.float32)


class Order:
    """Which row each position of a run takes: all of them once an epoch, then padding.

    Args:
        selection: [n] int64, the rows that are trained on.
        global_batch: samples of one optimizer step, over all ranks and micro-steps.
    """

    def __init__(self, selection: Tensor, seed: int, global_batch: int) -> None:
        self.steps_per_epoch = -(-len(selection) // global_batch)
        self.slots = self.steps_per_epoch * global_batch  # positions of an epoch
        self._selection, self._seed = selection, seed
        self._epoch, self._order = -1, torch.empty(0)  # the permutation of the current epoch

    def rows(self, positions: Tensor) -> Tensor:
        """[n] int64 -> [n] int64, the row of each position; -1 for padding."""
        epochs, offsets = positions // self.slots, positions % self.slots
        rows = torch.full_like(positions, -1)
        for epoch in epochs.unique().tolist():
            if epoch != self._epoch:
                self._order = permutation(self._seed, Purpose.ORDER, epoch, len(self._selection))
                self._epoch = epoch
            here = (epochs == epoch) & (offsets < len(self._selection))
            rows[here] = self._selection[self._order[offsets[here]]]
        return rows


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
    """

    def __init__(
        self,
        rows: Rows,
        selection: Tensor,
        section: DataConfig,
        seed: int,
        global_batch: int,
        tokenize: Callable[[str], Tensor],
    ) -> None:
        self.order = Order(selection, seed, global_batch)
        self._rows, self._section = rows, section
        self._seed, self._tokenize = seed, tokenize

    def __getitem__(self, position: int) -> PixelSample:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[PixelSample]:
        """A micro-batch at once: its draws then cost those of one sample."""
        at = torch.tensor(positions)
        pair = draw_uniform(self._seed, Purpose.PAIR, at)
        size = draw_uniform(self._seed, Purpose.RESIZE, at)
        place = draw_uniform(self._seed, Purpose.CROP, at, 2)
        mirror = draw_uniform(self._seed, Purpose.FLIP, at)
        draws = torch.cat([pair, size, place, mirror], dim=1).tolist()
        rows = self.order.rows(at).tolist()
        return [
            self._read(row, position, own[0], tuple(own[1:]))
            for row, position, own in zip(rows, positions, draws, strict=True)
        ]

    def collate(self, found: list[PixelSample]) -> PixelBatch:
        return collate(found)

    def sample(self, row: int) -> PixelSample:
        """A row that no draw changes: the first of its pairs, centre crop, no mirror."""
        return self._read(row, row, 0.0, CENTRE)

    def instruction(self, row: int) -> str:
        """The text of `sample(row)`. Raises: BadSample."""
        return self._rows.read(row, 0.0)[2]

    def blank(self) -> PixelSample:
        """A sample of weight 0, in the shapes of all others."""
        return self._nothing(position=0)

    def _read(
        self, row: int, position: int, pair_draw: float, draws: tuple[float, ...]
    ) -> PixelSample:
        if row < 0:
            return self._nothing(position)
        try:
            original, edited, prompt = self._rows.read(row, pair_draw)
        except BadSample as error:
            return self._nothing(position, str(error))
        pixels, edited_pixels, size_ids = transform(original, edited, self._section, draws)
        tokens = self._tokenize(prompt)
        return PixelSample(pixels, edited_pixels, tokens, size_ids, position, weight=1.0)

    def _nothing(self, position: int, error: str | None = None) -> PixelSample:
        side = self._section.resolution
        zeros = torch.zeros(3, side, side, dtype=torch.uint8)
        ids = size_ids_of(self._section, (side, side), (0, 0))
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
    return DataLoader(
        cast(Dataset[Any], source),
        batch_sampler=cast(Sampler[list[int]], sampler),
        num_workers=workers,
        collate_fn=source.collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=prefetch if workers else None,
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach the whole process group; the parent still wants data.

    Workers end when the parent says so, or within seconds of its death.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
