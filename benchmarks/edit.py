"""`fusedit edit` of a folder beside diffusers' pipeline, called for one image after another.

    python -m fusedit.benchmarks.edit --tiny --out results
    python -m fusedit.benchmarks.edit --dtype fp16 --batch 8 --out results

Both read the same images from files, edit them by the same model and the same noise, and write
PNGs. `diffusers` is the loop of its documentation: StableDiffusionInstructPix2PixPipeline, one call
an image. `ours` is what the command does after it has loaded the model: reading and writing beside
the edits, --batch of them at once, on a GPU by the kernels; `ours-single` has batches of 1,
`ours-plain` leaves the kernels out, `ours-blocks` and `ours-whole` are --compile. A way's first
edits, which compile, are not timed. Ways take turns, so that what else the machine does falls on
all of them; times are of a whole round over its edits, a ratio is the median of the rounds'.

Every edit is compared with that of diffusers: its pixels may differ by the rounding of sums in
another order. Memory is the most that a round took beyond what lay there before it.

--tiny is the demo's base at 64 px, for a CPU; else Stable Diffusion 1.5's architecture at 512 px
with random weights, of which throughput does not depend. Both take four more channels, which are
zero, as before any training.

Writes edit.json and edit.md. Exit codes: 0 done; 1 an edit differs; 2 a mistake in the flags.
"""

import argparse
import re
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from PIL import Image

from ..launch.demo.run import HELD_OUT_SEED, RESOLUTION
from ..launch.demo.world import make_pair
from ..launch.train import quiet_libraries
from ..trainer.config import ModelConfig
from ..trainer.draws import Purpose, draw_normal
from ..trainer.editing import Editor, Settings
from ..trainer.editing_many import edit_rows
from ..trainer.editing_rows import Bad, Row
from ..trainer.families import STABLE_DIFFUSION
from ..trainer.pipelines import load_pipeline
from ..trainer.pretrained import load_unet
from ..trainer.sample import build_pipeline
from . import harness, report
from .flags import Flags, positive
from .harness import Record, Timing, say
from .models import DEMO, make_sd15, saved
from .timing import timing

DIFFUSERS = "diffusers"
PIXELS = 512
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of 255, in the mean over an edit's pixels. Of half precision a guess until a GPU has run it.
ALLOWED = {"fp32": 0.05, "fp16": 3.0, "bf16": 8.0}
HIGHEST, RESET = re.compile(r"^VmHWM:\s*(\d+)", re.M), "5"  # proc(5): status, clear_refs


def make_editor(base: Path, folder: Path) -> Path:
    """The editing pipeline that training starts from; made once."""
    if folder.exists():
        return folder
    parts: dict[str, Any] = StableDiffusionPipeline.from_pretrained(
        base, use_safetensors=True
    ).components
    parts.pop("image_encoder", None)
    parts["unet"] = load_unet(ModelConfig(pretrained_model_name_or_path=str(base)))
    return saved(build_pipeline(STABLE_DIFFUSION, **parts), folder)


