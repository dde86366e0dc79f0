"""A folder of pairs that stand in for photographs: JPEGs of smooth colours under a grain."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

PAIRS_A_TEXT = 2  # about as many as InstructPix2Pix's data has


def photographs(folder: Path, side: int, files: int, rows: int | None = None) -> None:
    """Writes as many pairs, and the list of them that --train_data_dir takes.

    Args:
        side: pixels.
        rows: of the list, which begins anew at its end; by default one for each pair.
    """
    draw, names = np.random.default_rng(0), []
    for index in range(files):
        names.append({})
        for column in ("input_image", "edited_image"):
            coarse = draw.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
            smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
            grained = np.asarray(smooth) + draw.normal(0, 4, (side, side, 3))
            names[-1][column] = f"{index}-{column}.jpg"
            pixels = grained.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / names[-1][column], quality=95)
    texts = [f"make it look like {row // PAIRS_A_TEXT}" for row in range(rows or files)]
    lines = [
        json.dumps({**names[row % files], "edit_prompt": text}) for row, text in enumerate(texts)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
