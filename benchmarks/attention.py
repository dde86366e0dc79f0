"""Attention as it is timed: apart from the projections, which are separate tensors for every rival.

The work is counted as the literature counts it: two products forward, five backward.
Source: Dao 2023 (arXiv:2307.08691), section 4.1.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.attention import attention, attention_reference
from .accuracy import Inputs
from .shapes import AttentionShape

MOST_SCORES = 2**28  # at a time in fp64: 2 GiB, of which PyTorch holds a handful


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v)


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attention_reference; in fp64, where PyTorch keeps every score, some heads at a time.

    At 1024 px one head of one sample has 2 GiB of scores, so the backward makes them again.
    """
    if q.dtype != torch.float64:
        return attention_reference(q, k, v)
    heads = max(1, MOST_SCORES // (q.shape[1] * k.shape[1]))
    samples = []
    for sample in zip(q.split(1), k.split(1), v.split(1), strict=True):
        some = zip(*(one.split(heads, dim=2) for one in sample), strict=True)
        samples.append(torch.cat([_again(*projections) for projections in some], dim=2))
    return torch.cat(samples)


def _again(*projections: Tensor) -> Tensor:
    out: Tensor = checkpoint(
        attention_reference, *projections, use_reentrant=False, preserve_rng_state=False
    )
    return out


def inputs(shape: AttentionShape, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows = {"q": shape.queries, "k": shape.keys, "v": shape.keys}
    sizes = {name: (batch, count, shape.heads, shape.width) for name, count in rows.items()}
    return {
        name: torch.randn(size, dtype=dtype, device=device).requires_grad_()
        for name, size in sizes.items()
    }


def least_bytes(inputs: Inputs) -> tuple[int, int]:
    """q, k, v -> out; these and its gradient -> three gradients."""
    queries, keys = inputs["q"].nbytes, inputs["k"].nbytes
    return 2 * queries + 2 * keys, 4 * queries + 4 * keys


def flops(inputs: Inputs) -> tuple[int, int]:
    n, queries, heads, width = inputs["q"].shape
    forward = 4 * n * heads * queries * inputs["k"].shape[1] * width
    return forward, forward * 5 // 2
