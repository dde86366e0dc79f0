"""What a run leaves for others: the pipeline or adapter, its card, and both on the hub if asked."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter_files import loading, save_adapter
from .export import model_card, push, save_pipeline
from .exporting import components
from .job import Job
from .plan import Plan
from .settings import flat

VERSIONS = ("fusedit", "torch", "diffusers", "transformers", "datasets")


class Made(NamedTuple):
    """How it came about."""

    step: int
    ranks: int
    command: str
    picture: Path | None  # of the last edits


def publish(
    plan: Plan, job: Job, unet: Any, raw_weights: dict[str, Tensor] | None, made: Made
) -> None:
    """Writes to the output folder, on rank 0.

    Args:
        unet: with the weights to be exported.
        raw_weights: without averaging, where those are averages.
    """
    config, family, lines = plan.config, plan.described.family, None
    if job.adapter is not None:
        lines = loading(plan.output, family, config.model)
        save_adapter(plan.output, family, unet, job.adapter, job.named, raw_weights)
    else:
        save_pipeline(
            plan.output,
            unet=unet,
            family=family,
            zero_null=plan.described.zero_null,
            components=components(config.model, plan.described),
            raw_weights=raw_weights,
            dtype=torch.float32,
        )
    model_card(
        plan.output,
        family=family,
        command=made.command,
        settings=flat(config) | {"ranks": made.ranks, "samples a step": plan.global_batch},
        base=str(config.model.pretrained_model_name_or_path),
        dataset=str(config.data.dataset_name or config.data.train_data_dir),
        versions=versions(job),
        steps=made.step,
        picture=made.picture,
        loading=lines,
    )
    if config.output.push_to_hub:
        push(config.output, f"fusedit: step {made.step}")


def versions(job: Job) -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    names = (*VERSIONS, "peft") if job.adapter is not None else VERSIONS
    return {name: version(name) for name in names}
