"""Decoding, and what the loader delivers, at small sizes: rows, and that a wrong one is seen."""

import numpy as np
import pytest
from PIL import Image
from records import refusal

from fusedit.benchmarks import cache, data, harness


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"PHOTOGRAPHS": 6, "BATCHES": 3, "WORKERS": (0,)}
    sizes |= {"JPEGS": (data.Jpegs(48, 32, 680), data.Jpegs(32, 32, 1))}
    for name, value in sizes.items():
        monkeypatch.setattr(data, name, value)
    sizes = {"PAIRS": 24, "PAIRS_A_SHARD": 8, "RESOLUTIONS": (16,), "TEXT_TOKENS": 3, "WIDTH": 4}
    sizes["BUILDS"] = [case for case in cache.BUILDS if case.sd15]
    for name, value in sizes.items():
        monkeypatch.setattr(cache, name, value)


def test_every_part_and_size_is_timed(tmp_path, capsys):
    assert data.main([f"--out={tmp_path}", f"--folder={tmp_path}", "--batch=4"]) == 0
    record = harness.read(tmp_path / "data.json")
    assert record["complete"]
    assert [row["name"] for row in record["rows"]] == [
        *(f"cache/16px/4/{dtype}/read/ours" for dtype in ("bf16", "fp32")),
        *(f"cache/sd15 {side}px/64/bf16/build/ours" for side in (256, 512)),
        *(f"decode/{side}px/1/jpeg/1 process/ours" for side in (48, 32)),
        *(f"loader/{side}px to 32px/4/jpeg/0 workers/ours" for side in (48, 32)),
    ]
    told = capsys.readouterr().out
    for row in record["rows"]:
        built, values = row["labels"]["direction"] == "build", row["values"]
        assert built or values["samples_per_s" if "samples_per_s" in values else "images_per_s"] > 0
        assert f"{row['name']}: needs a GPU" in told if built else f"{row['name']}: " in told
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_each_file_is_decoded_several_times(tmp_path):
    data.photographs(tmp_path, 32, 3)
    row = data.decode_row(32, sorted(tmp_path.glob("*.jpg")))
    assert row["timings"]["warm"]["runs"] == 6 * data.DECODES
    assert row["values"]["images_per_s"] < 1e3 / row["timings"]["warm"]["low_ms"]


def test_a_wrong_image_has_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_image", lambda path: Image.open(path).reduce(2))
    assert data.main([f"--out={tmp_path}", "--only=decode"]) == 1
    rows = harness.read(tmp_path / "data.json")["rows"]
    assert {(row["verdict"], row["timings"]) for row in rows} == {("wrong", None)}


def test_photographs_differ_and_their_list_goes_round_them(tmp_path):
    data.photographs(tmp_path, 32, files=2, rows=5)
    files = sorted(tmp_path.glob("*.jpg"))
    pixels = [np.asarray(Image.open(path)) for path in files]
    assert [image.shape for image in pixels] == [(32, 32, 3)] * 4
    assert not any(np.array_equal(pixels[0], other) for other in pixels[1:])
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert [line.count('"0-input_image.jpg"') for line in lines] == [1, 0, 1, 0, 1]
    assert len({line.split("edit_prompt")[1] for line in lines}) == 3  # two pairs to a text


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
