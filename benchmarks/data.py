"""How many samples a second a process reads from a cache of encodings, through the real loader.

    python -m fusedit.benchmarks.data --out results

The cache is synthetic: what the VAE of Stable Diffusion 1.5 gives in size, both mirrors, as many
pairs to an instruction as InstructPix2Pix's data has, in random order. It was just written, so it
is read from memory that the system keeps of it; a disk may be slower. On the CPU, without workers.

Exit codes: 0 done, 1 a wrong answer, 2 a mistake in the flags. Needs 2 GB in --folder.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..trainer.cache import CachedPairs
from ..trainer.cache_build import text_digest
from ..trainer.cache_files import CacheFolder, Shape
from ..trainer.data import Order, StepSampler, make_loader
from . import harness, report
from .flags import Flags, positive
from .harness import Record, say
from .shapes import TEXT_TOKENS
from .timing import timing

PAIRS, PAIRS_A_TEXT, PAIRS_A_SHARD = 4096, 2, 512
RESOLUTIONS = (256, 512)
WIDTH = 768  # of CLIP's text encoder
EPOCHS = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shape_of(resolution: int, dtype: torch.dtype) -> Shape:
    side = resolution // 8
    return Shape(mirrors=2, crops=1, latent=(4, side, side), text=(TEXT_TOKENS, WIDTH), dtype=dtype)


def written(folder: Path, shape: Shape) -> CacheFolder:
    """A cache of noise; the first number of each pair and text is its own, modulo 128."""
    cache = CacheFolder(folder, {"synthetic": True}, shape)
    count = PAIRS // PAIRS_A_TEXT
    tokens = torch.arange(count + 1, dtype=torch.int32)[:, None].expand(-1, TEXT_TOKENS)
    digest = torch.from_numpy(np.stack([text_digest(one) for one in tokens.contiguous()]))
    for start in range(0, PAIRS, PAIRS_A_SHARD):
        row = torch.arange(start, start + PAIRS_A_SHARD)
        latents = torch.randn(PAIRS_A_SHARD, *shape.latents_shape, dtype=shape.dtype)
        latents[..., 0, 0, 0] = (row % 128).to(shape.dtype)[:, None, None, None]
        number = row // PAIRS_A_TEXT
        cache.write(
            "pairs",
            {
                "latents": latents,
                "unit": torch.stack((row, torch.zeros_like(row)), dim=1),
                "tokens": tokens[number].contiguous(),
                "digest": digest[number],
            },
            {},
        )
    text = torch.randn(count + 1, *shape.text, dtype=shape.dtype)
    text[:, 0, 0] = (torch.arange(count + 1) % 128).to(shape.dtype)
    cache.write("texts", {"text": text, "digest": digest}, {})
    cache.seal()
    return cache


def measured(cache: CacheFolder, batch: int) -> tuple[list[float], str]:
    """Milliseconds of each micro-batch, and what was wrong with one."""
    order = Order(torch.arange(PAIRS), 0, batch)
    null_tokens = torch.full((1, TEXT_TOKENS), PAIRS // PAIRS_A_TEXT)
    pairs = CachedPairs(cache, order, 0, True, null_tokens)
    sampler = StepSampler(0, EPOCHS * order.steps_per_epoch, 0, 1, batch, 1)
    milliseconds, wrong = [], ""
    since = time.perf_counter()
    for found in make_loader(pairs, sampler, workers=0, prefetch=1, pin_memory=False):
        milliseconds.append(1e3 * (time.perf_counter() - since))
        rows = order.rows(found.positions)
        own, texts = found.latents[..., 0, 0, 0], found.text[:, 0, 0]
        if not (own == rows % 128).all() or not (texts == rows // PAIRS_A_TEXT % 128).all():
            wrong = "a sample is not that of its position"
        since = time.perf_counter()
    return milliseconds, wrong


def measure(record: Record, folder: Path, batch: int) -> None:
    for resolution in RESOLUTIONS:
        for name, dtype in DTYPES.items():
            say(f"{resolution} px {name}")
            shape = shape_of(resolution, dtype)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                milliseconds, wrong = measured(written(Path(place), shape), batch)
            sample_bytes = shape.pair_bytes // shape.variants + shape.text_bytes
            per_second = 1e3 * batch * len(milliseconds) / sum(milliseconds)
            labels = {"op": "cache", "preset": f"{resolution}px", "shape": str(batch)}
            labels |= {"dtype": name, "direction": "read", "by": "ours"}
            record["rows"].append(
                harness.row(
                    labels,
                    verdict="wrong" if wrong else "right",
                    timings=None if wrong else {"warm": timing(milliseconds)},
                    least_bytes=batch * sample_bytes,
                    values={} if wrong else {"samples_per_s": round(per_second)},
                    note=wrong,
                )
            )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.data", str(__doc__))
    flags.add_argument("--out", type=Path, required=True, help="a folder")
    flags.add_argument("--folder", type=Path, help="where the cache is put; default: for temporary")
    flags.add_argument("--batch", type=positive, default=16, help="samples of a micro-batch")
    flags.add_argument("--commit", help="for a tree without .git")
    chosen = flags.parse_args(argv)
    if chosen.folder is not None and not chosen.folder.is_dir():
        flags.error(f"--folder {chosen.folder}: there is no such folder")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    record = harness.new_record("data", words, flags.commit)
    measure(record, flags.folder, flags.batch)
    code = report.finish(record, flags.out / "data.json")
    for row in record["rows"]:
        print(f"{row['name']}: {row['values'].get('samples_per_s', row['note'])} samples a second")
    return code


if __name__ == "__main__":
    sys.exit(main())
