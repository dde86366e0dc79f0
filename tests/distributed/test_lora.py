"""However a step is cut, an adapter's dropout hides the same, and the run ends alike."""

import pytest
import torch
from ranks import run
from safetensors.torch import load_file
from tiny import save_tiny_inputs

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 6)  # 4 a step: windows of 4 and 2


def _train(inputs, output, ranks, batch, micro_steps, *more):
    flags = [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=16",
        f"--train_batch_size={batch}",
        f"--gradient_accumulation_steps={micro_steps}",
        "--lora_rank=4",
        "--lora_dropout=0.5",
        "--conditioning_dropout_prob=0.1",
        "--use_ema",
        "--report_to=none",
        "--learning_rate=1e-2",
        "--adam_epsilon=1e-3",  # not far below the gradients, or Adam would hide a wrong scale
        f"--output_dir={output}",
        *more,
    ]
    run(ranks, flags, output.with_suffix(".log"))
    return output / f"checkpoint-{STEPS}"


def test_ranks_and_micro_steps_do_not_change_what_is_hidden(inputs, tmp_path):
    length = f"--max_train_steps={STEPS}"
    alone = _train(inputs, tmp_path / "1x4", 1, 4, 1, length)
    cuts = [
        _train(inputs, tmp_path / "2x2", 2, 2, 1, length, "--gradient_checkpointing"),
        _train(inputs, tmp_path / "1x2x2", 1, 2, 2, length),
    ]
    for file in ("unet", "ema"):
        expected = load_file(alone / f"{file}.safetensors")
        for other in cuts:
            for name, value in load_file(other / f"{file}.safetensors").items():
                error = (value - expected[name]).norm() / expected[name].norm()
                assert error < 1e-5, f"{other.parent.name} {file} {name}: {error:.1e}"


def test_two_ranks_go_on_to_the_same_bits(inputs, tmp_path):
    whole = _train(inputs, tmp_path / "whole", 2, 2, 1, f"--max_train_steps={STEPS}")
    _train(inputs, tmp_path / "cut", 2, 2, 1, "--max_train_steps=3")
    cut = _train(inputs, tmp_path / "cut", 2, 2, 1, f"--max_train_steps={STEPS}")
    for file in ("unet", "ema", "optimizer"):
        one, other = (load_file(folder / f"{file}.safetensors") for folder in (whole, cut))
        assert all(torch.equal(value, other[name]) for name, value in one.items()), file
