"""The benchmark of reading, at small sizes: its rows, and that it sees a wrong answer."""

import pytest
import torch
from records import refusal

from fusedit.benchmarks import data, harness


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"PAIRS": 24, "PAIRS_A_SHARD": 8, "RESOLUTIONS": (16,), "TEXT_TOKENS": 3, "WIDTH": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(data, name, value)


def test_every_size_is_timed(tmp_path):
    assert data.main([f"--out={tmp_path}", f"--folder={tmp_path}", "--batch=4"]) == 0
    record = harness.read(tmp_path / "data.json")
    assert record["complete"]
    assert [row["name"] for row in record["rows"]] == [
        f"cache/16px/4/{dtype}/read/ours" for dtype in ("bf16", "fp32")
    ]
    assert all(row["values"]["samples_per_s"] > 0 for row in record["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_a_wrong_answer_has_no_speed(tmp_path, monkeypatch):
    right = data.CachedPairs.__getitems__

    def shifted(self, positions):
        found = right(self, positions)
        return found._replace(positions=torch.tensor(positions) + 1)

    monkeypatch.setattr(data.CachedPairs, "__getitems__", shifted)
    assert data.main([f"--out={tmp_path}", "--batch=4"]) == 1
    rows = harness.read(tmp_path / "data.json")["rows"]
    assert {row["verdict"] for row in rows} == {"wrong"}
    assert not any(row["timings"] for row in rows)


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    words = [f"--out={tmp_path}", f"--folder={tmp_path / 'no'}"]
    assert "there is no such folder" in refusal(data.main, words, capsys)
