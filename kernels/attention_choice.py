"""Which attention runs where: ours, or one that PyTorch ships, by what was measured.

`tables/attention.json` says for each GPU family which was fastest, forward and backward together,
for a head width, dtype and pair of lengths; `python -m fusedit.benchmarks.choose` writes it. What
nobody has measured is left to PyTorch's own choice, so that a choice never costs anything.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import dispatch
from .tables import FOLDER, family

BACKENDS = ("auto", "triton", "sdpa", "cudnn", "flash")  # sdpa: PyTorch's own choice
TABLE = FOLDER / "attention.json"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
CUDNN_MAX_WIDTH = 128  # of its backward
_SHIPPED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


# What a compiler traces is which one was chosen: lengths and dtype are constants to it.
@torch.compiler.assume_constant_result
def choose(device: torch.device, dtype: torch.dtype, width: int, queries: int, keys: int) -> str:
    """One of BACKENDS, not "auto".

    Lengths between two measured ones get what both have in common, longer ones what the longest
    has. Where nothing was measured, or one neighbour says otherwise, it is "sdpa".
    """
    if dtype not in DTYPES or not (device.type == "cuda" or dispatch.INTERPRETED):
        return "sdpa"
    known = {
        row["queries"]: row["backend"]
        for row in measured(family(device))["choices"]
        if (row["width"], row["dtype"]) == (width, DTYPES[dtype])
        and (row["keys"] == row["queries"] if keys == queries else row["keys"] == keys)
    }
    shorter = [length for length in known if length <= queries]
    longer = [length for length in known if length >= queries]
    if not shorter:
        return "sdpa"
    below = known[max(shorter)]
    if below == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "sdpa"  # PyTorch refuses cuDNN's attention then
    return below if not longer or known[min(longer)] == below else "sdpa"


@cache
def measured(of_family: str) -> dict[str, Any]:
    """The table of a family: "measured", the origin or None, and "choices"."""
    return json.loads(TABLE.read_text())[of_family]


def explained(backend: str, device: torch.device) -> str:
    """A line on what a backend means on a device."""
    if device.type != "cuda":
        return "attention: PyTorch's own, where there is no GPU"
    if backend != "auto":
        return f"attention: {backend}, as asked"
    table = measured(family(device))
    if not table["choices"]:
        return f"attention: auto is PyTorch's own choice: none was measured on {family(device)}"
    count = len({row["backend"] for row in table["choices"]})
    origin = table["measured"]
    return (
        f"attention: auto chooses by length among {count}, as measured on {origin['device']} "
        f"at commit {origin['commit']}"
    )


@contextmanager
def shipped(backend: str) -> Iterator[None]:
    """Inside, PyTorch's attention is cuDNN's or flash alone; "sdpa": whichever it takes."""
    if backend not in _SHIPPED:
        yield
        return
    with sdpa_kernel([_SHIPPED[backend]]):
        yield
