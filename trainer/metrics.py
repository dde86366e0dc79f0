"""What an edit is measured by, row by row: torchmetrics' formulas, with our networks to see by.

Each metric is a `torchmetrics.Metric`. Its states are the rows that this rank saw, with what was
found of each; ranks put them together, and everything is summed up in the order of rows, in fp64.
So any number of ranks comes to the same bits. (torchmetrics' own CLIPScore knows no rows, and does
not run with transformers 5.)
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional import cosine_similarity, mean_absolute_error, mean_squared_error
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.data import dim_zero_cat

from .extractors import Extractors, Lpips

MOST_DB = 100.0  # stands for the infinite PSNR of images that are alike in every bit
KID_SUBSETS, KID_SIZE, KID_SEED = 100, 1000, 0  # as torchmetrics has them; the size at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Some rows as the metrics see them."""

    edits: Sequence[Tensor]  # each [3, height, width] fp32, 0 to 1
    references: Sequence[Tensor]  # what they are measured against, of the same sizes
    features: Mapping[str, Tensor] = field(default_factory=dict)  # [n, width], see `features_of`


def features_of(
    extractors: Extractors,
    edits: Sequence[Image.Image],
    references: Sequence[Image.Image],
    originals: Sequence[Image.Image],
    captions: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """What the networks that there are see: "clip.edit", "clip.before", "dino.reference", ...

    Args:
        captions: "before" and "after" the edit, where there are such.
    """
    found: dict[str, Tensor] = {}
    if extractors.clip is not None:
        found["clip.edit"] = extractors.clip.images(edits)
        found["clip.reference"] = extractors.clip.images(references)
        found["clip.original"] = extractors.clip.images(originals)
        for which, texts in captions.items():
            found[f"clip.{which}"] = extractors.clip.texts(texts)
    if extractors.dino is not None:
        found["dino.edit"] = extractors.dino.images(edits)
        found["dino.reference"] = extractors.dino.images(references)
    return found


class ByRow(Metric):
    """Keeps something of each row, on the CPU.

    Both states are flat and fp64: a rank that saw no row gives such an empty one.
    """

    full_state_update = False
    rows: list[Tensor] | Tensor
    kept: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self.add_state("rows", [], "cat")
        self.add_state("kept", [], "cat")

    def find(self, seen: Seen) -> Tensor:
        """[n, ...] fp64, of each row."""
        raise NotImplementedError

    def update(self, rows: Tensor, seen: Seen) -> None:
        """Args: rows: [n] int64."""
        if isinstance(self.rows, list) and isinstance(self.kept, list):
            self.rows.append(rows.double())
            self.kept.append(self.find(seen).double().flatten())

    def in_order(self) -> tuple[Tensor, Tensor]:
        """[n] rows and [n, width] of them, of this rank; inside `sync_context`, of all."""
        rows, kept = (
            dim_zero_cat([*state, torch.empty(0).double()]) for state in (self.rows, self.kept)
        )
        order = rows.argsort()
        return rows[order].long(), kept.view(len(rows), -1)[order]


class Score(ByRow):
    """A number of each row; computed is their mean."""

    def compute(self) -> Tensor:
        return self.in_order()[1].mean()

    def by_row(self) -> tuple[Tensor, Tensor]:
        """Rows and values, of all ranks."""
        with self.sync_context():
            rows, values = self.in_order()
        return rows, values.flatten()


class L1(Score):
    def find(self, seen: Seen) -> Tensor:
        return _each(mean_absolute_error, seen)


class L2(Score):
    def find(self, seen: Seen) -> Tensor:
        return _each(mean_squared_error, seen)


class Psnr(Score):
    """In dB, at most MOST_DB."""

    def find(self, seen: Seen) -> Tensor:
        return _each(lambda a, b: peak_signal_noise_ratio(a, b, data_range=1.0), seen).clamp(
            max=MOST_DB
        )


class Ssim(Score):
    def find(self, seen: Seen) -> Tensor:
        return _each(_ssim, seen)


class PerceptualDistance(Score):
    """LPIPS."""

    def __init__(self, net: Lpips) -> None:
        super().__init__()
        self._net = net

    def find(self, seen: Seen) -> Tensor:
        return _each(lambda a, b: self._net.distance(a[None], b[None])[0], seen)


class Similarity(Score):
    """The cosine of two of a row's features."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__()
        self._names = one, other

    def find(self, seen: Seen) -> Tensor:
        one, other = (seen.features[name].double() for name in self._names)
        return cosine_similarity(one, other, reduction="none")


class DirectionalSimilarity(Score):
    """The cosine of what changed in the image, and what changed in its caption, as CLIP sees it.

    Source: Gal et al. 2021 (arXiv:2108.00946), as Brooks et al. 2023 measure with it: differences
    of embeddings that have norm 1.
    """

    def find(self, seen: Seen) -> Tensor:
        edit, original, after, before = (
            nn.functional.normalize(seen.features[f"clip.{name}"].double(), dim=1)
            for name in ("edit", "original", "after", "before")
        )
        return cosine_similarity(edit - original, after - before, reduction="none")


class Precomputed(nn.Module):
    """Stands for the network of torchmetrics' FID and KID: they are given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(ByRow):
    """Between the features of all edits and of all references: FID, seen by another network.

    Args:
        extractor: clip or dino.
    """

    def __init__(self, extractor: str) -> None:
        super().__init__()
        self._names = f"{extractor}.edit", f"{extractor}.reference"

    def find(self, seen: Seen) -> Tensor:
        return torch.cat([seen.features[name] for name in self._names], dim=1)

    def compute(self) -> Tensor:
        edits, references = self.in_order()[1].chunk(2, dim=1)
        metric = FrechetInceptionDistance(Precomputed(edits.shape[1])).set_dtype(torch.float64)
        metric.update(references, real=True)
        metric.update(edits, real=False)
        return _alone(metric)


class KernelDistance(FrechetDistance):
    """KID, likewise: the mean over torchmetrics' subsets, which are always the same."""

    def compute(self) -> Tensor:
        edits, references = self.in_order()[1].chunk(2, dim=1)
        with warnings.catch_warnings(action="ignore"):  # that features are kept
            metric = KernelInceptionDistance(
                Precomputed(edits.shape[1]),
                subsets=KID_SUBSETS,
                subset_size=min(KID_SIZE, len(edits)),
            )
        metric.update(references, real=True)
        metric.update(edits, real=False)
        with torch.random.fork_rng(devices=[]):  # training draws nothing from it, others might
            torch.manual_seed(KID_SEED)
            return _alone(metric)


def _alone(metric: Metric) -> Tensor:
    """What it computes of what this rank gave it, which is of all ranks already; KID's mean."""
    metric._to_sync = False
    found = metric.compute()
    return (found[0] if isinstance(found, tuple) else found).double()


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A metric that can be asked for."""

    make: Callable[[Extractors], Metric]
    needs: tuple[str, ...] = ()  # extractors and captions
    higher_is_better: bool = True


def _of_lpips(extractors: Extractors) -> Metric:
    if extractors.lpips is None:
        raise ValueError("lpips needs its network")
    return PerceptualDistance(extractors.lpips)


METRICS: dict[str, Kind] = {
    "l1": Kind(make=lambda _: L1(), higher_is_better=False),
    "l2": Kind(make=lambda _: L2(), higher_is_better=False),
    "psnr": Kind(make=lambda _: Psnr()),
    "ssim": Kind(make=lambda _: Ssim()),
    "lpips": Kind(make=_of_lpips, needs=("lpips",), higher_is_better=False),
    "clip_image": Kind(make=lambda _: Similarity("clip.edit", "clip.reference"), needs=("clip",)),
    "clip_text": Kind(
        make=lambda _: Similarity("clip.edit", "clip.after"), needs=("clip", "after")
    ),
    "clip_direction": Kind(
        make=lambda _: DirectionalSimilarity(), needs=("clip", "before", "after")
    ),
    "dino": Kind(make=lambda _: Similarity("dino.edit", "dino.reference"), needs=("dino",)),
    "fid_clip": Kind(
        make=lambda _: FrechetDistance("clip"), needs=("clip",), higher_is_better=False
    ),
    "kid_clip": Kind(
        make=lambda _: KernelDistance("clip"), needs=("clip",), higher_is_better=False
    ),
    "fid_dino": Kind(
        make=lambda _: FrechetDistance("dino"), needs=("dino",), higher_is_better=False
    ),
    "kid_dino": Kind(
        make=lambda _: KernelDistance("dino"), needs=("dino",), higher_is_better=False
    ),
}
CAPTIONS = ("before", "after")  # of the image before the edit, and after it


def make_metrics(names: Collection[str], extractors: Extractors) -> dict[str, Metric]:
    """One of each; all that they need must be there."""
    return {name: METRICS[name].make(extractors) for name in names}


def _each(score: Callable[[Tensor, Tensor], Tensor], seen: Seen) -> Tensor:
    """[n] fp64: images may differ in size from row to row."""
    pairs = zip(seen.edits, seen.references, strict=True)
    return torch.stack([score(edit, truth).double() for edit, truth in pairs])


def _ssim(edit: Tensor, truth: Tensor) -> Tensor:
    found = structural_similarity_index_measure(edit[None], truth[None], data_range=1.0)
    return found if isinstance(found, Tensor) else found[0]


def to_tensor(image: Image.Image) -> Tensor:
    """[3, height, width] fp32, 0 to 1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous() / 255


def psnr(images: Sequence[Image.Image], truths: Sequence[Image.Image]) -> list[float]:
    """Peak signal-to-noise ratio of each image against its truth, in dB, at most MOST_DB.

    Args:
        images, truths: RGB, of one size in each pair.
    """
    edits, references = ([to_tensor(image) for image in group] for group in (images, truths))
    return Psnr().find(Seen(edits=edits, references=references)).tolist()


def mean_by_kind(values: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """Means of the values of each kind, kinds in the order they first appear."""
    groups: dict[str, list[float]] = defaultdict(list)
    for value, kind in zip(values, kinds, strict=True):
        groups[kind].append(value)
    return {kind: sum(group) / len(group) for kind, group in groups.items()}
