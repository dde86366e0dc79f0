"""Do diffusers' script and ours learn the demo equally well? Same base, pairs, budget; three seeds.

    python -m fusedit.benchmarks.learning --reference PATH --out results

Both train the demo's base with the same flags and export a pipeline of the averaged weights; edits
of pairs that neither has seen are measured by their PSNR against the truth, and by the loss on
them, with the same noise for all. The two draw other noise in another order, so only what many
steps come to can be compared: ours is right where its mean over the seeds is not worse than the
script's by more than the standard error of their difference.

Writes learning.json, learning.md and learning.png. Exit codes: 0 ours is at least as good; 1 it is
not, or a run failed; 2 a mistake in the flags.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from ..launch.demo.run import BATCH, FULL, HELD_OUT_SEED, Size, measure, step_flags
from ..launch.demo.world import Pair, make_pair
from ..trainer.config import ModelConfig
from ..trainer.data import PixelBatch, make_tokenize
from ..trainer.diffusion import Diffusion
from ..trainer.encoders import Encoders
from ..trainer.families import SIZE_IDS
from ..trainer.loss import HELD_OUT, EditLoss
from ..trainer.pretrained import describe, load_encoders
from . import harness, report
from .demo_steps import RunFailed, demo_data, run_module
from .flags import Flags, positive
from .harness import Record, say
from .reference import Script, data_flags, note, parse_with_script, run_script

SCRIPT, OURS = "the script", "ours"
COLOURS = {SCRIPT: "#d93025", OURS: "#1f6feb"}
METRICS = {"edit_db": 1, "held_out_loss": -1}  # 1: more is better
NAMES = {"edit_db": "PSNR of held-out edits, dB", "held_out_loss": "held-out loss"}
LOSS_PAIRS = 200

Found = Mapping[str, Sequence[float]]  # of each metric, a number for each seed


def train(program: str, script: Script, seed: int, steps: int, work: Path) -> Path:
    """The folder of the pipeline that a program trained; one that is there is taken.

    Raises: RunFailed: it did not come to its end.
    """
    folder = work / "learning" / f"{program.split()[-1]}-{seed}"
    if (folder / "run/model_index.json").exists():
        return folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    data = demo_data(work / "data")
    values = step_flags(replace(FULL, steps=steps), data, BATCH)
    for ours in ("train_data_dir", "ema_decay", "held_out"):  # the script has no flag of these
        del values[ours]
    flags = [f"--{name}={value}" for name, value in values.items()]
    flags += [*data_flags(data, work), "--use_ema", f"--seed={seed}"]
    if program == SCRIPT:
        run_script("stamps", script, flags, folder)
    else:
        run_module("launch.train", [*flags, f"--output_dir={folder / 'run'}"], folder)
    return folder / "run"


def evaluated(pipeline: Path, size: Size) -> dict[str, float]:
    """METRICS of an exported pipeline."""
    if not (pipeline / "metrics.json").exists():
        measure(pipeline, size)
    found = json.loads((pipeline / "metrics.json").read_text())
    pairs = [make_pair(index, HELD_OUT_SEED) for index in range(LOSS_PAIRS)]
    return {"edit_db": found["edit_db"], "held_out_loss": held_out_loss(pipeline, pairs)}


@torch.no_grad()
def held_out_loss(pipeline: Path, pairs: Sequence[Pair]) -> float:
    """The loss with text and image given, in the mean; the same noise for every pipeline."""
    section = ModelConfig(pretrained_model_name_or_path=str(pipeline))
    described, device = describe(section), torch.device("cpu")
    tokenize = make_tokenize(described.tokenizers)
    null_tokens = tokenize("")[None]
    encoders = Encoders(*load_encoders(section), null_tokens, device, torch.float32)
    diffusion = Diffusion.from_scheduler(
        described.scheduler, described.vae["scaling_factor"], device
    )
    loss_fn = EditLoss(diffusion, (0.0, 0.0, 0.0), encoders.null_text, 0, torch.float32)
    unet: Any = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    total = 0.0
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        samples = encoders.encode(
            PixelBatch(
                torch.stack([pixels(pair.original) for pair in batch]),
                torch.stack([pixels(pair.edited) for pair in batch]),
                torch.stack([tokenize(pair.instruction) for pair in batch]),
                torch.zeros(len(batch), SIZE_IDS),
                torch.arange(start, start + len(batch)),
                torch.ones(len(batch)),
                (),
            )
        )
        shown = torch.zeros(len(batch), dtype=torch.bool)
        given = loss_fn.edit_input(samples, shown, shown, HELD_OUT)
        total += float(loss_fn.errors(unet, given, samples.weights)[0])
    return total / len(pairs)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Verdict(NamedTuple):
    better_by: float  # ours than the script, in the mean
    standard_error: float  # of that difference

    @property
    def right(self) -> bool:
        return self.better_by >= -self.standard_error


def verdict(metric: str, ours: Sequence[float], script: Sequence[float]) -> Verdict:
    better_by = METRICS[metric] * (statistics.fmean(ours) - statistics.fmean(script))
    errors = (statistics.variance(values) / len(values) for values in (ours, script))
    return Verdict(better_by, sum(errors) ** 0.5)


def rows(found: Mapping[str, Found], steps: int) -> list[Record]:
    """A row for each metric and program; ours has the verdict."""
    made = []
    for metric in METRICS:
        judged = verdict(metric, found[OURS][metric], found[SCRIPT][metric])
        for program, by in ((SCRIPT, "reference"), (OURS, "ours")):
            numbers = found[program][metric]
            values = {f"seed_{place}": number for place, number in enumerate(numbers)}
            values |= {"mean": statistics.fmean(numbers)}
            told = "unchecked"
            if program == OURS:
                values |= judged._asdict()
                told = "right" if judged.right else "wrong"
            labels = {"op": "learning", "metric": metric, "steps": steps, "by": by}
            made.append(harness.row(labels, verdict=told, values=values))
    return made


def markdown(record: Record) -> str:
    seeds = [name for name in record["rows"][0]["values"] if name.startswith("seed_")]
    lines = [
        [
            NAMES[row["labels"]["metric"]],
            SCRIPT if row["labels"]["by"] == "reference" else OURS,
            *(f"{row['values'][seed]:.4g}" for seed in seeds),
            f"{row['values']['mean']:.4g}",
            row["verdict"],
        ]
        for row in record["rows"]
    ]
    head = ["", "program", *(seed.replace("_", " ") for seed in seeds), "mean", "verdict"]
    return f"{report.heading(record)}\n\n{report.table(head, lines)}\n"


def plot(record: Record, path: Path) -> bool:
    """A point for each seed; False without matplotlib."""
    pyplot = report.drawing()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(8, 3.2), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for row in record["rows"]:
            if row["labels"]["metric"] != metric:
                continue
            program = SCRIPT if row["labels"]["by"] == "reference" else OURS
            numbers = [v for name, v in row["values"].items() if name.startswith("seed_")]
            place = [SCRIPT, OURS].index(program)
            axis.scatter([place] * len(numbers), numbers, color=COLOURS[program], alpha=0.7)
            axis.hlines(row["values"]["mean"], place - 0.2, place + 0.2, COLOURS[program])
        axis.set_xticks([0, 1], [SCRIPT, OURS])
        axis.set_xlim(-0.6, 1.6)
        axis.set_title(NAMES[metric], fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.learning", str(__doc__))
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--steps", type=positive, default=300, help="of each run")
    flags.add_argument("--held_out", type=positive, default=100, help="pairs that are edited")
    chosen = parse_with_script(flags, argv)
    if len(chosen.seeds) < 2:
        flags.error(f"--seeds {chosen.seeds[0]}: give at least two, for their spread")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    path = flags.out / "learning.json"
    record = harness.resumed(path, harness.new_record("learning", words, flags.commit))
    note(record, flags.reference, "The model is the demo's base.")
    size = replace(FULL, held_out=flags.held_out, steps=flags.steps)
    found: dict[str, dict[str, list[float]]] = {
        program: {metric: [] for metric in METRICS} for program in (SCRIPT, OURS)
    }
    harness.write(record, path)  # so that what is stopped goes on
    try:
        for seed in flags.seeds:
            for program, numbers in found.items():
                say(f"seed {seed}: {program}")
                pipeline = train(program, flags.reference, seed, flags.steps, flags.work)
                for metric, number in evaluated(pipeline, size).items():
                    numbers[metric].append(number)
    except RunFailed as error:
        say(f"fusedit.benchmarks.learning: {error}")
        return 1
    record["rows"] = rows(found, flags.steps)
    plot(record, path.with_suffix(".png"))
    return report.finish(record, path, flags.compare, markdown)


if __name__ == "__main__":
    sys.exit(main())
