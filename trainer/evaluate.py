"""How near an edit is to the truth."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

MOST_DB = 100.0  # stands for the infinite PSNR of images that are alike in every bit


def psnr(images: Sequence[Image.Image], truths: Sequence[Image.Image]) -> list[float]:
    """Peak signal-to-noise ratio of each image against its truth, in dB, at most MOST_DB.

    Args:
        images, truths: RGB, all of one size.
    """
    ours, theirs = (
        torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in group])).float()
        for group in (images, truths)
    )
    values = peak_signal_noise_ratio(
        ours, theirs, data_range=(0.0, 255.0), reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=MOST_DB).tolist()


def mean_by_kind(values: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """Means of the values of each kind, kinds in the order they first appear."""
    groups: dict[str, list[float]] = defaultdict(list)
    for value, kind in zip(values, kinds, strict=True):
        groups[kind].append(value)
    return {kind: sum(group) / len(group) for kind, group in groups.items()}
