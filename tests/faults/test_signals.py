"""Told to stop, a run ends with a checkpoint and code 75; told twice, at once, without harm."""

import os
import signal
import time

import pytest
from following import flags_of, start_and_await, state
from processes import await_end, children, tell
from ranks import Ranks, run
from tiny import save_tiny_inputs

from fusedit.launch.train import SAME_REQUEST_S, StopSignals

STEPS, MANY = 8, 100_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(2, flags_of(inputs, output, 2, STEPS), output.with_suffix(".log"))
    return output


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_everything_ends_in_a_checkpoint(inputs, whole, tmp_path, number):
    """As a scheduler tells it, loader workers too, which are still importing; in the same bits."""
    flags = flags_of(inputs, tmp_path / "run", 2, STEPS, "--dataloader_num_workers=1")
    ranks = Ranks(2, flags, tmp_path / "log")
    pids = [process.pid for process in ranks.processes]
    while len(workers := [child for pid in pids for child in children(pid)]) < 2:
        assert all(process.is_alive() for process in ranks.processes), ranks.output()
        time.sleep(0.01)
    tell(workers, number)
    start_and_await(ranks, tmp_path / "run", 1)
    tell([*pids, *workers], number)
    assert [process.join(60) or process.exitcode for process in ranks.processes] == [75, 75], (
        ranks.output()
    )
    assert await_end(workers) == []
    run(2, flags_of(inputs, tmp_path / "run", 2, STEPS), tmp_path / "log")
    assert state(tmp_path / "run", STEPS) == state(whole, STEPS)


def test_a_second_signal_ends_it_at_once_without_harm(inputs, whole, tmp_path):
    """Also while a rank waits for another in a collective, which no handler of Python's ends."""
    output = tmp_path / "run"
    flags = flags_of(inputs, output, 2, STEPS, "--dataloader_num_workers=1")
    ranks = start_and_await(Ranks(2, flags, tmp_path / "log"), output, 2)
    first, second = (process.pid for process in ranks.processes)
    workers = [child for pid in (first, second) for child in children(pid)]
    os.kill(second, signal.SIGSTOP)
    time.sleep(0.3)  # by then the first waits for the second
    for _ in range(2):
        os.kill(first, signal.SIGINT)
        time.sleep(0.1)
    assert await_end([first], within_s=5) == []
    ranks.kill(ranks.processes[1:])
    assert ranks.processes[0].exitcode == 128 + signal.SIGINT
    assert await_end(workers) == []
    run(2, flags_of(inputs, output, 2, STEPS), tmp_path / "log")
    assert state(output, STEPS) == state(whole, STEPS)


def test_an_echo_of_a_signal_is_no_second_one(monkeypatch):
    """torchrun tells what the scheduler has told; a warning and then the end are two."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    clock = iter([0.0, SAME_REQUEST_S / 2, SAME_REQUEST_S * 2])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    signals = StopSignals()
    signals.ask(signal.SIGUSR1)
    signals.ask(signal.SIGTERM)
    assert signals.asked_at == 0.0
    assert codes == []
    signals.ask(signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]
