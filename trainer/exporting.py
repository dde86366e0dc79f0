"""What a run's checkpoint holds as files to use: its pipeline, its adapter, or the two merged."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, sharded_checkpoint
from .adapter_files import MERGED, loading, save_adapter
from .adapters import attach, load_trained, merge
from .config import ModelConfig, RunConfig
from .errors import UsageError
from .export import CARD_FILE, load_safety, model_card, save_pipeline
from .families import Family
from .log import PICTURES
from .plan import RUN_FILE, describe_trained
from .pretrained import Described, load_encoders, load_unet
from .settings import from_toml
from .validate import newest_picture


def components(section: ModelConfig, described: Described) -> dict[str, Any]:
    """All of the pipeline but its UNet, in fp32: the run's own may be rounded."""
    parts = described.components(*load_encoders(section))
    return {**parts, **load_safety(section, torch.float32)}


def export_checkpoint(run: Path, out: Path | None, *, merged: bool) -> tuple[Path, Path]:
    """Writes the newest whole checkpoint of a run as a pipeline, or as the adapter that it is.

    Args:
        run: an output folder.
        out: folder to write; by default the run's own, or `merged` in it.
        merged: the adapter is added to its base, and the whole pipeline written.

    Returns: the checkpoint, and what was written.
    Raises: UsageError: no run, no checkpoint, nothing to merge, or a base that cannot be read.
    """
    if not (run / RUN_FILE).is_file():
        raise UsageError(f"{run} is no run's output folder: it has no {RUN_FILE}")
    config = from_toml(run / RUN_FILE, flag="")
    adapts = config.adapter.lora_rank is not None
    if merged and not adapts:
        raise UsageError(f"--merge: {run} has no adapter, it is a whole model; leave it out")
    out = out or (run / MERGED if merged else run)
    if merged and out.resolve() == run.resolve():
        raise UsageError(f"--out {out} is the run's own folder; give another one to merge into")
    found, passed_over = checkpoint.newest(run)
    if found is None:
        raise UsageError("; ".join([f"{run} has no whole checkpoint", *passed_over]))
    tensors, state = sharded_checkpoint.read(found, None), checkpoint.read_state(found)
    trained, raw = tensors["unet"], None
    if "ema" in tensors:
        trained, raw = tensors["ema"], trained
    described = describe_trained(config)
    _write(config, described, out, trained, raw, merged=merged)
    if out.resolve() != run.resolve():
        family, as_adapter = described.family, adapts and not merged
        _write_card(config, family, run, out, state, as_adapter=as_adapter)
    return found, out


def _write(
    config: RunConfig,
    described: Described,
    out: Path,
    trained: Mapping[str, Tensor],
    raw: Mapping[str, Tensor] | None,
    *,
    merged: bool,
) -> None:
    unet = load_unet(config.model)
    if config.adapter.lora_rank is None:
        unet.load_state_dict(trained)
    else:
        adapter = attach(unet, config.adapter, torch.float32, config.loop.seed)
        if not merged:
            out.mkdir(parents=True, exist_ok=True)
            save_adapter(out, described.family, unet, adapter, trained, raw)
            return
        load_trained(unet, trained)
        merge(unet)
    save_pipeline(
        out,
        family=described.family,
        zero_null=described.zero_null,
        unet=unet,
        components=components(config.model, described),
        raw_weights=None if merged else raw,
        dtype=torch.float32,
    )


def _write_card(
    config: RunConfig,
    family: Family,
    run: Path,
    out: Path,
    state: dict[str, Any],
    *,
    as_adapter: bool,
) -> None:
    """As the run's own, with the lines that load this folder."""
    card = run / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    command = re.search(r"^```bash\n(.*?)\n```", text, re.DOTALL | re.MULTILINE)
    model_card(
        out,
        family=family,
        command=command[1] if command else f"fusedit train --config {RUN_FILE}",
        settings=state["settings"] | {"samples a step": state["global_batch"]},
        base=str(config.model.pretrained_model_name_or_path),
        dataset=str(config.data.dataset_name or config.data.train_data_dir),
        versions=state["versions"],
        steps=state["step"],
        picture=newest_picture(run / PICTURES, state["step"]),
        loading=loading(out, family, config.model) if as_adapter else None,
    )
