import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import GPU

from fusedit.kernels import philox as module
from fusedit.kernels.philox import normal, philox, uniform, words

DEVICE = "cuda" if GPU else "cpu"
NORMAL_ULPS = 8
EVERY_WORD = 2**32 - 1
BLOCK = 4096

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


# The same in Triton. The kernels are made where they are launched, as conftest wants them then.


def _philox_kernel(words, drawn, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    c0 = tl.load(words + at, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(words + size + at, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(words + 2 * size + at, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(words + 3 * size + at, mask=inside, other=0).to(tl.uint32)
    k0 = tl.load(words + 4 * size + at, mask=inside, other=0).to(tl.uint32)
    k1 = tl.load(words + 5 * size + at, mask=inside, other=0).to(tl.uint32)
    c0, c1, c2, c3 = module.philox4x32_10(c0, c1, c2, c3, k0, k1)
    tl.store(drawn + at, c0.to(tl.int64), mask=inside)
    tl.store(drawn + size + at, c1.to(tl.int64), mask=inside)
    tl.store(drawn + 2 * size + at, c2.to(tl.int64), mask=inside)
    tl.store(drawn + 3 * size + at, c3.to(tl.int64), mask=inside)


def _values_kernel(words, uniforms, normals, pairs, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    first = tl.load(words + 2 * at, mask=inside, other=0).to(tl.uint32)
    second = tl.load(words + 2 * at + 1, mask=inside, other=0).to(tl.uint32)
    x, y = module.triton_normal(first, second)
    tl.store(normals + 2 * at, x, mask=inside)
    tl.store(normals + 2 * at + 1, y, mask=inside)
    tl.store(uniforms + 2 * at, module.triton_uniform(first), mask=inside)
    tl.store(uniforms + 2 * at + 1, module.triton_uniform(second), mask=inside)


def triton_philox(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[4, n] and [2, n] int64 words -> [4, n] int64, by the kernel."""
    given = torch.cat((counters, keys)).to(DEVICE)
    drawn = given.new_full((4, given.shape[1]), -1)
    grid = (triton.cdiv(given.shape[1], BLOCK),)
    kernel: Any = triton.jit(_philox_kernel)
    kernel[grid](given, drawn, given.shape[1], BLOCK=BLOCK)
    return drawn.cpu()


def triton_values(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] int64 words, n even -> their uniforms and normals, fp32, by the kernel."""
    drawn = drawn.to(DEVICE)
    uniforms = torch.full(drawn.shape, torch.nan, device=DEVICE)
    normals = uniforms.clone()
    pairs = drawn.numel() // 2
    grid = (triton.cdiv(pairs, BLOCK),)
    kernel: Any = triton.jit(_values_kernel)
    kernel[grid](drawn, uniforms, normals, pairs, BLOCK=BLOCK)
    return uniforms.cpu(), normals.cpu()


def ulps(ours: torch.Tensor, definition: torch.Tensor) -> torch.Tensor:
    """Distance in units of the last place of the definition, fp64."""
    size = definition.abs()
    last_place = torch.nextafter(size, torch.tensor(math.inf)).double() - size.double()
    return (ours.double() - definition.double()).abs() / last_place


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors_in_triton(counter, key, expected):
    drawn = triton_philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
    assert tuple(drawn[:, 0].tolist()) == expected


WORD = st.one_of(st.integers(0, EVERY_WORD), st.sampled_from([0, 1, 2**31 - 1, 2**31, EVERY_WORD]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=8), WORD, WORD)
def test_triton_draws_the_words_of_the_definition(kernels_run, counters, low, high):
    counter = torch.tensor(counters).T
    keys = torch.tensor([[low], [high]]).expand(2, counter.shape[1])
    expected = torch.stack(philox((low, high), tuple(counter)))
    assert torch.equal(triton_philox(counter, keys), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), WORD, st.integers(0, 2**63 - 1), st.integers(1, 40))
def test_triton_draws_the_words_of_a_position(kernels_run, seed, purpose, position, count):
    blocks = torch.arange(-(-count // 4))
    counter = (
        blocks,
        *(
            torch.full_like(blocks, value)
            for value in (purpose, position & EVERY_WORD, position >> 32)
        ),
    )
    keys = torch.tensor([[seed & EVERY_WORD], [seed >> 32]]).expand(2, len(blocks))
    drawn = triton_philox(torch.stack(counter), keys).T.flatten()[:count]
    assert torch.equal(drawn, words(seed, purpose, torch.tensor([position]), count)[0])


def edges() -> torch.Tensor:
    """Pairs of words at every corner of Box-Muller, and beside it.

    Radii of 0 and of the largest, steps of fp32's rounding of the first word, the logarithm's
    exponents and the fold of its mantissa; the second word's quarter turns, their ends and middles.
    """
    powers = [2**power for power in range(33)] + [2**24 * 3, 2**32 - 256, 2**32 - 128]
    folds = [round(2.0**power * math.sqrt(0.5)) for power in range(26, 33)]
    firsts = {max(0, min(EVERY_WORD, at + by)) for at in powers + folds for by in range(-3, 4)}
    turns = [quarter * 2**30 + at for quarter in range(5) for at in (0, 2**29, 2**28, 64)]
    seconds = {max(0, min(EVERY_WORD, at + by)) for at in turns for by in (-65, -64, -1, 0, 1, 63)}
    return torch.cartesian_prod(torch.tensor(sorted(firsts)), torch.tensor(sorted(seconds)))


@pytest.mark.parametrize("kind", ["many", "edges", "near 1"])
def test_triton_normals_are_within_8_ulp_of_the_definition(kind):
    generator = torch.Generator().manual_seed(0)
    drawn = words(5, 0, torch.arange(64), 8192).flatten() if kind == "many" else edges().flatten()
    if kind == "near 1":  # where the radius nears 0
        drawn = torch.randint(0, 2**32, (2**17, 2), generator=generator)
        drawn[:, 0] = EVERY_WORD - torch.randint(0, 2**16, (2**17,), generator=generator)
        drawn = drawn.flatten()
    uniforms, normals = triton_values(drawn)
    assert torch.equal(uniforms, uniform(drawn))
    definition = normal(drawn)
    assert float(ulps(normals, definition).max()) <= NORMAL_ULPS
    assert float(normals.abs().max()) < 6.8


def test_the_edges_hold_radius_zero_and_every_quarter():
    first, second = edges().unbind(1)
    assert (normal(edges())[first == EVERY_WORD] == 0).all()
    assert set((second >> 30).tolist()) == {0, 1, 2, 3}
    assert {0, EVERY_WORD} <= set(first.tolist())
    assert {0, EVERY_WORD} <= set(second.tolist())


def test_the_bar_sees_a_normal_9_ulp_off():
    definition = normal(words(5, 0, torch.arange(4), 64))
    last_place = torch.nextafter(definition.abs(), torch.tensor(math.inf)) - definition.abs()
    assert float(ulps(definition + 9 * last_place, definition).max()) > NORMAL_ULPS