def make_images(folder: Path, count: int, side: int) -> list[Path]:
    """Scenes of the demo, in this size."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        path = folder / f"{index:03}-{side}.png"
        scene = make_pair(index, HELD_OUT_SEED).original
        scene.resize((side, side), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


@dataclass
class Way:
    """How edits are made; what rounds of them took."""

    batch: int
    plain: bool = False
    compiled: Any = "off"
    milliseconds: list[float] = field(default_factory=list)  # of an edit, by round
    bytes: int = 0


def ways_of(batch: int, on_gpu: bool, without: Sequence[str]) -> dict[str, Way]:
    ways = {DIFFUSERS: Way(1), "ours-single": Way(1), "ours": Way(batch)}
    if on_gpu:
        ways["ours-plain"] = Way(batch, plain=True)
    ways["ours-blocks"] = Way(batch, compiled="blocks")
    ways["ours-whole"] = Way(batch, compiled="whole")
    return {name: way for name, way in ways.items() if name.split("-")[-1] not in without}


class Theirs:
    """diffusers' pipeline, as its documentation calls it."""

    def __init__(self, model: Path, device: torch.device, dtype: torch.dtype) -> None:
        pipeline: Any = StableDiffusionInstructPix2PixPipeline
        self.pipeline = pipeline.from_pretrained(model, use_safetensors=True).to(device, dtype)
        self.pipeline.set_progress_bar_config(disable=True)

    def edit(self, rows: Sequence[Row]) -> None:
        for row in rows:
            image = Image.open(row.image).convert("RGB")
            edited = self.pipeline(
                row.instruction,
                image=image,
                num_inference_steps=row.settings.steps,
                guidance_scale=row.settings.guidance_scale,
                image_guidance_scale=row.settings.image_guidance_scale,
                latents=self._noise(row, image),
            ).images[0]
            row.output.parent.mkdir(parents=True, exist_ok=True)
            edited.save(row.output)

    def _noise(self, row: Row, image: Image.Image) -> torch.Tensor:
        """Ours; a seeded generator would give another."""
        factor = self.pipeline.vae_scale_factor
        shape = (4, image.height // factor, image.width // factor)
        place = torch.tensor([0])
        noise = draw_normal(row.settings.seed, Purpose.VALIDATION_NOISE, place, shape)
        return noise.to(self.pipeline.device, self.pipeline.unet.dtype)


class Ours:
    def __init__(self, model: Path, device: torch.device, dtype: torch.dtype, way: Way) -> None:
        self.editor = Editor(
            load_pipeline(str(model)),
            device,
            dtype=dtype,
            resolution=PIXELS,
            plain=way.plain,
            compiled=way.compiled,
            batch_size=way.batch,
        )

    def edit(self, rows: Sequence[Row]) -> None:
        edit_rows(self.editor, [*rows], 0, "", Bad(skip=False, tell=say))


def rows_of(images: Sequence[Path], out: Path, steps: int) -> list[Row]:
    return [
        Row(
            place=str(path),
            image=str(path),
            instruction=make_pair(index, HELD_OUT_SEED).instruction,
            settings=Settings(seed=index, steps=steps),
            output=out / path.name,
        )
        for index, path in enumerate(images)
    ]


def measure(
    ways: Mapping[str, Way],
    model: Path,
    images: Sequence[Path],
    folder: Path,
    device: torch.device,
    flags: argparse.Namespace,
) -> None:
    """Fills in what the ways took."""
    dtype = DTYPES[flags.dtype]
    editors = {
        name: Theirs(model, device, dtype) if name == DIFFUSERS else Ours(model, device, dtype, way)
        for name, way in ways.items()
    }
    rows = {name: rows_of(images, folder / name, flags.steps) for name in ways}
    for name, way in ways.items():
        say(f"{name}: warming up")
        editors[name].edit(rows[name][: way.batch])
    for turn in range(flags.rounds):
        say(f"round {turn + 1} of {flags.rounds}")
        for name, way in ways.items():
            before = memory(device, anew=True)
            since = time.perf_counter()
            editors[name].edit(rows[name])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            way.milliseconds.append(1e3 * (time.perf_counter() - since) / len(images))
            way.bytes = max(way.bytes, memory(device) - before)


def memory(device: torch.device, anew: bool = False) -> int:
    """The most bytes in use since it was begun anew: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if anew:
        Path("/proc/self/clear_refs").write_text(RESET)
    found = HIGHEST.search(Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def differences(images: Sequence[Path], folder: Path, name: str) -> tuple[int, float]:
    """The largest of a pixel, and the largest mean over an edit's pixels; of 255."""
    largest, mean = 0, 0.0
    for path in images:
        one, other = (
            np.asarray(Image.open(folder / which / path.name)).astype(int)
            for which in (name, DIFFUSERS)
        )
        apart = np.abs(one - other)
        largest, mean = max(largest, int(apart.max())), max(mean, float(apart.mean()))
    return largest, mean


def row_of(
    name: str,
    ways: Mapping[str, Way],
    labels: Mapping[str, str | int],
    apart: tuple[int, float],
    allowed: float,
) -> Record:
    way, theirs = ways[name], ways[DIFFUSERS]
    found = timing(way.milliseconds)
    pairs = zip(theirs.milliseconds, way.milliseconds, strict=True)
    ratios = [one / own for one, own in pairs]
    values = {
        "images_per_s": 1e3 / found.median_ms,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "memory_gib": way.bytes / 2**30,
        "largest_difference": apart[0],
        "mean_difference": apart[1],
    }
    right = apart[1] <= allowed
    return harness.row(
        {"op": "edit", **labels, "batch": way.batch, "by": name},
        verdict="right" if right else "wrong",
        error=apart[1] / allowed,
        timings={"warm": found} if right else None,
        values=values,
    )


def table(record: Record) -> str:
    head = ["by", "batch", "ms an edit", "± %", "images a second", "of diffusers' speed",
            "GiB beside", "differs: most, mean"]  # fmt: skip
    lines = []
    for row in record["rows"]:
        values, by = row["values"], row["labels"]["by"]
        apart = f"{values['largest_difference']:.0f}, {values['mean_difference']:.2g}"
        if not row["timings"]:
            lines.append([by, str(row["labels"]["batch"]), *["-"] * 5, f"{apart}: wrong"])
            continue
        found = Timing(**row["timings"]["warm"])
        ratio = f"{values['ratio']:.2f} ({values['ratio_low']:.2f} to {values['ratio_high']:.2f})"
        lines.append(
            [by, str(row["labels"]["batch"]), f"{found.median_ms:.4g}",
             f"{100 * found.spread:.1f}", f"{values['images_per_s']:.3g}", ratio,
             f"{values['memory_gib']:.2f}", apart]
        )  # fmt: skip
    labels = record["rows"][0]["labels"]
    what = f"{labels['preset']}, {labels['steps']} steps, {labels['dtype']}"
    return f"{report.heading(record)}\n\n{what}\n\n{report.table(head, lines)}\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    flags = Flags("fusedit.benchmarks.edit", str(__doc__))
    flags.add_record()
    flags.add_argument("--tiny", action="store_true", help="the demo's base at 64 px, for a CPU")
    flags.add_argument("--work", type=Path, default=Path("runs/edit"), help="model and images")
    flags.add_argument("--edits", type=positive, default=32, help="of a round")
    flags.add_argument("--batch", type=positive, default=8)
    flags.add_argument("--steps", type=positive, default=20)
    flags.add_argument("--rounds", type=positive, default=5)
    flags.add_argument("--dtype", choices=DTYPES, default="fp16" if on_gpu else "fp32")
    others = ["single", "plain", "blocks", "whole"]
    flags.add_argument("--without", nargs="+", choices=others, default=[], help="ways left out")
    chosen = flags.parse_args(argv)
    if chosen.rounds < 2:
        flags.error("--rounds must be 2 or more: of one nothing is known of its spread")
    if not (chosen.tiny or on_gpu):
        flags.error("there is no GPU here for Stable Diffusion 1.5; give --tiny, or run it on one")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    quiet_libraries()
    words = list(sys.argv[1:] if argv is None else argv)
    path, work = flags.out / "edit.json", flags.work
    record = harness.new_record("edit", words, flags.commit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, name = (RESOLUTION, "demo") if flags.tiny else (PIXELS, "sd15")
    model = make_editor(DEMO if flags.tiny else make_sd15(work), work / f"{name}-editor")
    images = make_images(work / "images", flags.edits, side)
    ways = ways_of(flags.batch, device.type == "cuda", flags.without)
    edits = work / "edits"
    shutil.rmtree(edits, ignore_errors=True)
    measure(ways, model, images, edits, device, flags)
    labels = {"preset": f"{name}-{side}", "steps": flags.steps, "dtype": flags.dtype}
    for each in ways:
        apart = differences(images, edits, each)
        record["rows"].append(row_of(each, ways, labels, apart, ALLOWED[flags.dtype]))
    return report.finish(record, path, flags.compare, table)


if __name__ == "__main__":
    sys.exit(main())
