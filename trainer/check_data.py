"""What is wrong with a dataset, found before it is trained on.

Every pair is read once, as training reads it. What STOPS ends a run (or is skipped, with
--on_bad_sample skip), what SPOILS teaches it what nobody meant, and a HINT may be neither.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .cache_build import PAIRS_A_ROW, wanted_units
from .config import RunConfig
from .data import make_loader, split_rows
from .rows import BadSample, Rows, open_rows, parts_of

STOPS, SPOILS, HINT = "stops", "spoils", "hint"
KINDS = {  # finding: what it does, and what it is
    "unreadable": (STOPS, "an image or instruction that cannot be read"),
    "misaligned": (SPOILS, "the images have different shapes: the edited one would be stretched"),
    "identical": (SPOILS, "the edited image is the original, pixel by pixel"),
    "duplicate": (SPOILS, "the same images and instruction as another pair"),
    "empty": (SPOILS, "an instruction without words"),
    "long": (SPOILS, "an instruction of more tokens than the text encoder reads; the rest is cut"),
    "unrelated": (HINT, "light and edges of the images have little in common: another picture?"),
}
SHAPE_TOLERANCE = 0.02  # of the ratio of sides: what rounding to whole pixels makes of small images
LOOK_SIDE = 32  # pixels a side, of what is compared
LEAST_ALIKE = 0.15  # of 1
FLAT = 1.0  # levels of 255: standard deviation of what has nothing to compare
AT_ONCE = 8  # pairs


class Facts(NamedTuple):
    """Of one pair."""

    row: int
    pair: int  # which of its row
    name: str
    error: str | None = None
    size: tuple[int, int] = (0, 0)
    edited_size: tuple[int, int] = (0, 0)
    digests: tuple[bytes, bytes] = (b"", b"")  # of the pixels
    alike: float = 1.0  # as of `alike`
    instruction: str = ""


class FactsBatch(NamedTuple):
    """As it leaves the loader."""

    facts: list[Facts]


class Found(NamedTuple):
    """One pair's fault."""

    row: int
    pair: int
    name: str
    detail: str
    badness: float  # the worst are shown first


class Look:
    """The pairs of rows, by their place in `units`: what workers read. Picklable.

    Args:
        units: [n] int64, of `wanted_units`.
    """

    def __init__(self, rows: Rows, units: np.ndarray) -> None:
        self._rows, self._units = rows, units

    def __getitems__(self, places: list[int]) -> list[Facts]:
        return [self._facts(*divmod(int(self._units[place]), PAIRS_A_ROW)) for place in places]

    def collate(self, found: list[Facts]) -> FactsBatch:
        return FactsBatch(found)

    def _facts(self, row: int, pair: int) -> Facts:
        try:
            original, edited, instruction = read_pair(self._rows, row, pair)
            name = self._rows.name(row)
        except BadSample as error:
            return Facts(row, pair, f"row {row}", str(error))
        digests = digest_of(original), digest_of(edited)
        likeness = alike(original, edited)
        return Facts(
            row, pair, name, None, original.size, edited.size, digests, likeness, instruction
        )


def read_pair(rows: Rows, row: int, pair: int) -> tuple[Image.Image, Image.Image, str]:
    """One of the pairs of a row. Raises: BadSample."""
    return rows.read(row, (pair + 0.5) / rows.pairs(row))


def digest_of(image: Image.Image) -> bytes:
    """Of the size and the RGB values."""
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()


def alike(original: Image.Image, edited: Image.Image) -> float:
    """How much two pictures have in common, 0 to 1: a hint, cheap and not sure.

    The larger of two correlations, of the light at LOOK_SIDE pixels a side, as it is or inverted
    (an edit may make a negative), and of its edges. An edit changes colours, or a part; it seldom
    leaves neither. Where an image has nothing in it to compare they count as alike.
    """
    lights = [
        np.asarray(
            image.convert("L").resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX), np.float64
        )
        for image in (original, edited)
    ]
    if min(light.std() for light in lights) < FLAT:
        return 1.0
    edges = []
    for light in lights:
        down, across = np.gradient(light)
        edges.append(np.hypot(down, across))
    return max(abs(_correlation(*lights)), _correlation(*edges))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / max(np.sqrt((one**2).sum() * (other**2).sum()), 1e-12))


