"""A captured update against the same updates one by one."""

from contextlib import contextmanager

import pytest
import torch
from jobs import OPTIONS, Job
from recorder import record
from tiny import save_tiny_pipeline

from fusedit.trainer.captured import Captured, record_graph
from fusedit.trainer.config import AdapterConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.step import Rates

ADAPTER = AdapterConfig(lora_rank=2, lora_dropout=0.5)
SETTINGS = [
    {},
    {"fp16": True},
    {"param_dtype": "bf16"},
    {"gradient_checkpointing": True},
    OPTIONS,
    {"adapter": ADAPTER, "gradient_checkpointing": True},
]
STEPS, EAGER_STEPS = 6, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"))


def _results(base, device, captured, **settings):
    torch.manual_seed(0)  # the images
    job = Job(base, device, lr=1e-2, **settings)
    update = job.update
    if captured:
        recorder = record_graph if device == "cuda" else record
        update = Captured(job.update, record=recorder, eager_steps=EAGER_STEPS)
    results = [job.step(number, update) for number in range(1, STEPS + 1)]
    if captured:
        assert update.first is not None
        update.close()
    return {
        f"{i} {n}": v for i, r in enumerate(results) for n, v in r._asdict().items()
    } | job.moved()


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
@pytest.mark.parametrize("fused", [False, True], ids=["pytorch", "one pass"])
def test_a_graph_does_what_the_updates_do_one_by_one(fused, settings, base, device):
    if device == "cuda" and not fused:
        pytest.skip("on a GPU PyTorch's AdamW is for --plain, which has no graphs")
    with same_bits(device):
        one_by_one = _results(base, device, False, fused=fused, **settings)
        captured = _results(base, device, True, fused=fused, **settings)
    assert one_by_one.keys() == captured.keys()
    for name, value in one_by_one.items():
        assert torch.equal(captured[name], value), name


@contextmanager
def same_bits(device):
    """On a GPU: off the default stream, and by algorithms that add up in one order."""
    if device == "cpu":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.use_deterministic_algorithms(False)


def test_the_first_updates_are_real_and_not_captured(base):
    calls = []
    job = Job(base, "cpu")

    def counted(call, beside):
        calls.append(job.scale)
        return record(call)

    update = Captured(job.update, record=counted, eager_steps=3)
    before = job.moved()["parameter conv_in.weight"]
    for number in (1, 2, 3):
        job.step(number, update)
    assert not calls
    assert not torch.equal(job.moved()["parameter conv_in.weight"], before)
    job.step(4, update)
    job.step(5, update)
    assert len(calls) == 1


def test_results_are_not_overwritten_by_the_next_replay(base):
    job = Job(base, "cpu", lr=1e-2)
    update = Captured(job.update, record=record, eager_steps=1)
    first, second, third = (job.step(number, update) for number in (1, 2, 3))
    assert len({float(result.loss) for result in (first, second, third)}) == 3


def test_a_step_that_overflows_is_skipped_in_a_graph_too(base):
    job = Job(base, "cpu", fp16=True)
    update = Captured(job.update, record=record, eager_steps=1)
    job.step(1, update)
    job.step(2, update)
    before = job.moved()
    samples = [job.encoders.encode(job.batch(20)), job.encoders.encode(job.batch(22))]
    samples[0].target_mean.fill_(float("inf"))
    for scale in (2.0**15, 2.0**14):
        assert not update(samples, Rates.on(job.device, 1e-2, 0.5)).applied
        assert job.scale.scale == scale
    for name, value in job.moved().items():
        assert torch.equal(value, before[name]), name


def test_what_cannot_be_captured_is_said_with_its_cure(monkeypatch):
    class Refusing:
        def __init__(self, *_, **__):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    with pytest.raises(UsageError, match="stream is capturing\\); take --cuda_graphs off"):
        record_graph(lambda: None)
