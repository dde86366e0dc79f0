"""The two questions of the benchmark, on answers that are made up; a small CLIP in a moment."""

import numpy as np
import pytest
import torch
from PIL import Image

from fusedit.benchmarks import harness
from fusedit.benchmarks.evaluate import (
    CURVE,
    HELD_OUT,
    RUNS,
    WITH,
    WITHOUT,
    difference_of_areas,
    plot,
    rows_of,
    save_scenes,
    spearman,
)
from fusedit.benchmarks.small_clip import save_small_clip
from fusedit.launch.flags import parse
from fusedit.trainer.examples import data_config
from fusedit.trainer.extractors import Clip
from fusedit.trainer.protocols import read_protocol
from fusedit.trainer.rows import open_rows


def test_spearman_is_of_ranks():
    assert spearman([1.0, 2.0, 5.0, 100.0]) == 1
    assert spearman([4.0, 3.0, 2.0, 1.0]) == -1
    swapped = [float(value) for value in (0, 1, 2, 3, 4, 5, 6, 7, 9, 8)]
    assert spearman(swapped) == pytest.approx(np.corrcoef(swapped, range(10))[0, 1])


def measured(direction, image, seed):
    draw = np.random.default_rng(seed)
    return {
        (scale, row): {
            "clip_direction": direction + 0.1 * draw.standard_normal(),
            "clip_image": image + 0.1 * draw.standard_normal(),
        }
        for scale in (1.0, 2.2)
        for row in range(40)
    }


def test_models_are_told_apart_by_their_areas():
    one, other = measured(0.3, 0.9, 0), measured(0.2, 0.8, 1)
    difference, (low, high) = difference_of_areas(one, other, draws=200)
    assert 0 < low < difference < high
    assert difference == pytest.approx(0.27 - 0.16, abs=0.04)
    _, (low, high) = difference_of_areas(one, measured(0.3, 0.9, 2), draws=200)
    assert low < 0 < high


def results(area):
    points = [
        {"image_guidance_scale": scale, "metrics": {"clip_direction": 0.2, "clip_image": 0.8}}
        for scale in (1.0, 2.2)
    ]
    return {"curve": {"area": area, "reach": 0.1}, "points": points}


@pytest.mark.parametrize(
    ("decibels", "interval", "verdicts"),
    [
        ((1.0, 2.0, 3.0), (0.01, 0.03), ["right", "right"]),
        ((3.0, 2.0, 1.0), (-0.01, 0.03), ["wrong", "wrong"]),
    ],
)
def test_the_bar(decibels, interval, verdicts, tmp_path):
    checkpoints = {10 * at: {"psnr": value} for at, value in enumerate(decibels, start=1)}
    curves = {WITH: results(0.2), WITHOUT: results(0.1)}
    rows = rows_of(checkpoints, curves, (0.02, interval), 0.9)
    told = {row["labels"]["op"]: row["verdict"] for row in rows}
    assert [told["order"], told["told apart"]] == verdicts
    record = harness.new_record("evaluate", []) | {"rows": rows}
    harness.write(record, tmp_path / "evaluate.json")
    assert harness.read(tmp_path / "evaluate.json")["rows"] == rows
    assert plot({10: 1.0, 20: 2.0}, curves, "made up", tmp_path / "evaluate.png")
    assert Image.open(tmp_path / "evaluate.png").width > 500


def test_runs_differ_in_image_dropout_alone():
    rates = {
        name: parse([*flags, "--conditioning_dropout_prob=0.05"]) for name, flags in RUNS.items()
    }
    assert rates[WITH].run.conditioning.rates == (0.05, 0.05, 0.05)
    assert rates[WITHOUT].run.conditioning.rates == (0.05, 0, 0)


def test_its_protocols_find_their_columns(tmp_path):
    scenes = save_scenes(tmp_path / "scenes", 2)
    for text in (HELD_OUT, CURVE):
        (tmp_path / "own.toml").write_text(text)
        protocol = read_protocol(str(tmp_path / "own.toml"))
        rows = open_rows(data_config(str(scenes), protocol.data))
        assert len(rows) == 2
    assert rows.column(protocol.data.before_column) is not None
    assert rows.column(protocol.data.after_column) is not None


def test_a_small_clip_is_one_that_evaluate_takes(tmp_path):
    assert 0 <= save_small_clip(tmp_path, pairs=2, steps=1) <= 1
    clip = Clip(str(tmp_path), torch.device("cpu"))
    assert (
        clip.texts(["a house", "a tree"]).shape
        == clip.images([Image.new("RGB", (64, 64))] * 2).shape
    )
