"""What looks at a run while it trains: its log, the audit of its steps, validation, evaluation."""

import platform
from functools import partial
from typing import Any

import torch

from .audit import Audit, rows_of_step
from .best import Evaluation, Evaluator
from .callbacks import Callbacks
from .export import without_secrets
from .job import Job
from .log import AUDIT_FILE, PICTURES, RunLog
from .plan import Plan
from .publish import versions
from .sample import build_pipeline
from .settings import flat
from .validate import Validator
from .world import World

MOST_AT_ONCE = 8  # pictures sampled, or rows measured; guidance triples it


def open_log(plan: Plan, world: World, step: int, callbacks: Callbacks) -> RunLog:
    """Rank 0's; that of other ranks is silent."""
    if not world.is_main:
        return RunLog.silent()
    output = plan.config.output
    return RunLog(
        plan.output,
        output.logging_dir,
        output.trackers,
        flat(plan.config),
        plan.output.resolve().name,
        plan.total_steps,
        step,
        callbacks,
    )


def facts(plan: Plan, job: Job, world: World, command: str) -> dict[str, Any]:
    """Of a start of the run, for whoever looks at it later."""
    on_gpu = world.device.type == "cuda"
    return {
        "total_steps": plan.total_steps,
        "command": without_secrets(command),
        "ranks": world.size,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "global_batch": plan.global_batch,
        "rows": len(plan.train_rows),
        "versions": versions(job),
    }


def open_audit(plan: Plan, job: Job, world: World, step: int, log: RunLog) -> Audit:
    """Of steps after this one; rank 0 writes it."""
    path = plan.output / AUDIT_FILE if world.is_main else None
    rows_of = partial(rows_of_step, job.pairs.order, plan.global_batch)
    return Audit(path, step, rows_of, log, plan.config.loop.max_skips)


def open_validator(plan: Plan, job: Job, world: World, callbacks: Callbacks) -> Validator | None:
    """None where there is nothing to look at."""
    asked = callbacks.on_validate if callbacks.validate else None
    if not len(plan.held_out_rows) and plan.validation_image is None and asked is None:
        return None
    return Validator(
        plan.config.validation,
        _pipeline(plan, job),
        job.encoders,
        job.loss_fn,
        job.pairs,
        plan.held_out_rows.tolist(),
        plan.validation_image,
        _validates_every(plan),
        plan.output / PICTURES,
        world,
        batch_size=min(MOST_AT_ONCE, plan.config.loop.train_batch_size),
        on_bad_sample=plan.config.data.on_bad_sample,
        asked=asked,
    )


def open_evaluator(
    plan: Plan, job: Job, world: World, evaluation: Evaluation | None, step: int
) -> Evaluator | None:
    """None without --eval_steps."""
    if evaluation is None:
        return None
    batch_size = min(MOST_AT_ONCE, plan.config.loop.train_batch_size)
    return Evaluator(evaluation, _pipeline(plan, job), step, world, batch_size)


def _pipeline(plan: Plan, job: Job) -> Any:
    """Around the UNet in training, with a sampler of its own."""
    described, encoders = plan.described, job.encoders
    parts = described.components(encoders.vae, encoders.text_encoder)
    return build_pipeline(described.family, described.zero_null, unet=job.unet, **parts)


def _validates_every(plan: Plan) -> int:
    """Optimizer steps between two validations."""
    section = plan.config.validation
    steps = section.validation_steps
    if steps is None and section.validation_epochs == 1:
        steps = plan.described.family.validation_steps
    return steps or section.validation_epochs * plan.steps_per_epoch
