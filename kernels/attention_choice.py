"""Which attention runs where: ours, or one that PyTorch ships, by what was measured.

`tables/attention.json` says for each GPU family which was fastest, forward and backward together,
for a head width, dtype and pair of lengths; `python -m fusedit.benchmarks.choose` writes it. What
nobody has measured on such a card is left to PyTorch's own choice, so that a choice costs nothing.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import dispatch
from .tables import FOLDER, family

BACKENDS = ("auto", "triton", "sdpa", "cudnn", "flash")  # sdpa: PyTorch's own choice
TABLE = FOLDER / "attention.json"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DEFAULT = "sdpa"
CUDNN_MAX_WIDTH = 128  # of its backward
LEAST_CAPABILITY = (8, 0)  # Ampere
_SHIPPED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_OTHERS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def choose(device: torch.device, dtype: torch.dtype, width: int, queries: int, keys: int) -> str:
    """One of BACKENDS, not "auto".

    Lengths between two measured ones get what both have in common. Where nothing was measured, or
    one neighbour says otherwise, or there is none, it is "sdpa".
    """
    own = keys == queries
    shorter = longer = 0
    below = above = DEFAULT
    for row in known(device, dtype, width, torch.are_deterministic_algorithms_enabled()):
        if row.keys != (row.queries if own else keys):
            continue
        if shorter < row.queries <= queries:
            shorter, below = row.queries, row.backend
        if row.queries >= queries and (row.queries < longer or not longer):
            longer, above = row.queries, row.backend
    return below if below == above else DEFAULT


class Row(NamedTuple):
    queries: int
    keys: int
    backend: str


# A compiler takes the rows as they are now; lengths, which may be symbols to it, are not asked.
@torch.compiler.assume_constant_result
def known(
    device: torch.device, dtype: torch.dtype, width: int, deterministic: bool
) -> tuple[Row, ...]:
    """What was measured on a device's own kind of card; nothing, where no kernel of ours runs."""
    return _known(device, dtype, width, deterministic)


@cache
def _known(
    device: torch.device, dtype: torch.dtype, width: int, deterministic: bool
) -> tuple[Row, ...]:
    if dtype not in DTYPES or not (dispatch.INTERPRETED or kernels_run_on(device)):
        return ()
    table = of_card(device)
    if table is None:
        return ()
    refused = "cudnn" if deterministic else ""  # by PyTorch, then
    return tuple(
        Row(row["queries"], row["keys"], DEFAULT if row["backend"] == refused else row["backend"])
        for row in table["choices"]
        if (row["width"], row["dtype"]) == (width, DTYPES[dtype])
    )


def kernels_run_on(device: torch.device) -> bool:
    """Ours and flash need bf16 products on the card."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def of_card(device: torch.device) -> dict[str, Any] | None:
    """The table of a device's family, if it was measured on this very kind of card."""
    table = measured(family(device))
    return table if table["choices"] and table["measured"]["device"] == name(device) else None


@cache
def measured(of_family: str) -> dict[str, Any]:
    """The table of a family: "measured", the origin or None, and "choices"."""
    return json.loads(TABLE.read_text())[of_family]


def explained(backend: str, device: torch.device) -> str:
    """A line on what a backend means on a device."""
    if device.type != "cuda":
        return f"attention: {backend}, where it runs on a GPU; PyTorch's own elsewhere"
    if backend != "auto":
        return f"attention: {backend}, as asked"
    table = of_card(device)
    if table is None:
        return f"attention: auto is PyTorch's own choice: none was measured on {name(device)}"
    count = len({row["backend"] for row in table["choices"]})
    return (
        f"attention: auto chooses by length among {count}, as measured on this kind of card "
        f"at commit {table['measured']['commit']}"
    )


@contextmanager
def shipped(backend: str, *, alone: bool) -> Iterator[None]:
    """Inside, PyTorch's attention is cuDNN's or flash; "sdpa": whichever it takes.

    Args:
        alone: no other serves in its place: what it cannot serve raises.
    """
    if backend not in _SHIPPED:
        yield
        return
    first = _SHIPPED[backend]
    others = [one for one in _OTHERS if one != first]
    with sdpa_kernel([first] if alone else [first, *others], set_priority=True):
        yield
