"""A rank that hangs, dies, is slow or late: one line names it, and nothing stays behind."""

import os
import re
import signal
import time

import pytest
from following import flags_of, losses, start_and_await
from processes import await_end
from ranks import Ranks, run
from tiny import save_tiny_dataset, save_tiny_inputs

MANY = 100_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


def _long(inputs, tmp_path, *more):
    return flags_of(inputs, tmp_path / "run", 3, MANY, *more)


def _lines(ranks):
    """What the run said of itself; nothing else may look like an error."""
    assert "Traceback" not in ranks.output(), ranks.output()
    return [line for line in ranks.output().splitlines() if line.startswith("fusedit: ")]


def test_a_rank_that_dies_is_named(inputs, tmp_path):
    ranks = Ranks(3, _long(inputs, tmp_path), tmp_path / "log")
    start_and_await(ranks, tmp_path / "run", 2)
    time.sleep(3)  # some beats, so that the others know that it trains
    started = time.monotonic()
    ranks.kill(ranks.processes[1:2])
    assert ranks.wait(30) == [1, -signal.SIGKILL, 1], ranks.output()
    assert time.monotonic() - started < 15
    (line,) = _lines(ranks)
    assert re.fullmatch(
        r"fusedit: rank 0 stops: rank 1 is gone or frozen; it was "
        r"(reading|waiting after reading|training) step \d+ when it was last heard of",
        line,
    )


def test_a_rank_that_hangs_is_named_within_the_timeout(inputs, tmp_path):
    ranks = Ranks(3, _long(inputs, tmp_path, "--timeout_s=4"), tmp_path / "log")
    start_and_await(ranks, tmp_path / "run", 2)
    frozen = ranks.processes[2]
    os.kill(frozen.pid, signal.SIGSTOP)
    started = time.monotonic()
    assert [process.join(30) or process.exitcode for process in ranks.processes[:2]] == [1, 1]
    assert time.monotonic() - started < 15
    *waited, line = _lines(ranks)
    assert waited
    for told in waited:
        assert re.match(r"fusedit: rank 0 has waited \d s for rank 2 \((reading|training)", told)
    assert line.startswith("fusedit: rank 0 stops: rank 2 is gone or frozen; it was ")
    os.kill(frozen.pid, signal.SIGCONT)  # as torchrun's SIGKILL would, it ends by itself
    assert await_end([frozen.pid]) == []


def test_a_slow_rank_is_named_and_the_run_goes_on(inputs, tmp_path):
    flags = flags_of(inputs, tmp_path / "run", 2, 30, "--timeout_s=8")
    ranks = start_and_await(Ranks(2, flags, tmp_path / "log"), tmp_path / "run", 2)
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(ranks.processes[0].pid, signal.SIGCONT)
    assert ranks.wait() == [0, 0], ranks.output()
    for line in _lines(ranks):
        assert re.match(r"fusedit: rank 1 has waited \d s for rank 0 \(", line)


def test_a_rank_that_never_comes_is_named(inputs, tmp_path):
    flags = _long(inputs, tmp_path, "--timeout_s=3")
    ranks = Ranks(3, flags, tmp_path / "log", absent={1})
    assert ranks.wait(30) == [1, 1]
    assert _lines(ranks) == ["fusedit: rank 0 waited 3 s for rank 1 of 3, which did not start"]


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["--learning_rate=0.5"], "rank 1 has --learning_rate 0.5, rank 0 0.0001; give the same"),
        (["--train_data_dir=OTHER"], "all machines must see the same dataset"),
    ],
)
def test_a_rank_with_other_flags_or_data_is_refused(inputs, tmp_path, own, told):
    other = save_tiny_dataset(tmp_path / "other", count=8, size=(20, 24))
    own = [flag.replace("OTHER", str(other)) for flag in own]
    flags = flags_of(inputs, tmp_path / "run", 2, 2)
    ranks = Ranks(2, flags, tmp_path / "log", own_flags={1: own})
    assert ranks.wait(60) == [2, 2], ranks.output()
    (line,) = _lines(ranks)
    assert told in line


def test_fewer_and_more_ranks_go_on_with_the_same_samples(inputs, tmp_path):
    """By the same command, as torchrun restarts it when a machine leaves or comes."""
    whole, elastic = tmp_path / "whole", tmp_path / "elastic"
    run(2, flags_of(inputs, whole, 2, 6), tmp_path / "whole.log")
    for ranks, steps in ((2, 2), (1, 4), (3, 6)):
        run(ranks, flags_of(inputs, elastic, 2, steps), tmp_path / "log")
    told = (tmp_path / "log").read_text()
    assert "1 ranks: 3 x 4 micro-steps each, for the 12 samples a step" in told
    assert "3 ranks: 2 x 2 micro-steps each, for the 12 samples a step" in told
    assert losses(elastic) == pytest.approx(losses(whole), rel=1e-5)
    refused = Ranks(5, flags_of(inputs, elastic, 2, 8), tmp_path / "refused")
    assert set(refused.wait()) == {2}
    assert "was trained with 12 samples a step, this command makes 30" in refused.output()
