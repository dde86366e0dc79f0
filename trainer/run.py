"""A run from its configuration to the exported pipeline: the plan, the job, then the loop."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, sharded_checkpoint
from .adapter_files import loading, save_adapter
from .adapters import evaluating
from .cache import CachedPairs
from .caching import open_cache
from .captured import Captured
from .checkpoint import Checkpoint
from .compiled import eager
from .config import RunConfig
from .errors import UsageError
from .export import check_push, model_card, push, save_pipeline
from .exporting import components
from .job import Job
from .log import RunLog
from .meter import Meter
from .optim import schedule
from .plan import Plan, claim_output, make_plan, set_numerics
from .power_ema import SNAPSHOTS
from .quarantine import Quarantine
from .sample import build_pipeline
from .settings import flat
from .step import Rates
from .validate import Validator, newest_picture
from .windows import Verdict, Windows
from .world import World

VERSIONS = ("fusedit", "torch", "diffusers", "transformers", "datasets")


def train(
    config: RunConfig,
    world: World,
    *,
    command: str = "",
    stop_requested: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> bool:
    """Trains, or goes on training, until the run is exported or asked to stop.

    Args:
        world: started.
        command: what the user typed, for the model card.
        stop_requested: asked before each step.
        dry_run: loads and checks everything, prints the plan and trains nothing.

    Returns: whether it came to its end; else it was asked to stop, and has written a checkpoint.

    Raises: UsageError, on all ranks alike.
    """
    with world.together():
        plan = make_plan(config, world)
        if plan.config.output.push_to_hub and world.is_main:
            check_push(plan.config.output)
    world.check_same(plan.facts(), "all machines must see the same --output_dir and dataset")
    if plan.config.precision.sharding == "hsdp":
        cure = "give each as many, or take --sharding fsdp"
        world.check_same({"numbers of ranks of their machine": world.local_size}, cure)
    set_numerics(plan.config.precision)
    cached = None
    if plan.config.data.cache_latents is not None:
        cached = open_cache(plan, world, stop_requested, dry_run=dry_run)
        if cached is None and not dry_run:
            return False
    with world.together():
        run = Run(plan, world, command, cached)
    if world.is_main:
        print(*plan.lines(world), *plan.notes, sep="\n", file=sys.stderr)
    if dry_run:
        return True
    with world.together():
        if world.is_main:
            claim_output(plan)
    return run.train(stop_requested)


class Run:
    """The parts of a run, and what is done with them between steps."""

    def __init__(self, plan: Plan, world: World, command: str, cached: CachedPairs | None) -> None:
        self.plan, self.world, self.command = plan, world, command
        self.job = Job(plan, world, cached)
        self.pictures = plan.output / "validation"
        self.step = 0  # optimizer steps done
        if plan.resume:
            state = checkpoint.read_state(plan.resume)
            self.step = state["step"]
            self.job.load_tensors(sharded_checkpoint.read(plan.resume, self.job.shards))
            self.job.loss_scale.scale.fill_(state["loss_scale"])
            self.job.loss_scale.good_steps.fill_(state["good_steps"])

    # The loop.

    def train(self, stop_requested: Callable[[], bool]) -> bool:
        """Steps until the last one; then the checkpoint, validation and export.

        Returns: False when it was asked to stop.
        """
        config, world, plan = self.plan.config, self.world, self.plan
        loop, data, optim, output = config.loop, config.data, config.optim, config.output
        peak = optim.learning_rate * (plan.global_batch if optim.scale_lr else 1)
        lr_at = schedule(
            optim.lr_scheduler,
            peak,
            optim.lr_warmup_steps,
            plan.total_steps,
            optim.lr_num_cycles,
            optim.lr_power,
        )
        job = self.job
        update = job.update()
        validator = self._validator()
        quarantine = Quarantine(plan.output, len(plan.train_rows), data.max_bad_fraction, world)
        log = self._open_log()
        for line in job.fused:
            log.note(line)
        if self.step == plan.total_steps:
            log.note("all steps were done before; the pipeline is written again")
        meter = Meter(world.device)
        windows = Windows(job.source, loop, data, world, self.step, plan.total_steps)
        try:
            while self.step < plan.total_steps:
                window, verdict, messages = windows.take(stop_requested())
                if verdict >= Verdict.STOP:
                    self.save()
                    if verdict is Verdict.NO_DATA:
                        raise UsageError(messages[0])
                    if verdict is Verdict.BAD_SAMPLE:
                        raise UsageError(f"{messages[0]}; --on_bad_sample skip goes on without it")
                    log.note(f"stopped after step {self.step}; the same command goes on from here")
                    return False
                if messages:
                    self._skip(messages, quarantine, log)
                lr = lr_at(self.step)
                rates = Rates.on(world.device, lr, *job.ema_weights(self.step + 1))
                result = update(job.samples(window), rates)
                self.step += 1
                meter.add(result)
                last = self.step == plan.total_steps
                if self.step % output.log_every == 0 or last:
                    values = meter.read() | {"lr": lr, "epoch": self.step / plan.steps_per_epoch}
                    log.scalars(self.step, values)
                    log.progress(self.step, values)
                shows = validator is not None and validator.due(self.step, plan.total_steps)
                saves = self.step % output.checkpointing_steps == 0 or last
                every = output.ema_snapshot_steps or output.checkpointing_steps
                keeps = bool(job.kept) and (self.step % every == 0 or last)
                if not (shows or saves or keeps):
                    continue
                with meter.paused():  # validated first: what a checkpoint's step logs is then whole
                    if validator is not None and shows:
                        with eager(), evaluating(job.unet):  # its shapes are others
                            validator.run(self.step, job.ema, log)
                    if keeps:  # before the checkpoint, from which a run does not come back to it
                        self.save_snapshot()
                    if saves:
                        self.save()
            what = "pipeline" if job.adapter is None else "adapter"
            log.note(f"trained to step {self.step}: writing the {what} to {plan.output}")
            self.export(newest_picture(self.pictures, self.step))
            log.note(f"done: {plan.output}")
            return True
        finally:
            if isinstance(update, Captured):
                update.close()
            log.close()

    def _skip(self, messages: list[str], quarantine: Quarantine, log: RunLog) -> None:
        """Puts rows into the quarantine. Raises: UsageError, after a checkpoint: it is full."""
        for message in quarantine.add(messages):
            log.note(f"skipped: {message}")
        complaint = quarantine.complaint()
        if complaint is not None:
            self.save()
            raise UsageError(complaint)

    # Checkpoints and export.

    def save(self) -> None:
        """Writes the checkpoint of this step; all ranks wait for it."""
        root, keep = self.plan.output, self.plan.config.output.checkpoints_total_limit
        if self.job.shards is not None:
            made = self._state()
            sharded_checkpoint.save(root, self.step, made, keep, self.job.shards, self.world)
            return
        with self.world.together():
            if self.world.is_main:
                checkpoint.save(root, self.step, self._state(), keep)

    def save_snapshot(self) -> None:
        """Writes the averages of --post_hoc_ema; all ranks wait for it."""
        with self.world.together():
            if self.world.is_main:
                state = {"step": self.step, "lengths": list(self.job.kept)}
                kept = Checkpoint(self.job.snapshot(), state)
                checkpoint.save(self.plan.output / SNAPSHOTS, self.step, kept, keep=None)

    def _state(self) -> Checkpoint:
        scale = self.job.loss_scale
        return Checkpoint(
            self.job.tensors(),
            {
                "step": self.step,
                "position": self.step * self.plan.global_batch,
                "global_batch": self.plan.global_batch,
                "loss_scale": scale.scale.item(),
                "good_steps": scale.good_steps.item(),
                "settings": flat(self.plan.config),
                "versions": self._versions(),
            },
        )

    def _versions(self) -> dict[str, str]:
        """Of the packages that decide what a run computes."""
        names = (*VERSIONS, "peft") if self.job.adapter is not None else VERSIONS
        return {name: version(name) for name in names}

    def export(self, picture: Path | None) -> None:
        """Writes the pipeline and its card to the output folder, and sends them if asked to."""
        with self.job.exported() as (unet, raw_weights), self.world.together():
            if self.world.is_main:
                self._export(unet, raw_weights, picture)

    def _export(
        self, unet: Any, raw_weights: dict[str, Tensor] | None, picture: Path | None
    ) -> None:
        plan, config, adapter = self.plan, self.plan.config, self.job.adapter
        family, lines = plan.described.family, None
        if adapter is not None:
            lines = loading(plan.output, family, config.model)
            save_adapter(plan.output, family, unet, adapter, self.job.named, raw_weights)
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
            command=self.command,
            settings=flat(config) | {"ranks": self.world.size, "samples a step": plan.global_batch},
            base=str(config.model.pretrained_model_name_or_path),
            dataset=str(config.data.dataset_name or config.data.train_data_dir),
            versions=self._versions(),
            steps=self.step,
            picture=picture,
            loading=lines,
        )
        if config.output.push_to_hub:
            push(config.output, f"fusedit: step {self.step}")

    # Parts that only the loop needs.

    def _validator(self) -> Validator | None:
        plan, section, job = self.plan, self.plan.config.validation, self.job
        if not len(plan.held_out_rows) and plan.validation_image is None:
            return None
        described, encoders = plan.described, job.encoders
        parts = described.components(encoders.vae, encoders.text_encoder)
        pipeline = build_pipeline(described.family, described.zero_null, unet=job.unet, **parts)
        return Validator(
            section,
            pipeline,
            job.encoders,
            job.loss_fn,
            job.pairs,
            plan.held_out_rows.tolist(),
            plan.validation_image,
            self._validates_every(),
            self.pictures,
            self.world,
            batch_size=min(8, plan.config.loop.train_batch_size),
            on_bad_sample=plan.config.data.on_bad_sample,
        )

    def _validates_every(self) -> int:
        """Optimizer steps between two validations."""
        section = self.plan.config.validation
        steps = section.validation_steps
        if steps is None and section.validation_epochs == 1:
            steps = self.plan.described.family.validation_steps
        return steps or section.validation_epochs * self.plan.steps_per_epoch

    def _open_log(self) -> RunLog:
        if not self.world.is_main:
            return RunLog.silent()
        output = self.plan.config.output
        return RunLog(
            self.plan.output,
            output.logging_dir,
            output.trackers,
            flat(self.plan.config),
            self.plan.output.resolve().name,
            self.plan.total_steps,
            self.step,
        )
