"""Does `evaluate` see what is known? Checkpoints in their order, and a run without image dropout.

    python -m fusedit.benchmarks.evaluate --out results

Two runs of the demo from one cache, that differ in one thing: one never trains without its image.
The ten checkpoints of the other are measured against the truth of scenes that nothing has seen
(PSNR, no guidance); the bar is a Spearman correlation of at least 0.9 with their order. Then both
are measured by the paper's curve, image guidance 1.0 to 2.2 at text guidance 7.5, as a small CLIP
sees it that was trained on this world (small_clip.py): they are told apart where the interval of
the difference of their areas, over scenes drawn again, leaves out 0. It says nothing of seeds.

Writes evaluate.json and evaluate.png. Exit codes: 0 done; 1 the bar is missed, or a run failed; 2 a
mistake in the flags.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import datasets
import numpy as np

from ..launch.demo.run import BATCH, FULL, HELD_OUT_SEED, RESOLUTION
from ..launch.demo.world import make_pair
from ..launch.train import make_world, quiet_libraries
from ..trainer.comparing import Rows, read_rows
from ..trainer.curve import dominated_area
from ..trainer.evaluating import RESULTS, Asked, evaluate
from . import harness, report
from .demo_steps import RunFailed, demo_data, demo_flags, run_module
from .flags import Flags, positive
from .harness import Record, say
from .small_clip import save_small_clip

CHECKPOINTS = 10
SCENES = 100  # a multiple of the kinds of edits
LEAST_SPEARMAN = 0.9
RANKS = 2
WITH, WITHOUT = "image dropout 5%", "no image dropout"
RUNS = {WITH: (), WITHOUT: ("--image_dropout_prob=0", "--both_dropout_prob=0")}
COLOURS = {WITH: "#1f6feb", WITHOUT: "#f0883e"}
TOLD = "told-apart.json"  # beside the small CLIP
DRAWS = 2000  # of scenes, with replacement
LEVEL = 95  # percent
HELD_OUT = f"""
name = "demo-held-out"
metrics = ["psnr", "l1", "l2", "ssim"]
[data]
edited_column = "edited_image"
[sampling]
resolution = {RESOLUTION}
steps = {FULL.inference_steps}
guidance_scale = 1.0
image_guidance_scales = [1.0]
"""
CURVE = f"""
name = "demo-curve"
against = "input"
best_by = "curve"
metrics = ["clip_image", "clip_direction", "clip_text"]
[data]
edited_column = "edited_image"
before_column = "caption"
after_column = "edited_caption"
[sampling]
resolution = {RESOLUTION}
steps = {FULL.inference_steps}
guidance_scale = 7.5
image_guidance_scales = [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2]
"""


def save_scenes(folder: Path, count: int) -> Path:
    """Edits that nothing has seen, with captions, drawn where they are not there yet."""
    if folder.exists():
        return folder
    columns: dict[str, list[Any]] = {}
    for index in range(count):
        edit = make_pair(index, HELD_OUT_SEED)
        row = {"input_image": edit.original, "edited_image": edit.edited}
        row |= {"edit_prompt": edit.instruction, "caption": edit.caption}
        for name, value in {**row, "edited_caption": edit.edited_caption}.items():
            columns.setdefault(name, []).append(value)
    images = {"input_image": datasets.Image(), "edited_image": datasets.Image()}
    kinds = {name: images.get(name, datasets.Value("string")) for name in columns}
    made = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    folder.mkdir(parents=True)
    made.to_parquet(folder / "train.parquet")
    return folder


def spearman(values: Sequence[float]) -> float:
    """The correlation of the values' ranks with their order; no two are alike."""
    count = len(values)
    ranks = np.argsort(np.argsort(values))
    squares = float(((ranks - np.arange(count)) ** 2).sum())
    return 1 - 6 * squares / (count * (count**2 - 1))


def area_of(rows: Rows, scales: Sequence[float], chosen: np.ndarray) -> float:
    """The curve's area over these rows."""
    means = [
        [float(np.mean([rows[scale, row][name] for row in chosen])) for scale in scales]
        for name in ("clip_direction", "clip_image")
    ]
    return dominated_area(*means)


