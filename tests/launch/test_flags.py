"""The command line takes what diffusers' train_instruct_pix2pix.py takes, and more."""

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest
from tiny import save_tiny_dataset, save_tiny_pipeline

from fusedit.launch import train
from fusedit.launch.flags import parse
from fusedit.trainer.config import ModelConfig, RunConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.plan import make_plan
from fusedit.trainer.settings import from_toml
from fusedit.trainer.world import World

ROOT = Path(__file__).parents[2]
SWITCH = object()  # a flag without a value, off by default

# The parser of train_instruct_pix2pix.py, huggingface/diffusers 58eb52c0: flag, default, and a
# value to give it.
REFERENCE = {
    "pretrained_model_name_or_path": (None, "some/model"),
    "revision": (None, "main"),
    "variant": (None, "fp16"),
    "dataset_name": (None, "some/dataset"),
    "dataset_config_name": (None, "small"),
    "train_data_dir": (None, "pairs"),
    "original_image_column": ("input_image", "before"),
    "edited_image_column": ("edited_image", "after"),
    "edit_prompt_column": ("edit_prompt", "instruction"),
    "val_image_url": (None, "photo.png"),
    "validation_prompt": (None, "make it snowy"),
    "num_validation_images": (4, 2),
    "validation_epochs": (1, 3),
    "max_train_samples": (None, 100),
    "output_dir": ("instruct-pix2pix-model", "out"),
    "cache_dir": (None, "cache"),
    "seed": (None, 42),
    "resolution": (256, 512),
    "center_crop": SWITCH,
    "random_flip": SWITCH,
    "train_batch_size": (16, 4),
    "num_train_epochs": (100, 5),
    "max_train_steps": (None, 15000),
    "gradient_accumulation_steps": (1, 4),
    "gradient_checkpointing": SWITCH,
    "learning_rate": (1e-4, 5e-5),
    "scale_lr": SWITCH,
    "lr_scheduler": ("constant", "cosine"),
    "lr_warmup_steps": (500, 0),
    "conditioning_dropout_prob": (None, 0.05),
    "use_8bit_adam": SWITCH,
    "allow_tf32": SWITCH,
    "use_ema": SWITCH,
    "non_ema_revision": (None, "non-ema"),
    "dataloader_num_workers": (0, 2),
    "adam_beta1": (0.9, 0.8),
    "adam_beta2": (0.999, 0.99),
    "adam_weight_decay": (1e-2, 0.1),
    "adam_epsilon": (1e-8, 1e-6),
    "max_grad_norm": (1.0, 2.0),
    "push_to_hub": SWITCH,
    "hub_token": (None, "hf_x"),
    "hub_model_id": (None, "me/model"),
    "logging_dir": ("logs", "tensorboard"),
    "mixed_precision": (None, "bf16"),
    "report_to": ("tensorboard", "wandb"),
    "local_rank": (-1, 0),
    "checkpointing_steps": (500, 5000),
    "checkpoints_total_limit": (None, 1),
    "resume_from_checkpoint": (None, "latest"),
    "enable_xformers_memory_efficient_attention": SWITCH,
}
OTHER_DEFAULTS = {"seed": 0}  # without --seed the reference crashes
GO_TOGETHER = {"val_image_url": "validation_prompt", "validation_prompt": "val_image_url"}
LR_SCHEDULERS = (  # the reference's choices
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip

GUIDE = """
    --pretrained_model_name_or_path=$MODEL_NAME --dataset_name=$DATASET_ID
    --enable_xformers_memory_efficient_attention --resolution=256 --random_flip --train_batch_size=4
    --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000
    --checkpointing_steps=5000 --checkpoints_total_limit=1 --learning_rate=5e-05 --max_grad_norm=1
    --lr_warmup_steps=0 --conditioning_dropout_prob=0.05 --mixed_precision=fp16 --seed=42
    --push_to_hub
"""


def settings(flags) -> dict:
    """Every flag's value under its name."""
    sections = dataclasses.asdict(flags)
    merged = {
        name: value for section in sections.pop("run").values() for name, value in section.items()
    }
    return merged | sections


def parse_settings(*argv: str) -> dict:
    return settings(parse([str(argument) for argument in argv]))


@functools.cache
def defaults() -> dict:
    return parse_settings()


def refusal(capsys, *argv: str) -> str:
    """What is said of a command line that is refused, without the box around it."""
    with pytest.raises(SystemExit) as caught:
        parse(list(argv))
    assert caught.value.code == 2
    return " ".join(re.sub("[╭╮╰╯│─]", " ", capsys.readouterr().err).split())


def test_the_table_has_all_flags_of_the_reference():
    assert len(REFERENCE) == 51


@pytest.mark.parametrize("name", REFERENCE)
def test_a_flag_of_the_reference_has_its_default(name):
    given = REFERENCE[name]
    default = OTHER_DEFAULTS.get(name, False if given is SWITCH else given[0])
    found = defaults()[name]
    assert (found, type(found)) == (default, type(default))


@pytest.mark.parametrize("joined", [True, False], ids=["--flag=value", "--flag value"])
@pytest.mark.parametrize("name", REFERENCE)
def test_a_flag_of_the_reference_is_taken(name, joined):
    if REFERENCE[name] is SWITCH:
        assert parse_settings(f"--{name}")[name] is True
        return
    value = REFERENCE[name][1]
    argv = [f"--{name}={value}"] if joined else [f"--{name}", value]
    if name in GO_TOGETHER:
        argv += [f"--{GO_TOGETHER[name]}", "x"]
    found = parse_settings(*argv)
    assert (found[name], type(found[name])) == (value, type(value))
    unchanged = {name, GO_TOGETHER.get(name)}
    assert {k: v for k, v in found.items() if k not in unchanged} == {
        k: v for k, v in defaults().items() if k not in unchanged
    }


@pytest.mark.parametrize(
    ("flag", "values"),
    [("lr_scheduler", LR_SCHEDULERS), ("mixed_precision", ("no", "fp16", "bf16"))],
)
def test_every_choice_of_the_reference_is_taken(flag, values):
    assert [parse_settings(f"--{flag}={value}")[flag] for value in values] == list(values)


def test_the_guides_command_line_parses_to_what_it_says():
    found = parse_settings(*shlex.split(GUIDE))
    changed = {k: v for k, v in found.items() if v != defaults()[k]}
    assert changed == {
        "pretrained_model_name_or_path": "$MODEL_NAME",
        "dataset_name": "$DATASET_ID",
        "enable_xformers_memory_efficient_attention": True,
        "random_flip": True,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "max_train_steps": 15000,
        "checkpointing_steps": 5000,
        "checkpoints_total_limit": 1,
        "learning_rate": 5e-5,
        "lr_warmup_steps": 0,
        "conditioning_dropout_prob": 0.05,
        "mixed_precision": "fp16",
        "seed": 42,
        "push_to_hub": True,
    }


def test_dashes_serve_as_underscores():
    assert parse_settings("--train-batch-size", "3")["train_batch_size"] == 3


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[optim]\nlearning_rate = 3e-5\nuse_ema = true\n[loop]\nseed = 7")
    found = parse_settings("--seed=8", f"--config={path}", "--resolution", "64")
    asked = {"learning_rate": 3e-5, "use_ema": True, "seed": 8, "resolution": 64, "config": path}
    assert found == defaults() | asked


def test_a_switch_that_the_file_turns_on_can_be_turned_off(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("random_flip = true")
    assert not parse_settings("--config", path, "--no_random_flip")["random_flip"]


def test_a_switch_that_the_file_turns_on_may_be_given_again(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("random_flip = true")
    assert parse_settings("--config", path, "--random_flip")["random_flip"]


def test_a_file_that_is_not_there_is_the_users_mistake():
    with pytest.raises(UsageError, match=r"--config nowhere\.toml: there is no such file"):
        parse(["--config", "nowhere.toml"])


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("--learning_rat=1e-4", "--learning_rate"),
        ("--lr_schedular=constant", "--lr_scheduler"),
        ("--conditioning_dropout=0.05", "--conditioning_dropout_prob"),
        ("--random_flips", "--random_flip"),
    ],
)
def test_an_unknown_flag_names_its_nearest_neighbour(capsys, misspelt, nearest):
    assert re.search(rf"Perhaps you meant: {nearest}[ ,]", refusal(capsys, misspelt))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--resolution=big", "--resolution: invalid literal for int"),
        ("--resolution=4", "--resolution must be 8 or more, got 4"),
        ("--mixed_precision=fp8", "invalid choice 'fp8' for argument '--mixed_precision'"),
        ("--lr_scheduler=step", "invalid choice 'step' for argument '--lr_scheduler'"),
        ("--conditioning_dropout_prob=0.5", "lower --conditioning_dropout_prob"),
        ("--train_batch_size=0", "--train_batch_size must be 1 or more, got 0"),
        ("--report_to=comet_ml", "--report_to knows tensorboard, wandb, mlflow, trackio"),
        ("--random_flip=yes", "Unrecognized options: yes"),
    ],
)
def test_a_bad_value_is_refused_by_its_flags_name(capsys, flag, message):
    assert message in refusal(capsys, flag)


