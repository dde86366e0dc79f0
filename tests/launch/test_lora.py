"""A run with --lora_rank: what moves, what is kept, and what loads again to the same bits."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from fusedit.launch import cli, train
from fusedit.launch.flags import parse
from fusedit.trainer.errors import UsageError
from fusedit.trainer.plan import claim_output, make_plan
from fusedit.trainer.run import Run
from fusedit.trainer.settings import from_values
from fusedit.trainer.unet import grow_conv_in
from fusedit.trainer.world import World

FLAGS = [
    "--pretrained_model_name_or_path=base",
    "--train_data_dir=data",
    "--resolution=16",
    "--train_batch_size=2",
    "--max_train_steps=4",
    "--learning_rate=1e-2",
    "--conditioning_dropout_prob=0.1",
    "--output_dir=out",
    "--report_to=none",
    "--lora_rank=2",
]


def trained(*flags: str) -> Run:
    """A run that has come to its end, in memory."""
    config = parse([*FLAGS, *flags]).run
    world = World()
    plan = make_plan(config, world)
    run = Run(plan, world, "fusedit train --of-the-test", None)
    claim_output(plan)
    assert run.train(lambda: False)
    return run


def snippet(folder: Path) -> str:
    """The card's lines that make the pipeline, on this device."""
    text = (folder / "README.md").read_text().split("```python\n")[1]
    return text.split('pipeline.to("cuda")')[0]


def loaded(folder: Path) -> UNet2DConditionModel:
    names: dict = {}
    exec(compile(snippet(folder), "README.md", "exec"), names)
    assert isinstance(names["pipeline"], StableDiffusionInstructPix2PixPipeline)
    unet = names["pipeline"].unet
    return unet.to(memory_format=torch.channels_last)  # as the run's; else convolutions add apart


def assert_same_tensors(one: Path, other: Path) -> None:
    """Not the bytes: safetensors writes a header's texts in any order."""
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items()), one.name


@torch.no_grad()
def said(unet: UNet2DConditionModel, dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    latents, text = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 16)
    unet.eval()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        return unet(latents, torch.tensor([3, 900]), text, return_dict=False)[0]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], torch.float32),
        (["--lora_alpha=5", "--lora_dropout=0.3", "--use_ema"], torch.float32),
        (["--mixed_precision=bf16", "--gradient_checkpointing"], torch.bfloat16),
        (["--use_dora", "--lora_dropout=0.3"], torch.float32),
        (["--use_dora", "--mixed_precision=bf16"], torch.bfloat16),
        (["--lora_targets=to_q,ff.net.2,conv1, proj_in,time_emb_proj"], torch.float32),
    ],
    ids=str,
)
def test_the_cards_lines_make_the_trained_model_to_the_bit(here, flags, dtype):
    run = trained(*flags)
    if run.job.ema is not None:
        with run.job.ema.in_place():
            in_memory = said(run.job.unet, dtype)
    else:
        in_memory = said(run.job.unet, dtype)
    unet = loaded(here / "out")
    assert torch.equal(said(unet, dtype), in_memory)
    assert unet.config["in_channels"] == 8
    base = UNet2DConditionModel.from_pretrained("base/unet")
    grow_conv_in(base, "base")
    assert not torch.allclose(said(base, dtype), in_memory, atol=1e-3)
    moved = unet.conv_in.weight[:, 4:]
    assert moved.abs().max() > 1e-4  # what the reference's script loses


def test_the_cards_lines_name_the_base_as_it_was_read(here):
    unet = UNet2DConditionModel.from_pretrained("base/unet")
    torch.nn.init.normal_(unet.conv_out.weight)
    unet.half().save_pretrained("other/unet")
    run = trained("--unet=other/unet", "--revision=main")
    lines = snippet(here / "out")
    assert 'from_pretrained("unet", revision="main")' in lines
    assert 'from_pretrained(base, unet=unet, revision="main")' in lines
    (here / "unet").symlink_to("other/unet")  # the card tells no path
    assert torch.equal(said(loaded(here / "out")), said(run.job.unet))


def test_averages_are_exported_and_the_raw_values_beside_them(here):
    run = trained("--use_ema")
    for folder, values in ((here / "out", run.job.ema.averages), (here / "out/raw", run.job.named)):
        conv = load_file(folder / "conv_in.safetensors")
        assert torch.equal(conv["weight"], values["conv_in.weight"])
        saved = load_file(folder / "pytorch_lora_weights.safetensors")
        assert {f"unet.{name.replace('.default', '')}" for name in values} == {
            *saved, "unet.conv_in.weight", "unet.conv_in.bias"
        }  # fmt: skip
        for name, value in values.items():
            if "lora" in name:
                assert torch.equal(saved[f"unet.{name.replace('.default', '')}"], value)


def test_only_the_adapter_and_conv_in_move_and_are_kept(here):
    run = trained("--use_ema")
    moved = {name for name, p in run.job.unet.named_parameters() if p.requires_grad}
    assert {name for name in moved if "lora_" not in name} == {"conv_in.weight", "conv_in.bias"}
    assert all(".to_" in name for name in moved - {"conv_in.weight", "conv_in.bias"})
    folder = here / "out/checkpoint-4"
    assert set(load_file(folder / "unet.safetensors")) == moved
    assert set(load_file(folder / "ema.safetensors")) == moved
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.rsplit(".", 1)[0] for name in moments} == moved
    base = UNet2DConditionModel.from_pretrained("base/unet").state_dict()
    for name, value in run.job.unet.state_dict().items():
        if name not in moved:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), name
    assert not (here / "out/model_index.json").exists()


