"""`fusedit demo`: the whole job in minutes, on a drawn world, from a small base in the repository.

Draws edit pairs, trains by torchrun (all GPUs, or two ranks on the CPU) and measures held-out
edits. Each stage is skipped when its result lies there already. runs/demo/ ends with the exported
pipeline, edits.png (input, edit, truth, instruction) and metrics.json (PSNR in dB, by kind).
"""

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from datasets import Dataset, Features, Image, Value
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL.Image import Image as PILImage
from tqdm import tqdm

from ...trainer.draws import Purpose, draw_normal
from ...trainer.files import write_text
from ...trainer.metrics import mean_by_kind, psnr
from ...trainer.sample import edit_images, grid
from ..cli import torchrun
from ..train import quiet_libraries
from .world import GLOBAL_KINDS, KINDS, Pair, make_pair

BASE = Path(__file__).parent / "base"
RESOLUTION = 64  # pixels
TRAIN_SEED, HELD_OUT_SEED = 0, 3  # of the world; 1 and 2 made the base, nothing has seen 3
EVALUATION_SEED = 0  # of the noise that edits start from


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    pairs: int
    held_out: int  # a multiple of the kinds, so that they are equally frequent
    steps: int  # optimizer steps
    inference_steps: int


FULL = Size(pairs=6000, held_out=200, steps=1200, inference_steps=20)
QUICK = Size(pairs=200, held_out=20, steps=30, inference_steps=4)
BATCH = 32  # samples in one optimizer step, whatever the ranks
GUIDANCE, IMAGE_GUIDANCE = 1.0, 1.0  # measures best; more of both looks crisper


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Trains on a drawn world of edit pairs and shows what was learned."""

    output: Path = Path("runs/demo")  # the pipeline, edits.png and metrics.json
    quick: bool = False  # a minute: shows that everything runs, learns little
    from_scratch: bool = False  # start from random weights instead of the base's, to compare


def main(argv: list[str]) -> int:
    """Runs what is missing of the demo and returns the exit code."""
    flags = tyro.cli(
        DemoFlags,
        prog="fusedit demo",
        args=argv,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    quiet_libraries()
    size, output = (QUICK if flags.quick else FULL), flags.output
    if (output / "metrics.json").exists():
        _say(f"{output} is there already; delete it to start anew")
    else:
        data = output / "data"
        if not data.exists():
            _say(f"drawing {size.pairs} pairs of scenes into {data}")
            save_pairs(data, size.pairs)
        if not (output / "model_index.json").exists():
            _say(f"training {size.steps} steps; watch with tensorboard --logdir {output / 'logs'}")
            code = _train(size, output, data, flags.from_scratch)
            if code:
                return code
        _say(f"editing {size.held_out} held-out scenes")
        measure(output, size)
    _show(json.loads((output / "metrics.json").read_text()))
    if flags.quick:
        _say("--quick shows that everything runs and learns next to nothing")
    _say(
        f"see {output / 'edits.png'}, and try: fusedit report {output}; "
        f'fusedit edit {output} IMAGE "make it night"'
    )
    return 0


# Pairs.


def _png(image: PILImage) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_pairs(folder: Path, count: int, encode: Callable[[PILImage], bytes] = _png) -> None:
    """Writes `count` pairs as a parquet file that --train_data_dir takes."""
    features = Features(
        {"input_image": Image(), "edited_image": Image(), "edit_prompt": Value("string")}
    )
    columns: dict[str, list] = {name: [] for name in features}
    for index in tqdm(range(count), unit="pair", leave=False, disable=None):
        pair = make_pair(index, TRAIN_SEED)
        columns["input_image"].append({"bytes": encode(pair.original), "path": None})
        columns["edited_image"].append({"bytes": encode(pair.edited), "path": None})
        columns["edit_prompt"].append(pair.instruction)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    Dataset.from_dict(columns, features).to_parquet(partial / "train-00000-of-00001.parquet")
    partial.rename(folder)


# Training.


def step_flags(size: Size, data: Path, batch: int) -> dict[str, object]:
    """Those that decide what its steps compute, beside --use_ema.

    Args:
        batch: of a micro-step of one rank.
    """
    return {
        "pretrained_model_name_or_path": BASE,
        "train_data_dir": data,
        "resolution": RESOLUTION,
        "train_batch_size": batch,
        "max_train_steps": size.steps,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": size.steps // 20,
        "ema_decay": 0.998,
        "conditioning_dropout_prob": 0.05,
        "held_out": size.pairs // 50,
    }


def _train(size: Size, output: Path, data: Path, from_scratch: bool) -> int:
    ranks = torch.cuda.device_count() or 2
    flags = step_flags(size, data, max(1, BATCH // ranks)) | {
        "output_dir": output,
        "validation_steps": max(size.steps // 3, 1),
        "validation_guidance_scale": GUIDANCE,
        "validation_image_guidance_scale": IMAGE_GUIDANCE,
        "validation_inference_steps": size.inference_steps,
        "checkpointing_steps": max(size.steps // 5, 1),
        "checkpoints_total_limit": 1,
        "log_every": max(size.steps // 75, 1),
    }
    if from_scratch:
        flags["unet"] = _random_unet(output / "scratch-unet")
    return torchrun(
        "train", ranks, [], ["--use_ema", *(f"--{name}={flags[name]}" for name in flags)]
    )


def _random_unet(folder: Path) -> Path:
    """The base's architecture with the weights that PyTorch starts from."""
    torch.manual_seed(0)
    config: Any = UNet2DConditionModel.load_config(BASE / "unet")
    unet: Any = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(folder)
    return folder


