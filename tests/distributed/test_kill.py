"""Killed at any moment and started again by the same command, a run ends in the same bits."""

import json
import os
import random
import re
import shutil
import signal
import time

import pytest
from ranks import Ranks, run, run_flags
from tiny import save_tiny_inputs

STEPS, KILLS = 20, 5
STATE = ("unet.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 15)


def _flags(inputs, output, ranks, *more):
    return [
        *run_flags(inputs, output, ranks, STEPS),
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=3",
        "--held_out=2",
        "--validation_steps=5",
        "--checkpointing_steps=2",
        "--checkpoints_total_limit=1",
        *more,
    ]


def _state(output):
    return {name: (output / f"checkpoint-{STEPS}" / name).read_bytes() for name in STATE}


def _log(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    keep = ("loss", "grad_norm", "lr", "held_out/full", "held_out/neither")
    return [(line["step"], *(line.get(name) for name in keep)) for line in lines]


def _start_and_await(size, flags, output, log, step):
    """Starts the ranks and returns them once they have logged this step, or a later one."""
    told_in = output / "log.jsonl"
    before = told_in.stat().st_ino if told_in.exists() else None
    ranks = Ranks(size, flags, log)
    while True:
        assert all(process.is_alive() for process in ranks.processes), ranks.output()
        # A run that goes on rewrites the log: until then it tells of the run before.
        if told_in.exists() and told_in.stat().st_ino != before:
            told = re.findall(r'"step": (\d+)', told_in.read_text())
            if told and int(told[-1]) >= step:
                return ranks
        time.sleep(0.002)


@pytest.mark.slow  # in CI tests/faults has the like
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_killed_at_random_it_ends_in_the_same_bits(inputs, tmp_path, ranks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(ranks, _flags(inputs, whole, ranks), tmp_path / "whole.log")
    chance = random.Random(ranks)
    flags = _flags(inputs, killed, ranks)
    for step in sorted(chance.sample(range(1, STEPS), KILLS)):
        victims = _start_and_await(ranks, flags, killed, tmp_path / "killed.log", step)
        time.sleep(chance.uniform(0.0, 0.06))  # within a step, a validation or a save
        victims.kill(chance.sample(victims.processes, ranks))
    run(ranks, flags, tmp_path / "killed.log")
    resumed = re.findall(r"going on from checkpoint-(\d+)", (tmp_path / "killed.log").read_text())
    assert len({step for step in resumed if int(step) < STEPS}) >= 2
    assert _state(killed) == _state(whole)
    assert _log(killed) == _log(whole)


def test_validation_and_workers_change_nothing(inputs, tmp_path):
    """Validation eats from the reference's training draws (its defect 7)."""
    with_it, without = tmp_path / "with", tmp_path / "without"
    run(1, _flags(inputs, with_it, 1), tmp_path / "with.log")
    more = ["--validation_steps=1000", "--dataloader_num_workers=2"]
    run(1, _flags(inputs, without, 1, *more), tmp_path / "without.log")
    assert _state(with_it) == _state(without)


def test_sigterm_ends_in_a_checkpoint_and_code_75(inputs, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(2, _flags(inputs, whole, 2), tmp_path / "whole.log")
    flags = _flags(inputs, stopped, 2, "--checkpointing_steps=1000")
    ranks = _start_and_await(2, flags, stopped, tmp_path / "stopped.log", 3)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)  # one rank is told, all stop
    assert [p.join(60) or p.exitcode for p in ranks.processes] == [75, 75], ranks.output()
    assert "the same command goes on from here" in ranks.output()
    run(2, flags, tmp_path / "stopped.log")
    assert _state(stopped) == _state(whole)


@pytest.mark.parametrize("on_bad_sample", ["skip", "stop"])
def test_all_ranks_do_alike_when_one_meets_a_bad_image(inputs, tmp_path, on_bad_sample):
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(inputs / "data", data)
    image = sorted(data.glob("*_edited.png"))[3]
    image.write_bytes(image.read_bytes()[:-40])
    flags = _flags(inputs, output, 2, "--held_out=0", f"--on_bad_sample={on_bad_sample}")
    flags.append("--max_bad_fraction=0.1")
    ranks = Ranks(2, [*flags, f"--train_data_dir={data}"], tmp_path / "log")
    codes = ranks.wait()
    told = [line for line in ranks.output().splitlines() if image.name in line]
    if on_bad_sample == "skip":
        assert codes == [0, 0], ranks.output()
        assert told
        assert all(line.startswith("skipped: row") for line in told)
    else:
        assert codes == [2, 2], ranks.output()
        assert len(told) == 1
        assert told[0].startswith("fusedit: row")
        assert "Traceback" not in ranks.output()


def test_another_number_of_ranks_goes_on_with_the_same_batch(inputs, tmp_path):
    output = tmp_path / "run"
    run(1, _flags(inputs, output, 1, "--max_train_steps=4"), tmp_path / "log")
    run(3, _flags(inputs, output, 3), tmp_path / "log")
    assert "going on from checkpoint-4" in (tmp_path / "log").read_text()
    assert [line[0] for line in _log(output) if line[1] is not None] == list(range(1, STEPS + 1))
    refused = Ranks(2, _flags(inputs, output, 1), tmp_path / "refused.log")
    assert set(refused.wait()) == {2}
    assert "was trained with 12 samples a step, this command makes 24" in refused.output()
