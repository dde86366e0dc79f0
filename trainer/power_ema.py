"""Averages by a power law, and how one of any length is made of snapshots of a few.

An average's length is its relative standard deviation: of the steps it averages, weighted as it
weights them, over the steps of the run so far. Times are optimizer steps; all here is fp64.
Source: Karras et al. 2024 (arXiv:2312.02696), section 3.1, equations 1 to 5, and appendix C.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .ema import Averages

SNAPSHOTS = "post_hoc_ema"  # their folder, in a run's output folder


def part_of(length: float) -> str:
    """What the average of a length is called in checkpoints and snapshots."""
    return f"ema_{length}"


def gamma_of(length: float) -> float:
    """The exponent whose average has a length, which is above 0 and at most 12**-0.5.

    Source: algorithm 2; length**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3)).
    """
    t = length**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class PowerEma(Averages):
    """The average in which step k of t weighs as much as k**gamma, for a snapshot now and then.

    Source: equation 1, with beta_t = (1 - 1 / t)**(gamma + 1): the first step is taken whole, so
    that the weights the run starts from have no part in it.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], length: float) -> None:
        super().__init__(named)
        self.power = gamma_of(length) + 1

    def weight(self, n: int) -> float:
        return -math.expm1(self.power * math.log1p(-1 / n)) if n > 1 else 1.0


class Mix(NamedTuple):
    """An average made of snapshots."""

    weights: list[float]  # of each snapshot; they sum to 1
    error: float  # L2 norm of what its profile lacks, in parts of that of the profile asked for


def mix_for(snapshots: Sequence[tuple[int, float]], step: int, length: float) -> Mix:
    """The weights of the snapshots that come closest to the average of a length at a step.

    Closest by the squared distance of profiles, what each step weighs, as in the paper's appendix.
    Ours is that the weights sum to 1, as those of an average do: the paper's get there only
    with many snapshots, and 1% beside 1 would shrink the model by 1%.

    Args:
        snapshots: step and length of each, all different, none later than `step`.
    """
    steps, lengths = zip(*snapshots, strict=True)
    times = torch.tensor(steps, dtype=torch.float64)
    gammas = torch.tensor([gamma_of(one) for one in lengths], dtype=torch.float64)
    time = torch.tensor([step], dtype=torch.float64)
    gamma = torch.tensor([gamma_of(length)], dtype=torch.float64)
    among = inner_products(times, gammas, times, gammas)
    asked = inner_products(times, gammas, time, gamma)[:, 0]
    whole = inner_products(time, gamma, time, gamma)[0, 0]
    # Profiles of norm 1, so that early ones, which are short and high, do not dwarf the others;
    # then the multiplier of the sum's condition.
    norms = among.diagonal().sqrt()
    count = len(snapshots)
    system = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = among / norms[:, None] / norms
    system[:count, count] = system[count, :count] = norms.min() / norms
    right = torch.cat((asked / norms, norms.min()[None]))
    weights = torch.linalg.solve(system, right)[:count] / norms
    square = whole - 2 * weights @ asked + weights @ among @ weights
    return Mix(weights.tolist(), float((square.clamp(min=0) / whole).sqrt()))


def inner_products(times_a: Tensor, gammas_a: Tensor, times_b: Tensor, gammas_b: Tensor) -> Tensor:
    """[a, b] fp64, the integrals of the products of two lists of profiles over all times.

    A profile is (gamma + 1) tau**gamma / t**(gamma + 1) for tau from 0 to t, and its integral over
    a step is exactly what the average gives to that step.
    Source: appendix C, algorithm 3, `p_dot_p`.
    """
    time_a, gamma_a = times_a[:, None], gammas_a[:, None]
    exponent = torch.where(time_a < times_b, gammas_b, -gamma_a)
    above = (gamma_a + 1) * (gammas_b + 1) * (time_a / times_b) ** exponent
    return above / ((gamma_a + gammas_b + 1) * torch.maximum(time_a, times_b))
