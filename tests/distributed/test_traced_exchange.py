"""Of a trace of two ranks, DDP's all-reduces are a phase, though they run in gloo's threads."""

import json
import os

import torch
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from fusedit.benchmarks.tracing import summed

WIDTH, LAYERS = 512, 6


def _train(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    whole = DistributedDataParallel(model, bucket_cap_mb=1, gradient_as_bucket_view=True)
    found = []
    for exchanges in (False, True, True):
        whole.require_backward_grad_sync = exchanges
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            whole(torch.randn(32, WIDTH)).square().sum().backward()
            torch.distributed.barrier()
        found.append(summed(profiled.events()))
    torch.distributed.destroy_process_group()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


def test_the_exchange_of_gradients_is_told_apart(tmp_path):
    on_ranks(_train, 2, str(tmp_path))
    for rank in range(2):
        alone, _, exchanged = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "all-reduce" not in alone
        # 6 MB of gradients take gloo longer than it takes to ask for them.
        assert sum(exchanged["all-reduce"].values()) > 0.5
        assert exchanged["backward"]["linear"] > 0
