import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny_dataset, save_tiny_pipeline

from fusedit.launch import edit
from fusedit.launch.edit import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    save_tiny_pipeline(folder / "model", in_channels=8)
    save_tiny_pipeline(folder / "plain")
    save_tiny_dataset(folder / "data", count=1, size=(25, 18))
    return folder


@pytest.fixture
def run(place, tmp_path):
    """Runs `fusedit edit` with these changes and returns its exit code."""

    def call(*flags, model="model", image="data/000_input.png", output="out.png"):
        where = str(image) if "://" in str(image) else str(place / image)
        return main(
            [str(place / model), where, "make it red", "-o", str(tmp_path / output), *flags]
        )

    return call


def test_the_edit_keeps_the_size_to_the_vaes_factor(run, tmp_path, capsys):
    assert run("--steps", "2") == 0
    assert Image.open(tmp_path / "out.png").size == (24, 18)
    assert capsys.readouterr().out == f"{tmp_path / 'out.png'}: 24 x 18\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert run("--steps", "2", "--resolution", "12", output="small.jpg") == 0
    assert Image.open(tmp_path / "small.jpg").size == (12, 8)


def test_the_seed_decides(run, tmp_path):
    for name, seed in {"a.png": "1", "b.png": "1", "c.png": "2"}.items():
        assert run("--steps", "2", "--seed", seed, output=name) == 0
    one, same, other = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in "abc")
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("flags", "places", "reason"),
    [
        ((), {"model": "missing"}, "no such model folder"),
        ((), {"model": "data"}, "model_index.json"),
        ((), {"model": "plain"}, "takes 4 channels, not 8"),
        ((), {"model": "broken"}, "broken"),
        ((), {"image": "missing.png"}, "no such file"),
        ((), {"image": "model/model_index.json"}, "image"),
        ((), {"image": "ftp://host/image.png"}, "only http and https"),
        ((), {"image": "http://127.0.0.1:9/image.png"}, "cannot be fetched"),
        (("--device", "nonsense"), {}, "--device nonsense"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run, place, tmp_path, capsys, flags, places, reason):
    if places.get("model") == "broken" and not (place / "broken").exists():
        shutil.copytree(place / "model", place / "broken")
        (place / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_text("torn")
    assert run("--steps", "1", *flags, **places) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedit: ")]
    assert len(told) == 1
    assert reason in told[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["missing/out.png", "out", "out.txt", "folder.png"])
def test_an_output_that_cannot_be_is_refused_first(run, tmp_path, capsys, output):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as caught:
        run(output=output, model="missing")
    assert caught.value.code == 2
    assert "-o" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run(image="photos", output="edits")
    assert caught.value.code == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "photos: there is no such file or folder" in told


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--image_guidance_scale", "0.5"), "--image_guidance_scale must be 1 or more, got 0.5"),
        (("--guidance_scale", "nan"), "--guidance_scale must be a number"),
        (("--seed", "-1"), "--seed must be from 0"),
        (("--steps", "0"), "--steps must be 1 or more"),
        (("--overwrite",), "one image is always written"),
        (("--port", "8000"), "are of --ui"),
        (("--ui",), "--ui takes MODEL alone"),
    ],
)
def test_flags_that_cannot_be_are_refused_first(run, capsys, flags, reason):
    with pytest.raises(SystemExit) as caught:
        run(*flags, model="missing")
    assert caught.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_failed_write_leaves_the_old_picture(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.png").write_text("old")

    def full(image, path, *_, **__):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edit.Image.Image, "save", full)
    assert run("--steps", "1") == 2
    assert "no space is left" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.png": "old"}
