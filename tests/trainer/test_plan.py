from typing import get_args

import pytest
import torch

from fusedit.kernels.attention_choice import BACKENDS
from fusedit.trainer.config import Attention, DataConfig, PrecisionConfig, RunConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.plan import _check_attention, _notes


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
        ({"center_crop": True}, True, "--cache_latents DIR encodes them once"),
        ({"center_crop": True, "cache_latents": "cache"}, True, None),
        ({}, False, None),
    ],
)
def test_on_a_gpu_the_cache_is_recommended_once(settings, on_gpu, told):
    notes = _notes(RunConfig(data=DataConfig(**settings)), on_gpu)
    found = [note for note in notes if "--cache_latents" in note]
    assert [told in note for note in found] == ([True] if told else [])
