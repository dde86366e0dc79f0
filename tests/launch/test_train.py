"""The command as its users meet it: what it writes, and what it says when they err."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from fusedit.launch import cli, train
from fusedit.trainer import checkpoint
from fusedit.trainer.meter import Meter

BASIC = {
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "data",
    "resolution": 16,
    "train_batch_size": 2,
    "max_train_steps": 2,
    "output_dir": "out",
    "report_to": "none",
}


def _flags(*switches, **changes):
    named = {name: value for name, value in {**BASIC, **changes}.items() if value is not None}
    return [*(f"--{name}={value}" for name, value in named.items()), *switches]


def _mistake(capfd, flags):
    """The one line that a mistake is told in."""
    assert train.main(flags) == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("fusedit: ")]
    assert len(lines) == 1, printed
    return lines[0]


# What a good run leaves.


def test_a_run_leaves_a_pipeline_that_the_guides_snippet_loads(here):
    """No --seed, a local validation image, a folder called checkpoint_x: each crashes the
    reference (defect 3)."""
    (here / "out" / "checkpoint_x").mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(here / "input.png")
    flags = _flags(
        "--use_ema",
        "--revision=main",
        "--non_ema_revision=main",
        val_image_url="input.png",
        validation_prompt="make it blue",
        validation_inference_steps=2,
        num_validation_images=2,
        held_out=2,
        log_every=1,
        report_to="tensorboard",
    )
    assert train.main(flags) == 0
    out = here / "out"
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(out)
    edited = pipeline(
        "make it blue",
        image=Image.new("RGB", (16, 16)),
        num_inference_steps=2,
        image_guidance_scale=1.5,
        guidance_scale=10,
    ).images[0]
    assert edited.size == (16, 16)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):  # defect 9
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    saved = {
        name: load_file(out / "checkpoint-2" / f"{name}.safetensors") for name in ("unet", "ema")
    }
    raw = UNet2DConditionModel.from_pretrained(out, subfolder="unet_raw").state_dict()
    for name, average in pipeline.unet.state_dict().items():
        assert torch.equal(average, saved["ema"][name])
        assert torch.equal(raw[name], saved["unet"][name])
    assert Image.open(out / "validation" / "step-000002.png").size > (100, 100)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"loss", "lr", "grad_norm", "images_per_second", "memory_gib"} <= lines[0].keys()
    assert {f"held_out/{c}" for c in ("full", "no_text", "no_image", "neither")} <= lines[-1].keys()
    assert any((out / "logs").iterdir())
    assert "--train_data_dir=data" in (out / "README.md").read_text()


def test_zero_terminal_snr_is_exported_with_its_prediction_and_spacing(here):
    """From a pipeline that predicts epsilon, sampled by PNDM, which knows of no zero SNR."""
    flags = "--rescale_betas_zero_snr", "--prediction_type=v_prediction", "--snr_gamma=5"
    more = {"noise_offset": 0.1, "input_perturbation": 0.1, "min_timestep": 10}
    looked_at = {"held_out": 2, "validation_inference_steps": 2, "log_every": 1}
    assert train.main(_flags(*flags, **more, **looked_at)) == 0
    scheduler = StableDiffusionInstructPix2PixPipeline.from_pretrained(here / "out").scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert scheduler.config["rescale_betas_zero_snr"] is True
    assert scheduler.config["timestep_spacing"] == "trailing"
    assert not scheduler.config["clip_sample"]
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(2)
    assert scheduler.timesteps[0] == 999
    assert (here / "out" / "validation" / "step-000002.png").exists()
    lines = [json.loads(line) for line in (here / "out" / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] is not None for line in lines if "loss" in line)


def test_half_precision_training_does_not_round_what_is_exported(here):
    assert train.main(_flags(mixed_precision="bf16")) == 0
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        base, exported = (load_file(f"{at}/{part}.safetensors") for at in ("base", "out"))
        for name, value in base.items():
            assert torch.equal(exported[name], value), name


def test_bf16_weights_go_on_and_are_exported_as_their_fp32_masters(here):
    formats = {"mixed_precision": "bf16", "param_dtype": "bf16", "adam_moments_dtype": "bf16"}
    flags = {**formats, "held_out": 2, "checkpointing_steps": 2}
    for steps, folder in ((4, "whole"), (2, "out"), (4, "out")):
        more = {"max_train_steps": steps, "output_dir": folder}
        assert train.main(_flags("--use_ema", **flags, **more)) == 0
    for name in ("unet", "ema", "optimizer"):
        file = f"checkpoint-4/{name}.safetensors"
        assert (here / "out" / file).read_bytes() == (here / "whole" / file).read_bytes()
    saved = {
        name: load_file(here / "out" / "checkpoint-4" / f"{name}.safetensors")
        for name in ("unet", "ema", "optimizer")
    }
    moments = {v.dtype for n, v in saved["optimizer"].items() if "exp_avg" in n}
    assert moments == {torch.bfloat16}
    for part, of in (("unet", "ema"), ("unet_raw", "unet")):
        exported = UNet2DConditionModel.from_pretrained(here / "out", subfolder=part).state_dict()
        for name, value in exported.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, saved[of][name])
        assert any(not torch.equal(v, v.bfloat16().float()) for v in exported.values())


def test_the_device_is_waited_for_only_where_something_is_shown_or_saved(here, monkeypatch):
    paused, steps = [], []
    pause, add = Meter.paused, Meter.add
    monkeypatch.setattr(Meter, "add", lambda self, r: (steps.append(r), add(self, r)))
    monkeypatch.setattr(Meter, "paused", lambda self: (paused.append(len(steps)), pause(self))[1])
    looks = {"held_out": 2, "validation_steps": 4, "log_every": 5}
    assert train.main(_flags(max_train_steps=7, checkpointing_steps=3, **looks)) == 0
    assert paused == [3, 4, 6, 7]


def test_it_trains_as_many_steps_as_asked_and_resuming_adds_none(here):
    """At max_steps the reference trains one step more after a resume (defect 5)."""
    assert train.main(_flags(log_every=1)) == 0
    first = (here / "out" / "checkpoint-2" / "unet.safetensors").read_bytes()
    assert train.main(_flags(log_every=1)) == 0
    assert (here / "out" / "checkpoint-2" / "unet.safetensors").read_bytes() == first
    steps = [json.loads(line)["step"] for line in (here / "out/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_it_goes_on_from_a_checkpoint_of_another_folder(here):
    """Which crashes the reference (defect 3)."""
    assert train.main(_flags(max_train_steps=1)) == 0
    assert train.main(_flags()) == 0
    again = _flags(output_dir="elsewhere", resume_from_checkpoint="out/checkpoint-1")
    assert train.main(again) == 0
    same = [load_file(here / f / "checkpoint-2" / "unet.safetensors") for f in ("out", "elsewhere")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_dry_run_says_the_plan_and_writes_nothing(here, capfd):
    assert train.main(_flags("--dry_run")) == 0
    assert "2 steps, 4 an epoch" in capfd.readouterr().err
    assert not (here / "out").exists()


def test_overwrite_starts_anew(here):
    looked_at = {"held_out": 2, "validation_inference_steps": 1}
    assert train.main(_flags(**looked_at, max_train_steps=3)) == 0
    assert train.main(_flags("--overwrite", **looked_at, learning_rate=1e-3)) == 0
    assert checkpoint.steps(here / "out") == [2]
    [picture] = (here / "out" / "validation").iterdir()
    assert (here / "out" / "edits.png").read_bytes() == picture.read_bytes()


def test_turning_back_to_a_named_checkpoint_leaves_no_later_one(here):
    whole = _flags(max_train_steps=3, checkpointing_steps=1, lr_scheduler="linear")
    assert train.main(whole) == 0
    longer = ["--max_train_steps=4", "--resume_from_checkpoint=checkpoint-1"]
    assert train.main([*whole, *longer]) == 0
    assert (here / "out" / "checkpoint-3.aside-1").is_dir()
    assert max(checkpoint.steps(here / "out")) == 4


def test_an_unreadable_image_can_be_skipped(here, capfd):
    _truncate(here)
    assert train.main(_flags(max_train_steps=4, on_bad_sample="skip", max_bad_fraction=0.2)) == 0
    assert "skipped: row" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("local_size", "said", "threads"),
    [("2", "1", [3]), ("2", "5", []), ("1", "1", []), (None, None, [])],
    ids=["torchrun's own 1", "the user's 5", "one process", "no torchrun"],
)
def test_ranks_share_the_cores_unless_told(monkeypatch, local_size, said, threads):
    for name, value in (("LOCAL_WORLD_SIZE", local_size), ("OMP_NUM_THREADS", said)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    train.make_world()
    assert taken == threads


def test_two_ranks_under_torchrun_are_one_run(here):
    """On a CPU the reference's two ranks are two runs in one folder (defect 12)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fusedit.launch.train", *_flags(log_every=1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4 samples = 2 x 1 micro-steps x 2 ranks" in done.stderr
    assert done.stderr.count("step 1/2") == 1
    assert json.loads((here / "out/checkpoint-2/state.json").read_text())["position"] == 8


