"""However a step is cut into ranks and micro-steps, it sees the same samples and ends alike."""

import pytest
import torch
from ranks import run
from safetensors.torch import load_file
from tiny import save_tiny_inputs

from fusedit.trainer.log import read_lines

STEPS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    # 20 rows, 8 a step: the last window has 4
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 20)


def _train(inputs, tmp_path, name, ranks, batch, micro_steps, *more):
    output = tmp_path / name
    flags = [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=16",
        "--random_flip",
        f"--train_batch_size={batch}",
        f"--gradient_accumulation_steps={micro_steps}",
        f"--max_train_steps={STEPS}",
        "--conditioning_dropout_prob=0.1",
        "--use_ema",
        "--report_to=none",
        "--learning_rate=1e-3",
        "--adam_epsilon=1e-3",  # not far below the gradients, or Adam would hide a wrong scale
        f"--output_dir={output}",
        *more,
    ]
    run(ranks, flags, tmp_path / f"{name}.log")
    return output / f"checkpoint-{STEPS}"


@pytest.mark.parametrize("max_grad_norm", ["inf", "0.05"])  # 0.05 clips each step of this model
def test_ranks_and_micro_steps_do_not_change_the_weights(inputs, tmp_path, max_grad_norm):
    clip = f"--max_grad_norm={max_grad_norm}"
    alone = _train(inputs, tmp_path, "1x8", 1, 8, 1, clip)
    for name, ranks, batch, micro_steps in [
        ("2x4", 2, 4, 1),
        ("1x2x4", 1, 4, 2),
        ("2x2x2", 2, 2, 2),
    ]:
        other = _train(inputs, tmp_path, name, ranks, batch, micro_steps, clip)
        for file in ("unet", "ema"):
            expected, weights = (load_file(f / f"{file}.safetensors") for f in (alone, other))
            for key, value in weights.items():
                distance = (value - expected[key]).norm() / expected[key].norm()
                assert distance < 1e-5, f"{name} {file} {key}: {distance:.1e}"


def test_nor_do_they_with_more_noise_and_weights_of_timesteps(inputs, tmp_path):
    """The last window is short: what its mean divides by is the samples, not their weights."""
    flags = [
        "--snr_gamma=1",
        "--noise_offset=0.3",
        "--input_perturbation=0.2",
        "--min_timestep=100",
        "--prediction_type=v_prediction",
        "--post_hoc_ema",
        "0.05",
        "0.1",
    ]
    alone = _train(inputs, tmp_path, "1x8", 1, 8, 1, *flags)
    plain = _train(inputs, tmp_path, "plain", 1, 8, 1)
    other = _train(inputs, tmp_path, "2x2x2", 2, 2, 2, *flags)
    for file in ("unet", "ema", "ema_0.05", "ema_0.1"):
        expected, weights = (load_file(f / f"{file}.safetensors") for f in (alone, other))
        for key, value in weights.items():
            distance = (value - expected[key]).norm() / expected[key].norm()
            assert distance < 1e-5, f"{file} {key}: {distance:.1e}"
    logs = [read_lines(folder.parent / "log.jsonl")[-1] for folder in (alone, other)]
    told, expected = (
        {name: value for name, value in line.items() if name.startswith("loss")} for line in logs
    )
    assert len(told) == 9  # all samples, four conditions, four bands
    assert told == pytest.approx(expected, rel=1e-4)
    expected = load_file(plain / "unet.safetensors")["conv_in.weight"]
    assert not torch.equal(load_file(alone / "unet.safetensors")["conv_in.weight"], expected)


def test_ranks_add_up_in_the_masters_fp32(inputs, tmp_path):
    """Two ranks give the bf16 gradients that two micro-steps give; fp32 sums lose none of them."""
    flags = "--mixed_precision=bf16", "--param_dtype=bf16"
    alone = _train(inputs, tmp_path, "1x4x2", 1, 4, 2, *flags)
    ranks = _train(inputs, tmp_path, "2x4", 2, 4, 1, *flags)
    both = _train(inputs, tmp_path, "2x2x2", 2, 2, 2, *flags)
    rounded = _train(inputs, tmp_path, "bf16", 2, 4, 1, *flags, "--all_reduce_dtype=bf16")
    for file in ("unet", "ema"):
        expected = load_file(alone / f"{file}.safetensors")
        for key, value in expected.items():
            at_once, cut, sent = (
                load_file(folder / f"{file}.safetensors")[key] for folder in (ranks, both, rounded)
            )
            assert torch.equal(at_once, value), key
            for other in (cut, sent):  # other micro-batches, or rounded on their way
                assert (other - value).norm() < 1e-1 * value.norm(), key
    assert not torch.equal(sent, value)


def test_gradients_can_travel_in_bf16(inputs, tmp_path):
    alone = _train(inputs, tmp_path, "1x8", 1, 8, 1)
    rounded = _train(inputs, tmp_path, "2x4", 2, 4, 1, "--all_reduce_dtype=bf16")
    expected, weights = (load_file(f / "unet.safetensors") for f in (alone, rounded))
    for key, value in weights.items():
        assert 0 < (value - expected[key]).norm() / expected[key].norm() < 1e-2, key
