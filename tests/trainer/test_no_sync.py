"""The host never waits for the device inside a step.

On a CPU what would wait is counted: every read of a tensor's value by Python is an operation. On a
GPU the driver itself is asked.
"""

import pytest
import torch
from jobs import OPTIONS, Job
from tiny import save_tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from fusedit.trainer.config import AdapterConfig

aten = torch.ops.aten
WAITS = {  # whose result Python sees, or whose shape depends on values
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function in WAITS:
            self.found.append(str(function))
        return function(*arguments, **(named or {}))


ADAPTER = AdapterConfig(lora_rank=2, lora_dropout=0.5)
SETTINGS = [
    {},
    {"param_dtype": "bf16"},
    {"gradient_checkpointing": True},
    OPTIONS,
    {"adapter": ADAPTER, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["pytorch", "one pass"])
def test_the_host_does_not_wait_for_a_step(fused, fp16, settings, tmp_path, device):
    job = Job(save_tiny_pipeline(tmp_path / "base"), device, fused=fused, fp16=fp16, **settings)
    job.step(1)  # state is made, kernels are compiled
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            job.step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits() as waits:
        job.step(2)
    assert not waits.found


def test_what_waits_is_seen():
    with Waits() as waits:
        float(torch.ones(()))
        bool(torch.ones(()))
        torch.ones(3).nonzero()
    assert len(waits.found) == 3
