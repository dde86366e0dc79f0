"""How much of the gradients' exchange a backward hides: a model, no measurement.

DistributedDataParallel cuts the gradients into buckets in the order in which they are ready, and
exchanges a bucket once its last gradient is there, one bucket after another, beside the backward.
What is left when the backward ends is waited for. Ranks are taken to be equally fast, and the
exchange to take nothing from the backward: no core, no multiprocessor, no memory's time.

The time of an all-reduce: Thakur, Rabenseifner and Gropp 2005 (rings), Sanders, Speck and Traeff
2009 (two trees), both of which NCCL has.
"""

from collections.abc import Sequence
from typing import NamedTuple

BYTES = {"fp32": 4, "bf16": 2}  # of an element on its way


class Gradient(NamedTuple):
    """Of one parameter."""

    elements: int
    ready: float  # share of the backward's time after which it is there


class Bucket(NamedTuple):
    """What is exchanged at once."""

    elements: int
    ready: float  # as its last gradient


class Exchange(NamedTuple):
    """Milliseconds of all buckets."""

    total_ms: float
    exposed_ms: float  # after the backward


class Link(NamedTuple):
    """Of one GPU, as it is reached."""

    gb_per_s: float  # 1e9 bytes, one way
    latency_us: float  # of a message


class Cluster(NamedTuple):
    """Nodes of GPUs."""

    gpus_a_node: int
    inside: Link
    between: Link

    def all_reduce_ms(self, size_bytes: float, gpus: int) -> float:
        """By a ring inside each node, half of it before and half after the nodes exchange what
        each GPU then has of the sum; one after the other, which NCCL overlaps.

        Raises: ValueError: the GPUs fill no whole nodes.
        """
        local = min(gpus, self.gpus_a_node)
        if gpus % local:
            raise ValueError(f"{gpus} GPUs fill no nodes of {local}")
        nodes = gpus // local
        rings = ring_ms(size_bytes, local, self.inside)
        part, between = size_bytes / local, self.between
        return rings + min(ring_ms(part, nodes, between), trees_ms(part, nodes, between))


def ring_ms(size_bytes: float, ranks: int, link: Link) -> float:
    """All-reduce: each rank sends as many parts as there are other ranks, twice."""
    messages = 2 * (ranks - 1)
    return messages * (size_bytes / ranks / link.gb_per_s / 1e6 + link.latency_us / 1e3)


def trees_ms(size_bytes: float, ranks: int, link: Link) -> float:
    """All-reduce along two binary trees, up and down: more bytes than a ring's, fewer messages."""
    if ranks == 1:
        return 0.0
    levels = (ranks - 1).bit_length()
    return 2 * (size_bytes / link.gb_per_s / 1e6 + levels * link.latency_us / 1e3)


def buckets(gradients: Sequence[Gradient], bucket_mb: float) -> list[Bucket]:
    """As DDP cuts them: the gradient that fills a bucket of MiB of fp32 closes it.

    Args:
        gradients: in the order in which they are ready.
    """
    made, elements = [], 0
    for gradient in gradients:
        elements += gradient.elements
        if elements * BYTES["fp32"] >= bucket_mb * 2**20:
            made.append(Bucket(elements, gradient.ready))
            elements = 0
    if elements:
        made.append(Bucket(elements, gradients[-1].ready))
    return made


def exchange(ready_ms: Sequence[float], takes_ms: Sequence[float], backward_ms: float) -> Exchange:
    """Of buckets, one after another: when each is ready, and what its all-reduce takes."""
    free_ms = 0.0  # when the one before it is done
    for ready, takes in zip(ready_ms, takes_ms, strict=True):
        free_ms = max(ready, free_ms) + takes
    return Exchange(sum(takes_ms), max(0.0, free_ms - backward_ms))
