"""A run from its configuration to the exported pipeline: the plan, the job, then the loop."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import checkpoint, sharded_checkpoint
from .adapters import evaluating
from .alike import check_alike
from .best import Evaluation, open_evaluation
from .cache import CachedPairs
from .caching import open_cache
from .callbacks import Callback, Callbacks
from .captured import Captured, Update
from .checkpoint import Checkpoint
from .compiled import eager
from .config import RunConfig
from .errors import UsageError
from .export import check_push
from .job import Job
from .log import PICTURES
from .looking import facts, open_audit, open_evaluator, open_log, open_validator
from .meter import Meter
from .optim import schedule
from .output_lock import OutputLock
from .plan import Plan, claim_output, make_plan, set_numerics
from .power_ema import SNAPSHOTS
from .publish import Made, publish, versions
from .quarantine import Quarantine
from .saver import Save, Saver
from .settings import flat
from .step import Rates
from .validate import newest_picture
from .windows import Verdict, Windows
from .world import World


def train(
    config: RunConfig,
    world: World | None = None,
    *,
    command: str = "",
    stop_requested: Callable[[], bool] = lambda: False,
    callbacks: Sequence[Callback] = (),
    dry_run: bool = False,
) -> bool:
    """Trains, or goes on training, until the run is exported or asked to stop.

    Args:
        world: started; without one, this process alone trains, on the GPU if there is one.
        command: what the user typed, for the model card.
        stop_requested: asked before each step.
        callbacks: see `Callback`; all ranks have the same.
        dry_run: loads and checks everything, prints the plan and trains nothing.

    Returns: whether it came to its end; else it was asked to stop, and has written a checkpoint.

    Raises: UsageError, on all ranks alike.
    """
    if world is None:
        world = World.alone()
        world.start()
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
        return _train(plan, world, command, stop_requested, Callbacks(callbacks), dry_run=dry_run)


def _train(
    plan: Plan,
    world: World,
    command: str,
    stop_requested: Callable[[], bool],
    callbacks: Callbacks,
    *,
    dry_run: bool,
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
        run = Run(plan, world, command, cached, evaluation, callbacks)
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
        cached: CachedPairs | None = None,
        evaluation: Evaluation | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.plan, self.world, self.command = plan, world, command
        self.evaluation, self.callbacks = evaluation, callbacks or Callbacks(())
        self.job = Job(plan, world, cached)
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
        config, world, job = self.plan.config, self.world, self.job
        lr_at, total = self._schedule(), self.plan.total_steps
        with self._opened() as update:
            windows = Windows(job.source, config.loop, config.data, world, self.step, total)
            while self.step < total:
                world.doing(f"reading step {self.step + 1}")
                with self.meter.during("data"):
                    window, verdict, messages = windows.take(stop_requested())
                if verdict >= Verdict.STOP:
                    self._stop(verdict, messages)
                    return False
                self._skip(messages)
                world.doing(f"training step {self.step + 1}")
                lr = lr_at(self.step)
                rates = Rates.on(world.device, lr, *job.ema_weights(self.step + 1))
                self.meter.add(update(job.samples(window), rates))
                self.step += 1
                if self.step % config.output.log_every == 0 or self.step == total:
                    self._report(lr)
                self._look_and_save()
            self._finish()
        return True

    @contextmanager
    def _opened(self) -> Iterator[Update]:
        """What the loop works with: the update, and all that watches it."""
        plan, world, job = self.plan, self.world, self.job
        update = job.update()
        self.validator = open_validator(plan, job, world, self.callbacks)
        self.evaluator = open_evaluator(plan, job, world, self.evaluation, self.step)
        bad = plan.config.data.max_bad_fraction
        self.quarantine = Quarantine(plan.output, len(plan.train_rows), bad, world)
        with world.together():
            self.log = open_log(plan, world, self.step, self.callbacks)
            self.audit = open_audit(plan, job, world, self.step, self.log)
        self.meter = Meter(world.device, job.loss_fn.groups)
        self.saver = Saver(world, job.shards, self.log)
        self.log.history(self.step, "started", facts(plan, job, world, self.command))
        for line in job.fused:
            self.log.note(line)
        if self.step == plan.total_steps:
            self.log.note("all steps were done before; the pipeline is written again")
        try:
            yield update
        finally:
            if isinstance(update, Captured):
                update.close()
            self.saver.close()
            self.audit.close()
            self.log.close()

    def _schedule(self) -> Callable[[int], float]:
        optim = self.plan.config.optim
        peak = optim.learning_rate * (self.plan.global_batch if optim.scale_lr else 1)
        return schedule(
            optim.lr_scheduler,
            peak,
            optim.lr_warmup_steps,
            self.plan.total_steps,
            optim.lr_num_cycles,
            optim.lr_power,
        )

    def _stop(self, verdict: Verdict, messages: list[str]) -> None:
        """Ends the run before its last step. Raises: UsageError: it has no sample to go on with."""
        if self.meter.results:  # of steps that no line of the log will tell of
            self.meter.read()
            self.audit.look(self.step, self.meter.read_steps)
        cure = "; --on_bad_sample skip goes on without it"
        if verdict is not Verdict.STOP:
            self._give_up(messages[0] + (cure if verdict is Verdict.BAD_SAMPLE else ""))
        self.save()
        self.saver.finish()
        self.log.history(self.step, "stopped", self.meter.take_seconds())
        self.log.note(f"stopped after step {self.step}; the same command goes on from here")

    def _give_up(self, reason: str) -> None:
        """Raises: UsageError, after a checkpoint."""
        self.save()
        self.saver.finish()
        raise UsageError(reason)

    def _skip(self, messages: list[str]) -> None:
        """Puts rows into the quarantine. Raises: UsageError: it is full."""
        if not messages:
            return
        for message in self.quarantine.add(messages):
            self.log.note(f"skipped: {message}")
        if complaint := self.quarantine.complaint():
            self._give_up(complaint)

    def _report(self, lr: float) -> None:
        """A line of the log; here the host waits for the device."""
        values = self.meter.read() | {"lr": lr, "epoch": self.step / self.plan.steps_per_epoch}
        self.log.scalars(self.step, values)
        self.log.progress(self.step, values)
        self.saver.tell(self.step)
        if reason := self.audit.look(self.step, self.meter.read_steps):
            self._give_up(reason)

    def _look_and_save(self) -> None:
        """What is due after a step. Looks first: what a checkpoint's step logs is then whole."""
        job, output, step, total = (
            self.job,
            self.plan.config.output,
            self.step,
            self.plan.total_steps,
        )
        every = output.ema_snapshot_steps or output.checkpointing_steps
        saves = step % output.checkpointing_steps == 0 or step == total
        keeps = bool(job.kept) and (step % every == 0 or step == total)
        validator = self.validator if self.validator and self.validator.due(step, total) else None
        evaluator = self.evaluator if self.evaluator and self.evaluator.due(step, total) else None
        if not (saves or keeps or validator or evaluator):
            return
        with self.meter.paused():
            with eager(), evaluating(job.unet):  # its shapes are others
                if validator is not None:
                    self.world.doing(f"validating after step {step}")
                    validator.run(step, job.ema, self.log)
                if evaluator is not None:
                    self.world.doing(f"evaluating after step {step}")
                    saves |= evaluator.run(step, job.ema, self.log)
            if saves or keeps:
                with self.meter.during("checkpoint"):
                    self.save(whole=saves, averages=keeps)

    def _finish(self) -> None:
        with self.meter.during("checkpoint"):
            self.saver.wait()
        what = "pipeline" if self.job.adapter is None else "adapter"
        self.log.note(f"trained to step {self.step}: writing the {what} to {self.plan.output}")
        with self.meter.during("export"):
            self.export(newest_picture(self.plan.output / PICTURES, self.step))
        self.saver.finish()  # only now: if the last state could not be kept, its pipeline still is
        self.log.history(self.step, "done", self.meter.take_seconds())
        self.log.note(f"done: {self.plan.output}")

    # Checkpoints and export.

    def save(self, *, whole: bool = True, averages: bool = False) -> None:
        """Has the checkpoint of this step written, and the averages of --post_hoc_ema."""
        self.world.doing(f"saving step {self.step}")
        if not self.saver.writes:
            return
        saves, root = [], self.plan.output
        if averages:  # before the checkpoint, from which a run does not come back to it
            state = {"step": self.step, "lengths": list(self.job.kept)}
            saves.append(Save(root / SNAPSHOTS, Checkpoint(self.job.snapshot(), state), keep=None))
        if whole:
            keep = self.plan.config.output.checkpoints_total_limit
            saves.append(Save(root, self._state(), keep))
        self.saver.save(self.step, saves)

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
                "versions": versions(self.job),
            },
        )

    def export(self, picture: Path | None) -> None:
        """Writes the pipeline and its card to the output folder, and sends them if asked to."""
        self.world.doing("exporting")
        with self.job.exported() as (unet, raw_weights), self.world.together():
            if self.world.is_main:
                made = Made(self.step, self.world.size, self.command, picture)
                publish(self.plan, self.job, unet, raw_weights, made)
