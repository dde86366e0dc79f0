import math

import pytest
import torch

from fusedit.kernels.philox import normal, philox, uniform, words

# Random123's kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter, key, expected):
    drawn = philox(key, tuple(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in drawn) == expected


def test_a_position_draws_the_same_alone_and_in_any_batch():
    together = words(7, 3, torch.tensor([5, 2**40 + 1, 9]), 10)
    alone = words(7, 3, torch.tensor([2**40 + 1]), 10)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(words(7, 3, torch.tensor([9]), 3), together[2:, :3])


def test_seed_purpose_and_position_each_change_every_draw():
    base = words(1, 1, torch.tensor([1]), 8)
    others = [
        words(1 + 2**32, 1, torch.tensor([1]), 8),
        words(2, 1, torch.tensor([1]), 8),
        words(1, 2, torch.tensor([1]), 8),
        words(1, 1, torch.tensor([1 + 2**32]), 8),
    ]
    for other in others:
        assert not (base == other).any()


def test_uniform_reaches_zero_and_never_one():
    edge = uniform(torch.tensor([0, 2**32 - 1]))
    assert edge[0] == 0
    assert edge[1] < 1


def test_normals_follow_box_muller_in_fp64():
    drawn = words(0, 0, torch.arange(100), 64)
    away_from_zero = (drawn[:, ::2].float() * 2**-32 + 2**-33).double()  # rounded as fp32 rounds
    radius = torch.sqrt(-2 * torch.log(away_from_zero))
    turn = (drawn[:, 1::2] >> 6).double() * 2**-26 - 0.125  # the polynomials' 26 bits
    exact = torch.stack(
        (radius * torch.cos(2 * math.pi * turn), radius * torch.sin(2 * math.pi * turn)), -1
    ).flatten(-2)
    torch.testing.assert_close(normal(drawn).double(), exact, rtol=0, atol=1e-6)


def test_normals_have_the_moments_of_a_normal():
    drawn = normal(words(3, 0, torch.arange(1000), 1000)).double()
    n = drawn.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(drawn.pow(power).mean() - expected) < 5 * math.sqrt(variance / n)
    assert abs((drawn[:, ::2] * drawn[:, 1::2]).mean()) < 5 / math.sqrt(n / 2)
