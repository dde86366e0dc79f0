"""Makes the encodings that a cache lacks, by all ranks together, shard by shard."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .buckets import Buckets, square
from .cache_files import CacheFolder, Shape
from .config import DataConfig
from .data import CENTRE, make_loader, transform
from .draws import Purpose, draw_uniform
from .encoders import Encoders
from .errors import UsageError
from .families import SIZE_IDS
from .rows import BadSample, Rows
from .world import World

CACHE_SEED = 0  # of the crops; the run's own seed may change
SHARD_BYTES = 2**29  # at most, and so what a rank holds in memory while it makes one
SHARD_PAIRS = {"cuda": 1024, "cpu": 64}  # at most: what a kill may cost, in minutes
PAIRS_A_ROW = 2**20  # more than any row has: a pair is one number, row x this + pair
MIRRORED = (0.9, 0.0)  # draws that do not mirror, and that do


class Visit(NamedTuple):
    """A pair in all the forms that a cache keeps."""

    original: Tensor  # [mirrors x crops, 3, height, width] uint8, of its bucket
    edited: Tensor
    tokens: Tensor  # [length] int64
    size_ids: Tensor  # [mirrors x crops, 6] fp32
    error: str | None = None


class VisitBatch(NamedTuple):
    original: Tensor  # [n, mirrors x crops, 3, height, width] uint8
    edited: Tensor
    tokens: Tensor  # [n, length] int64
    size_ids: Tensor  # [n, mirrors x crops, 6] fp32
    errors: Sequence[str | None]


def wanted_units(rows: Rows, selection: Tensor) -> np.ndarray:
    """Every pair of these rows, [n] int64, ascending."""
    chosen = np.sort(selection.numpy())
    counts = np.array([rows.pairs(row) for row in chosen.tolist()])
    first = np.cumsum(counts) - counts
    pair = np.arange(counts.sum()) - np.repeat(first, counts)
    return np.repeat(chosen, counts) * PAIRS_A_ROW + pair


def missing_units(cache: CacheFolder, wanted: np.ndarray) -> np.ndarray:
    """Those of `wanted` that no shard has."""
    there = [cache.open(name, "unit")[0].numpy() for name in cache.shards("pairs")]
    if not there:
        return wanted
    units = np.concatenate(there)
    return np.setdiff1d(wanted, units[:, 0] * PAIRS_A_ROW + units[:, 1])


def text_digest(tokens: Tensor) -> np.ndarray:
    """[length] -> [16] uint8: the first half of SHA-256."""
    hashed = hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).digest()
    return np.frombuffer(hashed[:16], np.uint8)


def as_keys(digests: np.ndarray) -> np.ndarray:
    """[n, 16] uint8 -> [n] keys that sort and compare as the digests do."""
    return np.ascontiguousarray(digests).view("S16")[:, 0]


def missing_texts(
    cache: CacheFolder, null_tokens: Tensor, wanted: np.ndarray | None = None
) -> Tensor:
    """Tokens of the texts that no shard has, [n, length] int64, the same on all ranks.

    Args:
        null_tokens: [1, length] int64, always among what must be there.
        wanted: look at these pairs alone, not at all that are in the cache.
    """
    tokens, digests = [null_tokens.to(torch.int32)], [text_digest(null_tokens[0])[None]]
    for name in cache.shards("pairs"):
        unit, own_tokens, digest = cache.open(name, "unit", "tokens", "digest")
        units = unit[:, 0].numpy() * PAIRS_A_ROW + unit[:, 1].numpy()
        here = np.ones(len(units), bool) if wanted is None else np.isin(units, wanted)
        tokens.append(own_tokens[torch.from_numpy(here)])
        digests.append(digest.numpy()[here])
    distinct, first = np.unique(as_keys(np.concatenate(digests)), return_index=True)
    there = [cache.open(name, "digest")[0] for name in cache.shards("texts")]
    known = as_keys(torch.cat(there).numpy()) if there else np.empty(0, "S16")
    return torch.cat(tokens)[first[~np.isin(distinct, known)]].long()


class Visits:
    """The pairs that are wanting, by their place in `units`: what workers decode.

    Args:
        units: [n] int64.
        tokenize: text to [length] int64.
    """

    def __init__(
        self,
        rows: Rows,
        units: np.ndarray,
        section: DataConfig,
        shape: Shape,
        tokenize: Callable[[str], Tensor],
        buckets: Buckets,
    ) -> None:
        self._rows, self._units, self._section = rows, units, section
        self._shape, self._tokenize, self._buckets = shape, tokenize, buckets

    def __getitems__(self, places: list[int]) -> list[Visit]:
        return [self._visit(*divmod(int(self._units[place]), PAIRS_A_ROW)) for place in places]

    def collate(self, found: list[Visit]) -> VisitBatch:
        return VisitBatch(
            original=torch.stack([visit.original for visit in found]),
            edited=torch.stack([visit.edited for visit in found]),
            tokens=torch.stack([visit.tokens for visit in found]),
            size_ids=torch.stack([visit.size_ids for visit in found]),
            errors=[visit.error for visit in found],
        )

    def _visit(self, row: int, pair: int) -> Visit:
        size = self._buckets.sizes[int(self._buckets.of_row[row])]
        try:
            original, edited, prompt = self._rows.read(row, (pair + 0.5) / self._rows.pairs(row))
        except BadSample as error:
            shape = self._shape.variants, 3, size.height, size.width
            zeros = torch.zeros(shape, dtype=torch.uint8)
            no_ids = torch.zeros(self._shape.variants, SIZE_IDS)
            return Visit(zeros, zeros, self._tokenize(""), no_ids, str(error))
        draws = self._draws(row, pair)
        cuts = [transform(original, edited, self._section, own, size) for own in draws]
        originals, editeds, size_ids = (torch.stack(parts) for parts in zip(*cuts, strict=True))
        return Visit(originals, editeds, self._tokenize(prompt), size_ids)

    def _draws(self, row: int, pair: int) -> list[tuple[float, ...]]:
        """Of each mirror and crop; where no draw changes the crop, the middle."""
        mirrors, crops = self._shape.mirrors, self._shape.crops
        places = [CENTRE[:3]] * (mirrors * crops)
        if not self._section.one_crop:
            each = 3 * mirrors * crops
            drawn = draw_uniform(
                CACHE_SEED, Purpose.CACHE_CROPS, torch.tensor([row]), each * (pair + 1)
            )
            places = drawn[0, each * pair :].reshape(-1, 3).tolist()
        return [(*place, MIRRORED[at // crops]) for at, place in enumerate(places)]


class Build:
    """One rank's share of the work. Ranks go in rounds of a shard each, and end alike.

    Args:
        encode_at_once: images of each kind that the VAE takes, and texts.
        done: told (pairs or texts that this rank has done) as it goes.
        written: told a shard's name once it counts.
    """

    def __init__(
        self,
        cache: CacheFolder,
        encoders: Encoders,
        section: DataConfig,
        world: World,
        encode_at_once: int,
        done: Callable[[int], None],
        written: Callable[[str], None],
    ) -> None:
        self.cache, self.encoders, self.section = cache, encoders, section
        self.world, self.encode_at_once = world, encode_at_once
        self.done, self.written = done, written
        self.bad = 0  # pairs that this rank could not read

    def pairs(
        self,
        rows: Rows,
        missing: np.ndarray,
        tokenize: Callable[[str], Tensor],
        stop_requested: Callable[[], bool],
        buckets: Buckets | None = None,
    ) -> bool:
        """Encodes the pairs that are missing; False when it was stopped before the end.

        Args:
            missing: [n] int64, of `missing_units`.
            buckets: by default the square alone.

        Raises: UsageError, on all ranks alike: an unreadable pair that may not be skipped, or no
            space is left.
        """
        shape = self.cache.shape
        buckets = buckets or square(self.section.resolution, len(rows))
        of_unit = buckets.of_row.numpy()[missing // PAIRS_A_ROW]
        in_order = np.argsort(of_unit, kind="stable")  # those of a bucket behind each other
        missing, of_unit = missing[in_order], of_unit[in_order]
        starts = np.flatnonzero(np.diff(of_unit, prepend=-1))
        shards = [
            range(start + shard.start, start + shard.stop)
            for start, stop in pairwise([*starts.tolist(), len(missing)])
            for shard in self._cut(stop - start, shape.pair_bytes)
        ]
        mine = shards[self.world.rank :: self.world.size]
        step = max(1, self.encode_at_once // shape.variants)
        batches = [
            list(shard[at : at + step]) for shard in mine for at in range(0, len(shard), step)
        ]
        loader = iter(
            make_loader(
                Visits(rows, missing, self.section, shape, tokenize, buckets),
                batches,
                workers=self.section.dataloader_num_workers if batches else 0,
                prefetch=self.section.dataloader_prefetch,
                pin_memory=self.world.device.type == "cuda",
            )
        )
        for number in range(-(-len(shards) // self.world.size)):
            with self.world.together():
                if number < len(mine):
                    own = list(mine[number])
                    most = self.section.max_bad_fraction * len(missing)
                    self._write_pairs(missing[own], int(of_unit[own[0]]), loader, most)
            if self.world.highest(stop_requested()):
                return False
        return True

    def texts(self, null_tokens: Tensor) -> None:
        """Encodes each distinct instruction of the pairs that the cache lacks, and the empty one.

        Args:
            null_tokens: [1, length] int64.

        Raises: UsageError, on all ranks alike.
        """
        with self.world.together():
            tokens = missing_texts(self.cache, null_tokens)
        shards = self._cut(len(tokens), self.cache.shape.text_bytes)
        with self.world.together():
            for shard in shards[self.world.rank :: self.world.size]:
                own = tokens[list(shard)]
                parts = own.split(self.encode_at_once)
                encoded = [self.encoders.encode_text(p.to(self.world.device)) for p in parts]
                text, pooled = (torch.cat(part).cpu() for part in zip(*encoded, strict=True))
                digest = torch.from_numpy(np.stack([text_digest(one) for one in own]))
                tensors = {"text": text, "pooled": pooled, "digest": digest}
                self.written(self.cache.write("texts", tensors, {}))

    def _cut(self, total: int, each_bytes: int) -> list[range]:
        """Even shards, as many for one rank as for another where there is enough."""
        most = min(SHARD_PAIRS[self.world.device.type], max(1, SHARD_BYTES // each_bytes))
        rounds = -(-total // (most * self.world.size))
        each = max(1, -(-total // max(rounds * self.world.size, 1)))
        return [range(start, min(start + each, total)) for start in range(0, total, each)]

    def _write_pairs(
        self, units: np.ndarray, bucket: int, loader: Iterator[VisitBatch], most_bad: float
    ) -> None:
        shape, of_pair = self.cache.shape, self.cache.shape.latents_shape(bucket)
        latents = torch.empty(len(units), shape.variants, *of_pair[2:], dtype=shape.dtype)
        size_ids = torch.empty(len(units), shape.variants, SIZE_IDS)
        tokens: list[Tensor] = []
        bad: dict[str, str] = {}
        while len(tokens) < len(units):
            batch = next(loader)
            for place, error in enumerate(batch.errors, start=len(tokens)):
                if error is not None:
                    row, pair = divmod(int(units[place]), PAIRS_A_ROW)
                    bad[f"{row} {pair}"] = error
            if bad and self.section.on_bad_sample == "stop":
                raise UsageError(
                    f"{next(iter(bad.values()))}; --on_bad_sample skip goes on without it"
                )
            count = len(batch.tokens)
            here = slice(len(tokens), len(tokens) + count)
            latents[here], size_ids[here] = self._encode(batch), batch.size_ids
            tokens += batch.tokens.to(torch.int32)
            self.done(count)
        self.bad += len(bad)
        if self.bad > most_bad:  # before they are written, for the fault may be the disk's
            raise UsageError(
                f"{self.bad} pairs cannot be encoded, more than --max_bad_fraction "
                f"{self.section.max_bad_fraction:g} of them, the last: "
                f"{next(reversed(bad.values()))}; mend the data, or allow more"
            )
        name = self.cache.write(
            "pairs",
            {
                "latents": latents.reshape(-1, *of_pair),
                "size_ids": size_ids.unflatten(1, (shape.mirrors, shape.crops)),
                "unit": torch.from_numpy(np.stack(np.divmod(units, PAIRS_A_ROW), axis=1)),
                "tokens": torch.stack(tokens),
                "digest": torch.from_numpy(np.stack([text_digest(one) for one in tokens])),
            },
            bad,
        )
        self.written(name)

    def _encode(self, batch: VisitBatch) -> Tensor:
        """[n, mirrors x crops, 3, 4, h, w] on the CPU."""
        pairs = zip(
            batch.edited.flatten(0, 1).split(self.encode_at_once),
            batch.original.flatten(0, 1).split(self.encode_at_once),
            strict=True,
        )
        encoded = [torch.stack(self.encoders.encode_images(*pair), dim=1).cpu() for pair in pairs]
        return torch.cat(encoded).unflatten(0, batch.edited.shape[:2])
