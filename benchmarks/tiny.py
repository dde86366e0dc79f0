"""What a rehearsal has in the place of what is large, slow or not there: sizes, GPU, processes.

Other processes are copies of this one, in which nothing has to be imported again.
"""

import dataclasses
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from . import harness
from .stand_in import standing_in

UPDATE = "sd15-64:2x2"
SHAPES = ["--shapes", "sd15-64", "--batch", "1"]
FLAGS = {
    "update": ["--case", UPDATE, "--way", "all-lean"],
    "ledger": ["--steps", "3"],
    "data": ["--batch", "2"],
    "edit": [
        "--tiny", "--edits", "2", "--batch", "2", "--steps", "2", "--rounds", "2",
        "--without", "blocks", "whole",
    ],
    "scaling": ["--steps", "5", "--rounds", "1"],
    "step": ["--tiny", "--rounds", "1", "--updates", "3", "--warm_up", "1"],
}  # fmt: skip
FREELY = 1e6  # what is allowed where a time or a rounding is judged that means nothing here
PIXELS = 32


def tiny_unet() -> Any:
    """One transformer, in the middle: all others would be compiled anew."""
    from diffusers import UNet2DConditionModel

    blocks: dict[str, Any] = {  # diffusers declares tuples of four
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=8,
        **blocks,
    )


def narrow(unets: Mapping[str, tuple]) -> dict[str, tuple]:
    """One norm of each kind and one transformer block."""
    norms = [(1, 64, 0, 1e-5, True, True), (1, 64, 0, 1e-6, False, False)]
    return dict.fromkeys(unets, (norms, [(1, 80, 1, 2)], 1))


def small(shapes: Sequence[Sequence[int]] = ((32, 8, 3, 3), (32,), (64, 32))) -> list[torch.Size]:
    return [torch.Size(shape) for shape in shapes]


# What each module has instead, from what it has.
SIZES: dict[str, Callable[[Any], dict[str, object]]] = {
    "timing": lambda own: {
        "WARM_UP_CALLS": 1,
        "LEAST_RUNS": 2,
        "MOST_RUNS": 2,
        "MOST_GRAPH_CALLS": 1,
        "MOST_SETS": 1,
        "COPY_BYTES": 2**12,
        "MATRIX": 16,
    },
    "shapes": lambda own: {"UNETS": narrow(own.UNETS)},
    "accuracy": lambda own: {"FACTOR": 4 * own.FACTOR},  # of so few numbers the largest is chance
    "gpu": lambda own: {
        "PRESET": "sd15-64",
        "DTYPE": "fp32",  # Triton's interpreter is wrong for bf16
        "TESTS": ("tests/kernels/test_tables.py",),
        "PYTEST_PROCESSES": 1,
    },
    "optimizer": lambda own: {
        "unet_shapes": small,
        "CHECKED_SHAPES": small(),
        "DTYPES": {"fp32": own.DTYPES["fp32"]},
    },
    "update": lambda own: {
        "make_unet": tiny_unet,
        "DEVICE": "cpu",
        "EAGER_STEPS": 1,
        "Captured": partial(own.Captured, eager_steps=1),
    },
    "demo_steps": lambda own: {"FULL": dataclasses.replace(own.FULL, pairs=16)},
    "ledger": lambda own: {
        "SWITCHES": (*own.SWITCHES[:2], own.CACHE),
        "ON_CPU": (),
        "BATCH": 4,
        "ALLOWED": FREELY,
    },
    "data": lambda own: {
        "JPEGS": (own.Jpegs(64, 64, 680),),
        "PHOTOGRAPHS": 4,
        "BATCHES": 3,
        "WORKERS": (0, 1),
        "DECODES": 2,
    },
    "cache": lambda own: {
        "RESOLUTIONS": (64,),
        "PAIRS": 16,
        "PAIRS_A_SHARD": 8,
        "EPOCHS": 1,
        "BUILDS": (own.BUILDS[0]._replace(shards=3), *own.BUILDS[1:]),
    },
    "checkpoint": lambda own: {"SIZES": {"demo": own.SIZES["demo"]._replace(rounds=2)}},
    "scaling": lambda own: {"BATCH": 2, "ALLOWED": FREELY},
    "predicted": lambda own: {"PIXELS": 64, "_shape": lambda batch: UPDATE},
    "gradients": lambda own: {"EXCHANGES": 3, "EXCHANGES_WARM_UP": 1},
    "rooflines": lambda own: {"SIDE": 64, "COPY_BYTES": 2**16, "REPEATS": 2},
    "tracing": lambda own: {"SKIPPED": 1, "TRACED": 1},
    "recording": lambda own: {"UPDATES": 3},
    "parity": lambda own: {
        "UPDATES": 3,
        "PRESETS": {"sd15": own.PRESETS["tiny"]._replace(pixels=PIXELS, batch=2, pairs=10)},
    },
    "step_cases": lambda own: {
        "PRESETS": {name: values | {"train_batch_size": 1} for name, values in own.PRESETS.items()},
        "BATCHES": own.BATCHES | {PIXELS: 2},
        "PAIRS": 16,
        "RESOLUTION": PIXELS,
    },
    "step": lambda own: {
        "CLOCKS": FREELY,
        "EVERY": 1,
        "WAYS": (own.SCRIPT, own.RECOMMENDED),
        "SKIPPED": 1,
        "TRACED": 1,
    },
}


