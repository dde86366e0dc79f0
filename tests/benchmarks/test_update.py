"""The update's benchmark on a tiny UNet and a CPU: its answers, its record, its mistakes."""

from contextlib import nullcontext

import pytest
import torch
from records import refusal

from fusedit.benchmarks import harness, update
from fusedit.benchmarks.timing import timing

CASE = update.Case("sd15-64:2x2", 64, 2, 2)


class Clock:
    """A timer that calls, and takes no time."""

    def __init__(self, *_):
        self.calls = 0

    def stream(self):
        return nullcontext()

    def measure(self, calls, mode):
        calls[0]()
        self.calls += 1
        return timing([10.0, 10.0, 10.0])


pytestmark = pytest.mark.usefixtures("tiny_sd15")


@pytest.mark.parametrize("name", ["plain", "all-bf16", "all-lean"])
def test_a_way_is_timed_once_its_first_update_is_plain_pytorchs(name, monkeypatch):
    way = update.WAYS[name]
    # Kernels, compilers and graphs need a GPU; the formats do not.
    own = update.Way(fused=False, param_dtype=way.param_dtype, moments_dtype=way.moments_dtype)
    monkeypatch.setitem(update.WAYS, name, own)
    plain = update.first_of_plain(CASE, "cpu")
    row = update.measured(CASE, name, plain, Clock(), "cpu")
    assert (row["verdict"], row["note"]) == ("right", "")
    assert row["values"]["images_per_s"] == pytest.approx(400)
    assert row["labels"] == update.labels_of(CASE, name)
    other = plain._replace(loss=plain.loss * 1.02)
    row = update.measured(CASE, name, other, Clock(), "cpu")
    assert (row["verdict"], row["timings"]) == ("wrong", None)
    assert "loss is" in row["note"]


def test_a_way_that_cannot_run_is_a_row(monkeypatch):
    def lacking(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(update, "Job", lacking)
    row = update.measured(CASE, "all", None, Clock(), "cpu")
    assert (row["verdict"], row["note"]) == (
        "failed",
        "OutOfMemoryError: CUDA out of memory. Tried",
    )


def test_a_gradient_that_is_not_finite_is_wrong():
    yes, one = torch.tensor(True), torch.ones(())
    result = update.StepResult(one, one, one, ~yes, ~yes, one)
    assert update.disagreement(result, None) == "the gradient is not finite"
    assert update.disagreement(result._replace(applied=yes), None) == ""


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    asked = []

    def measured(case, name, plain, timer, device):
        asked.append((case.name, name))
        return harness.row(update.labels_of(case, name), verdict="right")

    with monkeypatch.context() as there:
        there.setattr(update.torch.cuda, "is_available", lambda: True)
        cases = ["--case", "sd15-256:64x1", "sd15-256:4x4", "--way", "all", "plain"]
        flags = update.parse(["--out", str(tmp_path), *cases])
    monkeypatch.setattr(update, "measured", measured)
    monkeypatch.setattr(update, "first_of_plain", lambda *_: None)
    monkeypatch.setattr(update, "profiled", lambda *_: [harness.row({"op": "profile"})])
    record = harness.new_record("update", [])
    path = tmp_path / "update.json"
    times = iter([0, 0, 0, 10**6])
    monkeypatch.setattr(update.time, "monotonic", lambda: next(times))
    flags.limit_s = 100
    assert not update.measure(record, flags, Clock(), "cpu", path)
    assert asked == [("sd15-256:64x1", "all"), ("sd15-256:64x1", "plain")]
    record = harness.read(path)
    flags.limit_s = None
    monkeypatch.setattr(update.time, "monotonic", lambda: 0)
    assert update.measure(record, flags, Clock(), "cpu", path)
    assert asked[2:] == [("sd15-256:4x4", "all"), ("sd15-256:4x4", "plain")]


def test_the_profile_names_what_time_goes_to():
    rows = update.profiled(CASE, Clock(), "cpu")
    assert len(rows) >= update.TOP
    assert sum(row["values"]["share"] for row in rows[: update.TOP]) > 0.8
    assert {row["verdict"] for row in rows} == {"right"}
    assert update.LAYOUT.search("void cudnn::ops::nchwToNhwcKernel<...>")


@pytest.mark.parametrize("text", ["sd15-256", "sd15-250:4x4", "sd15-256:0x1", "sdxl-1024:4x1"])
def test_a_case_that_is_none_is_refused(text, tmp_path, capsys):
    said = refusal(update.main, ["--out", str(tmp_path), "--case", text], capsys)
    assert "--case: must be as in sd15-256:64x1" in said


def test_it_needs_a_gpu(tmp_path, capsys):
    assert "there is no GPU here" in refusal(update.main, ["--out", str(tmp_path)], capsys)
