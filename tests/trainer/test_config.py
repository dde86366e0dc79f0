import dataclasses
import json

import pytest

from fusedit.trainer.config import (
    ConditioningConfig,
    DataConfig,
    DiffusionConfig,
    LoopConfig,
    ModelConfig,
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
        optim=OptimConfig(
            learning_rate=3e-5,
            max_grad_norm=float("inf"),
            use_ema=True,
            post_hoc_ema=(0.05, 0.1),
        ),
        diffusion=DiffusionConfig(prediction_type="v_prediction", snr_gamma=5.0),
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
        ("post_hoc_ema = 0.05", "post_hoc_ema must be a list of numbers, got 0.05"),
        ("post_hoc_ema = ['a']", "post_hoc_ema must be a list of numbers"),
        ("post_hoc_ema = [true]", "post_hoc_ema must be a list of numbers"),
        ("snr_gamma = true", "snr_gamma must be float, got True"),
        ("x = ", "run.toml: "),
        (f"learning_rate = {10**400}", "learning_rate is out of range"),
        (f"post_hoc_ema = [{10**400}]", "post_hoc_ema is out of range"),
        ('report_to = "a\\nb"', "--report_to knows"),
        ('"a\\nb" = 1', "unknown setting a b"),
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
        (lambda: DiffusionConfig(snr_gamma=0), "--snr_gamma must be above 0, got 0; leave it out"),
        (lambda: DiffusionConfig(snr_gamma=float("nan")), "--snr_gamma must be above 0"),
        (lambda: DiffusionConfig(noise_offset=-0.1), "--noise_offset must be 0 or more, got -0.1"),
        (lambda: DiffusionConfig(input_perturbation=float("inf")), "--input_perturbation must"),
        (lambda: DiffusionConfig(min_timestep=-1), "--min_timestep must be 0 or more"),
        (lambda: DiffusionConfig(max_timestep=0), "--max_timestep must be 1 or more"),
        (lambda: OptimConfig(lr_num_cycles=0), "--lr_num_cycles must be 1 or more"),
        (lambda: OptimConfig(lr_power=0), "--lr_power must be above 0, got 0"),
        (lambda: OptimConfig(post_hoc_ema=(0.05, 0.3)), "--post_hoc_ema 0.05 0.3: a length is"),
        (lambda: OptimConfig(post_hoc_ema=(0.1, 0.1)), "0.1 0.1: each length is kept once"),
        (lambda: OutputConfig(ema_snapshot_steps=0), "--ema_snapshot_steps must be 1 or more"),
    ],
)
def test_a_bad_value_names_its_flag(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="--pretrained_model_name_or_path is missing"):
        RunConfig().check_complete()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"diffusion": DiffusionConfig(min_timestep=500, max_timestep=500)},
            "--min_timestep 500 must be below --max_timestep 500",
        ),
        (
            {"diffusion": DiffusionConfig(rescale_betas_zero_snr=True, prediction_type="epsilon")},
            "--rescale_betas_zero_snr is not --prediction_type epsilon",
        ),
        (
            {"optim": OptimConfig(lr_num_cycles=3)},
            "--lr_num_cycles 3 is for --lr_scheduler cosine_with_restarts, not constant: leave",
        ),
        (
            {"optim": OptimConfig(lr_power=2.0, lr_scheduler="cosine")},
            "--lr_power 2.0 is for --lr_scheduler polynomial, not cosine: leave out one",
        ),
        (
            {"optim": OptimConfig(learning_rate=1e-7, lr_scheduler="polynomial")},
            "--learning_rate 1e-07 must be above 1e-07, at which --lr_scheduler polynomial ends",
        ),
        (
            {"output": OutputConfig(ema_snapshot_steps=5)},
            "--ema_snapshot_steps 5 is of --post_hoc_ema, which was not given",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_one_line(sections, message):
    model = ModelConfig(pretrained_model_name_or_path="base")
    run = RunConfig(model=model, data=DataConfig(train_data_dir="data"), **sections)
    with pytest.raises(UsageError, match=message) as caught:
        run.check_complete()
    assert "\n" not in str(caught.value)


def test_flags_that_go_together_are_taken():
    OptimConfig(lr_num_cycles=3, lr_scheduler="cosine_with_restarts").check()
    OptimConfig(lr_power=2.0, lr_scheduler="polynomial").check()
    DiffusionConfig(rescale_betas_zero_snr=True).check()  # the pipeline may predict v
    assert OptimConfig(use_ema=True, post_hoc_ema=(0.05, 0.1)).averages == 3


def test_settings_with_lists_are_the_same_after_json():
    run = flat(RunConfig(optim=OptimConfig(post_hoc_ema=(0.05, 0.1))))
    assert difference(json.loads(json.dumps(run)), run) == []
    other = flat(RunConfig(optim=OptimConfig(post_hoc_ema=(0.05,))))
    assert difference(json.loads(json.dumps(run)), other) == ["optim.post_hoc_ema"]


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