def difference_of_areas(
    one: Rows, other: Rows, draws: int = DRAWS
) -> tuple[float, tuple[float, float]]:
    """one's area less other's, and its interval over rows drawn again, the same of both."""
    scales, numbers = sorted({scale for scale, _ in one}), sorted({row for _, row in one})
    draw = np.random.default_rng(0)

    def apart(chosen: np.ndarray) -> float:
        return area_of(one, scales, chosen) - area_of(other, scales, chosen)

    found = [apart(draw.choice(numbers, len(numbers))) for _ in range(draws)]
    low, high = np.percentile(found, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return apart(np.array(numbers)), (float(low), float(high))


def plot(
    checkpoints: Mapping[int, float], curves: Mapping[str, Any], source: str, path: Path
) -> bool:
    """Both answers as a picture; False without matplotlib."""
    pyplot = report.drawing()
    if pyplot is None:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot([*checkpoints], [*checkpoints.values()], marker="o", color=COLOURS[WITH])
    left.set_xlabel("optimizer step of the checkpoint")
    left.set_ylabel("PSNR against the truth, dB")
    for name, results in curves.items():
        points = [point["metrics"] for point in results["points"]]
        across, up = ([p[key] for p in points] for key in ("clip_direction", "clip_image"))
        label = f"{name}: area {results['curve']['area']:.4f}"
        right.plot(across, up, marker="o", color=COLOURS[name], label=label)
        for point, x, y in zip(results["points"], across, up, strict=True):
            scale = f"{point['image_guidance_scale']:g}"
            right.annotate(scale, (x, y), xytext=(4, 4), textcoords="offset points", size=7)
    right.set_xlabel("directional similarity, by a small CLIP of this world")
    right.set_ylabel("image similarity, to the input")
    right.legend()
    figure.suptitle("\n".join(wrap(source, 150)), fontsize=8, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def rows_of(
    checkpoints: Mapping[int, Mapping[str, float]],
    curves: Mapping[str, Record],
    apart: tuple[float, tuple[float, float]],
    told_apart: float,
) -> list[Record]:
    """A row a checkpoint and a model, and one for each of the two questions."""
    made = [
        harness.row({"op": "checkpoint", "step": step}, values=dict(values))
        for step, values in checkpoints.items()
    ]
    found = spearman([values["psnr"] for values in checkpoints.values()])
    verdict = "right" if found >= LEAST_SPEARMAN else "wrong"
    made.append(harness.row({"op": "order"}, verdict=verdict, values={"spearman": found}))
    for name, results in curves.items():
        values = dict(results["curve"]) | {"clip_tells_edits_apart": told_apart}
        for point in results["points"]:
            at = f"{point['image_guidance_scale']:g}"
            values |= {f"{key}_at_{at}": value for key, value in point["metrics"].items()}
        made.append(harness.row({"op": "curve", "run": name}, values=values))
    difference, (low, high) = apart
    verdict = "wrong" if low <= 0 <= high else "right"
    values = {"area_difference": difference, "low": low, "high": high}
    made.append(harness.row({"op": "told apart"}, verdict=verdict, values=values))
    return made


def train(name: str, flags: argparse.Namespace, data: Path, output: Path) -> Path:
    """The run's output folder, with its checkpoints."""
    last = output / f"checkpoint-{flags.steps}"
    if not last.exists():
        say(f"training {flags.steps} steps, {name}")
        shutil.rmtree(output, ignore_errors=True)  # what was measured of another one lies in it
        words = [
            *demo_flags(data, BATCH // RANKS),
            *RUNS[name],
            "--center_crop",
            f"--cache_latents={flags.work / 'cache'}",
            f"--max_train_steps={flags.steps}",
            f"--checkpointing_steps={flags.steps // CHECKPOINTS}",
            f"--validation_steps={2 * flags.steps}",
            "--validation_inference_steps=1",
            "--report_to=none",
            "--overwrite",
            f"--output_dir={output}",
        ]
        run_module("launch.train", words, output, RANKS)
    return output


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.evaluate", str(__doc__))
    flags.add_record()
    flags.add_argument("--work", type=Path, default=Path("runs/ledger"), help="data, cache, runs")
    flags.add_argument("--steps", type=positive, default=FULL.steps, help="of each run")
    flags.add_argument("--scenes", type=positive, default=SCENES, help="that are edited")
    chosen = flags.parse_args(argv)
    if chosen.steps % CHECKPOINTS:
        flags.error(f"--steps must be a multiple of {CHECKPOINTS}, got {chosen.steps}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    quiet_libraries()
    path = flags.out / "evaluate.json"
    words = list(sys.argv[1:] if argv is None else argv)
    record = harness.new_record("evaluate", words, flags.commit)
    place = flags.work / f"evaluate-{flags.steps}"
    data = demo_data(flags.work / "data")
    scenes = save_scenes(place / f"scenes-{flags.scenes}", flags.scenes)
    for name, text in (("held-out", HELD_OUT), ("curve", CURVE)):
        (place / f"{name}.toml").write_text(text)
    clip = flags.work / "small-clip"
    if not (clip / TOLD).exists():
        say("training a small CLIP")
        (clip / TOLD).write_text(json.dumps(save_small_clip(clip)))
    told_apart = json.loads((clip / TOLD).read_text())
    say(f"of an edit's two captions, it finds the image's own in {told_apart:.1%}")
    world = make_world()

    def folder_of(model: Path, protocol: str) -> Path:
        return model.parent / f"{protocol}-{flags.scenes}-{model.name}"

    def measured(model: Path, protocol: str) -> Record:
        say(f"measuring {model.parent.name}/{model.name} by {protocol}")
        asked = Asked(
            model=str(model),
            out=folder_of(model, protocol),
            protocol=str(place / f"{protocol}.toml"),
            dataset=str(scenes),
            places={"clip": str(clip)},
            batch_size=BATCH,
        )
        return evaluate(asked, world)

    try:
        runs = {name: train(name, flags, data, place / f"run-{at}") for at, name in enumerate(RUNS)}
    except RunFailed as error:
        say(f"fusedit.benchmarks.evaluate: {error}")
        return 1
    steps = range(flags.steps // CHECKPOINTS, flags.steps + 1, flags.steps // CHECKPOINTS)
    checkpoints = {step: measured(runs[WITH] / f"checkpoint-{step}", "held-out") for step in steps}
    values = {step: results["points"][0]["metrics"] for step, results in checkpoints.items()}
    ends = {name: run / f"checkpoint-{flags.steps}" for name, run in runs.items()}
    curves = {name: measured(end, "curve") for name, end in ends.items()}
    one, other = (read_rows(folder_of(end, "curve") / RESULTS) for end in ends.values())
    apart = difference_of_areas(one, other)
    record["rows"] = rows_of(values, curves, apart, told_apart)
    psnr = {step: value["psnr"] for step, value in values.items()}
    flags.out.mkdir(parents=True, exist_ok=True)
    plot(psnr, curves, report.source_of(record), path.with_suffix(".png"))
    return report.finish(record, path, flags.compare)


if __name__ == "__main__":
    sys.exit(main())
