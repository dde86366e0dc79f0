"""The doctor finds what would stop or slow a run, and says how to put it right."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks import Ranks, run_flags

from fusedit.launch import cli, doctor
from fusedit.trainer import checkup
from fusedit.trainer.world import World


def _flags(here):
    return [*run_flags(here, here / "out", 1, 4), f"--json={here / 'found.json'}"]


def _found(here):
    read = json.loads((here / "found.json").read_text())
    return read, {finding["name"]: finding for finding in read["findings"]}


def test_a_run_that_can_start_leaves_nothing_behind(here, capsys):
    before = sorted(path.name for path in here.iterdir())
    assert cli.main(["doctor", "--nproc_per_node=1", *_flags(here)]) == 0
    assert sorted(path.name for path in here.iterdir()) == sorted([*before, "found.json"])
    read, found = _found(here)
    assert read["ranks"] == 1
    assert {finding["level"] for finding in read["findings"]} == {"ok", "warning"}
    assert found["devices"]["level"] == "warning"  # of the CPU
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60" in found["last checkpoint"]["text"]
    assert "its heads are 4 wide" in found["kernels"]["text"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)


def test_two_ranks_exchange_and_see_one_folder(here):
    ranks = Ranks(2, _flags(here), here / "log", module="doctor")
    assert ranks.wait() == [0, 0], ranks.output()
    read, found = _found(here)
    assert [row["bytes"] for row in read["all_reduce"]] == list(checkup.EXCHANGED)
    assert all(0 < row["bus_gb_per_s"] < 1000 for row in read["all_reduce"])
    assert "all ranks see what rank 0 writes" in found["output folder"]["text"]


def test_another_dataset_on_one_rank_is_a_problem(here):
    shutil.copytree(here / "data", here / "other")
    table = here / "other" / "metadata.jsonl"
    table.write_text(table.read_text().replace("snow", "rain"))
    own = {1: [f"--train_data_dir={here / 'other'}"]}
    ranks = Ranks(2, _flags(here), here / "log", own_flags=own, module="doctor")
    assert ranks.wait() == [1, 1], ranks.output()
    _, found = _found(here)
    assert found["model and data"]["level"] == "problem"
    assert "all machines must see the same dataset" in found["model and data"]["text"]


def test_a_mistake_in_the_flags_is_exit_2(here, capsys):
    assert doctor.main(["--train_batch_size=1"]) == 2
    assert "--pretrained_model_name_or_path is missing" in capsys.readouterr().err


def test_a_missing_model_is_a_problem_with_its_message(here):
    shutil.rmtree(here / "base" / "unet")
    assert doctor.main(_flags(here)) == 1
    assert "base" in _found(here)[1]["model and data"]["text"]


def test_too_little_space_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    (finding,) = checkup.room(World(), tmp_path / "new", 4e8, 2)
    assert finding.level == "problem"
    assert "1.2 GB are needed" in finding.cure
    assert [found.level for found in checkup.room(World(), tmp_path, 3e8, 2)] == ["ok", "ok"]


@pytest.mark.parametrize(("torch_version", "level"), [("2.11.0", "warning"), ("2.12.1", "ok")])
def test_a_torchrun_that_kills_too_soon_is_told(tmp_path, monkeypatch, torch_version, level):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(torch_version))
    found = checkup.room(World(), tmp_path, 1000, None)[-1]
    assert (found.name, found.level) == ("last checkpoint", level)


def test_clocks_that_differ_are_told(monkeypatch):
    assert checkup.clocks(World()).level == "ok"
    times = [torch.tensor(one, dtype=torch.float64) for one in (100.0, 100.5, 109.0)]
    monkeypatch.setattr(World, "gather", lambda world, mine: times)
    monkeypatch.setattr(World, "barrier", lambda world: None)
    found = checkup.clocks(World(size=3))
    assert (found.level, found.text) == ("warning", "9.000 s apart at most: rank 2's")
