from typing import get_args

import pytest
import torch

from fusedit.kernels.attention_choice import BACKENDS
from fusedit.trainer.config import (
    Attention,
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    OutputConfig,
    PrecisionConfig,
    RunConfig,
)
from fusedit.trainer.errors import UsageError
from fusedit.trainer.plan import _check_attention, _notes, check_precision, default_cache


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_a_card_before_ampere_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UsageError, match="of compute capability 8"):
        _check_attention(PrecisionConfig(attention="flash"), "fp16", True)
    _check_attention(PrecisionConfig(), "fp16", True)


@pytest.mark.parametrize(
    ("settings", "precision", "on_gpu", "message"),
    [
        ({"attention": "triton"}, "bf16", False, "--attention triton needs a GPU; on a CPU take"),
        ({"attention": "flash"}, "no", True, "--attention flash needs --mixed_precision bf16 or"),
        ({"attention": "cudnn", "deterministic": True}, "bf16", True, "cudnn is not --determinis"),
    ],
)
def test_attention_that_cannot_run_is_refused(settings, precision, on_gpu, message):
    with pytest.raises(UsageError, match=message):
        _check_attention(PrecisionConfig(**settings), precision, on_gpu)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_pytorchs_own_choice_runs_anywhere(attention):
    section = PrecisionConfig(attention=attention, deterministic=True, plain=True)
    _check_attention(section, "no", False)


@pytest.mark.parametrize("attention", ["triton", "cudnn", "flash"])
def test_what_a_gpu_can_run_is_taken(attention):
    _check_attention(PrecisionConfig(attention=attention), "fp16", True)


@pytest.mark.parametrize("attention", ["triton", "cudnn", "flash"])
def test_plain_modules_have_pytorchs_attention(attention):
    with pytest.raises(UsageError, match=f"--attention {attention} is not --plain"):
        PrecisionConfig(plain=True, attention=attention)


@pytest.mark.parametrize("parts", ["blocks", "whole"])
def test_plain_modules_are_not_compiled(parts):
    with pytest.raises(UsageError, match=f"--compile {parts} is not --plain"):
        PrecisionConfig(plain=True, compile=parts)


def test_the_flag_has_the_kernels_names():
    assert get_args(Attention) == BACKENDS


@pytest.mark.parametrize(
    ("settings", "on_gpu", "told"),
    [
        ({}, True, "--cache_latents DIR --cache_crops 4 (or --center_crop) encodes them once"),
        ({"center_crop": True, "cache_latents": "cache"}, True, None),
        ({"cache_latents": "off"}, True, None),
        ({}, False, None),
    ],
)
def test_on_a_gpu_the_cache_is_recommended_once(settings, on_gpu, told):
    data = DataConfig(**settings)
    notes = _notes(RunConfig(data=data.with_cache(None)), data.cache_latents, on_gpu)
    found = [note for note in notes if "--cache_latents" in note]
    assert [told in note for note in found] == ([True] if told else [])


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_timestep_of_weight_0_is_told(zero_snr):
    section = DiffusionConfig(snr_gamma=5.0, rescale_betas_zero_snr=zero_snr)
    notes = _notes(RunConfig(diffusion=section), None, on_gpu=False)
    assert any("--snr_gamma with --rescale_betas_zero_snr" in note for note in notes) == zero_snr


@pytest.mark.parametrize(
    ("settings", "plain", "where"),
    [
        ({"center_crop": True}, False, "out/cache"),
        ({"cache_crops": 4}, False, "out/cache"),
        ({"center_crop": True}, True, None),
        ({}, False, None),  # a random crop is never the same
        ({"center_crop": True, "max_resize": 600}, False, None),
        ({"center_crop": True, "cache_latents": "off"}, False, None),
        ({"center_crop": True, "cache_latents": "s3://there"}, False, "s3://there"),
    ],
)
def test_on_a_gpu_few_crops_are_cached_unless_told_otherwise(settings, plain, where):
    config = RunConfig(
        data=DataConfig(**settings),
        precision=PrecisionConfig(plain=plain),
        output=OutputConfig(output_dir="out"),
    )
    assert config.data.with_cache(default_cache(config)).cache_latents == where


def test_crops_are_kept_somewhere():
    with pytest.raises(UsageError, match="--cache_crops 2 is not --cache_latents off"):
        DataConfig(cache_crops=2, cache_latents="off").check_cache()
    with pytest.raises(UsageError, match="--cache_crops 2 needs --cache_latents DIR"):
        DataConfig(cache_crops=2).with_cache(None)


@pytest.mark.parametrize(
    ("settings", "precision", "on_gpu", "message"),
    [
        ({"param_dtype": "bf16"}, "no", False, "--param_dtype bf16 needs --mixed_precision bf16"),
        ({"param_dtype": "bf16"}, "fp16", True, "needs --mixed_precision bf16, got fp16"),
        ({"cuda_graphs": "on"}, "bf16", False, "--cuda_graphs on needs a GPU; on a CPU take auto"),
    ],
)
def test_formats_and_graphs_that_cannot_be_are_refused(settings, precision, on_gpu, message):
    with pytest.raises(UsageError, match=message):
        check_precision(RunConfig(precision=PrecisionConfig(**settings)), precision, on_gpu)


def test_what_excludes_each_other_is_refused():
    graphs = RunConfig(
        precision=PrecisionConfig(cuda_graphs="on"), optim=OptimConfig(use_8bit_adam=True)
    )
    with pytest.raises(UsageError, match="--cuda_graphs on is not --use_8bit_adam"):
        check_precision(graphs, "bf16", True)
    with pytest.raises(UsageError, match="--cuda_graphs on is not --plain"):
        PrecisionConfig(cuda_graphs="on", plain=True)
    with pytest.raises(UsageError, match="--adam_moments_dtype bf16 is not --use_8bit_adam"):
        OptimConfig(use_8bit_adam=True, adam_moments_dtype="bf16")
    check_precision(RunConfig(precision=PrecisionConfig(param_dtype="bf16")), "bf16", False)
