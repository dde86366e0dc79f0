"""Averages whose length is chosen after training, as their users meet them."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny import save_tiny_inputs

from fusedit.launch import cli, train
from fusedit.trainer import checkpoint

STEPS, EVERY = 16, 2
LENGTHS = ("0.05", "0.1")
FLAGS = [
    "--resolution=16",
    "--train_batch_size=2",
    "--learning_rate=1e-2",  # so that the weights go somewhere
    "--lr_scheduler=constant",
    "--checkpointing_steps=1",
    "--report_to=none",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of which every step's weights are kept, and its inputs."""
    folder = save_tiny_inputs(tmp_path_factory.mktemp("ema"))
    assert train.main(_flags(folder, "--use_ema", f"--ema_snapshot_steps={EVERY}")) == 0
    return folder


def _flags(folder, *more, steps=STEPS):
    return [
        *FLAGS,
        f"--pretrained_model_name_or_path={folder / 'base'}",
        f"--train_data_dir={folder / 'data'}",
        f"--output_dir={folder / 'out'}",
        f"--max_train_steps={steps}",
        "--post_hoc_ema",
        *LENGTHS,
        *more,
    ]


def _ema(folder, length, out="made"):
    return cli.main(["ema", str(folder / "out"), f"--length={length}", f"--out={folder / out}"])


def _flat(weights):
    return np.concatenate([weights[n].double().numpy().ravel() for n in sorted(weights)])


def _by_the_paper(folder, length, last=STEPS):
    """The average of the checkpoints' weights, by the paper's recursion in fp64."""
    grid = np.linspace(1e-3, 1e3, 2_000_001)
    deviations = np.sqrt(grid + 1) / ((grid + 2) * np.sqrt(grid + 3))
    gamma = grid[np.argmin(np.abs(deviations - float(length)))]
    average = 0.0
    for t in range(1, last + 1):
        weights = load_file(folder / "out" / f"checkpoint-{t}" / "unet.safetensors")
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * _flat(weights)
    return average


def _distance(one, other):
    return np.linalg.norm(one - other)


@pytest.mark.parametrize("length", LENGTHS)
def test_snapshots_hold_the_averages_of_the_paper(trained, length):
    snapshots = trained / "out" / "post_hoc_ema"
    assert sorted(checkpoint.steps(snapshots)) == list(range(EVERY, STEPS + 1, EVERY))
    for step in (EVERY, STEPS):
        weights = load_file(snapshots / f"checkpoint-{step}" / f"ema_{length}.safetensors")
        expected = _by_the_paper(trained, length, step)
        assert _distance(_flat(weights), expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("length", ["0.06", "0.075", "0.12"])
def test_a_length_is_chosen_after_training(trained, length, capsys):
    out = f"made-{length}"
    assert _ema(trained, length, out) == 0
    assert f"{out}: of 16 averages, the profile within" in capsys.readouterr().out
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(trained / out)
    made = _flat(pipeline.unet.state_dict())
    truth = _by_the_paper(trained, length)
    last = trained / "out" / "post_hoc_ema" / f"checkpoint-{STEPS}"
    kept = [_flat(load_file(last / f"ema_{one}.safetensors")) for one in LENGTHS]
    assert _distance(made, truth) < 0.2 * min(_distance(one, truth) for one in kept)
    for part in ("vae", "text_encoder"):
        for file in (trained / "out" / part).iterdir():
            assert (trained / out / part / file.name).read_bytes() == file.read_bytes()
    assert not (trained / out / "unet_raw").exists()
    about = json.loads((trained / out / "post_hoc_ema.json").read_text())
    assert (about["length"], about["step"]) == (float(length), STEPS)
    assert sum(one["weight"] for one in about["snapshots"]) == pytest.approx(1)


def test_the_usual_average_is_exported_as_ever(trained):
    exported = UNet2DConditionModel.from_pretrained(trained / "out", subfolder="unet").state_dict()
    ema = load_file(trained / "out" / f"checkpoint-{STEPS}" / "ema.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in ema.items())


def test_a_run_that_goes_on_makes_the_same_snapshots(trained, tmp_path):
    """From a checkpoint before the last snapshot, as after a kill; later ones are set aside."""
    shutil.copytree(trained / "out", tmp_path / "out")
    snapshots = tmp_path / "out" / "post_hoc_ema"
    for step in range(6, STEPS + 1):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    flags = "--use_ema", f"--ema_snapshot_steps={EVERY}", f"--output_dir={tmp_path / 'out'}"
    assert train.main(_flags(trained, *flags)) == 0
    for length in LENGTHS:
        name = f"checkpoint-{STEPS}/ema_{length}.safetensors"
        assert (snapshots / name).read_bytes() == (
            trained / "out" / "post_hoc_ema" / name
        ).read_bytes()
    assert (snapshots / f"checkpoint-{STEPS}.aside-1").is_dir()
    assert not (snapshots / "checkpoint-4.aside-1").exists()


def test_snapshots_are_taken_with_checkpoints_and_go_with_overwrite(trained, tmp_path):
    for name in ("base", "data"):
        shutil.copytree(trained / name, tmp_path / name)
    assert train.main(_flags(tmp_path, "--checkpointing_steps=2", steps=3)) == 0
    snapshots = tmp_path / "out" / "post_hoc_ema"
    assert sorted(checkpoint.steps(snapshots)) == [2, 3]
    assert train.main(_flags(tmp_path, "--overwrite", "--checkpointing_steps=2", steps=2)) == 0
    assert [path.name for path in snapshots.iterdir()] == ["checkpoint-2"]


def _mistake(capfd, folder, length="0.075", out="new"):
    assert _ema(folder, length, out) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert not (folder / "new").exists()
    assert not list(folder.glob(".*"))
    return lines[0]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("0.3", "--length 0.3: a length is above 0 and at most 0.2887"),
        ("0", "--length 0.0: a length is above 0"),
        ("0.005", "--length 0.005 cannot be made of 16 snapshots of 0.05, 0.1: its profile"),
    ],
)
def test_a_length_that_cannot_be_made(trained, capfd, length, message):
    assert message in _mistake(capfd, trained, length)


def test_a_folder_that_is_there_is_left_alone(trained, capfd):
    assert "base is there already; give a new folder" in _mistake(capfd, trained, out="base")


def test_a_run_without_snapshots_or_a_pipeline(trained, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    assert "has no post_hoc_ema: train with --post_hoc_ema" in _mistake(capfd, tmp_path)
    shutil.copytree(trained / "out" / "post_hoc_ema", tmp_path / "out" / "post_hoc_ema")
    assert "has no exported pipeline yet: let the run end first" in _mistake(capfd, tmp_path)


def test_a_damaged_snapshot_is_named(trained, tmp_path, capfd):
    shutil.copytree(trained / "out", tmp_path / "out")
    weights = tmp_path / "out" / "post_hoc_ema" / "checkpoint-4" / "ema_0.1.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = _mistake(capfd, tmp_path)
    assert "checkpoint-4 is not whole: ema_0.1.safetensors does not have the hash" in line
