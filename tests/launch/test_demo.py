"""The demo: its short form always, its bar when asked for (`-m slow`, half an hour)."""

import json
import os
import subprocess
import sys

import pytest
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from fusedit.launch.demo.world import GLOBAL_KINDS, KINDS


def _demo(output, *flags, timeout_s=600):
    command = [sys.executable, "-m", "fusedit.launch.cli", "demo", f"--output={output}", *flags]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_short_form_ends_in_its_results_and_is_not_done_twice(tmp_path):
    output = tmp_path / "demo"
    first = _demo(output, "--quick")
    for stage in ("drawing", "training", "editing"):
        assert f"fusedit demo: {stage}" in first.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert tuple(metrics["edit_db_by_kind"]) == KINDS
    assert Image.open(output / "edits.png").width > 500
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(output)
    assert pipeline.unet.config.in_channels == 8

    second = _demo(output, "--quick")
    for stage in ("drawing", "training", "editing"):
        assert f"fusedit demo: {stage}" not in second.stderr
    assert second.stdout == first.stdout

    (output / "metrics.json").unlink()  # as if it had been killed while measuring
    again = _demo(output, "--quick")
    assert "fusedit demo: training" not in again.stderr
    assert json.loads((output / "metrics.json").read_text()) == metrics


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    _demo(output / "demo", timeout_s=3600)
    return json.loads((output / "demo" / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_the_demo_meets_its_bar(measured):
    edit, unedited = measured["edit_db_by_kind"], measured["unedited_db_by_kind"]
    gains = {kind: edit[kind] - unedited[kind] for kind in KINDS}
    assert measured["gain_db"] >= 5
    assert sum(gains[kind] for kind in GLOBAL_KINDS) / len(GLOBAL_KINDS) >= 8
    assert min(gains.values()) >= -1, gains
    assert measured["edit_db"] - measured["shuffled_edit_db"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_the_base_beats_random_weights(measured, tmp_path):
    _demo(tmp_path / "scratch", "--from_scratch", timeout_s=3600)
    scratch = json.loads((tmp_path / "scratch" / "metrics.json").read_text())
    assert measured["edit_db"] > scratch["edit_db"] + 0.3
