"""The benchmarks of reading, at small sizes: their rows, and that they see a wrong answer."""

import pytest
import torch
from records import refusal

from fusedit.benchmarks import data, harness


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"PHOTOGRAPHS": 6, "BATCHES": 3, "WORKERS": (0,)}
    sizes |= {"JPEGS": (data.Jpegs(48, 32, 680), data.Jpegs(32, 32, 1))}
    sizes |= {"PAIRS": 24, "PAIRS_A_SHARD": 8, "RESOLUTIONS": (16,), "TEXT_TOKENS": 3, "WIDTH": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(data, name, value)


def test_every_size_is_timed(tmp_path):
    assert data.main([f"--out={tmp_path}", f"--folder={tmp_path}", "--batch=4"]) == 0
    record = harness.read(tmp_path / "data.json")
    assert record["complete"]
    assert [row["name"] for row in record["rows"]] == [
        *(f"cache/16px/4/{dtype}/read/ours" for dtype in ("bf16", "fp32")),
        *(f"loader/{side}px to 32px/4/jpeg/0 workers/ours" for side in (48, 32)),
    ]
    assert all(row["values"]["samples_per_s"] > 0 for row in record["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_a_wrong_answer_has_no_speed(tmp_path, monkeypatch):
    right = data.CachedPairs.__getitems__

    def shifted(self, positions):
        found = right(self, positions)
        return found._replace(positions=torch.tensor(positions) + 1)

    monkeypatch.setattr(data.CachedPairs, "__getitems__", shifted)
    assert data.main([f"--out={tmp_path}", "--batch=4", "--only=cache"]) == 1
    rows = harness.read(tmp_path / "data.json")["rows"]
    assert {row["verdict"] for row in rows} == {"wrong"}
    assert not any(row["timings"] for row in rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_delivers_the_samples_of_each_position(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(data, "WORKERS", (workers,))
    monkeypatch.setattr(data, "JPEGS", data.JPEGS[:1])
    assert data.main([f"--out={tmp_path}", "--batch=4", "--only=loader"]) == 0
    (row,) = harness.read(tmp_path / "data.json")["rows"]
    values = row["values"]
    assert row["timings"]["warm"]["runs"] == 3  # those that were ready before are not among them
    assert values["images_per_s"] == pytest.approx(2 * values["samples_per_s"], abs=0.2)
    assert values["samples_per_s"] == pytest.approx(4 * values["batches_per_s"], rel=1e-2)
    needed = 680 / values["samples_per_s"]
    assert values["workers_for_it"] == pytest.approx(needed + 0.5, abs=0.51)
    assert f"{values['workers_for_it']} workers for the 680 aimed at" in capsys.readouterr().out


def test_workers_are_counted_by_what_one_of_them_delivers():
    row = data.loader_row(data.Jpegs(512, 256, 680), 16, 4, [80.0, 80.0], "")
    assert row["values"]["samples_per_s"] == 200.0
    assert row["values"]["workers_for_it"] == 14  # at 50 samples a second each


def test_a_wrong_batch_has_no_speed(tmp_path, monkeypatch):
    right = data.StepSampler
    monkeypatch.setattr(
        data, "StepSampler", lambda first, last, *rest: right(first + 1, last + 1, *rest)
    )
    assert data.main([f"--out={tmp_path}", "--batch=4", "--only=loader"]) == 1
    rows = harness.read(tmp_path / "data.json")["rows"]
    assert {(row["verdict"], row["timings"]) for row in rows} == {("wrong", None)}


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    words = [f"--out={tmp_path}", f"--folder={tmp_path / 'no'}"]
    assert "there is no such folder" in refusal(data.main, words, capsys)