# What a mistake is answered with.


def _truncate(here: Path) -> None:
    image = sorted((here / "data").rglob("*.png"))[0]
    image.write_bytes(image.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"pretrained_model_name_or_path": "data"}, "data has no folder unet"),
        ({"train_data_dir": None}, "--dataset_name or --train_data_dir is missing"),
        ({"train_data_dir": "nowhere"}, "nowhere"),
        ({"original_image_column": "before"}, "there: input_image, edited_image, edit_prompt"),
        ({"edit_prompt_column": "words"}, "has no column words, set --edit_prompt_column"),
        ({"dataset_split": "validation"}, "train"),
        ({"max_train_samples": 9}, "--max_train_samples 9 is above the 8 rows"),
        ({"held_out": 8}, "--held_out 8 leaves none of the dataset's 8 rows"),
        ({"resolution": 17}, "--resolution 17 must be a multiple of 2"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
        ({"attention": "triton"}, "--attention triton needs a GPU; on a CPU take auto"),
        ({"max_timestep": 1001}, "--max_timestep 1001 must be at most 1000"),
        ({"lr_num_cycles": 2}, "--lr_num_cycles 2 is for --lr_scheduler cosine_with_restarts"),
        ({"ema_snapshot_steps": 5}, "--ema_snapshot_steps 5 is of --post_hoc_ema"),
        (
            {"val_image_url": "no.png", "validation_prompt": "x"},
            "--val_image_url no.png: there is no such",
        ),
        ({"report_to": "wandb"}, "fusedit[wandb]"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "checkpoint-7: there is no such folder"),
        ({"output_dir": "base/model_index.json"}, "is a file; give a folder"),
        ({"config": "no.toml"}, "--config no.toml: there is no such file"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_weights_load(here, capfd, changes, message):
    for weights in (here / "base").rglob("*.safetensors"):
        weights.unlink()
    assert message in _mistake(capfd, _flags(**changes))
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "unet",
            '"addition_embed_type": null',
            '"addition_embed_type": "text_time"',
            "of one family",
        ),
        ("vae", '"scaling_factor"', '"scaling"', "vae/config.json is incomplete"),
        ("scheduler", '"epsilon"', '"sample"', "prediction_type sample; epsilon and v_prediction"),
    ],
)
def test_a_pipeline_that_cannot_be_trained(here, capfd, file, old, new, message):
    [config] = (here / "base" / file).glob("*config.json")
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    assert message in _mistake(capfd, _flags())


