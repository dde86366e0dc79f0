"""Whether two programs learn alike: what is measured of a pipeline, and the verdict."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from records import refusal
from test_reference import SCRIPT
from tiny import save_tiny_pipeline

from fusedit.benchmarks import harness, learning, reference
from fusedit.benchmarks.demo_steps import RunFailed
from fusedit.benchmarks.learning import held_out_loss, verdict
from fusedit.launch.demo.world import make_pair

PAIRS = [make_pair(index, 3) for index in range(40)]


def test_the_held_out_loss_is_of_the_weights_alone(tmp_path):
    folder = save_tiny_pipeline(tmp_path / "base", in_channels=8)
    first = held_out_loss(folder, PAIRS)
    torch.manual_seed(7)
    assert held_out_loss(folder, PAIRS) == first
    assert 0.5 < first < 3  # a random UNet says next to nothing about noise of variance 1
    each = [held_out_loss(folder, PAIRS[:32]), held_out_loss(folder, PAIRS)]
    assert each[0] != each[1]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
    unet.save_pretrained(folder / "unet")
    assert held_out_loss(folder, PAIRS) > first


def test_ours_may_be_worse_by_the_standard_error_alone():
    script = [20.0, 21.0, 22.0]  # a variance of 1: the error of a difference is sqrt(2 / 3)
    found = verdict("edit_db", [19.3, 20.3, 21.3], script)
    assert found.better_by == pytest.approx(-0.7)
    assert found.standard_error == pytest.approx((2 / 3) ** 0.5)
    assert found.right
    assert not verdict("edit_db", [19.0, 20.0, 21.0], script).right
    assert verdict("held_out_loss", [0.3, 0.31], [0.4, 0.41]).better_by == pytest.approx(0.1)
    assert not verdict("held_out_loss", [0.4, 0.41], [0.3, 0.31]).right


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command, its runs and measurements made up; what was trained with which words."""
    asked = []

    def ran(folder, words):
        asked.append(words)
        (folder / "run").mkdir(parents=True)
        (folder / "run/model_index.json").write_text("{}")

    def evaluated(pipeline, size):
        seed, ours = int(pipeline.parent.name[-1]), pipeline.parent.name.startswith("ours")
        assert (size.held_out, size.steps) == (20, 7)
        return {"edit_db": 20.0 + seed + ours, "held_out_loss": 0.3 + seed / 100 - ours / 10}

    monkeypatch.setattr(learning, "evaluated", evaluated)
    monkeypatch.setattr(learning, "demo_data", lambda folder: folder)
    monkeypatch.setattr(learning, "run_module", lambda name, words, folder: ran(folder, words))
    monkeypatch.setattr(learning, "run_script", lambda w, script, words, folder: ran(folder, words))
    (tmp_path / reference.NAME).write_bytes(SCRIPT.read_bytes())
    base = [f"--reference={tmp_path}", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"]

    def run(*more):
        return learning.main([*base, "--steps=7", "--held_out=20", *more])

    return run, asked, tmp_path


def test_both_programs_have_the_same_flags_and_each_seed(command):
    run, asked, folder = command
    assert run("--seeds", "1", "2") == 0
    assert len(asked) == 4
    for script, ours in (asked[:2], asked[2:]):
        same = {word for word in ours if not word.startswith("--output_dir")}
        assert same == {*script}
        assert {"--use_ema", "--max_train_steps=7", "--train_batch_size=32"} <= same
    assert {f"--seed={seed}" for seed in (1, 2)} <= {word for words in asked for word in words}
    rows = {row["name"]: row for row in harness.read(folder / "learning.json")["rows"]}
    ours = rows["learning/edit_db/7/ours"]
    assert (ours["verdict"], ours["values"]["mean"]) == ("right", 22.5)
    assert ours["values"]["better_by"] == pytest.approx(1)
    assert (
        "| PSNR of held-out edits, dB | the script | 21 | 22 | 21.5 | unchecked |"
        in (folder / "learning.md").read_text()
    )
    with Image.open(folder / "learning.png") as picture:
        assert picture.width > 500
    assert run("--seeds", "1", "2") == 0
    assert len(asked) == 4  # what was trained is taken


def test_worse_learning_is_told(command, monkeypatch):
    run, _, folder = command
    own = learning.evaluated
    swap = {"ours": "script", "script": "ours"}

    def swapped(pipeline, size):
        name, seed = pipeline.parent.name.split("-")
        return own(pipeline.parent.with_name(f"{swap[name]}-{seed}") / "run", size)

    monkeypatch.setattr(learning, "evaluated", swapped)
    # Seeds that differ as much as the programs hide it: the error covers the difference.
    assert run("--seeds", "0", "1", "2") == 1
    rows = {row["name"]: row for row in harness.read(folder / "learning.json")["rows"]}
    assert rows["learning/held_out_loss/7/ours"]["verdict"] == "wrong"


def test_a_run_that_fails_ends_it(command, monkeypatch, capsys):
    run, _, _ = command

    def fails(*_):
        raise RunFailed("exit code 1: no room")

    monkeypatch.setattr(learning, "run_script", fails)
    assert run() == 1
    assert "fusedit.benchmarks.learning: exit code 1: no room" in capsys.readouterr().err


def test_one_seed_is_refused(tmp_path, capsys):
    (tmp_path / reference.NAME).write_bytes(SCRIPT.read_bytes())
    words = [f"--reference={tmp_path}", f"--out={tmp_path}", "--seeds", "4"]
    assert "--seeds 4: give at least two" in refusal(learning.main, words, capsys)
