"""The benchmark of editing, on edits that are made up, and once for real at its least."""

import json

import numpy as np
import pytest
from PIL import Image

from fusedit.benchmarks import edit, harness
from fusedit.benchmarks.edit import DIFFUSERS, Way, differences, main, row_of, ways_of

LABELS = {"preset": "demo-64", "steps": 2, "dtype": "fp32"}


def test_both_make_the_same_edits_and_the_record_says_how_fast(tmp_path, capsys):
    words = ["--tiny", "--edits", "3", "--batch", "2", "--steps", "2", "--rounds", "2"]
    words += ["--without", "blocks", "whole", "--work", str(tmp_path / "work")]
    assert main([*words, "--out", str(tmp_path)]) == 0
    record = harness.read(tmp_path / "edit.json")
    by = {row["labels"]["by"]: row for row in record["rows"]}
    assert [*by] == [DIFFUSERS, "ours-single", "ours"]
    assert {row["verdict"] for row in by.values()} == {"right"}
    assert by["ours"]["values"]["largest_difference"] <= 1
    assert by["ours"]["timings"]["warm"]["runs"] == 2
    assert by["ours"]["labels"]["batch"] == 2
    assert "| ours | 2 |" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(record)


def test_a_ratio_is_the_median_of_the_rounds_and_a_wrong_edit_has_no_speed():
    ways = {DIFFUSERS: Way(1, milliseconds=[10, 20, 30]), "ours": Way(8, milliseconds=[5, 5, 5])}
    right = row_of("ours", ways, LABELS, (1, 0.01), 0.05)
    assert (right["values"]["ratio"], right["values"]["images_per_s"]) == (4, 200)
    wrong = row_of("ours", ways, LABELS, (90, 0.06), 0.05)
    assert (wrong["verdict"], wrong["timings"]) == ("wrong", None)


def test_differences_are_of_the_worst_edit(tmp_path):
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for name, values in {"ours": (3, 0), DIFFUSERS: (3, 4)}.items():
        (tmp_path / name).mkdir()
        for path, value in zip(paths, values, strict=True):
            pixels = np.zeros((2, 2, 3), np.uint8)
            pixels[0, 0] = value
            Image.fromarray(pixels).save(tmp_path / name / path.name)
    assert differences(paths, tmp_path, "ours") == (4, 1.0)


def test_ways_that_need_a_gpu_or_are_left_out_are_not_measured():
    assert "ours-plain" not in ways_of(8, False, [])
    assert [*ways_of(8, True, ["blocks", "whole", "single"])] == [DIFFUSERS, "ours", "ours-plain"]


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--rounds", "1", "--tiny"], "--rounds must be 2"), ([], "there is no GPU here")],
)
def test_mistakes_are_one_line(words, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        edit.parse([*words, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