def test_zero_terminal_snr_is_for_v_prediction(here, capfd):
    line = _mistake(capfd, _flags("--rescale_betas_zero_snr"))
    assert "take --prediction_type v_prediction" in line


def test_another_objective_is_another_run(here, capfd):
    assert train.main(_flags(max_train_steps=1)) == 0
    for name, value in {
        "snr_gamma": 5.0,
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "prediction_type": "v_prediction",
        "min_timestep": 10,
        "max_timestep": 900,
        "post_hoc_ema": 0.1,
    }.items():
        assert f"holds another run: --{name} was " in _mistake(capfd, _flags(**{name: value}))


def test_a_file_where_logs_should_go(here, capfd):
    (here / "out").mkdir()
    (here / "out" / "logs").touch()
    assert "--logging_dir out/logs is a file" in _mistake(capfd, _flags())


def test_fewer_steps_than_are_done(here, capfd):
    assert train.main(_flags()) == 0
    assert "checkpoint-2 has 2 steps behind it" in _mistake(capfd, _flags(max_train_steps=1))


def test_an_unreadable_held_out_row_stops_or_is_skipped(here, capfd):
    for image in (here / "data").glob("*_edited.png"):
        image.write_bytes(image.read_bytes()[:-40])
    unread = {"held_out": 7, "max_train_steps": 1, "train_batch_size": 1}
    assert train.main(_flags(**unread, on_bad_sample="skip", max_bad_fraction=1)) == 0
    assert "row" in _mistake(capfd, _flags(**unread, output_dir="stopped"))


