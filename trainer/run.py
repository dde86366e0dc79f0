"""A run from its configuration to the exported pipeline: the plan, the job, then the loop."""

import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, sharded_checkpoint
from .adapter_files import loading, save_adapter
from .adapters import evaluating
from .alike import check_alike
from .audit import AUDIT_FILE, Audit, rows_of_step
from .best import Evaluation, Evaluator, open_evaluation
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
from .output_lock import OutputLock
from .plan import Plan, claim_output, make_plan, set_numerics
from .power_ema import SNAPSHOTS
from .quarantine import Quarantine
from .sample import build_pipeline
from .saver import Save, Saver
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
    with OutputLock(Path(config.output.output_dir)) as lock:
        locks = world.is_main and not dry_run
        with world.together():
            if locks:
                lock.take_if_there()
            plan = make_plan(config, world)
            if plan.config.output.push_to_hub and world.is_main:
                check_push(plan.config.output)
            if locks:
                lock.take()
        return _train(plan, world, command, stop_requested, dry_run=dry_run)


def _train(
    plan: Plan, world: World, command: str, stop_requested: Callable[[], bool], *, dry_run: bool
) -> bool:
    """As `train`, in a folder that no other run works in."""
    check_alike(plan, world)
    if plan.config.precision.sharding == "hsdp":
        cure = "give each as many, or take --sharding fsdp"
        world.check_same({"numbers of ranks of their machine": world.local_size}, cure)
    set_numerics(plan.config.precision)
    cached = None
    if plan.config.data.cache_latents is not None:
        cached = open_cache(plan, world, stop_requested, dry_run=dry_run)
        if cached is None and not dry_run:
            return False
    evaluation = open_evaluation(plan, world)
    with world.together():
        run = Run(plan, world, command, cached, evaluation)
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

    def __init__(
        self,
        plan: Plan,
        world: World,
        command: str,
        cached: CachedPairs | None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.plan, self.world, self.command = plan, world, command
        self.evaluation = evaluation
        self.job = Job(plan, world, cached)
        self.pictures = plan.output / "validation"
        self.step = 0  # optimizer steps done
        if plan.resume:
            state = checkpoint.read_state(plan.resume)
            self.step = state["step"]
            self.job.load_tensors(sharded_checkpoint.read(plan.resume, self.job.shards))
            self.job.loss_scale.scale.fill_(state["loss_scale"])
            self.job.loss_scale.good_steps.fill_(state["good_steps"])
            self.job.guard.usual.fill_(state.get("usual_loss", 0.0))  # older ones have none
            self.job.guard.steps.fill_(state.get("usual_steps", 0))

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
        validator, evaluator = self._validator(), self._evaluator()
        with world.together():
            log = self._open_log()
            audit = self._audit(log)
            quarantine = Quarantine(plan.output, len(plan.train_rows), data.max_bad_fraction, world)
        for line in job.fused:
            log.note(line)
        if self.step == plan.total_steps:
            log.note("all steps were done before; the pipeline is written again")
        meter, saver = Meter(world.device), Saver(world, job.shards, log)
        windows = Windows(job.source, loop, data, world, self.step, plan.total_steps)
        try:
            while self.step < plan.total_steps:
                world.doing(f"reading step {self.step + 1}")
                window, verdict, messages = windows.take(stop_requested())
                if verdict >= Verdict.STOP:
                    if meter.results:  # of steps that no line of the log will tell of
                        meter.read()
                        audit.look(self.step, meter.read_steps)
                    self.save(saver)
                    saver.finish()
                    if verdict is Verdict.NO_DATA:
                        raise UsageError(messages[0])
                    if verdict is Verdict.BAD_SAMPLE:
                        raise UsageError(f"{messages[0]}; --on_bad_sample skip goes on without it")
                    log.note(f"stopped after step {self.step}; the same command goes on from here")
                    return False
                if messages:
                    self._skip(messages, quarantine, saver, log)
                world.doing(f"training step {self.step + 1}")
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
                    saver.tell(self.step)
                    if reason := audit.look(self.step, meter.read_steps):
                        self.save(saver)
                        saver.finish()
                        raise UsageError(reason)
                shows = validator is not None and validator.due(self.step, plan.total_steps)
                saves = self.step % output.checkpointing_steps == 0 or last
                every = output.ema_snapshot_steps or output.checkpointing_steps
                keeps = bool(job.kept) and (self.step % every == 0 or last)
                judges = evaluator is not None and evaluator.due(self.step, plan.total_steps)
                if not (shows or saves or keeps or judges):
                    continue
                with meter.paused():  # validated first: what a checkpoint's step logs is then whole
                    if validator is not None and shows:
                        world.doing(f"validating after step {self.step}")
                        with eager(), evaluating(job.unet):  # its shapes are others
                            validator.run(self.step, job.ema, log)
                    if evaluator is not None and judges:
                        world.doing(f"evaluating after step {self.step}")
                        with eager(), evaluating(job.unet):
                            saves |= evaluator.run(self.step, job.ema, log)
                    if saves or keeps:
                        self.save(saver, whole=saves, averages=keeps)
            saver.wait()
            what = "pipeline" if job.adapter is None else "adapter"
            log.note(f"trained to step {self.step}: writing the {what} to {plan.output}")
            self.export(newest_picture(self.pictures, self.step))
            saver.finish()  # only now: if the last state could not be kept, its pipeline still is
            log.note(f"done: {plan.output}")
            return True
        finally:
            if isinstance(update, Captured):
                update.close()
            saver.close()
            audit.close()
            log.close()

    def _skip(self, messages: list[str], quarantine: Quarantine, saver: Saver, log: RunLog) -> None:
        """Puts rows into the quarantine. Raises: UsageError, after a checkpoint: it is full."""
        for message in quarantine.add(messages):
            log.note(f"skipped: {message}")
        complaint = quarantine.complaint()
        if complaint is not None:
            self.save(saver)
            saver.finish()
            raise UsageError(complaint)

    # Checkpoints and export.

    def save(self, saver: Saver, *, whole: bool = True, averages: bool = False) -> None:
        """Has the checkpoint of this step written, and the averages of --post_hoc_ema."""
        self.world.doing(f"saving step {self.step}")
        if not saver.writes:
            return
        saves, root = [], self.plan.output
        if averages:  # before the checkpoint, from which a run does not come back to it
            state = {"step": self.step, "lengths": list(self.job.kept)}
            saves.append(Save(root / SNAPSHOTS, Checkpoint(self.job.snapshot(), state), keep=None))
        if whole:
            keep = self.plan.config.output.checkpoints_total_limit
            saves.append(Save(root, self._state(), keep))
        saver.save(self.step, saves)

    def _state(self) -> Checkpoint:
        scale, guard = self.job.loss_scale, self.job.guard
        return Checkpoint(
            self.job.tensors(),
            {
                "step": self.step,
                "position": self.step * self.plan.global_batch,
                "global_batch": self.plan.global_batch,
                "loss_scale": scale.scale.item(),
                "good_steps": scale.good_steps.item(),
                "usual_loss": guard.usual.item(),
                "usual_steps": guard.steps.item(),
                "settings": flat(self.plan.asked),
                "versions": self._versions(),
            },
        )

    def _versions(self) -> dict[str, str]:
        """Of the packages that decide what a run computes."""
        names = (*VERSIONS, "peft") if self.job.adapter is not None else VERSIONS
        return {name: version(name) for name in names}

    def export(self, picture: Path | None) -> None:
        """Writes the pipeline and its card to the output folder, and sends them if asked to."""
        self.world.doing("exporting")
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
        return Validator(
            section,
            self._pipeline(),
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

    def _evaluator(self) -> Evaluator | None:
        if self.evaluation is None:
            return None
        batch_size = min(8, self.plan.config.loop.train_batch_size)
        return Evaluator(self.evaluation, self._pipeline(), self.step, self.world, batch_size)

    def _pipeline(self) -> Any:
        """Around the UNet in training, with a sampler of its own."""
        described, encoders = self.plan.described, self.job.encoders
        parts = described.components(encoders.vae, encoders.text_encoder)
        unet = self.job.unet
        return build_pipeline(described.family, described.zero_null, unet=unet, **parts)

    def _validates_every(self) -> int:
        """Optimizer steps between two validations."""
        section = self.plan.config.validation
        steps = section.validation_steps
        if steps is None and section.validation_epochs == 1:
            steps = self.plan.described.family.validation_steps
        return steps or section.validation_epochs * self.plan.steps_per_epoch

    def _audit(self, log: RunLog) -> Audit:
        path = self.plan.output / AUDIT_FILE if self.world.is_main else None
        rows_of = partial(rows_of_step, self.job.pairs.order, self.plan.global_batch)
        return Audit(path, self.step, rows_of, log, self.plan.config.loop.max_skips)

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
