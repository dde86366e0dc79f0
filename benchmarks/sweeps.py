"""Which block shapes tuning tries for each kernel. To tune another one, add a sweep."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

Config = tuple[tuple[str, int], ...]  # what `pick` returns, in order


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
        every = (
            dict(zip(self.blocks, values, strict=True))
            for values in itertools.product(*self.blocks.values())
        )
        return [tuple(blocks.items()) for blocks in every if self.fits(blocks, size)]


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
    """All positions of the channels in registers; no channels: the kernel is not used."""
    if not blocks["CHANNELS"]:
        return blocks["num_warps"] == 4
    held = (1 << (size - 1).bit_length()) * blocks["CHANNELS"]
    return 4 <= held / (32 * blocks["num_warps"]) <= 64


GEGLU = {"ROWS": (1, 2, 4, 8), "COLUMNS": (256, 512, 1024), "num_warps": (4, 8)}
ROWS = {"ROWS": (1, 2, 4, 8, 16), "COLUMNS": (64, 128, 256), "num_warps": (4, 8)}
TILES = {"ROWS": (16, 32, 64, 128), "CHANNELS": (32, 64, 128), "num_warps": (4, 8)}
WHOLE = {"CHANNELS": (0, 32, 64, 128), "num_warps": (4, 8, 16)}
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
]  # fmt: skip
