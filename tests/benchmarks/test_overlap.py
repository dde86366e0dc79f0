"""The model of the exchange by hand-made numbers; its buckets against DDP's own."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fusedit.benchmarks.gradients import Stamps
from fusedit.benchmarks.overlap import (
    Bucket,
    Cluster,
    Exchange,
    Gradient,
    Link,
    buckets,
    exchange,
    ring_ms,
    trees_ms,
)

FAST, SLOW = Link(100.0, 2.0), Link(10.0, 5.0)  # GB/s, us


def test_a_ring_sends_each_part_to_all_others_twice():
    # 8 ranks, 800 MB: 14 messages of 100 MB, 1 ms each, and 2 us each.
    assert ring_ms(800e6, 8, FAST) == pytest.approx(14 * (1.0 + 0.002))
    assert ring_ms(800e6, 2, FAST) == pytest.approx(2 * (4.0 + 0.002))
    assert ring_ms(800e6, 1, FAST) == 0.0


def test_trees_send_more_and_wait_less():
    # All of 100 MB up and down, 10 ms each, and 5 us for each of 6 levels.
    assert trees_ms(100e6, 64, SLOW) == pytest.approx(2 * (10.0 + 6 * 0.005))
    assert trees_ms(100e6, 33, SLOW) == trees_ms(100e6, 64, SLOW)
    assert trees_ms(100e6, 1, SLOW) == 0.0
    assert trees_ms(1e3, 64, SLOW) < ring_ms(1e3, 64, SLOW)
    assert trees_ms(100e6, 4, SLOW) > ring_ms(100e6, 4, SLOW)


@pytest.mark.parametrize("size", [1e3, 800e6])
def test_nodes_exchange_a_part_for_each_gpu(size):
    cluster = Cluster(8, FAST, SLOW)
    assert cluster.all_reduce_ms(size, 1) == 0.0
    assert cluster.all_reduce_ms(size, 4) == ring_ms(size, 4, FAST)
    assert cluster.all_reduce_ms(size, 8) == ring_ms(size, 8, FAST)
    between = min(ring_ms(size / 8, 64, SLOW), trees_ms(size / 8, 64, SLOW))
    assert cluster.all_reduce_ms(size, 512) == pytest.approx(ring_ms(size, 8, FAST) + between)


def test_nodes_must_be_whole():
    with pytest.raises(ValueError, match="12 GPUs fill no nodes of 8"):
        Cluster(8, FAST, SLOW).all_reduce_ms(1.0, 12)


@pytest.mark.parametrize(
    ("ready_ms", "takes_ms", "backward_ms", "expected"),
    [
        ([10, 20], [5, 5], 30, (10, 0)),  # hidden
        ([10, 30], [5, 5], 30, (10, 5)),  # the last one is ready at the end
        ([10, 20], [5, 15], 30, (20, 5)),  # the last one lasts longer than the backward
        ([10, 10, 10], [9, 9, 9], 30, (27, 7)),  # they wait for each other
        ([10, 35], [25, 5], 40, (30, 0)),  # no sooner than it is ready, nor than it can be sent
        ([], [], 30, (0, 0)),
    ],
)
def test_what_the_backward_does_not_hide(ready_ms, takes_ms, backward_ms, expected):
    assert exchange(ready_ms, takes_ms, backward_ms) == Exchange(*expected)


def test_a_bucket_is_closed_by_the_gradient_that_fills_it():
    mebi = 2**20 // 4  # elements of a MiB in fp32
    sizes = [mebi // 2, mebi // 2, mebi // 4, 3 * mebi, 7]
    gradients = [Gradient(size, at / 10) for at, size in enumerate(sizes)]
    assert buckets(gradients, 1) == [
        Bucket(mebi, 0.1),
        Bucket(mebi // 4 + 3 * mebi, 0.3),
        Bucket(7, 0.4),
    ]
    assert buckets(gradients[:2], 1) == [Bucket(mebi, 0.1)]
    assert buckets(gradients, 100) == [Bucket(sum(sizes), 0.4)]


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_buckets_are_ddps(alone):
    # In another order than they are used in, and of several sizes.
    layers = nn.ModuleDict({name: nn.Linear(300, 300) for name in "dbeac"})
    layers["wide"] = nn.Linear(300, 3000)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            for name in "abcde":
                x = self.layers[name](x)
            return self.layers["wide"](x)

    model = Model()
    stamps = Stamps(model, torch.device("cpu"))
    seen: list[list[int]] = []

    def hook(_, bucket):
        seen[-1].append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    whole = DistributedDataParallel(
        model, bucket_cap_mb=1, gradient_as_bucket_view=True, static_graph=True
    )
    whole.register_comm_hook(None, hook)
    for _ in range(6):
        seen.append([])
        whole(torch.randn(8, 300)).sum().backward()
    own = [bucket.elements for bucket in buckets(stamps.backward().gradients, 1)]
    assert own == seen[-1]
    assert len(own) > 2
