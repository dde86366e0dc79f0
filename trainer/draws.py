"""Every random number of a run: a function of (seed, position in the data, purpose).

There is no generator state anywhere, so a resumed run draws what it would have drawn, any split
into ranks and micro-steps draws the same, and validation cannot disturb training.
"""

from enum import IntEnum

import torch
from torch import Tensor

from ..kernels.philox import normal, uniform, words


class Purpose(IntEnum):
    """What a draw is for; the number is part of its counter. Never renumber: runs would change."""

    ORDER = 0  # the epoch's permutation; position: the epoch
    ROWS = 1  # which rows --max_train_samples and --held_out take; position: 0
    PAIR = 2  # which of a prompt's images (the paper's layout)
    RESIZE = 3
    CROP = 4
    FLIP = 5
    POSTERIOR = 6  # noise of the VAE's posterior sample
    NOISE = 7  # noise of the diffusion
    TIMESTEP = 8
    DROPOUT = 9  # which conditions are hidden
    VALIDATION_NOISE = 10  # position: the row or picture
    HELD_OUT_POSTERIOR = 11  # held-out loss; position: the row
    HELD_OUT_NOISE = 12
    HELD_OUT_TIMESTEP = 13
    ROUNDING = 14  # of bf16 moments; position: the optimizer's step
    CACHE_CROPS = 15  # the crops a cache keeps; position: the row; not of the run's seed
    CACHED_CROP = 16  # which of them
    NOISE_OFFSET = 17  # what --noise_offset adds to a channel of the noise
    INPUT_PERTURBATION = 18  # what --input_perturbation adds to the noise of the input alone
    ADAPTER = 30  # a LoRA's first matrices; position: the layer
    ADAPTER_DROPOUT = 31  # what it hides; the layer is in the purpose's upper half


def draw_uniform(seed: int, purpose: Purpose, positions: Tensor, count: int = 1) -> Tensor:
    """[n, count] fp32 in [0, 1), for positions [n] int64."""
    return uniform(words(seed, purpose, positions, count))


def draw_normal(seed: int, purpose: Purpose, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[n, *shape] fp32 standard normals, for positions [n] int64; elements in row-major order."""
    count = 1
    for size in shape:
        count *= size
    drawn = words(seed, purpose, positions, count + count % 2)
    return normal(drawn)[:, :count].reshape(-1, *shape)


def draw_integers(seed: int, purpose: Purpose, positions: Tensor, below: int) -> Tensor:
    """[n] int64 in [0, below), for positions [n] int64; each value within 2**-32 of fair."""
    return words(seed, purpose, positions, 1)[:, 0] * below >> 32


def permutation(seed: int, purpose: Purpose, position: int, size: int) -> Tensor:
    """A random order of range(size): [size] int64, by sorting 63-bit keys, ties by index."""
    drawn = words(seed, purpose, torch.tensor([position]), 2 * size)[0].unflatten(0, (size, 2))
    return torch.argsort((drawn[:, 0] >> 1 << 32) | drawn[:, 1], stable=True)
