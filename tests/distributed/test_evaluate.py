"""Ranks measure together: to the bits of one alone, and without touching what they train."""

import json
import os
from pathlib import Path

import pytest
from extractor_files import save_clip
from ranks import _context, free_port, run, run_flags
from safetensors.torch import load_file
from tiny import save_tiny_dataset, save_tiny_inputs, save_tiny_pipeline

PROTOCOL = """
name = "own"
metrics = ["psnr", "ssim", "clip_image", "fid_clip", "kid_clip"]
[data]
edited_column = "edited_image"
[sampling]
resolution = 16
steps = 2
guidance_scale = 2.0
image_guidance_scales = [1.0, 1.5]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = save_tiny_inputs(tmp_path_factory.mktemp("inputs"))
    save_tiny_pipeline(folder / "model", in_channels=8)
    save_tiny_dataset(folder / "five", count=5)
    save_clip(folder / "clip")
    (folder / "own.toml").write_text(PROTOCOL)
    return folder


def _rank(rank, size, port, words):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        HF_HUB_OFFLINE="1",
    )
    import torch

    from fusedit.launch import evaluate

    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None
    os._exit(evaluate.main(words))


def evaluated(inputs: Path, out: Path, size: int, *flags: str) -> tuple[dict, str]:
    words = [str(inputs / "model"), f"--out={out}", f"--protocol={inputs / 'own.toml'}"]
    words += [f"--dataset={inputs / 'five'}", f"--clip={inputs / 'clip'}", *flags]
    port = free_port()
    ranks = [_context.Process(target=_rank, args=(at, size, port, words)) for at in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * size
    return json.loads((out / "results.json").read_text()), (out / "rows.jsonl").read_text()


def test_any_number_of_ranks_comes_to_the_bits_of_one(inputs, tmp_path):
    one, its_rows = evaluated(inputs, tmp_path / "one", 1, "--batch_size=2")
    two, rows = evaluated(inputs, tmp_path / "two", 2, "--batch_size=2")
    assert len(rows.splitlines()) == 10
    assert rows == its_rows
    assert two["provenance"]["ranks"] == 2
    for name in ("points", "rows", "model", "protocol_sha256", "extractors"):
        assert two[name] == one[name]


def test_measuring_changes_nothing_that_is_trained(inputs, tmp_path):
    flags = [*run_flags(inputs, tmp_path / "plain", 2, 4), "--held_out=3"]
    flags += ["--validation_steps=1000", "--checkpointing_steps=4", "--seed=3"]
    run(2, flags, tmp_path / "plain.log")
    more = [f"--output_dir={tmp_path / 'measured'}", "--eval_steps=1", "--keep_best"]
    more += [f"--eval_protocol={inputs / 'own.toml'}", f"--eval_clip={inputs / 'clip'}"]
    more += ["--checkpoints_total_limit=1", "--eval_rows=3"]
    run(2, [*flags, *more], tmp_path / "measured.log")
    plain, measured = (tmp_path / name for name in ("plain", "measured"))
    for stem in ("unet", "ema", "optimizer"):
        one, other = (
            load_file(at / f"checkpoint-4/{stem}.safetensors") for at in (plain, measured)
        )
        assert all(one[name].equal(other[name]) for name in one)
    told = json.loads((measured / "best.json").read_text())
    assert [*told["values"]] == ["1", "2", "3", "4"]
    assert (measured / f"checkpoint-{told['step']}").is_dir()
    lines = [json.loads(line) for line in (measured / "log.jsonl").open()]
    values = [line["eval/psnr_at_1.5"] for line in lines if "eval/psnr_at_1.5" in line]
    assert len(values) == 4
    assert {"eval/kid_clip_at_1", "eval/clip_image_at_1.5"} <= {*lines[-1], *lines[-2]}
