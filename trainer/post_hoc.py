"""A run's pipeline once more, with averages of a length that is chosen after training.

Read are the snapshots of --post_hoc_ema (`trainer/run.py` writes them as checkpoints of their own)
and the exported pipeline, of which only the UNet's weights change.
Source: Karras et al. 2024 (arXiv:2312.02696), section 3.2.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import checkpoint
from .config import check_ema_length
from .errors import UsageError
from .export import model_of
from .files import beside, cannot_write
from .power_ema import SNAPSHOTS, Mix, mix_for, part_of
from .pretrained import INDEX_FILE

ABOUT_FILE = "post_hoc_ema.json"  # what was mixed, beside the pipeline
LARGEST_ERROR = 0.1  # of a profile, in parts of it; beyond, it is another length


class Snapshot(NamedTuple):
    """One average at one step."""

    step: int
    length: float
    file: Path


def write_pipeline(run: Path, length: float, out: Path) -> Mix:
    """Writes the pipeline of a run with averages of a length, at the step of its last snapshot.

    Args:
        run: output folder of a run with --post_hoc_ema that has been exported.
        out: new or empty; it is there whole or not at all.

    Raises: UsageError: no snapshots, or damaged ones, no pipeline, or a length they cannot make.
    """
    check_ema_length(f"--length {length}", length)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already; give a new folder")
    snapshots = find_snapshots(run)
    if not (run / INDEX_FILE).is_file():
        raise UsageError(f"{run} has no exported pipeline yet: let the run end first")
    mix = mix_for([(s.step, s.length) for s in snapshots], snapshots[-1].step, length)
    if mix.error > LARGEST_ERROR:
        kept = ", ".join(map(str, sorted({snapshot.length for snapshot in snapshots})))
        raise UsageError(
            f"--length {length} cannot be made of {len(snapshots)} snapshots of {kept}: its "
            f"profile would be off by {mix.error:.0%}; take one nearer to these"
        )
    partial = beside(out)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _copy_others(run, partial)
        config: Any = UNet2DConditionModel.load_config(run / "unet")
        unet = model_of(UNet2DConditionModel, config, mixed(snapshots, mix.weights))
        unet.save_pretrained(partial / "unet")
        (partial / ABOUT_FILE).write_text(_about(run, length, snapshots, mix))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise cannot_write(out, error) from None
    return mix


def find_snapshots(run: Path) -> list[Snapshot]:
    """All of a run, the last step last.

    Raises: UsageError: there are none, or one is not as it was written.
    """
    found = []
    for step in sorted(checkpoint.steps(run / SNAPSHOTS)):
        folder = run / SNAPSHOTS / f"checkpoint-{step}"
        reason = checkpoint.broken(folder)
        if reason is not None:
            raise UsageError(f"{folder} is not whole: {reason}; delete it to go on without it")
        for length in checkpoint.read_state(folder)["lengths"]:
            found.append(Snapshot(step, length, folder / f"{part_of(length)}.safetensors"))
    if not found:
        raise UsageError(f"{run} has no {SNAPSHOTS}: train with --post_hoc_ema 0.05 0.1")
    return found


def mixed(snapshots: Sequence[Snapshot], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of the snapshots, in fp32; added up in fp64, a tensor at a time."""
    found = {}
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(s.file, framework="pt")) for s in snapshots]
        for name in files[0].keys():  # noqa: SIM118 - it is no dict
            tensors = (file.get_tensor(name) for file in files)
            total = torch.zeros((), dtype=torch.float64)
            for weight, tensor in zip(weights, tensors, strict=True):
                total = total + weight * tensor.double()
            found[name] = total.float()
    return found


def _copy_others(run: Path, to: Path) -> None:
    """The pipeline's parts but the UNet, as its index names them."""
    index = json.loads((run / INDEX_FILE).read_text())
    shutil.copyfile(run / INDEX_FILE, to / INDEX_FILE)
    for name in index:
        if name != "unet" and (run / name).is_dir():
            shutil.copytree(run / name, to / name)


def _about(run: Path, length: float, snapshots: Sequence[Snapshot], mix: Mix) -> str:
    parts = [
        {"step": snapshot.step, "length": snapshot.length, "weight": weight}
        for snapshot, weight in zip(snapshots, mix.weights, strict=True)
    ]
    about = {"run": run.resolve().name, "length": length, "profile_error": mix.error}
    return json.dumps(about | {"step": snapshots[-1].step, "snapshots": parts}, indent=1)
