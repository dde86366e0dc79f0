"""`fusedit cache` and --cache_latents as their users meet them."""

import json
import shutil

import pytest

from fusedit.launch import cache, cli, train
from fusedit.trainer import checkpoint
from fusedit.trainer.encoders import Encoders

BASIC = {
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "data",
    "resolution": 16,
    "train_batch_size": 2,
    "max_train_steps": 5,
    "log_every": 1,
    "learning_rate": 1e-3,
    "conditioning_dropout_prob": 0.1,
    "report_to": "none",
}


def _flags(*switches, **changes):
    named = {name: value for name, value in {**BASIC, **changes}.items() if value is not None}
    return [*(f"--{name}={value}" for name, value in named.items()), *switches]


def _square(*switches, **changes):
    """With a transform of few outcomes."""
    return _flags("--center_crop", "--random_flip", *switches, **changes)


def _losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("loss", "held_out/full", "held_out/neither")
    return [line[name] for line in lines for name in names if name in line]


def _mistake(capfd, main, flags):
    """The one line that a mistake is told in."""
    assert main(flags) == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("fusedit: ")]
    assert len(lines) == 1, printed
    return lines[0]


def test_a_run_from_the_cache_has_the_losses_of_one_without(here, capfd):
    looked_at = {"held_out": 2, "validation_steps": 2, "validation_inference_steps": 1}
    assert train.main(_square(output_dir="plain", **looked_at)) == 0
    assert train.main(_square(output_dir="cached", cache_latents="cache", **looked_at)) == 0
    assert "is whole" in capfd.readouterr().err
    plain, cached = _losses(here / "plain"), _losses(here / "cached")
    assert len(plain) == 5 + 3 * 2
    assert cached == pytest.approx(plain, rel=1e-3)
    assert (here / "cached" / "validation" / "step-000002.png").exists()


def test_the_command_fills_the_cache_and_the_run_only_reads_it(here, capfd, monkeypatch):
    flags = _square(output_dir="out", cache_latents="cache")
    assert cli.main(["cache", "--nproc_per_node=1", *flags]) == 0
    printed = capfd.readouterr().err
    assert "0 of 8 pairs are there" in printed
    assert "8 to encode, 2 forms each: 49.5 kB" in printed
    assert "pair 8/8" in printed
    assert not (here / "out").exists()

    def unused(*_):
        raise RuntimeError("the run has no use for the encoders")

    monkeypatch.setattr(Encoders, "__init__", unused)
    assert train.main(flags) == 0
    assert "8 of 8 pairs are there" in capfd.readouterr().err


def test_random_crops_train_from_those_that_are_kept(here):
    crops = {"cache_latents": "cache", "cache_crops": 2, "max_resize": 18}
    assert train.main(_flags(output_dir="out", **crops)) == 0
    assert all(0 < loss < 10 for loss in _losses(here / "out"))


def test_a_dry_run_says_the_size_and_writes_nothing(here, capfd):
    for main in (cache.main, train.main):
        assert main(_square("--dry_run", output_dir="out", cache_latents="cache")) == 0
        assert "8 to encode, 2 forms each: 49.5 kB" in capfd.readouterr().err
        assert not (here / "out").exists()
        assert not (here / "cache").exists()


def test_a_run_goes_on_with_or_without_the_cache_but_not_with_other_crops(here, capfd):
    assert train.main(_square(output_dir="whole")) == 0
    assert train.main(_square(output_dir="out", max_train_steps=2)) == 0
    assert train.main(_square(output_dir="out", max_train_steps=4, cache_latents="cache")) == 0
    assert train.main(_square(output_dir="out")) == 0
    assert max(checkpoint.steps(here / "out")) == 5
    assert _losses(here / "out") == pytest.approx(_losses(here / "whole"), rel=1e-3)

    crops = {"output_dir": "crops", "cache_latents": "cache"}
    assert train.main(_flags(**crops, cache_crops=2)) == 0
    line = _mistake(capfd, train.main, _flags(**crops, cache_crops=3))
    assert "--cache_crops was 2, now 3" in line


def test_a_stopped_build_exits_with_75(here, capfd, monkeypatch):
    monkeypatch.setattr(train.StopSignals, "requested", lambda self: True)
    for main in (cache.main, train.main):
        assert main(_square(output_dir="out", cache_latents="cache", resolution=16)) == 75
        assert "the same command goes on with the cache" in capfd.readouterr().err
        shutil.rmtree(here / "cache")


def test_two_ranks_by_the_command(here):
    flags = _square(output_dir="out", cache_latents="cache")
    assert cli.main(["cache", "--nproc_per_node=2", *flags]) == 0
    [manifest] = (here / "cache").rglob("manifest.json")
    shards = json.loads(manifest.read_text())["shards"]
    assert sum(name.startswith("pairs-") for name in shards) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (_flags(cache_latents="cache"), "--cache_latents cache cannot keep every random crop"),
        (_square(max_resize=18, cache_latents="cache"), "cannot keep every random crop"),
        (_flags(cache_crops=2), "--cache_crops 2 needs --cache_latents DIR"),
        (_square(cache_crops=2, cache_latents="cache"), "there is one crop; leave out one of them"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_weights_load(here, capfd, flags, message):
    for weights in (here / "base").rglob("*.safetensors"):
        weights.unlink()
    for main in (cache.main, train.main):
        assert message in _mistake(capfd, main, flags)
    assert not (here / "instruct-pix2pix-model").exists()
    assert not (here / "cache").exists()


def test_a_file_of_flags_may_hold_half_of_what_goes_together(here, capfd):
    (here / "run.toml").write_text("cache_crops = 2")
    flags = _flags("--dry_run", "--config=run.toml", cache_latents="cache")
    assert cache.main(flags) == 0
    assert "8 to encode, 2 forms each" in capfd.readouterr().err
    assert "needs --cache_latents" in _mistake(capfd, train.main, _flags("--config=run.toml"))


def test_the_command_needs_the_folder(here, capfd):
    assert "--cache_latents is missing" in _mistake(capfd, cache.main, _square())


def test_a_file_where_the_cache_should_go(here, capfd):
    (here / "cache").touch()
    line = _mistake(capfd, cache.main, _square(cache_latents="cache"))
    assert "--cache_latents cache is a file; give a folder" in line
