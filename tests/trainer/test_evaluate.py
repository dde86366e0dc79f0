"""`fusedit evaluate` and `compare` on tiny models and networks, from command to files."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from extractor_files import save_clip, save_dino, save_lpips
from PIL import Image
from tiny import save_tiny_dataset, save_tiny_pipeline

from fusedit.launch import cli, evaluate
from fusedit.trainer import checkpoint
from fusedit.trainer.comparing import paired_interval
from fusedit.trainer.config import DataConfig, LoopConfig, ModelConfig, RunConfig
from fusedit.trainer.curve import Curve, curve_of, dominated_area
from fusedit.trainer.curve import plot as plot_curve
from fusedit.trainer.metrics import METRICS, psnr
from fusedit.trainer.sample import edit_images
from fusedit.trainer.settings import to_toml

COUNT = 5
PROTOCOL = """
name = "own"
metrics = [{metrics}]
against = "{against}"
[data]
edited_column = "edited_image"
{data}
[sampling]
resolution = {resolution}
steps = 2
guidance_scale = 2.0
image_guidance_scales = [{scales}]
seed = {seed}
{sampling}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny_pipeline(folder / "model", in_channels=8)
    save_tiny_dataset(folder / "data", count=COUNT)
    lines = [json.loads(line) for line in (folder / "data/metadata.jsonl").open()]
    with (folder / "data/metadata.jsonl").open("w") as file:
        for row, line in enumerate(lines):
            line |= {"old": f"noise {row}", "new": f"inverted {row}"}
            line |= {"session": row // 2, "turn": -row}
            file.write(json.dumps(line) + "\n")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    save_lpips(folder / "lpips")
    return folder


@pytest.fixture
def run(place, tmp_path, monkeypatch):
    """Runs the command on one rank; gives exit code and results."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(
        *flags, out="out", model="model", metrics=("psnr", "l2"), scales="1.5", against="truth",
        data="", sampling="", seed=0, resolution=16,
    ):  # fmt: skip
        told = ", ".join(f'"{name}"' for name in metrics)
        text = PROTOCOL.format(
            metrics=told,
            scales=scales,
            against=against,
            data=data,
            sampling=sampling,
            seed=seed,
            resolution=resolution,
        )
        (tmp_path / "own.toml").write_text(text)
        words = [f"--out={tmp_path / out}", f"--protocol={tmp_path / 'own.toml'}"]
        if not any(flag.startswith("--dataset") for flag in flags):
            words.append(f"--dataset={place / 'data'}")
        code = evaluate.main([str(place / model), *words, *flags])
        path = tmp_path / out / "results.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return call


NETWORKS = ("clip", "dino", "lpips")
CAPTIONS = 'before_column = "old"\nafter_column = "new"'


def networks(place):
    return [f"--{name}={place / name}" for name in NETWORKS]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").open()]


def test_all_metrics_by_row_and_in_all(run, place, tmp_path, capsys):
    metrics = sorted(METRICS)
    code, results = run(*networks(place), metrics=metrics, data=CAPTIONS, resolution=64)
    assert code == 0
    [point] = results["points"]
    assert sorted(point["metrics"]) == metrics
    assert results["left_out"] == {}
    rows = rows_of(tmp_path / "out")
    assert [line["row"] for line in rows] == [*range(COUNT)]
    assert rows[1]["name"] == "row 1 (001_input.png)"
    for name in metrics:
        if not name.startswith(("fid", "kid")):
            assert point["metrics"][name] == pytest.approx(np.mean([row[name] for row in rows]))
    assert {*results["extractors"]} == {*NETWORKS}
    assert len(results["protocol_sha256"]) == len(results["model"]["sha256"]) == 64
    assert results["provenance"]["command"].startswith("fusedit evaluate ")
    assert results["provenance"]["versions"]["torchmetrics"]
    assert "psnr" in capsys.readouterr().out


def test_what_cannot_be_measured_is_named(run, capsys):
    metrics = ["psnr", "lpips", "clip_text", "dino", "clip_image", "fid_clip"]
    network = '[extractors.clip]\nplace = "no/such-network"'
    code, results = run(metrics=metrics, sampling=network)
    assert code == 0
    assert [*results["points"][0]["metrics"]] == ["psnr"]
    left_out = results["left_out"]
    assert left_out["lpips"] == "the protocol names no lpips; --lpips FOLDER gives one"
    assert "no/such-network" in left_out["clip_image"]
    assert {*left_out} == {*metrics} - {"psnr"}
    told = capsys.readouterr().err
    assert all(f"{name} is left out: " in told for name in left_out)


def test_a_caption_that_is_not_there_is_named(run, place):
    _, results = run(
        f"--clip={place / 'clip'}", metrics=["clip_direction", "clip_text"],
        data='after_column = "gone"',
    )  # fmt: skip
    assert results["left_out"] == {
        "clip_direction": "the protocol names no column of captions before the edit",
        "clip_text": "the dataset has no column gone of captions after the edit",
    }


def test_the_edit_is_of_its_row_and_seed_alone(run, place, tmp_path):
    def edits(out, *flags, **protocol):
        code, _ = run("--keep_edits", *flags, out=out, **protocol)
        assert code == 0
        paths = sorted((tmp_path / out / "edits" / "image-guidance-1.5").glob("*.png"))
        assert len(paths) == COUNT
        return [np.asarray(Image.open(path), dtype=int) for path in paths]

    by_eight, by_two = edits("a"), edits("b", "--batch_size=2")
    # Another batch sums up in another order; more than a grey level would be other noise.
    assert all(abs(a - b).max() <= 1 for a, b in zip(by_eight, by_two, strict=True))
    other = edits("c", seed=1)
    assert all(abs(a - b).max() > 1 for a, b in zip(by_eight, other, strict=True))


def test_killed_it_goes_on_to_the_same(run, tmp_path, monkeypatch):
    whole = run(out="whole")[1]
    made = []

    def dies_in_the_third(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(edit_images(*args, **kwargs))
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr("fusedit.trainer.evaluate.edit_images", dies_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run("--batch_size=1")
    assert len([*(tmp_path / "out/edits").rglob("*.png")]) == 2
    (tmp_path / "out/edits/image-guidance-1.5/.0000002.png.partial").write_bytes(b"half")

    def counted(*args, **kwargs):
        made.append(None)
        return edit_images(*args, **kwargs)

    monkeypatch.setattr("fusedit.trainer.evaluate.edit_images", counted)
    code, results = run("--batch_size=1")
    assert (code, len(made)) == (0, COUNT)
    alone = run("--batch_size=1", out="alone")[1]
    assert results["points"] == alone["points"]
    assert results["points"][0]["metrics"] == pytest.approx(whole["points"][0]["metrics"], rel=1e-3)
    assert not (tmp_path / "out/edits").exists()
    assert run("--batch_size=1")[1] == results
    assert len(made) == 2 * COUNT  # of alone; done is done


def test_a_folder_of_another_evaluation_is_refused(run, capsys):
    assert run()[0] == 0
    assert run(seed=1)[0] == 2
    told = capsys.readouterr().err
    assert "holds another evaluation, with another protocol: give another folder" in told
    assert run("--overwrite", seed=1)[0] == 0


def test_against_its_input(run, place, tmp_path):
    _, results = run("--keep_edits", against="input", metrics=["psnr"])
    paths = sorted((tmp_path / "out/edits/image-guidance-1.5").glob("*.png"))
    inputs = [Image.open(place / f"data/{row:03}_input.png") for row in range(COUNT)]
    # Of 24 x 20, resized to 19 x 16, the columns from 2 to 18.
    box = (2 * 24 / 19, 0, 18 * 24 / 19, 20)
    cut = [image.resize((16, 16), Image.Resampling.BICUBIC, box) for image in inputs]
    values = psnr([Image.open(path) for path in paths], cut)
    assert results["points"][0]["metrics"]["psnr"] == pytest.approx(np.mean(values), abs=1e-4)


def test_turns_go_on_from_each_other_and_the_last_is_measured(run, tmp_path, monkeypatch):
    given = []

    def seen(pipeline, images, instructions, noise, **options):
        given.append((images, noise))
        return edit_images(pipeline, images, instructions, noise, **options)

    monkeypatch.setattr("fusedit.trainer.evaluate.edit_images", seen)
    code, results = run(
        "--keep_edits", data='session_column = "session"\nturn_column = "turn"',
        sampling='resize = "long_side"',
    )  # fmt: skip
    assert code == 0
    assert [line["row"] for line in rows_of(tmp_path / "out")] == [0, 2, 4]  # turns count down
    assert results["rows"]["measured"] == 3
    _, second = given  # rows 1, 3, 4, then 0 and 2
    assert [len(images) for images, _ in given] == [3, 2]
    for image, row in zip(second[0], (1, 3), strict=True):
        path = tmp_path / f"out/edits/image-guidance-1.5/{row:07}.png"
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_several_guidances_make_a_curve(run, place, tmp_path):
    metrics = ["clip_image", "clip_direction"]
    _, results = run(
        f"--clip={place / 'clip'}", metrics=[*metrics, "psnr"], data=CAPTIONS, against="input",
        scales="1.0, 1.6, 2.2",
    )  # fmt: skip
    assert [point["image_guidance_scale"] for point in results["points"]] == [1.0, 1.6, 2.2]
    images, directions = (
        [point["metrics"][name] for point in results["points"]] for name in metrics
    )
    assert results["curve"]["area"] == dominated_area(directions, images)
    assert results["curve"]["reach"] == images[-1] - images[0]
    assert Image.open(tmp_path / "out/curve.png").width > 500
    assert len(rows_of(tmp_path / "out")) == 3 * COUNT


def test_the_area_is_what_a_grid_counts():
    draw = np.random.default_rng(0)
    x, y = draw.random((2, 6))
    ticks = (np.arange(1000) + 0.5) / 1000
    covered = ((ticks[:, None, None] < x) & (ticks[None, :, None] < y)).any(axis=2)
    assert dominated_area(x, y) == pytest.approx(covered.mean(), abs=2e-3)
    assert dominated_area([-0.2, 0.5], [0.9, 0.4]) == pytest.approx(0.2)


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not plot_curve({"a": curve_of([0.1, 0.2], [0.9, 0.8], [2, 1])}, "", tmp_path / "c.png")
    assert curve_of([0.1, 0.2], [0.9, 0.8], [2, 1]) == Curve(
        [0.2, 0.1], [0.8, 0.9], [1, 2], pytest.approx(0.17), pytest.approx(0.1)
    )


def test_a_bad_row_stops_it_or_is_left_out(run, place, tmp_path, capsys):
    save_tiny_dataset(tmp_path / "data", count=COUNT)
    (tmp_path / "data/003_input.png").write_bytes(b"not an image")
    dataset = f"--dataset={tmp_path / 'data'}"
    assert run(dataset)[0] == 2
    told = capsys.readouterr().err
    assert "row 3 (003_input.png)" in told
    assert "--on_bad_sample skip leaves it out" in told
    code, results = run(dataset, "--on_bad_sample=skip")
    assert code == 0
    assert results["rows"]["left_out"] == ["row 3 (003_input.png)"]
    assert [line["row"] for line in rows_of(tmp_path / "out")] == [0, 1, 2, 4]


def test_a_pinned_hash_is_held(run, place, capsys):
    found = run(f"--clip={place / 'clip'}", metrics=["clip_image"], out="a")[1]
    pinned = f'[extractors.clip]\nplace = "{place / "clip"}"\nsha256 = "{{}}"'
    right = pinned.format(found["extractors"]["clip"])
    assert run(metrics=["clip_image"], sampling=right, out="b")[0] == 0
    assert run(metrics=["clip_image"], sampling=pinned.format("0" * 64), out="c")[0] == 2
    assert "the protocol wants 000" in capsys.readouterr().err
    rows = 'rows_sha256 = "{}"'
    assert run(data=rows.format(found["rows"]["sha256"]), out="d")[0] == 0
    assert run(data=rows.format("0" * 64), out="e")[0] == 2
    assert "--dataset: its rows have the hash" in capsys.readouterr().err


def test_mistakes_are_told_in_a_line(run, place, capsys):
    gone = 'session_column = "x"\nturn_column = "y"'
    for flags, places, reason in (
        (["--dataset=nowhere/at-all/x"], {}, "nowhere/at-all/x is not a folder"),
        ([f"--clip={place / 'data'}"], {"metrics": ["clip_image"]}, "--clip "),
        ([], {"model": "data"}, "model_index.json"),
        ([], {"data": gone, "sampling": 'resize = "long_side"'}, "no columns x and y"),
    ):  # fmt: skip
        assert run(*flags, **places)[0] == 2
        told = capsys.readouterr().err
        assert told.startswith("fusedit: ")
        assert reason in told
        assert told.count("\n") == 1


@pytest.mark.parametrize("flags", [["--batch_size=0"], ["--split=test"], ["--seed=1"]])
def test_flags_are_refused_by_the_parser(place, tmp_path, flags):
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(place / "model"), f"--out={tmp_path / 'x'}", *flags])
    assert caught.value.code == 2


def test_a_run_measures_its_own_checkpoints_on_what_it_held_out(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    config = RunConfig(
        model=ModelConfig(pretrained_model_name_or_path=str(place / "model")),
        data=DataConfig(train_data_dir=str(place / "data"), resolution=16, held_out=2),
        loop=LoopConfig(seed=3),
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    unet = UNet2DConditionModel.from_pretrained(place / "model/unet").state_dict()
    moved = {name: value + 0.01 for name, value in unet.items()}
    for step, tensors in ((1, {"unet": unet}), (2, {"unet": unet, "ema": moved})):
        checkpoint.save(tmp_path, step, checkpoint.Checkpoint(tensors, {"step": step}), None)
    text = 'name = "held"\nmetrics = ["psnr"]\n[data]\nedited_column = "edited_image"\n'
    text += "[sampling]\nsteps = 2\n"
    (tmp_path / "own.toml").write_text(text)
    (tmp_path / "sized.toml").write_text(f"{text}resolution = 16\n")

    def measured(model, protocol, *flags):
        out = tmp_path / f"{model.name}-out"
        words = [str(model), f"--out={out}", f"--protocol={tmp_path / protocol}.toml", *flags]
        assert evaluate.main(words) == 0
        return json.loads((out / "results.json").read_text())

    first, second = (measured(tmp_path / f"checkpoint-{step}", "own") for step in (1, 2))
    model = measured(place / "model", "sized", f"--dataset={place / 'data'}")
    assert first["rows"]["measured"] == 2
    assert first["protocol_sha256"] == model["protocol_sha256"]
    assert first["model"]["sha256"] == model["model"]["sha256"]
    assert first["points"] != second["points"]  # the averages were taken
    assert evaluate.main([str(place / "model"), f"--out={tmp_path / 'x'}"]) == 2
    assert "--protocol held-out takes the model's resolution" in capsys.readouterr().err


@pytest.fixture
def pair(run, tmp_path):
    """Two results of one protocol."""
    run(out="one")
    run(out="other")
    path = tmp_path / "other/rows.jsonl"
    rows = rows_of(tmp_path / "other")
    for row in rows:
        row["l2"] -= 0.01 + 0.001 * row["row"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = json.loads((tmp_path / "other/results.json").read_text())
    results["points"][0]["metrics"]["l2"] -= 0.012
    (tmp_path / "other/results.json").write_text(json.dumps(results))
    return [str(tmp_path / name / "results.json") for name in ("one", "other")]


def test_two_results_stand_side_by_side(pair, capsys):
    capsys.readouterr()
    assert cli.main(["compare", *pair]) == 0
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    head, _, psnr_line, l2_line = lines
    assert head[:3] == ["metric", "one", "other"]
    assert psnr_line[0] == "psnr"
    assert psnr_line[3:] == ["+0.0000", "+0.0000 to +0.0000", "-"]
    assert l2_line[3] == "-0.0120"
    low, _, high = l2_line[4].split()
    assert -0.014 <= float(low) < -0.012 < float(high) <= -0.01
    assert l2_line[5] == "other"  # less is better


def test_unlike_results_are_refused_with_what_differs(run, pair, place, tmp_path, capsys):
    run(out="third", seed=1)
    save_tiny_dataset(tmp_path / "more", count=COUNT + 1)
    run(f"--dataset={tmp_path / 'more'}", out="fourth")
    capsys.readouterr()
    for name, reason in (
        ("third", "sampling.seed is 0 and 1"),
        ("fourth", f"the rows are others ({COUNT} and {COUNT + 1})"),
    ):
        assert cli.main(["compare", pair[0], str(tmp_path / name / "results.json")]) == 2
        told = capsys.readouterr().err
        assert f"cannot be compared: {reason}\n" in told
    assert cli.main(["compare", pair[0], str(place / "data/metadata.jsonl")]) == 2
    assert "is no results.json" in capsys.readouterr().err


def test_the_interval_is_the_normal_one_for_many_rows():
    differences = np.random.default_rng(1).normal(0.3, 2.0, 400)
    low, high = paired_interval(differences)
    half = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - half, abs=0.02)
    assert high == pytest.approx(differences.mean() + half, abs=0.02)
