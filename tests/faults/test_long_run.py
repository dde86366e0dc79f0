"""Nothing grows with the steps: memory, open files, threads, CPU time a step; logs in parts.

python -m pytest -m slow tests/faults/test_long_run.py
"""

import json
import statistics
from itertools import pairwise

import pytest
from diffusers import UNet2DConditionModel
from long_run import PART_BYTES, Counted
from tiny import TEXT_WIDTH, save_tiny_inputs

from fusedit.trainer.log import LOG_FILE, parts_of, read_lines

MIB = 2**20
GROWS_MIB = 24  # that a heap may move by, whatever the steps


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)
    UNet2DConditionModel(  # a few milliseconds a step
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=TEXT_WIDTH,
    ).save_pretrained(folder / "small")
    return folder


@pytest.mark.parametrize(
    ("steps", "checkpoints", "slower"),
    [
        (240, 8, 3.0),  # few are timed, beside other tests
        pytest.param(20_000, 200, 1.4, marks=pytest.mark.slow),
    ],
)
def test_nothing_grows(inputs, tmp_path, steps, checkpoints, slower):
    output, told = tmp_path / "run", tmp_path / "told"
    every = steps // checkpoints
    flags = [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--unet={inputs / 'small'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=8",
        "--center_crop",
        f"--cache_latents={tmp_path / 'cache'}",
        "--train_batch_size=1",
        f"--max_train_steps={steps}",
        f"--checkpointing_steps={every}",
        "--checkpoints_total_limit=2",
        "--use_ema",
        "--log_every=5",
        f"--output_dir={output}",
    ]
    rank = Counted(flags, tmp_path / "log", told)
    assert rank.wait(timeout_s=1800) == [0], rank.output()
    held = [json.loads(line) for line in told.read_text().splitlines()]
    assert len(held) == steps // 5
    quarter = len(held) // 4
    early, late = held[quarter : 2 * quarter], held[3 * quarter :]  # once all is warm

    grown = statistics.median(h["bytes"] for h in late) - statistics.median(
        h["bytes"] for h in early
    )
    print(f"{steps} steps: {grown / MIB:+.1f} MiB, {late[-1]}")
    assert grown < GROWS_MIB * MIB
    for name in (
        "files",
        "threads",
    ):  # the least: a save has more
        assert min(h[name] for h in late) <= min(h[name] for h in early), name
    # The least here too: on a busy machine caches are shared with others.
    taken = [min(b["cpu_s"] - a["cpu_s"] for a, b in pairwise(part)) for part in (early, late)]
    print(f"CPU seconds of 5 steps, early and late: {taken}")
    assert taken[1] < slower * taken[0]

    parts = parts_of(output / LOG_FILE)
    assert len(parts) > 1
    assert all(part.stat().st_size < 2 * PART_BYTES for part in parts)
    assert [line["step"] for line in read_lines(output / LOG_FILE)] == [*range(5, steps + 1, 5)]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == sorted(
        f"checkpoint-{step}" for step in (steps - every, steps)
    )
