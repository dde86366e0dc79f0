import dataclasses

import pytest

from fusedit.trainer.config import (
    ConditioningConfig,
    DataConfig,
    LoopConfig,
    OptimConfig,
    OutputConfig,
    RunConfig,
    ValidationConfig,
)
from fusedit.trainer.errors import UsageError
from fusedit.trainer.settings import MAY_CHANGE, difference, flat, from_toml, to_toml


def _read(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return from_toml(path)


def test_an_empty_file_is_the_defaults(tmp_path):
    assert _read(tmp_path, "") == RunConfig()


def test_what_is_saved_reads_back_alike_and_holds_no_token(tmp_path):
    run = RunConfig(
        optim=OptimConfig(learning_rate=3e-5, max_grad_norm=float("inf"), use_ema=True),
        loop=LoopConfig(max_train_steps=7),
        output=OutputConfig(hub_token="hf_secret"),
    )
    text = to_toml(run)
    assert "hf_secret" not in text
    expected = dataclasses.replace(run, output=OutputConfig())
    assert _read(tmp_path, text) == expected


def test_flags_may_stand_without_a_section(tmp_path):
    run = _read(tmp_path, "learning_rate = 1\nresolution = 64")
    assert (run.optim.learning_rate, run.data.resolution) == (1.0, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr_schedular = 'linear'", "unknown setting lr_schedular; did you mean lr_sch"),
        ("[data]\nlearning_rate = 1.0", "unknown setting learning_rate"),
        ("learning_rate = '1e-4'", "learning_rate must be float, got '1e-4'"),
        ("resolution = 0.5", "resolution must be int, got 0.5"),
        ("mixed_precision = 'fp8'", "mixed_precision must be no or fp16 or bf16, got 'fp8'"),
        ("use_ema = 1", "use_ema must be bool, got 1"),
        ("x = ", "run.toml: "),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, text, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")) as caught:
        _read(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(resolution=4), "--resolution must be 8 or more, got 4"),
        (lambda: DataConfig(max_resize=200), "--max_resize must be 256 or more"),
        (lambda: ConditioningConfig(conditioning_dropout_prob=0.5), r"sum to 1 or less"),
        (lambda: ConditioningConfig(text_dropout_prob=-0.1), "--text_dropout_prob"),
        (lambda: OptimConfig(max_grad_norm=0), "--max_grad_norm must be above 0"),
        (lambda: OptimConfig(learning_rate=float("nan")), "--learning_rate"),
        (lambda: LoopConfig(train_batch_size=0), "--train_batch_size must be 1 or more"),
        (lambda: LoopConfig(seed=-1), "--seed"),
        (lambda: OptimConfig(adam_beta1=1), "--adam_beta1 must be from 0 to below 1"),
        (
            lambda: ValidationConfig(validation_image_guidance_scale=0.5),
            "--validation_image_guidance_scale must be 1",
        ),
        (lambda: OutputConfig(report_to="comet_ml"), "--report_to knows tensorboard"),
    ],
)
def test_a_bad_value_names_its_flag(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="--pretrained_model_name_or_path is missing"):
        RunConfig().check_complete()


def test_rates_of_their_own_override_the_common_one():
    rates = ConditioningConfig(conditioning_dropout_prob=0.05, image_dropout_prob=0.1).rates
    assert rates == (0.05, 0.05, 0.1)
    assert ConditioningConfig().rates == (0, 0, 0)


def test_several_trackers_may_be_asked_for():
    assert OutputConfig(report_to="wandb,tensorboard").trackers == ("tensorboard", "wandb")
    assert OutputConfig(report_to="none").trackers == ()


def test_the_table_of_what_may_change_names_real_settings_and_holds():
    old = flat(RunConfig())
    assert set(old) | {"output.hub_token"} >= MAY_CHANGE
    new = old | {"optim.learning_rate": 1.0, "loop.max_train_steps": 5, "output.log_every": 1}
    assert difference(old, new) == ["optim.learning_rate"]