def test_other_ranks_refuse_in_silence(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--learning_rat=1"], quiet=True)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_help_lists_every_flag_with_a_line_about_it(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"--(\w+)", shown))
    assert flags >= set(defaults()) >= set(REFERENCE)


def test_local_rank_says_what_happens_instead(capsys):
    assert parse_settings("--local_rank=1")["local_rank"] == 1
    assert train.main(["--local_rank=1"]) == 2  # for a model is missing
    told = capsys.readouterr().err.splitlines()
    assert told.count("--local_rank is ignored: torchrun's LOCAL_RANK is used") == 1


def test_other_flags_that_lost_their_point_say_so_in_the_plan(tmp_path):
    common = [
        f"--pretrained_model_name_or_path={save_tiny_pipeline(tmp_path / 'base')}",
        f"--dataset_name={save_tiny_dataset(tmp_path / 'pairs')}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=16",
        "--conditioning_dropout_prob=0.05",
    ]

    def notes(*flags: str) -> str:
        return "\n".join(make_plan(parse([*common, *flags]).run, World()).notes)

    assert notes() == ""
    assert "SDPA" in notes("--enable_xformers_memory_efficient_attention")
    assert "taken as the --revision of the UNet alone" in notes("--non_ema_revision=main")


def test_the_papers_recipe_is_the_papers():
    recipe = from_toml(ROOT / "launch/recipes/paper.toml")
    assert recipe.loop.global_batch(ranks=8) == 1024
    assert recipe.loop.max_train_steps == 10_000
    assert recipe.conditioning.rates == (0.05, 0.05, 0.05)
    data, optim = recipe.data, recipe.optim
    assert (data.resolution, data.max_resize, data.random_flip) == (256, 288, True)
    assert not data.center_crop
    assert (optim.learning_rate, optim.lr_scheduler, optim.lr_warmup_steps) == (1e-4, "constant", 0)
    assert (optim.use_ema, optim.ema_decay) == (True, 0.9999)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch/recipes").glob("*.toml")), ids=lambda p: p.name
)
def test_a_recipe_lacks_only_the_data(path):
    flags = parse([f"--config={path}", "--train_data_dir=pairs"])
    flags.run.check_complete()
    assert flags.run != RunConfig(model=ModelConfig(pretrained_model_name_or_path="x"))
