"""Sharded by FSDP2, a run ends as it does on one rank, to the order of sums; and goes on alike."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from ranks import Ranks, run, run_flags
from safetensors.torch import load_file
from tiny import save_tiny_inputs

from fusedit.trainer import checkpoint, sharded_checkpoint

STEPS, HALF = 8, 4
SHARDED = "--sharding=fsdp"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 15)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """A run on one rank, to its end."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run(1, _flags(inputs, output, 1), output.with_suffix(".log"))
    return output


@pytest.fixture(scope="module")
def shared(inputs, tmp_path_factory):
    """The same on two ranks that share it."""
    output = tmp_path_factory.mktemp("shared") / "run"
    run(2, _flags(inputs, output, 2, SHARDED), output.with_suffix(".log"))
    return output


def _flags(inputs, output, ranks, *more):
    return [
        *run_flags(inputs, output, ranks, STEPS),
        "--learning_rate=1e-3",
        "--adam_epsilon=1e-3",  # not far below the gradients, or Adam would hide a wrong scale
        "--max_grad_norm=0.05",  # clips each step of this model
        "--held_out=3",  # of which two ranks have not the same number
        "--validation_steps=3",
        f"--checkpointing_steps={HALF}",
        *more,
    ]


def _tensors(output):
    return sharded_checkpoint.read(output / f"checkpoint-{STEPS}", None)


def _assert_same_bits(output, expected):
    folders = (path / f"checkpoint-{STEPS}" for path in (output, expected))
    found, files = (
        {path.name: load_file(path) for path in folder.glob("*.safetensors")} for folder in folders
    )
    assert found.keys() == files.keys()
    for file, named in files.items():
        assert found[file].keys() == named.keys()
        for name, value in named.items():
            assert torch.equal(found[file][name], value), f"{file} {name}"


def _log(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    keep = ("loss", "grad_norm", "lr", "held_out/full", "held_out/neither")
    return [(line["step"], *(line.get(name) for name in keep)) for line in lines]


def _assert_near(output, expected, bar=1e-4):
    for part, named in _tensors(expected).items():
        found = _tensors(output)[part]
        assert found.keys() == named.keys()
        for name, value in named.items():
            assert found[name].shape == value.shape, name
            assert (found[name] - value).norm() <= bar * value.norm() + 1e-9, f"{part} {name}"


def _until_step(step, flags, output, log):
    """Two ranks, started, once this start of theirs has logged a step."""
    told_in = output / "log.jsonl"
    before = told_in.stat().st_ino if told_in.exists() else None
    ranks = Ranks(2, flags, log)
    while True:
        assert all(process.is_alive() for process in ranks.processes), ranks.output()
        if told_in.exists() and told_in.stat().st_ino != before:
            told = re.findall(r'"step": (\d+)', told_in.read_text())
            if told and int(told[-1]) >= step:
                return ranks
        time.sleep(0.002)


def test_sharded_ranks_end_as_one(alone, shared):
    """Weights, averages, moments, and what was logged: clipped norms and held-out losses too."""
    _assert_near(shared, alone)
    mine, theirs = _log(shared), _log(alone)
    assert [line[0] for line in mine] == [line[0] for line in theirs]
    numbers = [[v for line in log for v in line if v is not None] for log in (mine, theirs)]
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=1e-3, atol=1e-5)


def test_it_is_saved_in_parts_without_pickle_and_exported_whole(shared):
    folder = shared / f"checkpoint-{STEPS}"
    names = {path.name for path in folder.iterdir()}
    parts = {f"shard-0000{r}-model-0000{p}-of-00003.safetensors" for r in (1, 2) for p in (1, 2, 3)}
    assert names == {"state.json", "manifest.json", *parts}
    assert {*json.loads((folder / "manifest.json").read_text())["files"]} == names - {
        "manifest.json"
    }
    rows = [load_file(folder / f"shard-0000{r}-model-00001-of-00003.safetensors") for r in (1, 2)]
    weights = _tensors(shared)
    name = "conv_in.weight"
    assert torch.equal(torch.cat([r[f"unet/{name}"] for r in rows]), weights["unet"][name])
    assert len(rows[0][f"unet/{name}"]) == len(weights["unet"][name]) // 2

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(shared)
    raw = load_file(shared / "unet_raw" / "diffusion_pytorch_model.safetensors")
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, weights["ema"][name])
        assert torch.equal(raw[name], weights["unet"][name])


def test_killed_and_stopped_it_ends_in_the_same_bits(inputs, tmp_path, shared):
    output, log = tmp_path / "run", tmp_path / "log"
    flags = _flags(inputs, output, 2, SHARDED)
    victims = _until_step(HALF + 1, flags, output, log)
    victims.kill(victims.processes)
    ranks = _until_step(HALF + 2, flags, output, log)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)  # one rank is told, all stop
    assert [p.join(60) or p.exitcode for p in ranks.processes] == [75, 75], ranks.output()
    run(2, flags, log)
    assert "going on from checkpoint-4" in log.read_text()
    _assert_same_bits(output, shared)
    assert _log(output) == _log(shared)


def test_validation_changes_nothing(inputs, tmp_path, shared):
    """A root that kept its gathered averages would train on them."""
    flags = _flags(inputs, tmp_path / "run", 2, SHARDED, "--validation_steps=1000")
    run(2, flags, tmp_path / "log")
    _assert_same_bits(tmp_path / "run", shared)


@pytest.mark.parametrize(
    ("start", "ranks", "sharding"),
    [
        ("shared", 3, "fsdp"),
        ("shared", 1, "ddp"),
        ("alone", 2, "fsdp"),
        pytest.param("alone", 4, "hsdp", marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_goes_on(inputs, tmp_path, request, alone, start, ranks, sharding):
    output = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(start), output)
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    flags = _flags(inputs, output, ranks, f"--sharding={sharding}")
    if ranks == 4:
        flags += ["--train_batch_size=3", "--gradient_accumulation_steps=1"]
    told = run(ranks, flags, tmp_path / "log", local_size=2 if sharding == "hsdp" else None)
    assert "going on from checkpoint-4" in told
    assert checkpoint.broken(output / f"checkpoint-{STEPS}") is None
    _assert_near(output, alone)


def test_what_saves_memory_goes_with_it(inputs, tmp_path):
    flags = (
        "--mixed_precision=bf16",
        "--param_dtype=bf16",
        "--all_reduce_dtype=bf16",
        "--adam_moments_dtype=bf16",
        "--gradient_checkpointing",
        "--held_out=0",
    )
    outputs = tmp_path / "alone", tmp_path / "shared"
    run(1, _flags(inputs, outputs[0], 1, *flags), tmp_path / "alone.log")
    run(2, _flags(inputs, outputs[1], 2, *flags, SHARDED), tmp_path / "shared.log")
    alone, shared = map(_tensors, outputs)
    start = load_file(inputs / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    del start["conv_in.weight"]  # which has grown
    assert shared["optimizer"]["conv_in.weight.exp_avg"].dtype == torch.bfloat16
    assert {value.dtype for value in shared["unet"].values()} == {torch.float32}
    names = [*start]
    moved, apart = (
        torch.cat([(alone["unet"][name] - other[name]).flatten() for name in names]).norm()
        for other in (start, shared["unet"])
    )
    assert apart < 0.1 * moved
