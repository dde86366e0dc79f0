"""DDP's exchange goes on beside the backward, and gradients stay where they are."""

import json
import os

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from fusedit.trainer.masters import Masters, reduce_in_bf16

WIDTH, LAYERS = 256, 24


def _train(rank, port, folder, kind):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    masters = Masters(model) if kind == "masters" else None
    whole = DistributedDataParallel(
        model, bucket_cap_mb=1, gradient_as_bucket_view=True, static_graph=True
    )
    if masters is not None:
        whole.register_comm_hook(None, masters.reduce_in_buckets(2, torch.float32))
    elif kind == "bf16":
        whole.register_comm_hook(None, reduce_in_bf16(2))
    dtype = next(model.parameters()).dtype
    places = []
    for _ in range(4):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            images = torch.randn(2048, WIDTH, dtype=dtype)
            whole(images).square().sum().backward()
        places.append([p.grad.data_ptr() for p in model.parameters()])
        model.zero_grad(set_to_none=False)
    if rank == 0:
        profiled.export_chrome_trace(f"{folder}/trace.json")
    torch.distributed.destroy_process_group()
    with open(f"{folder}/places-{rank}.json", "w") as file:
        json.dump(places, file)


@pytest.mark.parametrize("kind", ["plain", "bf16", "masters"])
def test_gradients_are_exchanged_before_the_backward_ends(kind, tmp_path):
    on_ranks(_train, 2, str(tmp_path), kind)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e.get("ph") == "X"]
    starts = [e["ts"] for e in spans if "gloo:all_reduce" in e["name"]]
    backward = [e["ts"] + e["dur"] for e in spans if e["name"].endswith("AddmmBackward0")]
    assert len(starts) > 2  # several buckets
    assert backward
    early = sum(start < max(backward) for start in starts)
    assert early >= len(starts) // 2
    # A graph replays addresses: after the two discarded backwards none moves.
    places = json.loads((tmp_path / "places-0.json").read_text())
    assert places[2] == places[3]
