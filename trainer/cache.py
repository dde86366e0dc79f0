"""Samples from a cache: memory-mapped, at random, the ones that a run without it would encode.

Where the crop is not drawn, a position takes the same row, pair and mirror as without the cache.
With --cache_crops it takes one of the crops that are kept, by a draw of its own.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache_build import PAIRS_A_ROW, as_keys, text_digest
from .cache_files import CacheFolder
from .data import Order
from .draws import Purpose, draw_uniform
from .encoders import Samples
from .families import SIZE_IDS, Text

DRAWN_AT_ONCE = 4096  # positions: draws of many cost little more than of one


class CachedBatch(NamedTuple):
    """A micro-batch, as it leaves the loader."""

    latents: Tensor  # [3, n, 4, h, w]: the target's mean and std, the condition
    text: Tensor  # [n, tokens, width]
    pooled: Tensor  # [n, pooled]
    size_ids: Tensor  # [n, 6] fp32
    positions: Tensor  # [n] int64
    weights: Tensor  # [n] fp32
    errors: tuple[str, ...]  # of its bad samples; a list once pinned

    def to_samples(self, device: torch.device) -> Samples:
        given = self.text, self.pooled, self.size_ids, self.positions, self.weights
        sent = (tensor.to(device, non_blocking=True) for tensor in (*self.latents, *given))
        return Samples(*sent)


class Shelf:
    """The shards of a cache, open: what each pair and text is, and where its bytes lie.

    Raises: UsageError: a shard cannot be opened.
    """

    def __init__(self, cache: CacheFolder) -> None:
        names, texts = cache.shards("pairs"), cache.shards("texts")
        opened = [cache.open(name, "latents", "size_ids", "unit", "digest") for name in names]
        units = np.concatenate([unit.numpy() for *_, unit, _ in opened])
        # Ascending and each once: builds that could not lock each other out may both have made it.
        units = units[:, 0] * PAIRS_A_ROW + units[:, 1]
        self.units, order = np.unique(units, return_index=True)
        self.shard, self.place = (
            at[order] for at in _places([len(unit) for *_, unit, _ in opened])
        )
        # As bytes, for numpy has no bf16: of a pair [mirrors x crops, 3, bytes].
        self.latents = [_rows(latents, cache.shape.variants, 3) for latents, *_ in opened]
        self.size_ids = [size_ids.flatten(1, 2).numpy() for _, size_ids, *_ in opened]

        written = [cache.open(name, "text", "pooled", "digest") for name in texts]
        self.texts = [(_rows(text), _rows(pooled)) for text, pooled, _ in written]
        self.text_shard, self.text_place = _places([len(text) for text, *_ in written])
        keys = as_keys(torch.cat([digest for *_, digest in written]).numpy())
        self._sorted = np.argsort(keys)
        self._keys = keys[self._sorted]
        self.text = self.text_numbers(torch.cat([digest for *_, digest in opened]).numpy()[order])
        self.bad = {
            int(row) * PAIRS_A_ROW + int(pair): reason
            for facts in names.values()
            for key, reason in facts["bad"].items()
            for row, pair in [key.split()]
        }

    def text_numbers(self, digests: np.ndarray) -> np.ndarray:
        """[n, 16] uint8 -> [n] int64, which of all texts; -1 where another run still writes it."""
        keys = as_keys(digests)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._sorted[at], -1)


class Chosen(NamedTuple):
    """What a run of positions takes; each [n]."""

    unit: np.ndarray  # place in Shelf.units; -1 for padding and bad samples
    variant: np.ndarray  # mirror x crops + crop
    error: list[str | None]


class CachedPairs(Dataset[CachedBatch]):
    """The samples of a run, by position, from a cache that has all of its rows.

    Args:
        random_flip: of the run.
        null_tokens: [1, length] int64, the empty instruction; the cache has it.
    """

    def __init__(
        self, cache: CacheFolder, order: Order, seed: int, random_flip: bool, null_tokens: Tensor
    ) -> None:
        self._cache, self._order, self._seed = cache, order, seed
        self._random_flip, self._null_tokens = random_flip, null_tokens
        self._start, self._chosen = -1, None  # the block of positions that was last drawn
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the files themselves."""
        kept = ("_cache", "_order", "_seed", "_random_flip", "_null_tokens")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _start=-1, _chosen=None)
        self._open()

    def __getitem__(self, position: int) -> CachedBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> CachedBatch:
        """A micro-batch, of one step, at once."""
        shelf, shape, count = self._shelf, self._cache.shape, len(positions)
        latent = shape.latents[self._order.bucket(positions[0])]
        latents = torch.empty(3, count, *latent, dtype=shape.dtype)
        text, size_ids = self._no_texts(count), torch.zeros(count, SIZE_IDS)
        weights, errors = torch.ones(count), []
        latent_bytes, text_bytes = _rows(latents, count), [_rows(part) for part in text]
        ids = size_ids.numpy()
        for index, position in enumerate(positions):
            unit, variant, error = self._choose(position)
            number = self._null_text
            if unit < 0:
                weights[index] = 0.0
                latent_bytes[:, index] = 0
                errors += [error] if error is not None else []
            else:
                shard, place = shelf.shard[unit], shelf.place[unit]
                latent_bytes[:, index] = shelf.latents[shard][place][variant]
                ids[index] = shelf.size_ids[shard][place][variant]
                number = shelf.text[unit]
            self._read_text(text_bytes, index, number)
        return CachedBatch(
            latents, *text, size_ids, torch.tensor(positions), weights, tuple(errors)
        )

    def collate(self, found: CachedBatch) -> CachedBatch:
        return found

    def blank(self, count: int, bucket: int = 0) -> CachedBatch:
        """Samples of weight 0, in the shapes of all others of a bucket."""
        shape = self._cache.shape
        null = self.null_text()
        return CachedBatch(
            latents=torch.zeros(3, count, *shape.latents[bucket], dtype=shape.dtype),
            text=null.states.expand(count, -1, -1),
            pooled=null.pooled.expand(count, -1),
            size_ids=torch.zeros(count, SIZE_IDS),
            positions=torch.zeros(count, dtype=torch.int64),
            weights=torch.zeros(count),
            errors=(),
        )

    def null_text(self) -> Text:
        """The empty instruction's encoding."""
        text = self._no_texts(1)
        self._read_text([_rows(part) for part in text], 0, self._null_text)
        return text

    def _no_texts(self, count: int) -> Text:
        shape = self._cache.shape
        return Text(
            torch.empty(count, *shape.text, dtype=shape.dtype),
            torch.empty(count, shape.pooled, dtype=shape.dtype),
        )

    def _read_text(self, into: list[np.ndarray], index: int, number: int) -> None:
        """Copies text `number` of the cache, as bytes, to place `index`."""
        shard, place = self._shelf.text_shard[number], self._shelf.text_place[number]
        for part, kept in zip(into, self._shelf.texts[shard], strict=True):
            part[index] = kept[place]

    def _open(self) -> None:
        self._shelf = Shelf(self._cache)
        self._null_text = int(self._shelf.text_numbers(text_digest(self._null_tokens[0])[None])[0])

    def _choose(self, position: int) -> tuple[int, int, str | None]:
        """Of one position: the pair, its form, and what is wrong with it."""
        # Blocks of whole epochs, or parts of one: no block draws many permutations.
        size = min(DRAWN_AT_ONCE, self._order.slots)
        start = position // size * size
        if self._chosen is None or start != self._start:
            self._start, self._chosen = start, self._draw(torch.arange(start, start + size))
        at = position - start
        return int(self._chosen.unit[at]), int(self._chosen.variant[at]), self._chosen.error[at]

    def _draw(self, positions: Tensor) -> Chosen:
        """The same draws as of a run that encodes: row, pair and mirror; then the crop."""
        shelf, shape = self._shelf, self._cache.shape
        rows = self._order.rows(positions).numpy()
        first, behind = (
            np.searchsorted(shelf.units, row * PAIRS_A_ROW) for row in (rows, rows + 1)
        )
        pair = (self._uniform(Purpose.PAIR, positions) * (behind - first)).astype(np.int64)
        mirror = np.zeros_like(pair)
        if self._random_flip:
            mirror = (self._uniform(Purpose.FLIP, positions) < 0.5).astype(np.int64)
        crop = np.zeros_like(pair)
        if shape.crops > 1:
            drawn = self._uniform(Purpose.CACHED_CROP, positions)
            crop = (drawn * shape.crops).astype(np.int64)
        unit = np.where(rows >= 0, first + pair, -1)
        error: list[str | None] = [None] * len(positions)
        if shelf.bad:
            for at in np.flatnonzero(unit >= 0):
                error[at] = shelf.bad.get(int(shelf.units[unit[at]]))
                unit[at] = -1 if error[at] is not None else unit[at]
        return Chosen(unit, mirror * shape.crops + crop, error)

    def _uniform(self, purpose: Purpose, positions: Tensor) -> np.ndarray:
        """[n] fp64, as Python reads the draws one by one."""
        return draw_uniform(self._seed, purpose, positions)[:, 0].double().numpy()


def _rows(tensor: Tensor, *sizes: int) -> np.ndarray:
    """The bytes of a contiguous tensor, [its first size, *sizes, the rest]; no copy."""
    count = len(tensor)
    length = tensor.nbytes // (count * math.prod(sizes))
    flat = tensor.view(count, tensor.numel() // count).view(torch.uint8)
    return flat.numpy().reshape(count, *sizes, length)


def _places(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of all items of shards in a row: which shard, and the place in it."""
    shard = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    return shard, place
