"""`fusedit evaluate`: a model's edits by a protocol, as files that say where the numbers come from.

results.json   the totals, the protocol and its hash, the model's, the rows', and the networks'
rows.jsonl     a line a row and image guidance
curve.png      where there are several image guidances
edits/         PNGs; deleted at the end, unless they are to be kept
begun.json     what is measured here: another evaluation is refused
"""

import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, sharded_checkpoint
from .adapters import attach, load_trained
from .config import RunConfig
from .curve import plot
from .data import split_rows
from .errors import UsageError
from .evaluate import (
    Point,
    Store,
    curve_through,
    measure,
    open_extractors,
    rounds,
    split_metrics,
    with_sampler,
)
from .examples import Examples, data_config, survey, with_resolution
from .extractors import sha256_of
from .files import write_text
from .log import Progress
from .pipelines import load_pipeline
from .plan import RUN_FILE, describe_trained
from .pretrained import load_encoders, load_unet
from .protocols import UNPINNED, Protocol, read_protocol
from .rows import open_rows
from .sample import build_pipeline
from .settings import from_toml
from .world import World

RESULTS, ROWS, BEGUN, EDITS, PICTURE = (
    "results.json", "rows.jsonl", "begun.json", "edits", "curve.png",
)  # fmt: skip
FORMAT = 1
VERSIONS = ("fusedit", "torch", "diffusers", "transformers", "torchmetrics", "pillow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be measured, and how."""

    model: str
    out: Path
    protocol: str
    dataset: str | None = None
    split: str | None = None
    places: Mapping[str, str | None] = field(default_factory=dict)  # of extractors
    batch_size: int = 8
    on_bad_sample: str = "stop"
    keep_edits: bool = False
    overwrite: bool = False


def evaluate(asked: Asked, world: World, *, command: str = "") -> dict[str, Any]:
    """Measures, or goes on measuring; writes the files of this module's docstring.

    Returns: what results.json holds, on rank 0; empty on others.
    Raises: UsageError, on all ranks alike.
    """
    started = time.monotonic()
    with world.together():
        protocol = read_protocol(asked.protocol)
        pipeline, told = load_model(asked.model)
        protocol = with_resolution(protocol, told["resolution"])
        examples = open_examples(asked, protocol)
        extractors, missing = open_extractors(protocol, asked.places, world.device)
    surveyed = survey(examples, world, asked.on_bad_sample)
    examples, pinned = surveyed.examples, protocol.data.rows_sha256
    with world.together():
        if pinned not in (UNPINNED, surveyed.sha256):
            raise UsageError(
                f"--dataset: its rows have the hash {surveyed.sha256}, the protocol wants {pinned}"
            )
    metrics, left_out = split_metrics(
        protocol, {**missing, **examples.missing}, len(examples.chains)
    )
    results = {
        "format": FORMAT,
        "protocol": protocol.pinned(),
        "protocol_sha256": protocol.sha256,
        "model": told,
        "rows": {
            "measured": len(examples.chains),
            "sha256": surveyed.sha256,
            "left_out": surveyed.bad,
        },
        "extractors": extractors.sha256(),
        "left_out": left_out,
    }
    with world.together():
        earlier = _claim(asked, results) if world.is_main else None
    if world.highest(earlier is not None):
        return earlier or {}
    if world.is_main:
        for name, reason in left_out.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
    pipeline = with_sampler(_on(pipeline, world.device), protocol)
    total = rounds(protocol, examples, world, asked.batch_size)
    progress = Progress(total, 0, "block") if world.is_main else None
    points = measure(
        pipeline,
        protocol,
        examples,
        extractors,
        metrics,
        world,
        batch_size=asked.batch_size,
        store=Store(asked.out / EDITS),
        shows=lambda done: progress.show(done, {}) if progress is not None else None,
    )
    with world.together():
        if world.is_main and progress is not None:
            progress.close()
            provenance = _provenance(command, pipeline, world, time.monotonic() - started)
            results |= {"points": _told(points), "provenance": provenance}
            _write(asked, results, protocol, points, examples)
    return results if world.is_main else {}


# The model.


def load_model(model: str) -> tuple[Any, dict[str, Any]]:
    """The editing pipeline of a folder, a hub name, or a run's checkpoint, in fp32 on the CPU.

    Returns: it, and what it is known by: name, hash of its weights and sampler, resolution.
    Raises: UsageError: there is none, or it does not edit.
    """
    path = Path(model)
    is_checkpoint = bool(checkpoint.NAME.fullmatch(path.name)) and path.is_dir()
    pipeline = _of_checkpoint(path) if is_checkpoint else load_pipeline(model)
    run = (path.parent if is_checkpoint else path) / RUN_FILE
    tensors = {
        f"{name}.{key}": value
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module) and name != "safety_checker"
        for key, value in module.state_dict().items()
    }
    if run.is_file():
        resolution = from_toml(run, flag="").data.resolution
    else:
        latents = pipeline.unet.config["sample_size"]  # a side, both, or not told
        resolution = latents * pipeline.vae_scale_factor if isinstance(latents, int) else None
    told = {
        "name": model,
        "sha256": sha256_of(tensors, dict(pipeline.scheduler.config)),
        "resolution": resolution,
    }
    return pipeline, told


