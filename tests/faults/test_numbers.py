"""Numbers that are not finite on one rank: all ranks do alike, and what is kept stays finite."""

import json

import pytest
import torch
from poison import Poison, Poisoned
from ranks import run, run_flags
from safetensors.torch import load_file
from tiny import save_tiny_inputs

from fusedit.trainer import checkpoint

STEPS, BATCH, ROWS = 6, 12, 15


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), ROWS)


def _flags(inputs, output, *more, size=2):
    return [
        *run_flags(inputs, output, size, STEPS),
        "--checkpointing_steps=2",
        "--learning_rate=1e-3",
        *more,
    ]


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _unet(folder):
    return (folder / "unet.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_is_skipped_alike_on_all_ranks_and_told_with_its_rows(inputs, tmp_path, what):
    ends = {}
    for rank in (0, 1):  # whose rank it was must not matter
        output = tmp_path / f"{what}-{rank}"
        poison = Poison(what, rank, 3, 4, BATCH)
        ranks = Poisoned(2, _flags(inputs, output), tmp_path / "log", poison)
        assert ranks.wait() == [0, 0], ranks.output()
        [line] = _lines(output / "audit.jsonl")
        assert (line["step"], line["applied"]) == (4, False)
        assert line["what"] == "loss or gradient were not finite"
        assert 1 <= len(line["rows"]) <= BATCH
        assert set(line["rows"]) <= {*range(ROWS)}
        assert "step 4: loss or gradient were not finite and moved nothing; rows " in ranks.output()
        assert _lines(output / "log.jsonl")[-1]["skipped_steps"] == 1
        folder = output / f"checkpoint-{STEPS}"
        counts = load_file(folder / "optimizer.safetensors")
        assert {float(v) for name, v in counts.items() if name.endswith(".step")} == {STEPS - 1}
        ends[rank] = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    assert ends[0] == ends[1]


def test_after_so_many_skips_it_stops_with_the_last_good_state_and_goes_on(inputs, tmp_path):
    output = tmp_path / "run"
    flags = _flags(inputs, output, "--max_skips=3")
    ranks = Poisoned(2, flags, tmp_path / "log", Poison("gradient", 1, 2, 99, BATCH))
    assert ranks.wait() == [2, 2], ranks.output()
    told = [line for line in ranks.output().splitlines() if line.startswith("fusedit: ")]
    assert len(told) == 1
    assert "the last 3 steps up to 5 moved nothing" in told[0]
    assert "the weights are those of step 2" in told[0]
    newest, _ = checkpoint.newest(output)
    assert newest == output / "checkpoint-5"
    assert _unet(newest) == _unet(output / "checkpoint-2")
    assert [line["step"] for line in _lines(output / "audit.jsonl")] == [3, 4, 5]
    run(2, flags, tmp_path / "log")  # what poisoned it is gone
    assert _lines(output / "log.jsonl")[-1]["loss"] is not None


def test_infinite_moments_never_reach_a_checkpoint(inputs, tmp_path):
    output = tmp_path / "run"
    flags = _flags(inputs, output, "--max_skips=2", "--checkpointing_steps=1", size=1)
    ranks = Poisoned(1, flags, tmp_path / "log", Poison("moments", 0, 3, 4, BATCH))
    assert ranks.wait() == [2], ranks.output()
    assert "WARNING: not saved: checkpoint-4 is not written" in ranks.output()
    assert "numbers that are not finite" in ranks.output().splitlines()[-1]
    assert checkpoint.newest(output) == (output / "checkpoint-3", [])
    for path in (output / "checkpoint-3").glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    events = [line for line in _lines(output / "log.jsonl") if "event" in line]
    assert events[0]["event"] == "save failed"
