"""When loss curves agree, on curves that are made up."""

import math
import random

import pytest
from PIL import Image
from records import refusal

from fusedit.benchmarks import curves, harness
from fusedit.benchmarks.curves import FP32, PRECISIONS, ROUNDED, SEEDS, SMOOTH
from fusedit.benchmarks.demo_steps import RunFailed, Steps
from fusedit.launch.flags import parse

STEPS = 120
_, AUTOCAST, PARAMETERS = PRECISIONS
RUNS = [(name, seed) for name in PRECISIONS for seed in SEEDS] + [(ROUNDED, SEEDS[0])]


def losses(seed, off=0.0):
    draw = random.Random(seed)
    return [math.exp(-step / 100) + draw.gauss(0, 0.05) + off for step in range(STEPS)]


@pytest.fixture
def runs(monkeypatch):
    """Losses of each run, and the words and the loop each was asked with."""
    off = {FP32: 0.0, AUTOCAST: 1e-5, PARAMETERS: -1e-5, ROUNDED: 1e-6}
    made = {(name, seed): losses(seed, off[name]) for name, seed in RUNS}
    asked = {}

    def run(steps, words, output, *, loop):
        name = next(name for name in RUNS if name not in asked)
        asked[name] = (words, loop)
        if made[name] is None:
            raise RunFailed("exit code 1: out of luck")
        return Steps(made[name][:steps], [10.0], 0.5)

    monkeypatch.setattr(curves, "run_steps", run)
    monkeypatch.setattr(curves, "demo_data", lambda folder: folder)
    made["asked"] = asked
    return made


@pytest.fixture
def drawn(tmp_path):
    def main():
        code = curves.main([f"--out={tmp_path}", f"--work={tmp_path}", f"--steps={STEPS}"])
        rows = harness.read(tmp_path / "curves.json")["rows"]
        return code, {row["labels"]["run"]: row for row in rows}

    return main


def test_curves_that_agree_are_drawn(runs, drawn, tmp_path):
    code, rows = drawn()
    assert code == 0
    assert [row["verdict"] for row in rows.values()] == ["unchecked", "right", "right", "unchecked"]
    assert [row["labels"]["seeds"] for row in rows.values()] == [4, 4, 4, 1]
    fp32 = rows[FP32]["values"]
    of_all = [runs[FP32, seed] for seed in SEEDS]
    assert fp32["loss_at_50"] == pytest.approx(sum(sum(run[:50]) for run in of_all) / 200)
    assert fp32["loss_at_100"] == pytest.approx(sum(sum(run[50:100]) for run in of_all) / 200)
    assert Image.open(tmp_path / "curves.png").width > 500


def test_each_run_is_of_its_seed_and_precision(runs, drawn):
    drawn()
    formats = {FP32: ("no", "fp32"), AUTOCAST: ("bf16", "fp32"), PARAMETERS: ("bf16", "bf16")}
    formats[ROUNDED] = formats[FP32]
    assert list(runs["asked"]) == RUNS
    for (name, seed), (words, loop) in runs["asked"].items():
        run = parse(words).run
        found = (run.precision.mixed_precision, run.precision.param_dtype)
        assert (run.loop.seed, found) == (seed, formats[name])
        assert loop == ("rounded_once_more" if name == ROUNDED else "ours")


@pytest.mark.parametrize("name", [AUTOCAST, PARAMETERS])
def test_a_curve_that_leaves_the_spread_is_told(runs, drawn, name):
    # With each seed as far off, for some steps, as seeds never are.
    for seed in SEEDS:
        off = runs[name, seed]
        runs[name, seed] = [loss + 0.1 * (80 <= step < 110) for step, loss in enumerate(off)]
    code, rows = drawn()
    assert code == 1
    assert (rows[name]["verdict"], rows[name]["error"] > 1) == ("wrong", True)
    assert [row["verdict"] for row in rows.values()].count("wrong") == 1


def test_agreement_is_the_distance_of_the_means_as_a_share_of_the_mean_spread():
    fp32 = [[2.0, 2.0, 2.0], [1.0, 2.5, 2.1]]
    spread = (1.0 + 0.5 + 0.1) / 3
    assert curves.spread_of(fp32) == pytest.approx(spread)
    found = curves.agreement([[2.2, 1.2, 2.0], [1.0, 2.7, 2.1]], fp32)  # apart by .2 -.8 0, 0 .2 0
    assert (found.step, found.largest) == (SMOOTH + 1, pytest.approx(0.3 / spread))
    assert found.mean == pytest.approx((-0.2 + 0.2 / 3) / 2 / spread)
    assert found.standard_error == pytest.approx((0.2 + 0.2 / 3) / 2 / spread)
    assert found.largest_of_a_pair == pytest.approx(0.8 / spread)


def test_one_run_is_held_beside_the_first_seed_alone():
    found = curves.agreement([[2.0, 2.3]], [[2.0, 2.0], [1.0, 1.0]])
    assert (found.largest, found.standard_error) == (pytest.approx(0.3), 0.0)


def test_a_run_that_fails_ends_it(runs, tmp_path, capsys):
    runs[FP32, SEEDS[1]] = None
    assert curves.main([f"--out={tmp_path}", f"--work={tmp_path}", f"--steps={STEPS}"]) == 1
    said = capsys.readouterr().err
    assert f"{FP32}, seed {SEEDS[1]}\n" in said
    assert "exit code 1: out of luck" in said
    assert not harness.read(tmp_path / "curves.json")["complete"]


@pytest.mark.parametrize("steps", [SMOOTH - 1, 1201])
def test_too_few_steps_or_too_many_are_refused(steps, tmp_path, capsys):
    said = refusal(curves.main, [f"--out={tmp_path}", f"--steps={steps}"], capsys)
    assert "--steps must be from 50 to 1200" in said