def _of_checkpoint(folder: Path) -> Any:
    """Of a run, with its averages where it has them."""
    run = folder.parent
    if not (run / RUN_FILE).is_file():
        raise UsageError(f"{folder} lies in no run's output folder: there is no {run / RUN_FILE}")
    reason = checkpoint.broken(folder)
    if reason is not None:
        raise UsageError(f"{folder} is not whole: {reason}")
    config = from_toml(run / RUN_FILE, flag="")
    described = describe_trained(config)
    tensors = sharded_checkpoint.read(folder, None)
    trained = tensors.get("ema", tensors["unet"])
    unet = load_unet(config.model)
    if config.adapter.lora_rank is None:
        unet.load_state_dict(trained)
    else:
        attach(unet, config.adapter, torch.float32, config.loop.seed)
        load_trained(unet, trained)
    parts = described.components(*load_encoders(config.model))
    return build_pipeline(described.family, described.zero_null, unet=unet.eval(), **parts)


def _on(pipeline: Any, device: torch.device) -> Any:
    return pipeline.to(device, torch.float16) if device.type == "cuda" else pipeline.to(device)


# The rows.


def open_examples(asked: Asked, protocol: Protocol) -> Examples:
    """Those of --dataset, else of the protocol's own, else what the model's run held out."""
    run = Path(asked.model) / RUN_FILE
    source = asked.dataset or protocol.data.dataset
    if source is not None:
        return Examples(open_rows(data_config(source, protocol.data, asked.split)), protocol)
    beside_checkpoint = Path(asked.model).parent / RUN_FILE
    run = run if run.is_file() else beside_checkpoint
    if not run.is_file():
        raise UsageError(f"--dataset is missing: protocol {protocol.name} names none")
    config: RunConfig = from_toml(run, flag="")
    if not config.data.held_out:
        raise UsageError(f"--dataset is missing: the run of {asked.model} held out no rows")
    rows = open_rows(config.data, config.model.cache_dir)
    _, held_out = split_rows(
        len(rows), config.data.max_train_samples, config.data.held_out, config.loop.seed
    )
    return Examples(rows, protocol, sorted(held_out.tolist()))


# The files.


def _claim(asked: Asked, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Makes the folder this evaluation's; gives the results that lie there already.

    Raises: UsageError: it holds another one.
    """
    out = asked.out
    mine = {
        "protocol": results["protocol_sha256"],
        "model": results["model"]["sha256"],
        "rows": results["rows"]["sha256"],
    }
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    if asked.overwrite:
        for name in (RESULTS, ROWS, BEGUN, PICTURE):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / EDITS, ignore_errors=True)
    if (out / BEGUN).is_file():
        other = json.loads((out / BEGUN).read_text())
        differing = [name for name in mine if mine[name] != other.get(name)]
        if differing:
            raise UsageError(
                f"--out {out} holds another evaluation, with another {' and '.join(differing)}: "
                "give another folder, or --overwrite"
            )
        if (out / RESULTS).is_file():
            found = json.loads((out / RESULTS).read_text())
            same = ("extractors", "left_out")
            if all(found[name] == results[name] for name in same):
                return found
    write_text(out / BEGUN, json.dumps(mine, indent=1))
    return None


def _told(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {"image_guidance_scale": point.image_guidance_scale, "metrics": point.metrics}
        for point in points
    ]


def _write(
    asked: Asked,
    results: dict[str, Any],
    protocol: Protocol,
    points: Sequence[Point],
    examples: Examples,
) -> None:
    lines = []
    for point in points:
        for row in sorted(chain[-1] for chain in examples.chains):
            line = {"image_guidance_scale": point.image_guidance_scale, "row": row}
            line |= {"name": examples.name(row)}
            line |= {name: values[row] for name, values in point.rows.items()}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(asked.out / ROWS, "".join(lines))
    curve = curve_through(points)
    if curve is not None:
        results["curve"] = {"area": curve.area, "reach": curve.reach}
        source = f"{protocol.name}, {results['rows']['measured']} rows"
        if not plot({Path(asked.model).name: curve}, source, asked.out / PICTURE):
            print(f"{PICTURE} is left out: pip install 'fusedit[plots]'", file=sys.stderr)
    results["published"] = [
        {"model": one.model, "source": one.source, "metrics": one.values}
        for one in protocol.published
    ]
    write_text(asked.out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False))
    if not asked.keep_edits:
        shutil.rmtree(asked.out / EDITS, ignore_errors=True)


def _provenance(command: str, pipeline: Any, world: World, seconds: float) -> dict[str, Any]:
    device = world.device
    on_gpu = device.type == "cuda"
    return {
        "command": command,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {platform.machine()}",
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "ranks": world.size,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in VERSIONS},
    }
