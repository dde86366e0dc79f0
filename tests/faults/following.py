"""Tiny runs, followed by their logs and compared by what they leave."""

import json
import re
import time
from pathlib import Path

from ranks import Ranks, run_flags

STATE = ("unet.safetensors", "ema.safetensors", "optimizer.safetensors")


def flags_of(inputs: Path, output: Path, ranks: int, steps: int, *more: str) -> list[str]:
    """Without validation: what is held out takes time."""
    return [*run_flags(inputs, output, ranks, steps), "--checkpointing_steps=1000", *more]


def start_and_await(ranks: Ranks, output: Path, step: int) -> Ranks:
    """Returns once they have logged this step, or a later one."""
    while last_step(output) < step:
        assert all(process.is_alive() for process in ranks.processes), ranks.output()
        time.sleep(0.002)
    return ranks


def last_step(output: Path) -> int:
    """Of the log; 0 where there is none."""
    told_in = output / "log.jsonl"
    told = re.findall(r'"step": (\d+)', told_in.read_text()) if told_in.exists() else []
    return int(told[-1]) if told else 0


def state(output: Path, step: int) -> dict[str, bytes]:
    return {name: (output / f"checkpoint-{step}" / name).read_bytes() for name in STATE}


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