def flags_of(name: str, words: Sequence[str]) -> list[str]:
    """What makes a benchmark small; of a flag that is given twice the last one counts."""
    if name != "kernels":
        return FLAGS.get(name, [])
    if "attention" in words:  # its kernels take no fp32
        return [*SHAPES, "--dtype", "fp16", "--without", "compile", "flex"]
    tuned = ["--op", "geglu", "--kernel", "geglu.forward"] if "--tune" in words else []
    return [*SHAPES, "--dtype", "fp32", "--without", "compile", *tuned]


@contextmanager
def rehearsing(gpu: str, *, stand_in: bool) -> Iterator[None]:
    """Inside, the benchmarks that are loaded have their sizes, and records name such a GPU.

    Args:
        stand_in: for a GPU; else there is none, whatever the machine has.
    """
    machine = harness.machine
    torch.set_num_threads(1)  # a copy of a process has none of its threads
    with ExitStack() as stack:
        if stand_in:
            stack.enter_context(standing_in(gpu))
        else:
            stack.enter_context(patch.object(torch.cuda, "is_available", lambda: False))
        stack.enter_context(patch.object(harness, "machine", lambda: machine() | {"gpu": gpu}))
        for module in [*sys.modules.values()]:
            package, _, own = getattr(module, "__name__", "").rpartition(".")
            if package != __package__:
                continue
            values = SIZES[own](module) if own in SIZES else {}
            if "run_module" in vars(module):
                values["run_module"] = run_copy
            for attribute, value in values.items():
                stack.enter_context(patch.object(module, attribute, value))
        yield


# Processes.


def run_copy(name: str, words: Sequence[str], output: Path, ranks: int = 1) -> None:
    """As demo_steps.run_module, in copies of this process."""
    from .demo_steps import CHILD_LOG, RunFailed  # here: seconds of imports that not all need

    output.mkdir(parents=True, exist_ok=True)
    log, context = output / CHILD_LOG, multiprocessing.get_context("fork")
    log.write_text("")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    places = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(ranks)
    ]
    copies = [context.Process(target=_run, args=(name, words, log, place)) for place in places]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()
    if any(copy.exitcode for copy in copies):
        lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
        raise RunFailed(f"exit code {copies[0].exitcode}: {(lines or ['nothing'])[-1].strip()}")


def _run(name: str, words: Sequence[str], log: Path, place: Mapping[str, object]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({key: str(value) for key, value in place.items()})
    code = import_module(f"fusedit.{name}").main([*words])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python's own end of a process waits for a thread that was not copied
