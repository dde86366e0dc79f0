"""Philox 4x32-10: random numbers that are a function of a key and a counter, with no state.

The definition in PyTorch, and the same for Triton kernels. Integers are equal bit for bit, on any
device.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; the
constants and test vectors are those of Random123.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the key
MASK = 0xFFFFFFFF  # words are uint32, carried in int64

# Taylor terms of sin and cos, enough for fp32 on [-pi/4, pi/4] (the next term is below 2**-27).
SIN_TERMS = (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880)
COS_TERMS = (1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320)

# What kernels read.
MULTIPLIER_0 = tl.constexpr(MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[1])
WEYL_0 = tl.constexpr(WEYL[0])
WEYL_1 = tl.constexpr(WEYL[1])
UNIT_24 = tl.constexpr(2**-24)
UNIT_32 = tl.constexpr(2**-32)
HALF_UNIT_32 = tl.constexpr(2**-33)
HALF_PI = tl.constexpr(math.pi / 2)
LOG_2 = tl.constexpr(math.log(2))
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)  # of the fp32 next to sqrt(1/2)
MANTISSA_BITS = tl.constexpr(23)


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Four random words for each counter.

    Args:
        key: two uint32 words, low first.
        counter: four int64 tensors that broadcast together, each in [0, 2**32).

    Returns: four int64 tensors of the broadcast shape, in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; int64 wraps, which keeps all 64 bits."""
    product = word * multiplier
    return (product >> 32) & MASK, product & MASK


def words(seed: int, purpose: int, positions: Tensor, count: int) -> Tensor:
    """Random words for each position.

    Args:
        seed: 0 to 2**64 - 1, the key.
        purpose: 0 to 2**32 - 1, keeps the draws of different uses apart.
        positions: [n] int64, not negative: what the draws belong to.
        count: words for each position.

    Returns: [n, count] int64 in [0, 2**32), word i from counter (i / 4, purpose, position).
    """
    blocks = torch.arange(-(-count // 4), device=positions.device)[None, :]
    position = positions[:, None]
    counter = (blocks, torch.full_like(blocks, purpose), position & MASK, position >> 32)
    drawn = philox((seed & MASK, seed >> 32), counter)
    return torch.stack(drawn, dim=-1).flatten(1)[:, :count]


def uniform(word: Tensor) -> Tensor:
    """fp32 in [0, 1) from the word's upper 24 bits, so that 1 is never reached by rounding."""
    return (word >> 8).to(torch.float32) * 2**-24


def normal(word: Tensor) -> Tensor:
    """Standard normals by Box-Muller, each pair of words giving a pair of normals.

    Args:
        word: [..., n] int64 with n even, in [0, 2**32).

    Returns: [..., n] fp32, within 6.8 of 0.
    """
    first, second = word.unflatten(-1, (-1, 2)).unbind(-1)
    away_from_zero = first.to(torch.float32) * 2**-32 + 2**-33  # (0, 1]
    radius = torch.sqrt(-2.0 * torch.log(away_from_zero))
    # The angle is a quarter turn (2 bits) plus an offset in [-pi/4, pi/4), so that short
    # polynomials serve and nothing is reduced.
    quarter = second >> 30
    offset = ((second >> 6) & 0xFFFFFF).to(torch.float32) * 2**-24 - 0.5
    angle = offset * (math.pi / 2)
    sine, cosine = angle * _series(angle, SIN_TERMS), _series(angle, COS_TERMS)
    x = torch.where(quarter % 2 == 0, cosine, sine) * torch.where((quarter + 1) & 2 == 0, 1, -1)
    y = torch.where(quarter % 2 == 0, sine, cosine) * torch.where(quarter < 2, 1, -1)
    return torch.stack((radius * x, radius * y), dim=-1).flatten(-2)


def _series(angle: Tensor, terms: tuple[float, ...]) -> Tensor:
    """terms[0] + terms[1] angle**2 + terms[2] angle**4 + ..., by Horner's rule."""
    square = angle * angle
    total = torch.full_like(angle, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * square + term
    return total


# From here on the same in Triton, for kernels that draw where they compute. Integers and uniforms
# are those above, bit for bit; normals are within 7 ulp of those above. In units of 2**-24 of the
# value, over all words, multiplies and adds fused or not: radius 2.6, sine or cosine 2.1, the two
# products 2.


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Four random words, uint32, for counters and a key of uint32 that broadcast together."""
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        high0, low0 = tl.umulhi(c0, MULTIPLIER_0), c0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, MULTIPLIER_1), c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + WEYL_0, k1 + WEYL_1
    return c0, c1, c2, c3


@triton.jit
def triton_uniform(word):
    """`uniform` of uint32 words."""
    return (word >> 8).to(tl.float32) * UNIT_24


@triton.jit
def triton_normal(first, second):
    """`normal` of pairs of uint32 words: the two normals of each pair, as two tensors."""
    radius = tl.sqrt_rn(-2.0 * _log(first.to(tl.float32) * UNIT_32 + HALF_UNIT_32))
    quarter = second >> 30
    angle = (((second >> 6) & 0xFFFFFF).to(tl.float32) * UNIT_24 - 0.5) * HALF_PI
    square = angle * angle
    sine = angle * _horner(square, 1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880)
    cosine = _horner(square, 1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320)
    even = (quarter & 1) == 0
    x, y = tl.where(even, cosine, sine), tl.where(even, sine, cosine)
    x = tl.where(((quarter + 1) & 2) == 0, x, -x)
    y = tl.where(quarter < 2, y, -y)
    return radius * x, radius * y


@triton.jit
def _log(value):
    """Logarithm of normal fp32 in (0, 1], within 2 ulp; tl.log's error is absolute, bad near 1.

    value = mantissa * 2**exponent with the mantissa in [sqrt(1/2), sqrt(2)), and log(mantissa) =
    2 atanh(ratio) with a ratio within 0.172: the first term left out is below 2**-34 of the sum.
    From sqrt(1/2) to 1 the exponent is 0, so nothing cancels near 1.
    """
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    mantissa = (bits - (exponent << MANTISSA_BITS)).to(tl.float32, bitcast=True)
    ratio = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    square = ratio * ratio
    tail = square * _horner(square, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11)
    twice = 2.0 * ratio
    return exponent.to(tl.float32) * LOG_2 + (twice + twice * tail)


@triton.jit
def _horner(x, term0, term1, term2, term3, term4):
    return (((term4 * x + term3) * x + term2) * x + term1) * x + term0
