"""Stable Diffusion 1.5 at 256 px on 8, 64 and 512 GPUs, and the paper's run on 8: a model.

By `overlap.py`, from the speed of one GPU, when its gradients are ready, and the links' speed. Each
GPU keeps its batch, so that of all grows with them. Not in it: slower ranks, the loader, start,
validation and checkpoints, and what fills the cache.
"""

import argparse
from typing import NamedTuple

from . import harness
from .flags import Flags, existing_record, positive
from .gradients import Backward
from .harness import Record
from .overlap import BYTES, Bucket, Cluster, Exchange, Link, buckets, exchange
from .update import TARGETS

GPUS = (8, 64, 512)
PIXELS = 256
# Of an update, in a backward that is counted: clip, AdamW, averages and copy in one pass, 38 bytes
# for each of 859.5 M parameters at 3.0 TB/s. The speed model's, not measured.
OPTIMIZER_MS = 859.5e6 * 38 / 3.0e9
# Brooks et al. 2023 (arXiv:2211.09800): 8 A100s, each 32 images in 4 micro-steps.
RECIPE_STEPS, RECIPE_BATCH, PAPER_GPUS, PAPER_HOURS = 10_000, 1024, 8, 25.5
GOAL_HOURS = 1.0  # for it on 8 H100s


def add_flags(flags: Flags) -> None:
    """What is known of GPUs and links.

    Nominal speeds are of NVIDIA's data sheets for H100 SXM (NVLink 900 GB/s, both ways together)
    and DGX H100 (a 400 Gb/s port for each GPU), latencies of NCCL 2.30's own model (its
    src/graph/tuning.cc, protocol Simple). The link efficiency and the price are assumed.
    """
    flags.add_argument("--update", type=existing_record, help="a record of update.py, on one GPU")
    flags.add_argument("--images_per_s", type=above_zero, help="of one GPU, instead")
    flags.add_argument("--batch", type=positive, default=64, help="of one GPU and micro-step")
    flags.add_argument("--bucket_mb", type=positive, default=100, help="as fusedit train has it")
    flags.add_argument("--gpus_a_node", type=positive, default=8)
    flags.add_argument("--nvlink_gb_per_s", type=above_zero, default=450, help="one way, of a GPU")
    flags.add_argument("--network_gb_per_s", type=above_zero, default=50, help="one way, of a GPU")
    flags.add_argument("--link_efficiency", type=above_zero, default=0.8, help="reached: assumed")
    flags.add_argument("--nvlink_us", type=above_zero, default=3.4, help="of a message")
    flags.add_argument("--network_us", type=above_zero, default=14, help="of a message")
    flags.add_argument("--price_per_gpu_hour", type=above_zero, default=2, help="assumed")


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def check(parser: Flags, chosen: argparse.Namespace) -> None:
    """Ends the command where the flags of `add_flags` do not go together."""
    if chosen.update is not None and chosen.images_per_s is not None:
        parser.error("--update has images a second too: leave out --images_per_s")
    if chosen.update is not None and fastest(chosen.update, chosen.batch) is None:
        parser.error(f"--update has no right row of {_shape(chosen.batch)}; change --batch")
    if any(gpus % min(gpus, chosen.gpus_a_node) for gpus in GPUS):
        parser.error(f"--gpus_a_node must divide {GPUS}, got {chosen.gpus_a_node}")


class OneGpu(NamedTuple):
    """What is known of it."""

    images: int  # of an update
    step_ms: float  # of the update
    backward_ms: float
    buckets: list[Bucket]
    source: str  # a line for the reader


def one_gpu(flags: argparse.Namespace, backward: Backward) -> OneGpu:
    """By the record that was given, or the number, or what was measured just now, or the target."""
    found = None if flags.update is None else fastest(flags.update, flags.batch)
    if found is not None:
        speed, source = found
    elif flags.images_per_s is not None:
        speed, source = flags.images_per_s, "given as --images_per_s"
    elif backward.step_ms is not None:
        speed = 1e3 * flags.batch / backward.step_ms
        source = "measured in this run, without a CUDA graph"
    else:
        speed, source = TARGETS[_shape(64)], "the target for 64 images, which nobody has measured"
    step_ms, share, ready = 1e3 * flags.batch / speed, backward.share, "as measured in this run"
    if backward.step_ms is None:
        share *= max(0.0, 1 - OPTIMIZER_MS / step_ms)
        ready = "as counted, as if every FLOP took equally long"
    return OneGpu(
        flags.batch,
        step_ms,
        share * step_ms,
        buckets(backward.gradients, flags.bucket_mb),
        f"One GPU: {speed:.0f} images/s, {source}. Gradients are ready {ready}.",
    )


def fastest(record: Record, batch: int) -> tuple[float, str] | None:
    """Images a second of the fastest right way at this batch, and where they were measured."""
    found = [
        (row["values"]["images_per_s"], row["labels"]["way"])
        for row in record["rows"]
        if (row["labels"]["op"], row["verdict"]) == ("update", "right")
        and "{preset}:{shape}".format(**row["labels"]) == _shape(batch)
    ]
    if not found:
        return None
    speed, way = max(found)
    source = record["provenance"]
    where = f"{source['machine']['gpu']}, {way}, commit {(source['commit'] or 'unknown')[:12]}"
    return speed, f"measured: {where}"


def _shape(batch: int) -> str:
    return f"sd15-{PIXELS}:{batch}x1"


def cluster_of(flags: argparse.Namespace) -> Cluster:
    return Cluster(
        flags.gpus_a_node,
        Link(flags.link_efficiency * flags.nvlink_gb_per_s, flags.nvlink_us),
        Link(flags.link_efficiency * flags.network_gb_per_s, flags.network_us),
    )


def exchanged(one: OneGpu, cluster: Cluster, gpus: int, sent: str) -> Exchange:
    return exchange(
        [bucket.ready * one.backward_ms for bucket in one.buckets],
        [cluster.all_reduce_ms(bucket.elements * BYTES[sent], gpus) for bucket in one.buckets],
        one.backward_ms,
    )


def rows(one: OneGpu, cluster: Cluster, price: float) -> list[Record]:
    """For each number of GPUs and format of gradients on their way; the paper's run with 8."""
    made = []
    for gpus in GPUS:
        for sent in BYTES:
            found = exchanged(one, cluster, gpus, sent)
            update_ms = one.step_ms + found.exposed_ms
            values = {
                "images_per_s": 1e3 * gpus * one.images / update_ms,
                "efficiency": one.step_ms / update_ms,
                "all_reduce_ms": found.total_ms,
                "exposed_ms": found.exposed_ms,
            }
            if gpus == PAPER_GPUS:
                values |= recipe(one, found.exposed_ms, price)
            labels = {"op": "scaling", "what": f"sd15-{PIXELS}", "gpus": gpus, "sent": sent}
            labels |= {"batch": one.images, "by": "model"}
            made.append(harness.row(labels, values=values, note="a model"))
    return made


def recipe(one: OneGpu, exposed_ms: float, price: float) -> dict[str, float]:
    """The paper's run: its samples at the speed of one GPU, and an exchange after each update."""
    samples_ms = RECIPE_BATCH / PAPER_GPUS / one.images * one.step_ms
    hours = RECIPE_STEPS * (samples_ms + exposed_ms) / 3.6e6
    return {
        "recipe_hours": hours,
        "recipe_gpu_hours": PAPER_GPUS * hours,
        "recipe_cost": PAPER_GPUS * hours * price,
        "recipe_of_goal": hours / GOAL_HOURS,
    }
