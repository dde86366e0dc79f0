"""Which block shapes tuning tries for each kernel. To tune another one, add a sweep."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ..kernels.attention import parts
from .shapes import TEXT_TOKENS

Config = tuple[tuple[str, int], ...]  # what `pick` returns, in order
STAGES = {32: (2, 3, 4), 64: (1, 2, 3), 128: (1, 2)}  # rows of a tile -> how many are under way


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Candidates of one kernel: every combination of blocks that fits."""

    kernel: str  # as the tables name it
    ops: tuple[str, ...]  # that launch it
    direction: str
    by: str  # the size that its entries are bounded by
    blocks: dict[str, tuple[int, ...]]
    fits: Callable[[dict[str, int], int], bool]  # blocks at a size

    def candidates(self, size: int) -> list[Config]:
        """Where the first of the blocks is 0, the kernel is not used, and has no others."""
        every = (
            dict(zip(self.blocks, values, strict=True))
            for values in itertools.product(*self.blocks.values())
        )
        used = [
            tuple(blocks.items())
            for blocks in every
            if blocks[next(iter(blocks))] and self.fits(blocks, size)
        ]
        first, values = next(iter(self.blocks.items()))
        return ([((first, 0),)] if 0 in values else []) + used


def _tile_fits(blocks: dict[str, int], size: int) -> bool:
    """8 to 32 elements a thread: loads of 16 bytes, and no spills."""
    elements = blocks["ROWS"] * blocks.get("COLUMNS", blocks.get("CHANNELS", 1))
    return 8 <= elements / (32 * blocks["num_warps"]) <= 32


