"""A run that another program starts, and what it is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny_inputs

from fusedit.trainer.callbacks import Callback, Callbacks
from fusedit.trainer.errors import UsageError
from fusedit.trainer.run import train
from fusedit.trainer.settings import from_values
from fusedit.trainer.world import World

STEPS = 4
GUIDE = Path(__file__).parents[2] / "trainer/README.md"
SMALLER = {  # than in the guide
    '"stable-diffusion-v1-5/stable-diffusion-v1-5"': '"base"',
    "(4, 32, 32)": "(4, 8, 8)",
    "steps=20": "steps=2",
    '"resolution": 256': '"resolution": 16',
    '"train_batch_size": 16': '"train_batch_size": 2',
    '"max_train_steps": 1000': '"max_train_steps": 4',
    '"validation_steps": 500': '"validation_steps": 2',
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


def settings(inputs, output, **other):
    values = {
        "pretrained_model_name_or_path": inputs / "base",
        "train_data_dir": inputs / "data",
        "output_dir": output,
        "resolution": 16,
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "validation_steps": 2,
        "validation_inference_steps": 2,
        "log_every": 1,
        "use_ema": True,
        "report_to": "none",
    }
    return from_values(values | other)


class Noisy(Callback):
    """Notes all it is told, and draws."""

    def __init__(self):
        self.logged, self.sheets, self.validated = [], [], []

    def on_log(self, step, values):
        torch.rand(3)
        self.logged.append((step, values))

    def on_image(self, step, image):
        self.sheets.append((step, image.size))

    def on_validate(self, step, pipeline):
        torch.manual_seed(step)
        weight = pipeline.unet.conv_in.weight.detach()
        self.validated.append((step, weight.clone()))
        return {"mine/step": float(step)}


def unet_of(output):
    return load_file(output / "unet/diffusion_pytorch_model.safetensors")


def test_it_is_told_of_everything_and_changes_nothing(inputs, tmp_path):
    assert train(settings(inputs, tmp_path / "plain", held_out=2))
    noisy = Noisy()
    assert train(settings(inputs, tmp_path / "told", held_out=2), callbacks=[noisy, Callback()])

    plain, told = unet_of(tmp_path / "plain"), unet_of(tmp_path / "told")
    assert all(torch.equal(plain[name], told[name]) for name in plain)
    written = [json.loads(line) for line in (tmp_path / "told/log.jsonl").open()]
    lines = [(one.pop("step"), {k: v for k, v in one.items() if k != "time"}) for one in written]
    assert noisy.logged == lines
    assert [step for step, values in lines if "loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in lines if "held_out/full" in values] == [2, 4]
    assert [values for _, values in lines if "mine/step" in values] == [
        {"mine/step": 2.0},
        {"mine/step": 4.0},
    ]
    assert [step for step, _ in noisy.sheets] == [2, 4]
    # The averages, which the export has too.
    assert torch.equal(noisy.validated[-1][1], told["conv_in.weight"])


def test_it_validates_without_held_out_rows(inputs, tmp_path):
    noisy = Noisy()
    train(settings(inputs, tmp_path / "run"), callbacks=[noisy])
    assert [step for step, _ in noisy.validated] == [2, 4]
    assert noisy.sheets == []


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (None, "on_validate of Slip must return numbers by name"),
        ({"score": "high"}, "on_validate of Slip must return numbers by name"),
        ({"step": 3.0}, "on_validate may not return step"),
    ],
)
def test_a_validation_that_returns_no_numbers_is_told(told, reason):
    class Slip(Callback):
        def on_validate(self, step, pipeline):
            return told

    with pytest.raises(UsageError, match=reason):
        Callbacks([Slip()]).on_validate(1, None)


def test_numbers_of_any_kind_are_logged_and_curves_are_no_edits():
    class Kinds(Noisy):
        def on_validate(self, step, pipeline):
            return {"a": np.float32(0.5), "b": torch.tensor(2.0)}

    kinds = Kinds()
    callbacks = Callbacks([kinds])
    assert json.dumps(callbacks.on_validate(1, None)) == '{"a": 0.5, "b": 2.0}'
    callbacks.image(1, "curve", Image.new("RGB", (4, 4)), "")
    assert kinds.sheets == []


def test_alone_it_takes_the_gpu_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert World.alone().device == torch.device("cuda", 0)  # set_device takes no other


def test_a_wrong_setting_is_told(inputs, tmp_path):
    with pytest.raises(UsageError, match=r"settings: unknown setting .*; did you mean"):
        settings(inputs, tmp_path, learning_rat=1e-4)
    with pytest.raises(UsageError, match="train_data_dir"):
        train(from_values({"pretrained_model_name_or_path": inputs / "base"}))


def test_the_guides_program_runs(inputs, tmp_path, monkeypatch, capsys):
    program = (
        GUIDE.read_text().split("## From Python", 1)[1].split("```python\n")[1].split("```")[0]
    )
    for told, smaller in SMALLER.items():
        assert told in program
        program = program.replace(told, smaller)
    shutil.copytree(inputs / "base", tmp_path / "base")
    shutil.copytree(inputs / "data", tmp_path / "pairs")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(GUIDE), "exec"), {})
    assert {path.name for path in tmp_path.glob("snowy-*.png")} == {"snowy-2.png", "snowy-4.png"}
    assert "snowy/light" in (tmp_path / "runs/python/log.jsonl").read_text()
    assert (tmp_path / "runs/python/model_index.json").exists()
