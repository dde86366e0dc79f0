from collections.abc import Iterator

import pytest
import torch
from fake_gpu import faked


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch) -> None:
    """A machine's own GPU is not used: what these tests hold, they hold anywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch, no_gpu) -> Iterator[None]:
    from fusedit.benchmarks import timing

    monkeypatch.setattr(timing, "COPY_BYTES", 2**12)
    monkeypatch.setattr(timing, "MATRIX", 16)
    for name, value in {"WARM_UP_CALLS": 1, "LEAST_RUNS": 3, "MOST_RUNS": 4}.items():
        monkeypatch.setattr(timing, name, value)
    with faked():
        yield
