"""The benchmark of checkpoints, with the demo's UNet: its rows, and that it sees a wrong answer."""

from types import SimpleNamespace

import pytest
import torch
from records import refusal
from safetensors.torch import save_file

from fusedit.benchmarks import checkpoint, harness

CPU = torch.device("cpu")
DIRECTIONS = [
    "hold/ours",
    *(f"save/{by}" for by in ("ours", "copy", "torch.save", "torch.save, synced")),
    "find/ours",
    "load/ours",
]


@pytest.fixture(autouse=True)
def two_rounds(monkeypatch):
    monkeypatch.setitem(checkpoint.SIZES, "demo", checkpoint.SIZES["demo"]._replace(rounds=2))


@pytest.fixture
def measure(tmp_path):
    def main(*more):
        code = checkpoint.main([f"--out={tmp_path / 'out'}", f"--folder={tmp_path}", *more])
        return code, harness.read(tmp_path / "out" / "checkpoint.json")["rows"]

    return main


def test_every_direction_is_timed(measure, tmp_path, capsys):
    code, rows = measure("--size", "demo")
    assert code == 0
    assert [row["name"].split("/fp32/")[1] for row in rows] == DIRECTIONS
    hold, save, copy, _, synced = rows[:5]
    assert hold["timings"]["warm"]["low_ms"] < save["timings"]["warm"]["low_ms"]
    state = checkpoint.STATE_BYTES * save["labels"]["shape"]  # beside names and counts
    for row in rows:
        assert row["timings"]["warm"]["runs"] == 2
        assert row["values"]["bytes"] == pytest.approx(state, rel=0.02)
        seconds = row["timings"]["warm"]["median_ms"] / 1e3
        assert row["values"]["bytes_per_s"] == pytest.approx(row["values"]["bytes"] / seconds)
    share = copy["timings"]["warm"]["median_ms"] / save["timings"]["warm"]["median_ms"]
    assert save["values"]["of_copy"] == pytest.approx(share)
    assert synced["timings"]["warm"]["low_ms"] > rows[3]["timings"]["warm"]["low_ms"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    told = capsys.readouterr().out
    assert told == (tmp_path / "out" / "checkpoint.md").read_text() + "\n"
    lines = [line for line in told.splitlines() if line.startswith("| demo | ")]
    assert [line.count("30.5 MB |") for line in lines] == [1] * len(DIRECTIONS)
    assert lines[1].endswith(f" | {share:.0%} |")


def test_what_is_written_beside_is_as_long_and_the_older_one_goes(tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: lengths.append(path.stat().st_size))
    rounds = checkpoint.Rounds(checkpoint.Kept(checkpoint.demo_unet(), CPU), tmp_path)
    for _ in range(2):
        rounds.round()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    copies, saves = lengths[::2], lengths[1::2]
    assert copies == [rounds.bytes] * 2
    assert saves == pytest.approx(copies, rel=0.02)
    assert not rounds.wrong


def not_what_is_there(tensors, path):
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("module", "name", "broken", "told"),
    [
        (checkpoint.Job, "load_tensors", lambda self, parts: None, "not what was saved"),
        (checkpoint.checkpoint, "save_file", not_what_is_there, "not what was saved"),
        (checkpoint.checkpoint, "newest", lambda root: (None, ["it is cut"]), "it is cut"),
    ],
)
def test_a_wrong_answer_has_no_speed(measure, monkeypatch, module, name, broken, told):
    monkeypatch.setattr(module, name, broken)
    code, rows = measure("--size=demo")
    assert code == 1
    wrong = [row for row in rows if row["verdict"] == "wrong"]
    assert wrong == [row for row in rows if row["labels"]["by"] == "ours"]
    assert all(told in row["note"] and not row["timings"] for row in wrong)


def test_what_does_not_fit_says_why(measure, tmp_path, monkeypatch, capsys):
    free = SimpleNamespace(free=10 * 10**9)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: free)
    code, rows = measure()
    assert code == 0
    assert [row["labels"]["preset"] for row in rows] == ["demo"] * len(DIRECTIONS) + ["sd15"]
    assert rows[-1]["note"] == "needs 28.9 GB of disk, 10.0 are free"
    assert "| sd15 | unchecked: needs 28.9 GB of disk" in capsys.readouterr().out
    assert rows[-1]["verdict"] == "unchecked"
    assert checkpoint.main([f"--out={tmp_path}", "--size", "sd15"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--size sd15 needs 28.9 GB of disk" in said


@pytest.mark.parametrize("kind", ["memory", "GPU memory"])
def test_memory_is_looked_at_too(monkeypatch, kind):
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    monkeypatch.setattr(checkpoint, "NEEDED", {"memory": 0.0, "disk": 0.0, "GPU memory": 0.0})
    monkeypatch.setitem(checkpoint.NEEDED, kind, 1e3)
    device = torch.device("cuda" if kind == "GPU memory" else "cpu")
    assert f"GB of {kind}" in checkpoint.lacking(checkpoint.SIZES["sd15"], None, device)


def test_the_large_state_is_that_of_stable_diffusion():
    assert checkpoint.SIZES["sd15"].state_bytes == 16 * 859_532_484


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    words = [f"--out={tmp_path}", f"--folder={tmp_path / 'no'}"]
    assert "there is no such folder" in refusal(checkpoint.main, words, capsys)
