"""Folders and lists: the same edits as one by one, in batches, kept, and never mixed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_tiny_pipeline

from fusedit.launch.edit import main
from fusedit.trainer import editing, editing_many
from fusedit.trainer.editing import Editor, Settings
from fusedit.trainer.editing_many import WAIT, _batches, edit_rows, identity, still_to_do
from fusedit.trainer.editing_rows import Bad, Row, rows_of_folder
from fusedit.trainer.pipelines import load_pipeline

# name, width, height: two sizes, one in a folder below
IMAGES = {"a.png": (24, 20), "b.jpg": (24, 20), "c.bmp": (16, 20), "sub/d.png": (24, 20)}
EDITS = ["a.png", "b.jpg", "c.png", "sub/d.png"]
CLOSE = 1  # of 255: sums in another order


def noise(size, seed):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "model", in_channels=8)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for seed, (name, size) in enumerate(IMAGES.items()):
        noise(size, seed).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image either")
    return folder


@pytest.fixture
def run(model, tmp_path):
    def call(source, *flags, out="out", steps="2"):
        words = [str(model), str(source), *flags, "-o", str(tmp_path / out)]
        return main([*words, "--steps", steps])

    return call


def list_of(folder, *lines):
    path = folder / "edits.jsonl"
    path.write_text("".join(f"{json.dumps(x) if isinstance(x, dict) else x}\n" for x in lines))
    return path


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def told(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()]


def test_every_image_of_a_folder_is_edited_as_by_itself(run, photos, tmp_path, capsys):
    assert run(photos, "make it red", "--seed", "3") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 4 edited, 0 there already, 0 left out\n"
    assert names(tmp_path / "out") == EDITS
    for source, edit in {"a.png": "a.png", "c.bmp": "c.png", "sub/d.png": "sub/d.png"}.items():
        assert run(photos / source, "make it red", "--seed", "3", out="one.png") == 0
        assert np.abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "out" / edit)).max() <= CLOSE
    assert run(photos, "make it red", "--seed", "4", out="other") == 0
    assert not np.array_equal(pixels(tmp_path / "out/a.png"), pixels(tmp_path / "other/a.png"))


def test_an_edit_does_not_depend_on_its_batch(run, photos, tmp_path):
    for size in ("1", "2", "8"):
        assert run(photos, "make it red", "--batch_size", size, out=size) == 0
    for name in EDITS:
        one, *others = (pixels(tmp_path / size / name) for size in ("1", "2", "8"))
        assert all(np.abs(one - other).max() <= CLOSE for other in others)


def test_images_of_a_size_and_settings_share_a_batch(photos, model, tmp_path, monkeypatch):
    batches = []

    class Watched(Editor):
        def edit(self, images, *args):
            batches.append({image.size for image in images} | {len(images)})
            return images

    bad = Bad(False, print)
    rows = rows_of_folder(photos, "make it red", Settings(), tmp_path / "out", bad)
    editor = Watched(load_pipeline(str(model)), torch.device("cpu"), batch_size=2)
    assert edit_rows(editor, rows, 0, "model", bad) == (4, 0, 0)
    assert batches == [{(24, 20), 2}, {(16, 20), 1}, {(24, 20), 1}]


def test_images_do_not_wait_for_their_like_for_ever():
    rows = [Row(str(n), "", "", Settings(guidance_scale=1 + n), Path("out")) for n in range(50)]
    read = []
    images = ((row, Image.new("RGB", (8, 8))) for row in rows if not read.append(row))
    first = next(_batches(images, 2))
    assert [row.place for row, _ in first] == ["0"]
    assert len(read) == 2 * WAIT


def test_a_lists_lines_say_what_differs(run, photos, tmp_path):
    path = list_of(
        photos,
        {"image": "a.png", "instruction": "make it red"},
        "",
        {"image": "a.png", "instruction": "make it red", "seed": 5, "output": "more/seed.webp"},
        {"image": str(photos / "sub/d.png"), "instruction": "add snow", "steps": 3,
         "guidance_scale": 2, "image_guidance_scale": 1.2},
    )  # fmt: skip
    assert run(path) == 0
    assert names(tmp_path / "out") == ["a.png", "d.png", "more/seed.webp"]
    flags = ("--guidance_scale", "2", "--image_guidance_scale", "1.2")
    assert run(photos / "sub/d.png", "add snow", *flags, out="one.png", steps="3") == 0
    assert np.abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "out/d.png")).max() <= CLOSE


def test_what_is_there_is_kept_unless_it_was_made_otherwise(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, "make it red") == 0
    (out / "sub/d.png").unlink()
    (out / ".a.png.partial").write_text("half of one that was killed")
    before = {name: (out / name).stat().st_mtime_ns for name in EDITS[:3]}
    capsys.readouterr()
    assert run(photos, "make it red", "--batch_size", "3") == 0
    assert capsys.readouterr().out == f"{out}: 1 edited, 3 there already, 0 left out\n"
    assert {name: (out / name).stat().st_mtime_ns for name in EDITS[:3]} == before
    for flags, named in {
        ("make it blue",): "another instruction",
        ("make it red", "--seed", "1"): "another seed",
        ("make it red", "--guidance_scale", "3", "--resolution", "20"): "guidance_scale and resol",
    }.items():
        assert run(photos, *flags) == 2
        [line] = told(capsys)
        assert named in line
        assert "--overwrite" in line
    assert {name: (out / name).stat().st_mtime_ns for name in EDITS[:3]} == before
    assert run(photos, "make it blue", "--overwrite") == 0
    assert run(photos, "make it blue") == 0
    assert "0 edited, 4 there already" in capsys.readouterr().out


def test_a_changed_image_or_model_or_a_strange_file_is_not_taken_for_the_edit(
    run, photos, model, tmp_path, capsys
):
    assert run(photos, "make it red") == 0
    noise((24, 20), 9).save(photos / "a.png")
    os.utime(photos / "a.png", ns=(1, 1))
    assert run(photos, "make it red") == 2
    assert "made with another image" in told(capsys)[-1]
    shutil.copyfile(photos / "a.png", tmp_path / "out/a.png")
    assert run(photos, "make it red") == 2
    assert "`fusedit edit` did not write it" in told(capsys)[-1]
    copy = shutil.copytree(model, tmp_path / "model")
    assert identity(str(copy)) == identity(str(model))
    os.utime(copy / "unet/diffusion_pytorch_model.safetensors", ns=(1, 1))
    assert identity(str(copy)) != identity(str(model))


def test_what_was_written_before_a_stop_stands(photos, model, tmp_path):
    class Stopped(Editor):
        def edit(self, images, *args):
            if images[0].size == (16, 20):
                raise KeyboardInterrupt
            return images

    bad = Bad(False, print)
    rows = rows_of_folder(photos, "make it red", Settings(), tmp_path / "out", bad)
    with pytest.raises(KeyboardInterrupt):
        edit_rows(Stopped(load_pipeline(str(model)), torch.device("cpu")), rows, 0, "model", bad)
    assert names(tmp_path / "out") == ["a.png", "b.jpg"]
    left = still_to_do(rows, "model", 512, overwrite=False)
    assert [row.output.name for row in left] == ["c.png", "d.png"]


def test_an_unreadable_image_stops_before_the_model_loads_or_is_left_out(
    run, photos, tmp_path, monkeypatch, capsys
):
    (photos / "b.jpg").write_text("no image")
    with monkeypatch.context() as patch:
        patch.setattr("fusedit.launch.edit.load_pipeline", None)
        assert run(photos, "make it red") == 2
    assert f"{photos / 'b.jpg'}: it is no image" in told(capsys)[-1]
    whole = (photos / "sub/d.png").read_bytes()
    (photos / "sub/d.png").write_bytes(whole[: len(whole) // 2])  # its header is well
    assert run(photos, "make it red", "--on_bad_image", "skip") == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}: 2 edited, 0 there already, 2 left out\n"
    lines = [line for line in said.err.splitlines() if "left out" in line]
    assert len(lines) == 2
    assert "d.png: it cannot be decoded" in lines[1]
    assert names(tmp_path / "out") == ["a.png", "c.png"]


GOOD = {"image": "a.png", "instruction": "make it red"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is no JSON"),
        ("[1]", "it must be an object"),
        ("[" * 100000, "it is no JSON"),
        ({"instruction": "x"}, "image must be a text, got None"),
        (GOOD | {"instruction": "  "}, "instruction must be a text"),
        (GOOD | {"instruction": "x" * 5000}, "has 5000 letters"),
        (GOOD | {"instruction": "\ud800"}, "what is no letter"),
        (GOOD | {"sed": 1}, "there is no 'sed'"),
        (GOOD | {"seed": -1}, "seed must be from 0"),
        (GOOD | {"seed": 1.5}, "seed must be a whole number, got 1.5"),
        (GOOD | {"steps": True}, "steps must be a whole number, got True"),
        (GOOD | {"steps": 0}, "steps must be 1 or more"),
        (GOOD | {"guidance_scale": 10**400}, "guidance_scale is too large"),
        (GOOD | {"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        (GOOD | {"image_guidance_scale": 0.5}, "image_guidance_scale must be 1 or more"),
        (GOOD | {"image": "missing.png"}, "there is no such file"),
        (GOOD | {"output": "../x.png"}, "leaves the folder"),
        (GOOD | {"output": "/tmp/x.png"}, "leaves the folder"),
        (GOOD | {"output": "link/x.png"}, "leaves the folder"),
        (GOOD | {"output": "C:\\x.png"}, "leaves the folder"),
        (GOOD | {"output": "x.txt"}, "must end in .png"),
        (GOOD | {"output": f"{'x' * 300}.png"}, "too long a name"),
        (GOOD, "as that of"),
    ],
)
def test_a_bad_line_is_told_with_its_number(
    run, photos, tmp_path, monkeypatch, capsys, line, reason
):
    monkeypatch.setattr("fusedit.launch.edit.load_pipeline", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path)
    path = list_of(photos, GOOD, "", line)
    assert run(path) == 2
    [said] = told(capsys)
    assert said.startswith(f"fusedit: {path}, line 3: ")
    assert reason in said


def test_bad_lines_are_left_out_and_the_others_edited(run, photos, tmp_path, capsys):
    path = list_of(photos, "{", GOOD, GOOD | {"output": "../x.png"}, GOOD | {"image": "none.png"})
    assert run(path, "--on_bad_image", "skip") == 0
    said = capsys.readouterr()
    assert "1 edited, 0 there already, 3 left out" in said.out
    assert [line.split(", line ")[1][0] for line in said.err.splitlines()] == ["1", "3", "4"]
    assert names(tmp_path / "out") == ["a.png"]


@pytest.mark.parametrize(
    ("where", "flags", "out", "reason"),
    [
        ("photos", ("make it red",), "photos/edits", "lies in"),
        ("photos", ("make it red",), "photos", "lies in"),
        ("photos", (" ",), "out", "the instruction must be a text"),
        ("empty", ("make it red",), "out", "there is no image in it"),
        ("photos/edits.jsonl", (), "photos", "would replace the image"),
        ("empty/edits.jsonl", (), "out", "cannot be read"),
        ("photos/notes.jsonl", (), "out", "no line in it"),
    ],
)
def test_folders_that_cannot_be_are_one_line(
    run, photos, tmp_path, monkeypatch, capsys, where, flags, out, reason
):
    monkeypatch.setattr("fusedit.launch.edit.load_pipeline", None)
    (tmp_path / "empty").mkdir()
    list_of(photos, GOOD | {"output": "sub/d.png"}, {"image": "sub/d.png", "instruction": "x"})
    (photos / "notes.jsonl").write_text("\n")
    before = names(photos)
    assert run(tmp_path / where, *flags, out=out) == 2
    [said] = told(capsys)
    assert reason in said
    assert names(photos) == before


@pytest.mark.parametrize(
    "words",
    [["m", "edits.jsonl", "red", "-o", "out"], ["m", "a.png", "red"], ["m", "a.png", "-o", "b.png"],
     ["m"], ["--ui", "m", "a.png"]],
)  # fmt: skip
def test_words_that_say_too_little_or_too_much_are_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_ends_it_and_keeps_what_is_whole(run, photos, tmp_path, monkeypatch, capsys):
    save = Image.Image.save

    def full(image, path, *args, **options):
        if path.name.startswith(".c"):
            path.write_text("half")
            raise OSError(28, "No space left on device")
        save(image, path, *args, **options)

    monkeypatch.setattr(editing_many.Image.Image, "save", full)
    assert run(photos, "make it red", "--batch_size", "1") == 2
    assert "no space is left" in told(capsys)[-1]
    assert names(tmp_path / "out") in (["a.png", "b.jpg"], ["a.png", "b.jpg", "sub/d.png"])


def test_what_is_compiled_sees_one_shape_a_size(run, photos, tmp_path, monkeypatch):
    shapes = set()

    def watched(unet, parts):
        own = unet.forward

        def forward(sample, *args, **options):
            shapes.add((parts, *sample.shape))
            return own(sample, *args, **options)

        unet.forward = forward

    monkeypatch.setattr(editing, "compile_unet", watched)
    assert run(photos, "make it red", "--batch_size", "2", out="plain") == 0
    assert not shapes
    assert run(photos, "make it red", "--batch_size", "2", "--compile", "whole") == 0
    assert shapes == {("whole", 6, 8, 10, 12), ("whole", 6, 8, 10, 8)}
    for name in EDITS:
        one, other = (pixels(tmp_path / out / name) for out in ("out", "plain"))
        assert np.abs(one - other).max() <= CLOSE
