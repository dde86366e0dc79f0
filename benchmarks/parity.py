"""Is our update the one of diffusers' script? The script's first 20 updates, replayed by ours.

    python -m fusedit.benchmarks.parity --reference PATH --out results
    python -m fusedit.benchmarks.parity --reference PATH --preset sd15 --out results

The script runs unmodified, in a process of its own, while its draws, losses, gradients, weights and
averages are written down. Ours starts from its weights, is given its images and its draws, and must
come to the same: no further from the mathematics in fp64 (in fp32, where the script runs in bf16)
than twice as far as the script itself is, and the script no further than rounding takes it. Where
the script is known to be wrong, ours is made to do the same for this comparison, and a row says
what it does otherwise:

- conv_in.bias: the script replaces it by a random one;
- short window: the last window of an epoch has fewer micro-steps, and the script divides by all;
- average: diffusers' EMAModel copies at its first update, InstructPix2Pix's own averages then.

`tiny` is the demo's base at 64 px in fp32, on the CPU in minutes; `sd15` Stable Diffusion 1.5's
architecture, random weights, 256 px, bf16, for a GPU of 80 GB. Exit codes: 0 ours is as near; 1 it
is not, or a run failed; 2 a mistake in the flags.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..launch.flags import parse as parse_train
from ..trainer.plan import set_numerics
from ..trainer.pretrained import describe, load_unet
from . import harness, report
from .demo_steps import RunFailed
from .flags import Flags
from .harness import Record, say
from .models import DEMO, make_pairs, make_sd15
from .recording import START, UPDATES, file_of
from .reference import Script, data_flags, note, parse_with_script, run_script
from .replay import Named, Ours, Parts, Recorded, Truth, Update, kept

FACTOR = 2.0  # ours may be this much further from the truth than the script is
# What rounding explains of the script's own distance, by --mixed_precision: more is another
# mathematics. Of bf16 these are guesses until a GPU has run it.
ROUNDING = {
    "no": {"loss": 1e-5, "grad_norm": 1e-5, "gradients": 1e-3, "weights": 1e-3, "averages": 1e-3},
    "bf16": {"loss": 0.02, "grad_norm": 0.05, "gradients": 0.5, "weights": 0.5, "averages": 0.5},
}
FLOOR = 1e-9  # distances below are nothing
NO_NUMBER = 1e30  # the distance of what is not finite
QUANTITIES: dict[str, Callable[[Update], Named]] = {
    "loss": lambda update: {"loss": update.losses},
    "grad_norm": lambda update: {"grad_norm": update.grad_norm},
    "gradients": lambda update: update.gradients,
    "weights": lambda update: update.weights,
    "averages": lambda update: update.averages,
}

# Each tensor of these is a sum of many steps, in which AdamW makes rounding as large as the rate
# wherever a gradient is next to nothing: they are judged together, by how far they have moved.
MOVED = ("weights", "averages")


class Preset(NamedTuple):
    """What the script is run with."""

    pixels: int
    batch: int
    micro_steps: int
    pairs: int  # so that the last window of the first epoch is short
    precision: str  # --mixed_precision
    watch: str  # of reference_run
    truth: torch.dtype
    lr: float
    make_model: Callable[[Path], Path]


PRESETS = {
    "tiny": Preset(64, 4, 2, 44, "no", "record", torch.float64, 1e-4, lambda folder: DEMO),
    "sd15": Preset(256, 4, 2, 44, "bf16", "record-ends", torch.float32, 1e-5, make_sd15),
}


class Distance(NamedTuple):
    """Of a value from the truth, as a share, both as L2 norms."""

    value: float
    tensor: str  # which one it is of; all of them together: ""
    update: int


def distance(value: Named, truth: Named, update: int) -> Distance:
    """Of the worst tensor, as a share of that tensor."""
    worst = Distance(0.0, "", update)
    for name, expected in truth.items():
        found = share({name: value[name]}, {name: expected}, {name: torch.zeros_like(expected)})
        if found > worst.value:
            worst = Distance(found, name, update)
    return worst


def share(value: Named, truth: Named, start: Named) -> float:
    """How far from the truth, over how far the truth is from the start."""
    apart = math.sqrt(sum(squares(value[name], truth[name]) for name in truth))
    moved = math.sqrt(sum(squares(truth[name], start[name]) for name in truth))
    found = apart / moved if moved else apart
    return found if math.isfinite(found) else NO_NUMBER


def squares(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


def largest(distances: Iterable[Distance]) -> Distance:
    return max(distances, key=lambda found: found.value)


def compared(
    quantity: str, preset: str, ours: Sequence[Distance], script: Sequence[Distance]
) -> Record:
    """A row: how far ours is from the truth, as a share of what it may be."""
    worst, its = largest(ours), largest(script)
    allowed = FACTOR * max(its.value, FLOOR)
    told = f"ours worst in update {worst.update} {worst.tensor}".strip()
    right, most = worst.value <= allowed, ROUNDING[PRESETS[preset].precision][quantity]
    if its.value > most:
        right, told = False, f"the script does something else: above {most:g} is no rounding"
    return harness.row(
        {"op": "parity", "preset": preset, "what": quantity, "updates": len(ours), "by": "ours"},
        verdict="right" if right else "wrong",
        error=worst.value / allowed,
        values={"ours": worst.value, "script": its.value},
        note=told,
    )


def replayed_rows(name: str, files: Sequence[Path], parts: Parts, *, fused: bool) -> list[Record]:
    """The script's updates beside ours and the truth."""
    ours, truth = Ours(parts, fused=fused), Truth(parts, PRESETS[name].truth)
    found: dict[str, tuple[list[Distance], list[Distance]]] = {
        quantity: ([], []) for quantity in QUANTITIES
    }
    rows = []
    for index, path in enumerate(files, start=1):
        recorded = Recorded(load_file(path), PRESETS[name].micro_steps, parts.device)
        expected, own, script = truth.update(recorded), ours.update(recorded), recorded.result()
        for quantity, of in QUANTITIES.items():
            for distances, result in zip(found[quantity], (own, script), strict=True):
                pair = of(result), of(expected)
                if quantity in MOVED:
                    distances.append(Distance(share(*pair, parts.start), "", index))
                else:
                    distances.append(distance(*pair, index))
        if recorded.share < 1 and not rows:
            ratio = float(script.grad_norm) / (float(own.grad_norm) / recorded.share)
            rows.append(defect(name, "short window", {"its_gradient_over_ours": ratio}))
        means = (float(update.losses.mean()) for update in (own, script))
        say("update {}: loss {:.6f}, the script's {:.6f}".format(index, *means))
        if path == files[-1]:
            apart = share(kept(ours.own_averages.averages, recorded), script.averages, parts.start)
            rows.append(defect(name, "average", {"ours_apart_of_its_way": apart}))
    return [*(compared(quantity, name, *pair) for quantity, pair in found.items()), *rows]


