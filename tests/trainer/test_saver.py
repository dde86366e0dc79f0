"""Saving beside the loop: the copy is whole, a failed save is told, the last one must succeed."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import load_file

from fusedit.trainer import checkpoint, saver
from fusedit.trainer.checkpoint import Checkpoint
from fusedit.trainer.errors import RanksLost, UsageError
from fusedit.trainer.log import RunLog
from fusedit.trainer.saver import BLOCK_BYTES, HostCopy, Save, Saver
from fusedit.trainer.world import World

CPU = torch.device("cpu")
LATE = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation"
GONE = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer"


class Told(RunLog):
    """A log that keeps its lines."""

    def __init__(self):
        self.notes: list[str] = []
        self.events: list[tuple[int, str, str]] = []

    def note(self, text):
        self.notes.append(text)

    def event(self, step, name, text):
        self.events.append((step, name, text))


class Disk:
    """checkpoint.save, held until it is let go; full at the steps told."""

    def __init__(self, monkeypatch):
        self.free, self.full_at, self.at_once = threading.Event(), set(), 0
        self.running, self.save = 0, checkpoint.save
        monkeypatch.setattr(saver.checkpoint, "save", self)

    def __call__(self, root, step, made, keep):
        self.running += 1
        self.at_once = max(self.at_once, self.running)
        assert self.free.wait(20)
        self.running -= 1
        if step in self.full_at:
            raise UsageError(f"cannot write {root}/checkpoint-{step}: no space is left")
        return self.save(root, step, made, keep)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def run(told):
    made = Saver(World(), None, told)
    yield made
    made.close()


def _save(run, root, step, weights, keep=None):
    tensors = {"unet": {"w": weights}}
    run.save(step, [Save(root, Checkpoint(tensors, {"step": step}), keep)])


def _weights(root, step):
    return load_file(root / f"checkpoint-{step}" / "unet.safetensors")["w"]


def test_what_is_saved_is_the_state_of_that_moment(run, disk, tmp_path):
    weights = torch.randn(3, 4).t()
    expected = weights.clone()
    _save(run, tmp_path, 1, weights)
    weights.fill_(7.0)  # the next update, while the thread has not begun
    disk.free.set()
    run.finish()
    assert torch.equal(_weights(tmp_path, 1), expected)


def test_the_loop_is_held_for_the_copy_alone(run, disk, tmp_path, told):
    _save(run, tmp_path, 1, torch.ones(2))  # the disk does not answer yet
    assert checkpoint.steps(tmp_path) == []
    run.tell(1)
    assert not told.notes
    disk.free.set()
    run.finish()
    assert checkpoint.steps(tmp_path) == [1]


def test_one_save_at_a_time_and_the_wait_is_told(run, disk, tmp_path, told, monkeypatch):
    monkeypatch.setattr(saver, "TOLD_WAIT_S", 0.05)
    _save(run, tmp_path, 1, torch.ones(2))
    threading.Timer(0.1, disk.free.set).start()
    _save(run, tmp_path, 2, torch.full((2,), 2.0))  # waits: the copy of step 1 is still needed
    run.finish()
    assert disk.at_once == 1
    assert [_weights(tmp_path, step)[0] for step in (1, 2)] == [1, 2]
    assert len(told.notes) == 1
    assert told.notes[0].endswith("for the checkpoint of step 1")


def test_a_failed_save_is_told_until_the_next_one_is_whole(run, disk, tmp_path, told):
    disk.free.set()
    disk.full_at = {2}
    _save(run, tmp_path, 1, torch.ones(2), keep=1)
    _save(run, tmp_path, 2, torch.ones(2), keep=1)
    deadline = time.monotonic() + 20
    while not run.pending.done() and time.monotonic() < deadline:
        time.sleep(0.001)
    for step in (3, 4):
        run.tell(step)
    [(at, name, text)] = told.events
    assert (at, name) == (3, "save failed")
    assert text.startswith("WARNING: not saved: cannot write")
    assert "checkpoint-2" in text
    assert len(told.notes) == 1
    assert checkpoint.steps(tmp_path) == [1]
    _save(run, tmp_path, 5, torch.ones(2), keep=1)
    run.finish()  # the last one succeeded
    run.tell(6)
    assert checkpoint.steps(tmp_path) == [5]
    assert told.notes[1:] == [f"not saved on the way: {run.failed[2]}"]


def test_the_last_save_must_succeed(run, disk, tmp_path):
    disk.free.set()
    disk.full_at = {1}
    _save(run, tmp_path, 1, torch.ones(2))
    with pytest.raises(UsageError, match="checkpoint-1: no space"):
        run.finish()
    disk.full_at = set()
    _save(run, tmp_path, 1, torch.ones(2))  # asked to stop at the same step: tried again
    run.finish()
    assert checkpoint.steps(tmp_path) == [1]


def test_a_bug_in_the_thread_is_not_swallowed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(saver.checkpoint, "save", lambda *_: 1 / 0)
    _save(run, tmp_path, 1, torch.ones(2))
    with pytest.raises(ZeroDivisionError):
        run.finish()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_never_replace_a_whole_checkpoint(run, tmp_path, value):
    _save(run, tmp_path, 1, torch.ones(2), keep=1)
    _save(run, tmp_path, 2, torch.tensor([1.0, value]), keep=1)
    with pytest.raises(UsageError, match="checkpoint-2 is not written: unet w holds numbers that"):
        run.finish()
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-1", [])


def test_the_same_step_is_saved_once_to_each_folder(run, disk, tmp_path):
    disk.free.set()
    made = Checkpoint({"ema_0.1": {"w": torch.ones(2)}}, {"step": 3})
    run.save(3, [Save(tmp_path / "averages", made, None)])
    _save(run, tmp_path, 3, torch.ones(2))
    copies = []
    run.host.take = copies.append
    _save(run, tmp_path, 3, torch.ones(2))
    run.finish()
    assert not copies
    assert checkpoint.steps(tmp_path) == checkpoint.steps(tmp_path / "averages") == [3]


def test_the_memory_of_a_copy_is_used_again():
    host = HostCopy(CPU)
    state = {"a": {"x": torch.randn(5, 3).t(), "step": torch.tensor(3.0)}}
    first = host.take(state)
    assert torch.equal(first["a"]["x"], state["a"]["x"])
    assert first["a"]["x"].is_contiguous()
    addresses = [tensor.data_ptr() for tensor in first["a"].values()]
    state["a"]["x"].add_(1)
    state["a"]["late"] = torch.randn(2, dtype=torch.float64)  # moments come with the first update
    again = host.take(state)
    assert [again["a"][name].data_ptr() for name in ("x", "step")] == addresses
    for name, tensor in state["a"].items():
        assert torch.equal(again["a"][name], tensor)


def test_a_tensor_larger_than_a_block_has_its_own(monkeypatch):
    monkeypatch.setattr(saver, "BLOCK_BYTES", 128)
    host = HostCopy(CPU)
    state = {"a": {str(size): torch.randn(size) for size in (10, 100, 10, 3, 40)}}
    copied = host.take(state)
    for name, tensor in state["a"].items():
        assert torch.equal(copied["a"][name], tensor)
    assert BLOCK_BYTES & (BLOCK_BYTES - 1) == 0


def test_no_memory_for_a_copy_is_a_failed_save(run, tmp_path, told, monkeypatch):
    _save(run, tmp_path, 1, torch.ones(2))
    run.wait()

    def none_left(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nand a stack")

    with monkeypatch.context() as patch:
        patch.setattr(saver.torch, "empty", none_left)
        _save(run, tmp_path, 2, torch.ones(BLOCK_BYTES // 4))
    [(_, _, text)] = told.events
    assert text.endswith("no memory for a copy of the state: CUDA error: out of memory")
    with pytest.raises(UsageError, match="no memory"):
        run.finish()
    assert checkpoint.steps(tmp_path) == [1]


def test_other_ranks_neither_copy_nor_wait(disk, tmp_path):
    run = Saver(World(rank=1, size=2), None, RunLog.silent())
    _save(run, tmp_path, 1, torch.ones(2))
    run.tell(1)
    run.wait()
    run.close()
    assert not run.host.places


@pytest.mark.parametrize(("told_by_gloo", "error"), [(LATE, RanksLost), (GONE, RuntimeError)])
def test_ranks_that_do_not_write_their_part_are_told_of(run, told_by_gloo, error):
    run.step, run.pending = 6, Future()
    run.pending.set_exception(RuntimeError(told_by_gloo))
    reason = "has written its part of checkpoint-6" if error is RanksLost else "closed by peer"
    with pytest.raises(error, match=reason):
        run.wait()
