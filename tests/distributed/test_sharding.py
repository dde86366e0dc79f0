"""Sharded by FSDP2, a run ends as it does on one rank, to the order of sums; and goes on alike."""

import json
import os
import shutil
import signal

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from ranks import Ranks, run
from safetensors.torch import load_file
from tiny import save_tiny_inputs

from fusedit.trainer import checkpoint, sharded_checkpoint

STEPS = 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 15)


def _flags(inputs, output, ranks, *more):
    return [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=16",
        "--random_flip",
        f"--train_batch_size={6 // ranks}",
        "--gradient_accumulation_steps=2",
        f"--max_train_steps={STEPS}",
        "--conditioning_dropout_prob=0.1",
        "--learning_rate=1e-3",
        "--adam_epsilon=1e-3",  # not far below the gradients, or Adam would hide a wrong scale
        "--max_grad_norm=0.05",  # clips each step of this model
        "--use_ema",
        "--held_out=3",
        "--validation_steps=3",
        "--validation_inference_steps=2",
        "--checkpointing_steps=4",
        "--log_every=1",
        "--report_to=none",
        f"--output_dir={output}",
        *more,
    ]


def _tensors(output, step=STEPS):
    return sharded_checkpoint.read(output / f"checkpoint-{step}", None)


def _log(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def _assert_near(found, expected, bar=1e-5):
    assert found.keys() == expected.keys()
    for part, named in expected.items():
        assert found[part].keys() == named.keys()
        for name, value in named.items():
            assert found[part][name].shape == value.shape, name
            scale = value.norm() if value.norm() > 0 else 1
            assert (found[part][name] - value).norm() <= bar * scale, f"{part} {name}"


def test_sharded_ranks_end_as_one(inputs, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run(1, _flags(inputs, alone, 1), tmp_path / "alone.log")
    run(2, _flags(inputs, shared, 2, "--sharding=fsdp"), tmp_path / "shared.log")
    _assert_near(_tensors(shared), _tensors(alone), 1e-4)
    for mine, theirs in zip(_log(shared), _log(alone), strict=True):
        print(mine, theirs)
