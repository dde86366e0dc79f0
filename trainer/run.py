"""A run from its configuration to the exported pipeline: builds the parts, then the loop."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .checkpoint import Checkpoint
from .config import PrecisionConfig, RunConfig, flat
from .data import EditPairs, PixelBatch, StepSampler, collate, make_loader, make_tokenize
from .diffusion import Diffusion
from .ema import Ema
from .encoders import Encoders
from .errors import UsageError
from .export import check_push, load_safety, model_card, push, save_pipeline
from .log import RunLog
from .loss import EditLoss
from .meter import Meter
from .optim import AdamW, schedule
from .plan import Plan, claim_output, make_plan
from .pretrained import load_models
from .sample import build_pipeline
from .step import LossScale, discarded_step, train_step
from .unet import prepare_unet
from .validate import Validator
from .world import World

VERSIONS = ("fusedit", "torch", "diffusers", "transformers", "datasets")


class Ended(IntEnum):
    """How a run ended."""

    DONE = 0
    STOPPED = 1  # asked to by a signal, after a checkpoint


class Verdict(IntEnum):
    """What the ranks agree on before each step; the highest wins."""

    GO = 0
    SKIPPED = 1  # some rank has an unreadable sample and may go on without it
    STOP = 2
    BAD_SAMPLE = 3  # some rank has an unreadable sample and must not


def train(
    config: RunConfig,
    world: World,
    *,
    command: str = "",
    stop_requested: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> Ended:
    """Trains, or goes on training, until the run is exported or asked to stop.

    Args:
        world: started.
        command: what the user typed, for the model card.
        stop_requested: asked before each step.
        dry_run: loads and checks everything, prints the plan and trains nothing.

    Raises: UsageError, on all ranks alike.
    """
    with world.together():
        plan = make_plan(config, world)
        if plan.config.output.push_to_hub and world.is_main:
            check_push(plan.config.output)
    with world.together():
        run = Run(plan, world, command)
    if world.is_main:
        print(*plan.lines(world), *plan.notes, sep="\n", file=sys.stderr)
    if dry_run:
        return Ended.DONE
    with world.together():
        if world.is_main:
            claim_output(plan)
    return run.train(stop_requested)


class Run:
    """The parts of a run, and what is done with them between steps."""

    def __init__(self, plan: Plan, world: World, command: str) -> None:
        config, device = plan.config, world.device
        self.plan, self.world, self.command = plan, world, command
        _set_numerics(config.precision)
        models = load_models(config.model)
        self.unet = prepare_unet(
            models.unet, device, gradient_checkpointing=config.precision.gradient_checkpointing
        )
        tokenize = make_tokenize(plan.described.tokenizer)
        self.encoders = Encoders(
            models.vae, models.text_encoder, tokenize("")[None], device, plan.dtype
        )
        self.loss_fn = EditLoss(
            Diffusion.from_scheduler(
                plan.described.scheduler, models.vae.config["scaling_factor"], device
            ),
            config.conditioning.rates,
            self.encoders.null_text,
            config.loop.seed,
            plan.dtype,
        )
        self.optimizer = AdamW(self.unet.named_parameters(), config.optim)
        self.loss_scale = LossScale(plan.dtype is torch.float16, device)
        self.pairs = EditPairs(
            plan.rows, plan.train_rows, config.data, config.loop.seed, plan.global_batch, tokenize
        )
        self.step = 0  # optimizer steps done
        resumed = checkpoint.read(plan.resume) if plan.resume else None
        if resumed:
            self.unet.load_state_dict(resumed.tensors["unet"])
        self.ema = (
            Ema(self.unet.named_parameters(), config.optim.ema_decay)
            if config.optim.use_ema
            else None
        )
        if resumed:
            self._load_state(resumed)

    # The loop.

    def train(self, stop_requested: Callable[[], bool]) -> Ended:
        """Steps until the last one; then the checkpoint, validation and export."""
        config, world, plan = self.plan.config, self.world, self.plan
        loop, optim, output = config.loop, config.optim, config.output
        peak = optim.learning_rate * (plan.global_batch if optim.scale_lr else 1)
        lr_factor = schedule(optim.lr_scheduler, optim.lr_warmup_steps, plan.total_steps)
        model = self._data_parallel()
        validator = self._validator()
        log = self._open_log()
        meter = Meter(world.device)
        windows = self._windows()
        try:
            while self.step < plan.total_steps:
                window = next(windows)
                verdict, messages = self._agree(window, stop_requested)
                if verdict >= Verdict.STOP:
                    self.save()
                    if verdict is Verdict.BAD_SAMPLE:
                        raise UsageError(f"{messages[0]}; --on_bad_sample skip goes on without it")
                    log.note(f"stopped after step {self.step}; the same command goes on from here")
                    return Ended.STOPPED
                for message in messages:
                    log.note(f"skipped: {message}")
                lr = peak * lr_factor(self.step)
                result = train_step(
                    model,
                    map(self.encoders.encode, window),
                    loop.gradient_accumulation_steps,
                    self.loss_fn,
                    self.optimizer,
                    self.ema,
                    self.loss_scale,
                    world,
                    number=self.step + 1,
                    lr=lr,
                    max_grad_norm=optim.max_grad_norm,
                )
                self.step += 1
                meter.add(result)
                last = self.step == plan.total_steps
                if self.step % output.log_every == 0 or last:
                    values = meter.read() | {"lr": lr, "epoch": self.step / plan.steps_per_epoch}
                    log.scalars(self.step, values)
                    log.progress(self.step, values)
                if self.step % output.checkpointing_steps == 0 or last:
                    with meter.paused():
                        self.save()
                if validator.due(self.step, plan.total_steps):
                    with meter.paused():
                        validator.run(self.step, self.ema, log)
            log.note(f"trained to step {self.step}: writing the pipeline to {plan.output}")
            self.export(validator.newest_picture, validator.newest_losses)
            log.note(f"done: {plan.output}")
            return Ended.DONE
        finally:
            log.close()

    def _windows(self) -> Iterator[list[PixelBatch]]:
        """This rank's micro-batches of each optimizer step still to do."""
        loop, data, world = self.plan.config.loop, self.plan.config.data, self.world
        sampler = StepSampler(
            first_step=self.step,
            last_step=self.plan.total_steps,
            rank=world.rank,
            ranks=world.size,
            micro_batch=loop.train_batch_size,
            micro_steps=loop.gradient_accumulation_steps,
        )
        loader = iter(
            make_loader(
                self.pairs,
                sampler,
                workers=data.dataloader_num_workers,
                prefetch=data.dataloader_prefetch,
                pin_memory=world.device.type == "cuda",
            )
        )
        for _ in range(self.step, self.plan.total_steps):
            yield [next(loader) for _ in range(loop.gradient_accumulation_steps)]

    def _agree(
        self, window: list[PixelBatch], stop_requested: Callable[[], bool]
    ) -> tuple[Verdict, list[str]]:
        """What all ranks do with this window, and what is wrong with its samples on any rank."""
        errors = [error for batch in window for error in batch.errors]
        verdict = Verdict.STOP if stop_requested() else Verdict.GO
        if errors:
            may_skip = self.plan.config.data.on_bad_sample == "skip"
            verdict = max(verdict, Verdict.SKIPPED if may_skip else Verdict.BAD_SAMPLE)
        verdict = Verdict(self.world.highest(verdict))
        if verdict in (Verdict.GO, Verdict.STOP):
            return verdict, []
        return verdict, [text for text in self.world.texts("; ".join(errors)) if text]

    def _data_parallel(self) -> nn.Module:
        """The UNet as the loop calls it: with several ranks, in DDP with its buckets settled."""
        if self.world.size == 1:
            return self.unet
        on_gpu = self.world.device.type == "cuda"
        model = DistributedDataParallel(
            self.unet,
            device_ids=[self.world.local_rank] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
        blank = collate([self.pairs.blank()] * self.plan.config.loop.train_batch_size)
        discarded_step(model, self.encoders.encode(blank), self.loss_fn, self.optimizer)
        return model

    # Checkpoints and export.

    def save(self) -> None:
        """Writes the checkpoint of this step; all ranks wait for it."""
        with self.world.together():
            if self.world.is_main:
                keep = self.plan.config.output.checkpoints_total_limit
                checkpoint.save(self.plan.output, self.step, self._state(), keep)

    def _state(self) -> Checkpoint:
        tensors = {"unet": self.unet.state_dict(), "optimizer": self.optimizer.state()}
        if self.ema is not None:
            tensors["ema"] = self.ema.averages
        return Checkpoint(
            tensors,
            {
                "step": self.step,
                "position": self.step * self.plan.global_batch,
                "global_batch": self.plan.global_batch,
                "loss_scale": self.loss_scale.scale.item(),
                "good_steps": self.loss_scale.good_steps.item(),
                "settings": flat(self.plan.config),
                "versions": versions(),
            },
        )

    def _load_state(self, resumed: Checkpoint) -> None:
        self.step = resumed.state["step"]
        self.optimizer.load_state(resumed.tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_state(resumed.tensors["ema"])
        self.loss_scale.scale.fill_(resumed.state["loss_scale"])
        self.loss_scale.good_steps.fill_(resumed.state["good_steps"])

    def export(self, picture: Path | None, metrics: dict[str, float]) -> None:
        """Writes the pipeline and its card to the output folder, and sends them if asked to."""
        with self.world.together():
            if self.world.is_main:
                self._export(picture, metrics)

    def _export(self, picture: Path | None, metrics: dict[str, float]) -> None:
        plan, config = self.plan, self.plan.config
        raw_weights = None
        if self.ema is not None:
            raw_weights = {name: value.clone() for name, value in self.unet.state_dict().items()}
        with self.ema.in_place() if self.ema is not None else nullcontext():
            save_pipeline(
                plan.output,
                unet=self.unet,
                components={
                    "vae": self.encoders.vae,
                    "text_encoder": self.encoders.text_encoder,
                    "tokenizer": plan.described.tokenizer,
                    "scheduler": plan.described.make_scheduler(),
                    **load_safety(config.model, torch.float32),
                },
                raw_weights=raw_weights,
                dtype=torch.float32,
            )
        model_card(
            plan.output,
            command=self.command,
            settings=flat(config),
            base=str(config.model.pretrained_model_name_or_path),
            dataset=str(config.data.dataset_name or config.data.train_data_dir),
            versions=versions(),
            steps=self.step,
            picture=picture,
            metrics=metrics,
        )
        if config.output.push_to_hub:
            push(config.output, f"fusedit: step {self.step}")

    # Parts that only the loop needs.

    def _validator(self) -> Validator:
        plan, section = self.plan, self.plan.config.validation
        pipeline = build_pipeline(
            self.unet,
            self.encoders.vae,
            self.encoders.text_encoder,
            plan.described.tokenizer,
            plan.described.make_scheduler(),
        )
        return Validator(
            section,
            pipeline,
            self.encoders,
            self.loss_fn,
            self.pairs,
            plan.held_out_rows.tolist(),
            plan.validation_image,
            section.validation_steps or section.validation_epochs * plan.steps_per_epoch,
            plan.output / "validation",
            self.world,
        )

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


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    return {name: version(name) for name in VERSIONS}


def _set_numerics(precision: PrecisionConfig) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision.allow_tf32
    torch.use_deterministic_algorithms(precision.deterministic)
    torch.backends.cudnn.benchmark = not precision.deterministic