def test_an_empty_dataset(here, capfd):
    (here / "data" / "metadata.jsonl").write_text("")
    assert "data" in _mistake(capfd, _flags())


def test_a_model_with_neither_4_nor_8_channels(here, capfd):
    config = here / "base" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    assert "takes 9 input channels" in _mistake(capfd, _flags())


def test_a_folder_that_holds_another_run(here, capfd):
    assert train.main(_flags(max_train_steps=1)) == 0
    line = _mistake(capfd, _flags(learning_rate=1e-3))
    assert "--learning_rate was 0.0001, now 0.001" in line
    assert "--overwrite" in line
    assert checkpoint.steps(here / "out") == [1]


def test_an_unreadable_image_stops_the_run_by_name_with_a_checkpoint(here, capfd):
    _truncate(here)
    line = _mistake(capfd, _flags(max_train_steps=4))
    assert "row" in line
    assert "0000" in line or ".png" in line
    assert "--on_bad_sample skip" in line
    assert checkpoint.newest(here / "out")[0] is not None


def test_a_checkpoint_that_fails_its_hash(here, capfd):
    assert train.main(_flags()) == 0
    weights = here / "out" / "checkpoint-2" / "unet.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = _mistake(capfd, _flags(resume_from_checkpoint="checkpoint-2"))
    assert "unet.safetensors does not have the hash it was written with" in line
    assert train.main(_flags()) == 0  # latest: no whole one is left, so from the start
    assert "checkpoint-2 is passed over" in capfd.readouterr().err


def test_a_gpu_that_is_full_is_told_with_the_cure(here, capfd, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a")

    monkeypatch.setattr(Meter, "add", full)
    line = _mistake(capfd, _flags())
    assert line.startswith("fusedit: rank 0: CUDA out of memory: lower --train_batch_size and")


def test_no_space_left(here, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "no space is left on the disk" in _mistake(capfd, _flags())
    assert checkpoint.steps(here / "out") == []


def test_no_space_left_for_anything_else(here, capfd, monkeypatch):
    def full(image, path, form, **_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    line = _mistake(capfd, _flags(held_out=2, validation_inference_steps=1))
    assert "step-000002.png: no space is left on the disk" in line


@pytest.mark.parametrize("by", ["fusedit", "torchrun's variables"])
def test_a_port_in_use(here, capfd, monkeypatch, by):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if by == "fusedit":
            code = cli.main(["train", "--nproc_per_node=2", f"--master_port={port}", *_flags()])
        else:
            ours = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for name, value in ours.items():
                monkeypatch.setenv(name, str(value))
            code = train.main(_flags())
    printed = capfd.readouterr().err
    assert code == 2
    assert "EADDRINUSE" in printed or "in use" in printed
    assert "Traceback" not in printed