def defect(preset: str, what: str, values: dict[str, float]) -> Record:
    """What the script does otherwise than ours, in numbers; ours follows it for the comparison."""
    labels = {"op": "parity", "preset": preset, "what": what, "by": "script"}
    return harness.row(labels, values=values, note="a known defect of the script")


def bias_defect(preset: str, parts: Parts) -> Record:
    """How far the script's start is from the base's weights, by its worst tensor."""
    base = load_unet(parts.config.model).state_dict()
    apart = {name: float((parts.start[name] - base[name]).abs().max()) for name in base}
    bias = apart.pop("conv_in.bias")
    others = max(apart.values())
    row = defect(preset, "conv_in.bias", {"script_off_by": bias, "others_off_by": others})
    return row | {"verdict": "wrong"} if others > 0 else row


def flags_of(preset: Preset, model: Path, data: Path, work: Path) -> list[str]:
    """For the script and for ours."""
    values = {
        "pretrained_model_name_or_path": model,
        "resolution": preset.pixels,
        "train_batch_size": preset.batch,
        "gradient_accumulation_steps": preset.micro_steps,
        "max_train_steps": UPDATES,
        "learning_rate": preset.lr,
        "lr_warmup_steps": 0,
        "conditioning_dropout_prob": 0.2,  # so that each case comes up in a few updates
        "mixed_precision": preset.precision,
        "seed": 0,
    }
    flags = [f"--{name}={value}" for name, value in values.items()]
    return [*flags, *data_flags(data, work), "--use_ema"]


def run(name: str, script: Script, work: Path) -> list[Record]:
    """Rows of a preset.

    Raises: RunFailed: the script did not come to its end.
    """
    preset = PRESETS[name]
    model, data = preset.make_model(work), make_pairs(work, preset.pixels, preset.pairs)
    flags, folder = flags_of(preset, model, data, work), work / f"recorded-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    say(f"{script.told()}: {UPDATES} updates")
    run_script(preset.watch, script, flags, folder)
    config = parse_train([*flags, "--output_dir=none"]).run
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_numerics(config.precision)
    parts = Parts(config, describe(config.model), load_file(folder / START), device)
    files = [folder / file_of(index) for index in range(1, UPDATES + 1)]
    rows = replayed_rows(name, files, parts, fused=device.type == "cuda")
    return [*rows, bias_defect(name, parts)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.parity", str(__doc__))
    flags.add_argument("--preset", choices=list(PRESETS), default="tiny")
    return parse_with_script(flags, argv)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    record = harness.new_record("parity", words, flags.commit)
    note(record, flags.reference, f"Preset {flags.preset}.")
    try:
        record["rows"] = run(flags.preset, flags.reference, flags.work)
    except RunFailed as error:
        say(f"fusedit.benchmarks.parity: {flags.reference.path.name}: {error}")
        return 1
    return report.finish(record, flags.out / f"parity-{flags.preset}.json", flags.compare)


if __name__ == "__main__":
    sys.exit(main())