def _row_fits(blocks: dict[str, int], width: int) -> bool:
    """Whole rows in registers, in no more pieces than 8 and with few lanes idle."""
    pieces = -(-width // blocks["COLUMNS"])
    held = blocks["ROWS"] * pieces * blocks["COLUMNS"]
    wide = pieces * blocks["COLUMNS"] <= 1.25 * width
    return pieces <= 8 and wide and 8 <= held / (32 * blocks["num_warps"]) <= 64


def _whole_fits(blocks: dict[str, int], size: int) -> bool:
    """All positions of the channels in registers."""
    held = (1 << (size - 1).bit_length()) * blocks["CHANNELS"]
    return 4 <= held / (32 * blocks["num_warps"]) <= 64


def _attention_fits(
    rows: str,
    ahead: str,
    most: int,
    held: Callable[[dict[str, int], int], int],
    **usual: int,
) -> Callable[[dict[str, int], int], bool]:
    """Whether a thread holds a fair number of values, and no more than one thing is unusual.

    Usual are 16 rows for a warp (8, where 16 are too much) and what is named; few remain so.

    Args:
        rows: the block that the warps share, of KEYS where the kernel holds all of them.
        ahead: the block that is loaded ahead; "": any number of stages may be.
        most: fp32 values of a thread; it has 255 registers, and the compiler needs some.
        held: the values of a program, by its blocks and its columns.
    """

    def fits(blocks: dict[str, int], width: int) -> bool:
        columns = sum(parts(width, split=bool(blocks["SPLIT"])))
        if not blocks["SPLIT"] and columns == sum(parts(width, split=True)):
            return False  # the same kernel
        if ahead and blocks["num_stages"] not in STAGES[blocks[ahead]]:
            return False
        keys = sum(parts(TEXT_TOKENS, split=bool(blocks.get("SPLIT_KEYS", 0))))
        blocks = {"KEYS": keys} | blocks
        values = held(blocks, columns) / (32 * blocks["num_warps"])
        of_warp = blocks[rows] // blocks["num_warps"]
        unusual = sum(blocks[name] != value for name, value in usual.items())
        unusual += of_warp != 16 and not (of_warp == 8 and 2 * values > most)
        return of_warp in (8, 16, 32) and 40 <= values <= most and unusual <= 1

    return fits


GEGLU = {"ROWS": (1, 2, 4, 8), "COLUMNS": (256, 512, 1024), "num_warps": (4, 8)}
ROWS = {"ROWS": (1, 2, 4, 8, 16), "COLUMNS": (64, 128, 256), "num_warps": (4, 8)}
TILES = {"ROWS": (16, 32, 64, 128), "CHANNELS": (32, 64, 128), "num_warps": (4, 8)}
WHOLE = {"CHANNELS": (0, 32, 64, 128), "num_warps": (4, 8, 16)}
ATTENTION = {"QUERIES": (32, 64, 128), "KEYS": (32, 64, 128), "SPLIT": (0, 1), "num_warps": (4, 8),
             "num_stages": (1, 2, 3, 4)}  # fmt: skip
SHORT_FORWARD = {"QUERIES": (32, 64, 128), "SPLIT": (0, 1), "SPLIT_KEYS": (0, 1),
                 "PROGRAMS": (512, 1024, 2048), "num_warps": (4, 8),
                 "num_stages": (1, 2, 3, 4)}  # fmt: skip
SHORT_BACKWARD = {"QUERIES": (0, 32, 64), "SPLIT": (0, 1), "PROGRAMS": (256, 512, 1024),
                  "num_warps": (4, 8), "num_stages": (1, 2, 3)}  # fmt: skip
LAYER_NORMS = ("add_layer_norm", "layer_norm")
SWEEPS = [
    Sweep(kernel=f"geglu.{direction}", ops=("geglu",), direction=direction, by="width",
          blocks=GEGLU, fits=_tile_fits)
    for direction in ("forward", "backward")
] + [
    Sweep(kernel="layer_norm.forward", ops=LAYER_NORMS, direction="forward", by="width",
          blocks=ROWS, fits=_row_fits),
    Sweep(kernel="layer_norm.backward", ops=LAYER_NORMS, direction="backward", by="width",
          blocks={"ROWS": (1, 2, 4, 8, 16), "COLUMNS": (64, 128, 256), "STAGES": (1, 2, 3),
                  "num_warps": (4,)}, fits=_row_fits),
] + [
    Sweep(kernel=f"group_norm.{kernel}", ops=("group_norm",), direction=direction, by="elements",
          blocks=TILES, fits=_tile_fits)
    for direction, kernel in (("forward", "partial"), ("forward", "apply"),
                              ("backward", "backward_partial"), ("backward", "backward_apply"))
] + [  # after the others: it is compared with them
    Sweep(kernel=f"group_norm.{kernel}", ops=("group_norm",), direction=direction, by="size",
          blocks=WHOLE, fits=_whole_fits)
    for direction, kernel in (("forward", "whole"), ("backward", "backward_whole"))
] + [
    Sweep(kernel="edit_input.forward", ops=("edit_input",), direction="forward", by="plane",
          blocks={"PIXELS": (64, 128, 256, 512), "num_warps": (1, 2, 4, 8)},
          fits=lambda blocks, plane: 1 <= blocks["PIXELS"] / (32 * blocks["num_warps"]) <= 4),
] + [
    Sweep(kernel=f"attention.{kernel}", ops=("attention",), direction=kernel.split("_")[0],
          by="width", blocks=ATTENTION,
          fits=_attention_fits(rows, ahead, 128, held, SPLIT=1, num_stages=2))
    for kernel, rows, ahead, held in (
        ("forward", "QUERIES", "KEYS", lambda b, columns: b["QUERIES"] * (b["KEYS"] + columns)),
        ("backward_queries", "QUERIES", "KEYS",
         lambda b, columns: b["QUERIES"] * (2 * b["KEYS"] + columns)),
        ("backward_keys", "KEYS", "QUERIES",
         lambda b, columns: 2 * b["KEYS"] * (b["QUERIES"] + columns)),
    )
] + [
    Sweep(kernel="attention.short_forward", ops=("attention",), direction="forward", by="width",
          blocks=SHORT_FORWARD, fits=_attention_fits(
              "QUERIES", "", 128, lambda b, columns: b["QUERIES"] * (b["KEYS"] + columns),
              SPLIT=1, SPLIT_KEYS=1, PROGRAMS=1024, num_stages=2)),
    Sweep(kernel="attention.short_backward", ops=("attention",), direction="backward", by="width",
          blocks=SHORT_BACKWARD, fits=_attention_fits(
              "KEYS", "", 176,
              lambda b, columns: 2 * b["KEYS"] * (b["QUERIES"] + columns) + b["QUERIES"] * columns,
              SPLIT=1, PROGRAMS=512, num_stages=1)),
]  # fmt: skip
