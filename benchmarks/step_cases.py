"""What `step.py` compares: presets of the script's flags, and what ours is recommended instead."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..launch.demo.run import RESOLUTION
from .flags import Flags
from .models import DEMO, TINY_SDXL, make_pairs, make_sd15, make_sdxl
from .reference import NAME, XL_NAME, cure, script_named

PAIRS = 512
GUIDE = {  # of the script's guide, without its checkpoints and the hub
    "random_flip": True,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "learning_rate": 5e-5,
    "max_grad_norm": 1,
    "lr_warmup_steps": 0,
    "conditioning_dropout_prob": 0.05,
    "mixed_precision": "fp16",
    "seed": 42,
}
TUNED = GUIDE | {
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "mixed_precision": "bf16",
    "allow_tf32": True,
    "dataloader_num_workers": 8,
}
# Of README_sdxl.md, which gives no precision.
XL_GUIDE = GUIDE | {"mixed_precision": "no", "use_ema": True}
# It encodes texts in its loader, on the GPU: in no other process. With --vae_precision bf16 it
# fails at its first image; with the base's own VAE by --pretrained_vae_model_name_or_path it runs
# it in bf16, whose range is that of fp32.
XL_TUNED = XL_GUIDE | TUNED | {"dataloader_num_workers": 0}
PRESETS = {"as-shipped": GUIDE, "tuned": TUNED, "sdxl": XL_GUIDE, "sdxl-tuned": XL_TUNED}
# What fits a card of 80 GB without checkpointing, by pixels; XL's are guesses, no card has run it.
BATCHES = {256: 64, 512: 32}
XL_BATCHES = {512: 8, 1024: 2}  # divisors of PAIRS: its script fails at a ragged last batch
XL = ("sdxl", "sdxl-tuned")
SCRIPT, SAME, RECOMMENDED = "the script", "same flags", "recommended"
UNCACHED = "recommended, no cache"
CACHE = "cache_latents"  # the flag
WAYS = (SCRIPT, SAME, UNCACHED, RECOMMENDED)

Values = Mapping[str, object]


class Case(NamedTuple):
    """What is compared."""

    preset: str
    pixels: int
    model: Path
    data: Path
    values: Values  # of both programs' flags
    recommended: Values  # instead, for ours as recommended

    @property
    def images(self) -> int:
        """Of an update."""
        return math.prod(sizes(self.values))

    def flags(self, way: str) -> Values:
        if way in (SCRIPT, SAME):
            return self.values
        uncached = {name: value for name, value in self.recommended.items() if name != CACHE}
        return {**self.values, **(uncached if way == UNCACHED else self.recommended)}

    def labels(self, way: str) -> dict[str, str | int]:
        by = "reference" if way == SCRIPT else "ours"
        return {"preset": self.preset, "pixels": self.pixels, "way": way, "by": by}


def sizes(values: Values) -> tuple[int, int]:
    """Images of a micro-step, micro-steps of an update."""
    names = ("train_batch_size", "gradient_accumulation_steps")
    batch, micro_steps = (int(str(values[name])) for name in names)
    return batch, micro_steps


def case_of(preset: str, pixels: int, work: Path, *, tiny: bool) -> Case:
    values: dict[str, object] = {**PRESETS[preset], "resolution": pixels}
    xl, tuned = preset in XL, preset.endswith("tuned")
    if tuned:
        values["train_batch_size"] = batches(preset).get(pixels, 16)
    recommended: dict[str, object] = {
        "center_crop": True,  # of a square it is all, as the script's crop is of any image
        CACHE: work / f"cache-{'xl-' if xl else ''}{pixels}",
    }
    if not (xl and pixels > 512):  # else there is no room
        recommended["gradient_checkpointing"] = False
    if not xl:
        merged = {"train_batch_size": math.prod(sizes(values)), "gradient_accumulation_steps": 1}
        recommended |= merged
    if tiny:  # a CPU's autocast is slower than its fp32, and its two cores have no time for workers
        values |= {"mixed_precision": "no", "dataloader_num_workers": 0, "allow_tf32": False}
        model = make_sdxl(work, TINY_SDXL) if xl else DEMO
    else:
        recommended |= {"mixed_precision": "bf16", "param_dtype": "bf16"}
        model = make_sdxl(work) if xl else make_sd15(work)
    if xl and tuned:
        values["pretrained_vae_model_name_or_path"] = model / "vae"
    return Case(preset, pixels, model, make_pairs(work, pixels, PAIRS), values, recommended)


def batches(preset: str) -> dict[int, int]:
    """By the pixels that a preset is for."""
    return XL_BATCHES if preset in XL else BATCHES


def check_model(flags: Flags, chosen: argparse.Namespace) -> None:
    """One model in a call; its sizes, and the script that trains it."""
    told = " ".join(chosen.preset)
    if len({preset in XL for preset in chosen.preset}) > 1:
        flags.error(f"--preset {told}: XL has a script of its own; give it a call of its own")
    fits = batches(chosen.preset[0])
    chosen.pixels = chosen.pixels or [min(fits)]
    if wrong := [side for side in chosen.pixels if side not in fits]:
        flags.error(f"--pixels {wrong[0]}: --preset {told} takes {', '.join(map(str, fits))}")
    if chosen.tiny:
        chosen.pixels = [RESOLUTION]
    name = XL_NAME if chosen.preset[0] in XL else NAME
    script = script_named(chosen.reference, name)
    if script is None:
        flags.error(f"--reference {chosen.reference.path}: no {name} beside it; give {cure()}")
    chosen.reference = script
