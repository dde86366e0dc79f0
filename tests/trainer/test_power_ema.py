"""Power-law averages against what the paper defines: integrals and sums, written out anew."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fusedit.trainer.power_ema import PowerEma, gamma_of, inner_products, mix_for

LENGTHS = (0.05, 0.1)


def profile(length, steps, at):
    """[at] fp64: what each step weighs in the average after `steps` of them, by its recursion."""
    gamma = exponent(length)
    weights = np.zeros(at)
    for t in range(1, steps + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        weights *= beta
        weights[t - 1] += 1 - beta
    return weights


def exponent(length):
    """By bisection of the length's definition, not by the cubic's roots."""
    low, high = -0.3, 1e6
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        found = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3))
        low, high = (middle, high) if found > length else (low, middle)
    return low


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.25])
def test_a_length_is_the_profiles_relative_standard_deviation(length):
    steps = 2000
    weights, times = profile(length, steps, steps), np.arange(steps) + 0.5
    assert weights.sum() == pytest.approx(1)
    mean = (weights * times).sum()
    deviation = math.sqrt((weights * (times - mean) ** 2).sum())
    assert deviation / steps == pytest.approx(length, rel=1e-3)
    assert gamma_of(length) == pytest.approx(exponent(length), rel=1e-9)


def test_lengths_of_the_paper():
    """Karras et al. 2024, section 3.1: 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert [round(gamma_of(length), 2) for length in LENGTHS] == [16.97, 6.94]
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-6)  # the plain mean


@pytest.mark.parametrize("length", [0.05, 0.1, 0.28])
def test_the_average_is_the_profiles(length):
    torch.manual_seed(0)
    steps = 60
    parameter = nn.Parameter(torch.full((5,), 10.0))  # what a run starts from has no part in it
    average, seen = PowerEma({"weight": parameter}, length), []
    for step in range(1, steps + 1):
        parameter.data = torch.randn(5)
        seen.append(parameter.data.double().numpy())
        weight = torch.tensor(average.weight(step), dtype=torch.float64)
        average.update(weight, torch.tensor(True))
    expected = profile(length, steps, steps) @ np.stack(seen)
    np.testing.assert_allclose(average.averages["weight"], expected, rtol=1e-5, atol=1e-6)


def on_a_grid(length, time, until, points=200_000):
    """[points] the continuous profile from 0 to `until`."""
    gamma, tau = exponent(length), (np.arange(points) + 0.5) / points * until
    return np.where(tau <= time, (gamma + 1) * (tau / time) ** gamma / time, 0.0)


def test_inner_products_are_integrals():
    pairs = [(300, 0.05), (1000, 0.1), (1000, 0.2), (450, 0.1)]
    times = torch.tensor([float(time) for time, _ in pairs], dtype=torch.float64)
    gammas = torch.tensor([exponent(length) for _, length in pairs], dtype=torch.float64)
    found = inner_products(times, gammas, times, gammas)
    grids = np.stack([on_a_grid(length, time, 1000) for time, length in pairs])
    np.testing.assert_allclose(found, grids @ grids.T * 1000 / 200_000, rtol=1e-3)


@pytest.mark.parametrize("length", [0.03, 0.06, 0.075, 0.15])
@pytest.mark.parametrize("moments", [1, 4, 8])
def test_the_weights_are_those_of_least_squares(moments, length):
    """Of all that sum to 1: the last is 1 less the others, which NumPy finds on a grid."""
    snapshots = [(1000 * (i + 1) // moments, kept) for i in range(moments) for kept in LENGTHS]
    grids = np.stack([on_a_grid(kept, time, 1000) for time, kept in snapshots])
    wanted = on_a_grid(length, 1000, 1000)
    others = (grids[:-1] - grids[-1]).T
    free = np.linalg.lstsq(others, wanted - grids[-1], rcond=None)[0]
    expected = np.append(free, 1 - free.sum())
    mix = mix_for(snapshots, 1000, length)
    np.testing.assert_allclose(mix.weights, expected, atol=2e-3)
    assert sum(mix.weights) == pytest.approx(1, abs=1e-12)
    error = np.linalg.norm(expected @ grids - wanted) / np.linalg.norm(wanted)
    assert mix.error == pytest.approx(error, rel=1e-2)


def test_a_length_that_was_kept_is_its_last_snapshot():
    snapshots = [(step, kept) for step in (100, 200, 300) for kept in LENGTHS]
    mix = mix_for(snapshots, 300, 0.05)
    np.testing.assert_allclose(mix.weights, [0, 0, 0, 0, 1, 0], atol=1e-9)
    assert mix.error < 1e-6


@pytest.mark.parametrize("length", [0.06, 0.075, 0.15])
def test_of_snapshots_comes_the_average_that_was_not_kept(length):
    """Of weights that wander: nearer by far than those that were kept."""
    steps, every = 1024, 64
    wander = np.random.default_rng(0).standard_normal((steps, 50)).cumsum(axis=0)
    kept = {
        (step, one): profile(one, step, steps) @ wander
        for step in range(every, steps + 1, every)
        for one in LENGTHS
    }
    truth = profile(length, steps, steps) @ wander
    mix = mix_for(list(kept), steps, length)
    made = np.array(mix.weights) @ np.stack(list(kept.values()))

    def distance(average):
        return np.linalg.norm(average - truth)

    assert distance(made) < 0.05 * min(distance(kept[steps, one]) for one in LENGTHS)


def test_many_snapshots_are_solved_as_well():
    snapshots = [(100 * (i + 1), kept) for i in range(150) for kept in LENGTHS]
    mix = mix_for(snapshots, 15_000, 0.075)
    assert mix.error < 1e-3
    assert max(map(abs, mix.weights)) < 2
