"""How many samples a second the real loader delivers: from a cache of encodings, and from JPEGs.

    python -m fusedit.benchmarks.data --out results

The cache is synthetic: what the VAE of Stable Diffusion 1.5 gives in size, both mirrors, as many
pairs to an instruction as InstructPix2Pix's data has, in random order; read by one process.
The JPEGs are noise as smooth as photographs, two to a sample: decoded, resized, cut and mirrored as
the paper does, by several numbers of workers, beside what a step eats. That is a target, for nobody
has measured a step of ours on an H100 yet.
All files were just written, so they are read from memory that the system keeps of them; a disk may
be slower.

Exit codes: 0 done, 1 a wrong answer, 2 a mistake in the flags. Needs 2 GB in --folder.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from ..launch.demo.run import BASE
from ..trainer.cache import CachedPairs
from ..trainer.cache_build import text_digest
from ..trainer.cache_files import CacheFolder, Shape
from ..trainer.config import DataConfig
from ..trainer.data import EditPairs, Order, StepSampler, make_loader, make_tokenize
from ..trainer.rows import open_rows
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


class Jpegs(NamedTuple):
    """A case of the loader."""

    side: int  # pixels, of the files
    resolution: int
    eaten_per_s: int  # samples, by a step on one H100 at this resolution: a target, not measured


JPEGS = (Jpegs(256, 256, 680), Jpegs(512, 256, 680), Jpegs(512, 512, 145))
PHOTOGRAPHS = 64  # pairs in a folder
BATCHES = 40  # delivered and timed
WORKERS = (0, 1, 2)
PREFETCH = 4  # micro-batches each worker keeps ready, as by default


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


def photographs(folder: Path, side: int) -> None:
    """Pairs of JPEGs and the list of them: smooth colours under a grain, as a camera's."""
    draw, lines = np.random.default_rng(0), []
    for index in range(PHOTOGRAPHS):
        line = {"edit_prompt": f"make it look like photograph {index}"}
        for column in ("input_image", "edited_image"):
            coarse = draw.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
            smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
            grained = np.asarray(smooth) + draw.normal(0, 4, (side, side, 3))
            line[column] = f"{index}-{column}.jpg"
            pixels = grained.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / line[column], quality=95)
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def delivered(pairs: EditPairs, batch: int, workers: int) -> tuple[list[float], str]:
    """Milliseconds between micro-batches once the workers are under way, and what was wrong."""
    ahead = 1 + workers * PREFETCH  # what was ready before the loop asked for it
    sampler = StepSampler(0, ahead + BATCHES, 0, 1, batch, 1)
    milliseconds, wrong = [], ""
    since = time.perf_counter()
    for found in make_loader(pairs, sampler, workers, PREFETCH, pin_memory=False):
        milliseconds.append(1e3 * (time.perf_counter() - since))
        if len(milliseconds) == 1:
            expected = pairs.collate(pairs.__getitems__(list(range(batch))))
            same = zip(found[:-1], expected[:-1], strict=True)
            if found.errors or not all(torch.equal(one, other) for one, other in same):
                wrong = "a sample is not that of its position"
        since = time.perf_counter()
    return milliseconds[ahead:], wrong


def measure_loader(record: Record, folder: Path | None, batch: int) -> None:
    tokenize = make_tokenize(CLIPTokenizer.from_pretrained(BASE / "tokenizer"))
    for case in JPEGS:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            photographs(Path(place), case.side)
            section = DataConfig(
                train_data_dir=place,
                resolution=case.resolution,
                max_resize=case.resolution * 9 // 8,  # 256 to 288
                random_flip=True,
            )
            rows = open_rows(section, f"{place}/tables")
            pairs = EditPairs(rows, torch.arange(PHOTOGRAPHS), section, 0, batch, tokenize)
            for workers in WORKERS:
                say(f"JPEGs of {case.side} px to {case.resolution} px, {workers} workers")
                record["rows"].append(
                    loader_row(case, batch, workers, *delivered(pairs, batch, workers))
                )


def loader_row(
    case: Jpegs, batch: int, workers: int, milliseconds: list[float], wrong: str
) -> Record:
    batches_per_s = 1e3 * len(milliseconds) / sum(milliseconds)
    samples_per_s = batch * batches_per_s
    labels = {"op": "loader", "preset": f"{case.side}px to {case.resolution}px", "shape": batch}
    labels |= {"dtype": "jpeg", "direction": f"{workers} workers", "by": "ours"}
    values = {
        "samples_per_s": round(samples_per_s, 1),
        "images_per_s": round(2 * samples_per_s, 1),
        "batches_per_s": round(batches_per_s, 2),
        "eaten_per_s": case.eaten_per_s,
        "workers_for_it": math.ceil(case.eaten_per_s / (samples_per_s / max(workers, 1))),
    }
    return harness.row(
        labels,
        verdict="wrong" if wrong else "right",
        timings=None if wrong else {"warm": timing(milliseconds)},
        values={} if wrong else values,
        note=wrong,
    )


def measure_cache(record: Record, folder: Path | None, batch: int) -> None:
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


PARTS = {"cache": measure_cache, "loader": measure_loader}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.data", str(__doc__))
    flags.add_record()
    flags.add_argument("--folder", type=Path, help="where the cache is put; default: for temporary")
    flags.add_argument("--only", choices=list(PARTS), help="default: both")
    flags.add_argument("--batch", type=positive, default=16, help="samples of a micro-batch")
    chosen = flags.parse_args(argv)
    if chosen.folder is not None and not chosen.folder.is_dir():
        flags.error(f"--folder {chosen.folder}: there is no such folder")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    record = harness.new_record("data", words, flags.commit)
    for name, measure in PARTS.items():
        if flags.only in (None, name):
            measure(record, flags.folder, flags.batch)
    code = report.finish(record, flags.out / "data.json", flags.compare)
    for row in record["rows"]:
        print(f"{row['name']}: {told(row)}")
    return code


def told(row: Record) -> str:
    """Its speed in words, and what that must keep ahead of."""
    values = row["values"]
    if not values:
        return row["note"]
    text = f"{values['samples_per_s']} samples a second"
    if "eaten_per_s" in values:
        text += f"; {values['workers_for_it']} workers for the {values['eaten_per_s']} aimed at"
    return text


if __name__ == "__main__":
    sys.exit(main())