# Measuring.


def measure(output: Path, size: Size) -> None:
    """Edits held-out scenes with the exported pipeline and writes edits.png and metrics.json."""
    pairs = [make_pair(index, HELD_OUT_SEED) for index in range(size.held_out)]
    truths, kinds = [pair.edited for pair in pairs], [pair.kind for pair in pairs]
    instructions = [pair.instruction for pair in pairs]
    # Instructions of another kind each: the neighbour's in the cycle of kinds.
    shuffled = instructions[1:] + instructions[:1]

    edits = _edit(output, pairs, instructions, size)
    decibels = psnr(edits, truths)
    unedited = psnr([pair.original for pair in pairs], truths)
    gains = [edit - before for edit, before in zip(decibels, unedited, strict=True)]
    global_gains = [g for g, kind in zip(gains, kinds, strict=True) if kind in GLOBAL_KINDS]
    metrics = {
        "pairs": len(pairs),
        "edit_db": _mean(decibels),
        "unedited_db": _mean(unedited),
        "gain_db": _mean(gains),
        "global_gain_db": _mean(global_gains),
        "shuffled_edit_db": _mean(psnr(_edit(output, pairs, shuffled, size), truths)),
        "edit_db_by_kind": mean_by_kind(decibels, kinds),
        "unedited_db_by_kind": mean_by_kind(unedited, kinds),
        "guidance_scale": GUIDANCE,
        "image_guidance_scale": IMAGE_GUIDANCE,
        "inference_steps": size.inference_steps,
        "train_steps": size.steps,
    }
    shown = range(2 * len(KINDS))
    rows = [(pairs[i].original, edits[i], truths[i]) for i in shown]
    grid(rows, [instructions[i] for i in shown], ("input", "edit", "truth")).save(
        output / "edits.png"
    )
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))


def _edit(
    output: Path, pairs: Sequence[Pair], instructions: Sequence[str], size: Size
) -> list[PILImage]:
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(output, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    side = RESOLUTION // pipeline.vae_scale_factor
    edits = []
    for start in tqdm(range(0, len(pairs), BATCH), unit="batch", leave=False, disable=None):
        positions = torch.arange(start, min(start + BATCH, len(pairs)))
        edits += edit_images(
            pipeline,
            [pair.original for pair in pairs[start : start + BATCH]],
            instructions[start : start + BATCH],
            draw_normal(EVALUATION_SEED, Purpose.VALIDATION_NOISE, positions, (4, side, side)),
            steps=size.inference_steps,
            guidance_scale=GUIDANCE,
            image_guidance_scale=IMAGE_GUIDANCE,
        )
    return edits


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _show(metrics: dict) -> None:
    by_kind, before = metrics["edit_db_by_kind"], metrics["unedited_db_by_kind"]
    print(f"{'PSNR against the truth, dB':28}{'unedited':>10}{'edit':>8}{'gain':>8}")
    for kind in by_kind:
        name = f"{kind}{' (global)' if kind in GLOBAL_KINDS else ''}"
        gain = by_kind[kind] - before[kind]
        print(f"{name:28}{before[kind]:10.1f}{by_kind[kind]:8.1f}{gain:+8.1f}")
    print(
        f"{'all':28}{metrics['unedited_db']:10.1f}{metrics['edit_db']:8.1f}"
        f"{metrics['gain_db']:+8.1f}"
    )
    print(f"{'instructions shuffled':28}{'':10}{metrics['shuffled_edit_db']:8.1f}")


def _say(text: str) -> None:
    print(f"fusedit demo: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
