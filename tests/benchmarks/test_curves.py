"""When two loss curves agree, on curves that are made up."""

import math
import random

import pytest
from PIL import Image
from records import refusal

from fusedit.benchmarks import curves, harness
from fusedit.benchmarks.curves import RUNS, SEEDS, SMOOTH
from fusedit.benchmarks.demo_steps import RunFailed, Steps
from fusedit.launch.flags import parse

STEPS = 120
AUTOCAST, PARAMETERS = (name for name in RUNS if name not in SEEDS)


def losses(seed, off=0.0):
    draw = random.Random(seed)
    return [math.exp(-step / 100) + draw.gauss(0, 0.05) + off for step in range(STEPS)]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Losses of each run, and the flags each was asked with."""
    made = {name: losses(seed=int(name[-1])) for name in SEEDS}
    made |= {AUTOCAST: losses(3, off=1e-5), PARAMETERS: losses(3, off=-1e-5)}
    asked = {}

    def run(steps, words, output):
        name = next(name for name in RUNS if name not in asked)
        asked[name] = words
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
    assert [row["verdict"] for row in rows.values()] == ["unchecked"] * 3 + ["right"] * 2
    assert list(rows[AUTOCAST]["values"])[:2] == ["loss_at_50", "loss_at_100"]
    first = rows[SEEDS[0]]["values"]
    assert first["loss_at_50"] == pytest.approx(sum(runs[SEEDS[0]][:50]) / 50)
    assert first["loss_at_100"] == pytest.approx(sum(runs[SEEDS[0]][50:100]) / 50)
    assert Image.open(tmp_path / "curves.png").width > 500


def test_each_run_is_of_its_seed_and_precision(runs, drawn):
    drawn()
    found = {name: parse(words).run for name, words in runs["asked"].items()}
    assert [run.loop.seed for run in found.values()] == [3, 4, 5, 3, 3]
    formats = [(run.precision.mixed_precision, run.precision.param_dtype) for run in found.values()]
    assert formats == [("no", "fp32")] * 3 + [("bf16", "fp32"), ("bf16", "bf16")]


@pytest.mark.parametrize("name", [AUTOCAST, PARAMETERS])
def test_a_curve_that_leaves_the_spread_is_told(runs, drawn, name):
    # As far off, for some steps, as seeds never are.
    runs[name] = [loss + 0.1 * (80 <= step < 110) for step, loss in enumerate(runs[name])]
    code, rows = drawn()
    assert code == 1
    assert (rows[name]["verdict"], rows[name]["error"] > 1) == ("wrong", True)
    assert [row["verdict"] for row in rows.values()].count("wrong") == 1


def test_agreement_is_the_distance_as_a_share_of_the_mean_spread():
    seeds = {SEEDS[0]: [2.0, 2.0, 2.0], SEEDS[1]: [1.0, 2.5, 2.0], SEEDS[2]: [3.0, 2.1, 2.4]}
    assert curves.spread_of(seeds) == pytest.approx((2.0 + 0.5 + 0.4) / 3)
    found = curves.agreement([2.2, 1.6, 2.1], seeds)
    assert (found.step, found.largest) == (SMOOTH + 1, pytest.approx(0.4 * 3 / 2.9))
    assert found.mean == pytest.approx((0.2 + 0.4 + 0.1) / 2.9)


def test_a_run_that_fails_ends_it(runs, tmp_path, capsys):
    runs[SEEDS[1]] = None
    assert curves.main([f"--out={tmp_path}", f"--work={tmp_path}", f"--steps={STEPS}"]) == 1
    assert f"{SEEDS[1]}: exit code 1: out of luck" in capsys.readouterr().err
    assert not harness.read(tmp_path / "curves.json")["complete"]


@pytest.mark.parametrize("steps", [SMOOTH - 1, 1201])
def test_too_few_steps_or_too_many_are_refused(steps, tmp_path, capsys):
    said = refusal(curves.main, [f"--out={tmp_path}", f"--steps={steps}"], capsys)
    assert "--steps must be from 50 to 1200" in said