@pytest.mark.parametrize("flags", [["--lora_dropout=0.4", "--use_ema"], ["--use_dora"]], ids=str)
def test_a_run_that_was_stopped_ends_in_the_same_bits(here, flags):
    flags = [*FLAGS, *flags, "--checkpointing_steps=2", "--held_out=2"]
    for steps, folder in ((4, "whole"), (2, "out"), (4, "out")):
        assert train.main([*flags, f"--max_train_steps={steps}", f"--output_dir={folder}"]) == 0
    for name in ("unet", "optimizer", *(["ema"] if "--use_ema" in flags else [])):
        file = f"checkpoint-4/{name}.safetensors"
        assert (here / "out" / file).read_bytes() == (here / "whole" / file).read_bytes(), name
    for file in ("pytorch_lora_weights.safetensors", "conv_in.safetensors"):
        assert_same_tensors(here / "out" / file, here / "whole" / file)


def test_looking_does_not_change_the_training(here):
    flags = [*FLAGS, "--lora_dropout=0.4"]
    look = ["--held_out=2", "--validation_steps=1", "--validation_inference_steps=1"]
    assert train.main([*flags, "--max_train_samples=6", "--held_out=2"]) == 0
    again = [*flags, *look, "--max_train_samples=6", "--output_dir=looked"]
    assert train.main(again) == 0
    kept = [(here / at / "conv_in.safetensors").read_bytes() for at in ("out", "looked")]
    assert kept[0] == kept[1]


# Merging.


@pytest.mark.parametrize("flags", [["--lora_alpha=3", "--use_ema"], ["--use_dora"]], ids=str)
def test_the_merged_pipeline_says_what_the_adapter_says(here, flags, capsys):
    trained(*flags)
    edit = ["--steps", "1", "-o", "edit.png"]
    Image.new("RGB", (16, 16)).save("input.png")
    assert cli.main(["edit", "out", "input.png", "add snow", *edit]) == 2
    assert "`fusedit export out --merge` writes out/merged" in capsys.readouterr().err
    assert cli.main(["export", "out", "--merge"]) == 0
    assert "out/merged: written from checkpoint-4" in capsys.readouterr().out
    assert cli.main(["edit", "out/merged", "input.png", "add snow", *edit]) == 0
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(here / "out/merged")
    unet = pipeline.unet
    assert not [name for name, _ in unet.named_parameters() if "lora" in name]
    merged = said(unet.to(memory_format=torch.channels_last))
    beside = said(loaded(here / "out"))
    assert (merged - beside).norm() < 1e-5 * beside.norm()
    card = (here / "out/merged/README.md").read_text()
    assert "load_lora_weights" not in card
    assert "4 steps" in card
    assert "fusedit train --of-the-test" in card


def test_an_adapter_is_written_again_from_its_checkpoint(here):
    trained("--use_ema")
    files = ["pytorch_lora_weights.safetensors", "conv_in.safetensors"]
    files += [f"raw/{name}" for name in files]
    shutil.copytree(here / "out", here / "before")
    (here / "out/conv_in.safetensors").unlink()
    assert cli.main(["export", "out"]) == 0
    assert cli.main(["export", "out", "--out", "copy"]) == 0
    for folder in ("out", "copy"):
        for name in files:
            assert_same_tensors(here / folder / name, here / "before" / name)
    assert torch.equal(said(loaded(here / "copy")), said(loaded(here / "out")))


def test_a_whole_model_is_written_again_from_its_checkpoint(here):
    assert train.main([*FLAGS[:-1], "--use_ema"]) == 0
    assert cli.main(["export", "out", "--out", "copy"]) == 0
    for part in ("unet", "unet_raw"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        assert (here / "out" / file).read_bytes() == (here / "copy" / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere is no run's output folder: it has no run.toml"),
        (["whole", "--merge"], "--merge: whole has no adapter, it is a whole model; leave it out"),
        (["out", "--merge", "--out", "out"], "--out out is the run's own folder; give another"),
        (["empty"], "empty has no whole checkpoint"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused(here, words, told, capfd):
    for folder, rank in (("whole", ""), ("out", "lora_rank = 2\n"), ("empty", "lora_rank = 2\n")):
        (here / folder).mkdir()
        (here / folder / "run.toml").write_text(rank)
    assert cli.main(["export", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fusedit: {told}")


# Refusals.


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora_rank": 0}, "--lora_rank must be 1 or more, got 0"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "--lora_alpha must be above 0, got 0"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, "--lora_dropout must be from 0 to below 1, got 1"),
        ({"lora_rank": 2, "lora_targets": "to_q,"}, "--lora_targets is a list of names between"),
        ({"lora_rank": 2, "lora_targets": "conv_in"}, "conv_in is trained in full; leave it out"),
        ({"lora_alpha": 4.0}, "--lora_alpha 4.0 needs --lora_rank; or leave it out"),
        ({"use_dora": True}, "--use_dora needs --lora_rank; or leave it out"),
        ({"lora_rank": 2, "param_dtype": "bf16"}, "--param_dtype bf16 is not --lora_rank, whose"),
        (
            {"lora_rank": 2, "use_dora": True, "compile": "blocks"},
            "--compile blocks is not --use_dora, which torch cannot trace as peft has it: take",
        ),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together_are_refused(flags, told):
    needed = {"pretrained_model_name_or_path": "base", "train_data_dir": "data"}
    with pytest.raises(UsageError, match=re.escape(told)):
        from_values(needed | flags, "here").check_complete()


def test_another_rank_does_not_go_on(here, capfd):
    assert train.main([*FLAGS, "--max_train_steps=1"]) == 0
    assert train.main([*FLAGS, "--max_train_steps=2", "--lora_rank=3"]) == 2
    assert "--lora_rank was 2, now 3" in capfd.readouterr().err
