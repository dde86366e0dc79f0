"""The UNets' shapes as the tests take them: whole on a GPU, few rows where Python interprets."""

import torch

from fusedit.benchmarks.shapes import shapes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRESETS = ["sd15-256", "sd15-512", "sdxl-1024"]
GPU = torch.cuda.is_available()
BATCH = 2


def row_shapes(kind: str, *, rows: int, factor: int = 1) -> list[tuple[int, int]]:
    """[rows, factor * width] of every LayerNorm ("layer_norms") or GEGLU ("geglus") of the UNets.

    Args:
        rows: how many, where there is no GPU.
    """
    every = [shape for preset in PRESETS for shape in getattr(shapes(preset), kind)]
    return sorted({(BATCH * s.tokens if GPU else rows, factor * s.width) for s in every})


def group_norm_shapes() -> list[tuple[tuple[int, int, int, int], float, bool, bool]]:
    """(shape of x, eps, silu, whether a time embedding is added) of every GroupNorm of the UNets.

    Without a GPU images shrink, narrow ones to the fewest positions that are cut into tiles.
    """
    every = set()
    for shape in (shape for preset in PRESETS for shape in shapes(preset).group_norms):
        if GPU:
            dims = BATCH, shape.channels, shape.size, shape.size
        else:
            dims = 1, shape.channels, *((17, 16) if shape.channels <= 640 else (4, 4))
        every.add((dims, shape.eps, shape.silu, shape.time_embedding))
    return sorted(every)


def attention_shapes() -> list[tuple[int, int, int, int]]:
    """(heads, width of a head, queries, keys) of every attention of the UNets.

    Without a GPU there is one head, and rows shrink to what takes each path through a kernel.
    """
    every = set()
    for shape in (shape for preset in PRESETS for shape in shapes(preset).attentions):
        if GPU:
            every.add((shape.heads, shape.width, shape.queries, shape.keys))
        else:
            queries = min(shape.queries, 192)
            own = shape.keys == shape.queries
            every.add((1, shape.width, queries, queries if own else shape.keys))
    return sorted(every)