class Survey:
    """What is found, pair by pair.

    Args:
        tokenizers: of the base model; empty where none was given, and no length is checked.
    """

    def __init__(self, tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
        self._tokenizers = tokenizers
        self.found: dict[str, list[Found]] = {kind: [] for kind in KINDS}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.pairs = 0
        self._seen: dict[bytes, str] = {}  # digest of a pair and its instruction: its name

    def add(self, facts: Facts) -> None:
        self.pairs += 1
        if facts.error is not None:
            row, file, reason = parts_of(facts.error)
            name = f"row {row}" if file is None else f"row {row} ({file})"
            self._note("unreadable", facts._replace(name=name), reason, 1.0)
            return
        self.sizes[facts.size] += 1
        stretch = _stretch(facts.size, facts.edited_size)
        if stretch > SHAPE_TOLERANCE:
            told = " and ".join(f"{w} x {h}" for w, h in (facts.size, facts.edited_size))
            self._note("misaligned", facts, told, stretch)
        if facts.digests[0] == facts.digests[1]:
            self._note("identical", facts, "", 1.0)
        elif facts.alike < LEAST_ALIKE:
            self._note("unrelated", facts, f"{facts.alike:.2f} alike of 1", -facts.alike)
        self._check_twice(facts)
        self._check_text(facts)

    def _check_twice(self, facts: Facts) -> None:
        whole = b"".join((*facts.digests, facts.instruction.encode()))
        first = self._seen.setdefault(hashlib.blake2b(whole, digest_size=16).digest(), facts.name)
        if first is not facts.name:
            self._note("duplicate", facts, f"as {first}", 1.0)

    def _check_text(self, facts: Facts) -> None:
        if not facts.instruction.strip():
            self._note("empty", facts, repr(facts.instruction), 1.0)
        for tokenizer in self._tokenizers[:1]:  # those of XL share their vocabulary and length
            count, most = token_count(tokenizer, facts.instruction), tokenizer.model_max_length
            if count > most:
                self._note("long", facts, f"{count} tokens, {most} are read", count)

    def _note(self, kind: str, facts: Facts, detail: str, badness: float) -> None:
        self.found[kind].append(Found(facts.row, facts.pair, facts.name, detail, badness))

    @property
    def clean(self) -> bool:
        """Whether nothing was found that stops or spoils training."""
        return not any(self.found[kind] for kind, (does, _) in KINDS.items() if does != HINT)

    def report(self, source: str, rows: int) -> dict[str, Any]:
        """All of it, as JSON holds it.

        Args:
            source: the dataset, as it was named.
            rows: how many were looked at.
        """
        areas = sorted(self.sizes, key=lambda size: size[0] * size[1])
        return {
            "dataset": source,
            "rows": rows,
            "pairs": self.pairs,
            "clean": self.clean,
            "instruction_lengths": "checked" if self._tokenizers else "not checked: no base model",
            "sizes": {
                "smallest": list(areas[0]) if areas else None,
                "largest": list(areas[-1]) if areas else None,
                "most_common": [[*size, count] for size, count in self.sizes.most_common(10)],
            },
            "findings": {
                kind: {
                    "does": does,
                    "means": means,
                    "count": len(self.found[kind]),
                    "pairs": [
                        {"row": one.row, "pair": one.pair, "name": one.name, "detail": one.detail}
                        for one in self.found[kind]
                    ],
                }
                for kind, (does, means) in KINDS.items()
            },
        }

    def worst(self, kind: str, count: int) -> list[Found]:
        return sorted(self.found[kind], key=lambda one: -one.badness)[:count]


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """With the first and the last, not cut."""
    return len(cast(Any, tokenizer)(text, truncation=False, verbose=False).input_ids)


def _stretch(size: tuple[int, int], other: tuple[int, int]) -> float:
    ratio = size[0] * other[1] / (size[1] * other[0])
    return max(ratio, 1 / ratio) - 1


def survey(
    config: RunConfig, tokenizers: Sequence[PreTrainedTokenizerBase], *, quiet: bool = False
) -> tuple[Rows, int, Survey]:
    """Reads all pairs that a run of these flags trains on or holds out.

    Args:
        tokenizers: of the base model, or none.
        quiet: without a progress line.

    Returns: the dataset, how many rows were looked at, and what was found.
    Raises: UsageError: the dataset cannot be opened.
    """
    section = config.data
    rows = open_rows(section, config.model.cache_dir)
    chosen = split_rows(len(rows), section.max_train_samples, section.held_out, config.loop.seed)
    units = wanted_units(rows, torch.cat(chosen))
    found = Survey(tokenizers)
    with tqdm(total=len(units), unit="pair", disable=quiet, smoothing=0.1) as progress:
        for batch in _read(rows, units, section.dataloader_num_workers):
            for facts in batch.facts:
                found.add(facts)
            progress.update(len(batch.facts))
    return rows, sum(map(len, chosen)), found


def _read(rows: Rows, units: np.ndarray, workers: int) -> Iterator[FactsBatch]:
    places = range(len(units))
    batches = [list(places[at : at + AT_ONCE]) for at in range(0, len(units), AT_ONCE)]
    loader = make_loader(Look(rows, units), batches, workers, prefetch=4, pin_memory=False)
    yield from loader
