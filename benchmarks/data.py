"""How many samples a second the real loader delivers, and what that is made of.

    python -m fusedit.benchmarks.data --out results

Four parts: `cache` reads a cache of encodings, `build` makes one (both: see cache.py); `decode`
decodes JPEGs in one process and does nothing else; `loader` decodes two to a sample, resizes, cuts
and mirrors them as the paper does, by several numbers of workers, beside what a step eats. That is
a target, for nobody has measured a step of ours on an H100 yet. The JPEGs are noise as smooth as
photographs. A build encodes on a GPU where there is one.
All files were just written, so they are read from memory that the system keeps of them; a disk may
be slower.

Exit codes: 0 done, 1 a wrong answer, 2 a mistake in the flags. Needs 2 GB in --folder.
"""

import argparse
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
from ..launch.train import quiet_libraries
from ..trainer.config import DataConfig
from ..trainer.data import EditPairs, StepSampler, make_loader, make_tokenize
from ..trainer.images import load_image
from ..trainer.rows import open_rows
from . import harness, report
from .cache import measure_build, measure_read
from .flags import Flags, positive
from .harness import Record, say
from .jpegs import photographs
from .timing import timing


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
DECODES = 8  # of each file


def measure_decode(record: Record, folder: Path | None, batch: int) -> None:
    for side in dict.fromkeys(case.side for case in JPEGS):
        say(f"decoding JPEGs of {side} px")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            photographs(Path(place), side, PHOTOGRAPHS)
            files = sorted(Path(place).glob("*.jpg"))
            record["rows"].append(decode_row(side, files))


def decode_row(side: int, files: Sequence[Path]) -> Record:
    milliseconds, wrong = [], ""
    for path in files:
        with Image.open(path) as image:
            if not np.array_equal(np.asarray(load_image(path)), np.asarray(image)):
                wrong = "an image is not that of its file"
        for _ in range(DECODES):
            since = time.perf_counter()
            load_image(path)
            milliseconds.append(1e3 * (time.perf_counter() - since))
    labels: dict[str, str | int] = {"op": "decode", "preset": f"{side}px", "shape": 1}
    labels |= {"dtype": "jpeg", "direction": "1 process", "by": "ours"}
    per_second = 1e3 * len(milliseconds) / sum(milliseconds)
    return harness.row(
        labels,
        verdict="wrong" if wrong else "right",
        timings=None if wrong else {"warm": timing(milliseconds)},
        values={} if wrong else {"images_per_s": round(per_second, 1)},
        note=wrong,
    )


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
    tokenize = make_tokenize([CLIPTokenizer.from_pretrained(BASE / "tokenizer")])
    for case in JPEGS:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            photographs(Path(place), case.side, PHOTOGRAPHS)
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


PARTS = {
    "cache": measure_read,
    "build": measure_build,
    "decode": measure_decode,
    "loader": measure_loader,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.data", str(__doc__))
    flags.add_record()
    flags.add_folder()
    flags.add_argument("--only", choices=list(PARTS), help="default: all")
    flags.add_argument("--batch", type=positive, default=16, help="samples of a micro-batch")
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    quiet_libraries()
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
    if "samples_per_s" not in values:
        return f"{values['images_per_s']} images a second"
    text = f"{values['samples_per_s']} samples a second"
    if "bytes_a_sample" in values:
        text += f" of {values['bytes_a_sample']} bytes; {values['texts_per_s']} texts a second"
    if "eaten_per_s" in values:
        text += f"; {values['workers_for_it']} workers for the {values['eaten_per_s']} aimed at"
    return text


if __name__ == "__main__":
    sys.exit(main())
