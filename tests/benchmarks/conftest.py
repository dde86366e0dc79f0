import itertools
from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch) -> None:
    """A machine's own GPU is not used: what these tests hold, they hold anywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch, no_gpu) -> Iterator[None]:
    from fusedit.benchmarks import stand_in, timing

    def tick(event: stand_in.Event) -> None:
        event.at = next(ticks) * 10**6

    ticks = itertools.count()  # an event's time is the number of events before it
    monkeypatch.setattr(stand_in.Event, "record", tick)
    monkeypatch.setattr(timing, "COPY_BYTES", 2**12)
    monkeypatch.setattr(timing, "MATRIX", 16)
    for name, value in {"WARM_UP_CALLS": 1, "LEAST_RUNS": 3, "MOST_RUNS": 4}.items():
        monkeypatch.setattr(timing, name, value)
    with stand_in.standing_in("Fake H100"):
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        yield
        monkeypatch.undo()


@pytest.fixture
def tiny_sd15(monkeypatch):
    """A small UNet in the place of Stable Diffusion 1.5's; what makes it."""

    def make():
        return UNet2DConditionModel(
            sample_size=32, in_channels=8, block_out_channels=(32, 32), cross_attention_dim=16,
            attention_head_dim=4, layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip

    from fusedit.benchmarks import update

    monkeypatch.setattr(update, "make_unet", make)
    return make
