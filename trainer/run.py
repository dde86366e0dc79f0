"""A run from its configuration to the exported pipeline: builds the parts, then the loop."""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import nullcontext
from enum import IntEnum
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .cache import CachedBatch, CachedPairs
from .caching import open_cache
from .checkpoint import Checkpoint
from .compiled import Parts, check_gradients, compile_unet, eager
from .config import PrecisionConfig, RunConfig
from .data import EditPairs, PixelBatch, collate, make_tokenize
from .diffusion import Diffusion
from .ema import Ema
from .encoders import Encoders, Samples
from .errors import UsageError
from .export import check_push, load_safety, model_card, push, save_pipeline
from .log import RunLog
from .loss import EditLoss
from .meter import Meter
from .optim import make_optimizer, schedule
from .plan import Plan, claim_output, make_plan
from .pretrained import load_encoders, load_unet
from .sample import build_pipeline
from .settings import flat
from .step import LossScale, discarded_step, train_step
from .unet import prepare_unet
from .validate import Validator, newest_picture
from .windows import Verdict, Windows
from .world import World

VERSIONS = ("fusedit", "torch", "diffusers", "transformers", "datasets")


class Ended(IntEnum):
    """How a run ended."""

    DONE = 0
    STOPPED = 1  # asked to by a signal, after a checkpoint


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
    world.check_same(plan.facts(), "all machines must see the same --output_dir and dataset")
    _set_numerics(plan.config.precision)
    cached = None
    if plan.config.data.cache_latents is not None:
        cached = open_cache(plan, world, stop_requested, dry_run=dry_run)
        if cached is None and not dry_run:
            return Ended.STOPPED
    with world.together():
        run = Run(plan, world, command, cached)
    if world.is_main:
        print(*plan.lines(world), *plan.notes, sep="\n", file=sys.stderr)
    if dry_run:
        return Ended.DONE
    with world.together():
        if world.is_main:
            claim_output(plan)
    return run.train(stop_requested)


def build_cache(
    config: RunConfig,
    world: World,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> Ended:
    """Encodes what --cache_latents lacks for a run of these settings; trains nothing.

    Args:
        dry_run: says what is wanting, and writes nothing.

    Raises: UsageError, on all ranks alike.
    """
    config.check_complete()
    if config.data.cache_latents is None:
        raise UsageError("--cache_latents is missing: the folder or URL to write the cache to")
    # What another run left in --output_dir does not matter, and is not touched.
    output = dataclasses.replace(config.output, overwrite=True, resume_from_checkpoint=None)
    with world.together():
        plan = make_plan(dataclasses.replace(config, output=output), world)
    world.check_same(plan.facts(), "all machines must see the same dataset")
    _set_numerics(plan.config.precision)
    cached = open_cache(plan, world, stop_requested, dry_run=dry_run)
    return Ended.STOPPED if cached is None and not dry_run else Ended.DONE


class Run:
    """The parts of a run, and what is done with them between steps."""

    def __init__(self, plan: Plan, world: World, command: str, cached: CachedPairs | None) -> None:
        config, device = plan.config, world.device
        self.plan, self.world, self.command = plan, world, command
        self.kernels_run = device.type == "cuda" and not config.precision.plain
        self.unet, self.fused = prepare_unet(
            load_unet(config.model),
            device,
            gradient_checkpointing=config.precision.gradient_checkpointing,
            fused=self.kernels_run,
            attention=config.precision.attention,
        )
        self.compiled = config.precision.compile
        if self.compiled == "auto":
            self.compiled = "blocks" if self.kernels_run else "off"
        tokenize = make_tokenize(plan.described.tokenizer)
        self.cached = cached
        self.loss_fn = EditLoss(
            Diffusion.from_scheduler(
                plan.described.scheduler, plan.described.vae["scaling_factor"], device
            ),
            config.conditioning.rates,
            self.encoders.null_text if cached is None else cached.null_text().to(device),
            config.loop.seed,
            plan.dtype,
        )
        named = list(self.unet.named_parameters())
        self.ema = Ema(named, config.optim.ema_decay) if config.optim.use_ema else None
        self.optimizer = make_optimizer(named, config.optim, self.ema, fused=self.kernels_run)
        self.loss_scale = LossScale(plan.dtype is torch.float16, device)
        self.pairs = EditPairs(
            plan.rows, plan.train_rows, config.data, config.loop.seed, plan.global_batch, tokenize
        )
        self.pictures = plan.output / "validation"
        if self.compiled != "off":
            self._compile(self.compiled)
        self.step = 0  # optimizer steps done
        if plan.resume:
            self._load_state(checkpoint.read(plan.resume))

    def _compile(self, parts: Parts) -> None:
        """Compiles the UNet, with proof; by the weights it starts from, also where it resumes."""
        compile_unet(self.unet, parts)
        check_gradients(self.unet, self.loss_fn, self._blank(), self.plan.dtype, parts)

    def _blank(self) -> Samples:
        """A micro-batch of weight 0, in the shapes of all others."""
        count = self.plan.config.loop.train_batch_size
        batch = self.cached.blank(count) if self.cached else collate([self.pairs.blank()] * count)
        return self._samples(batch)

    # The loop.

    def train(self, stop_requested: Callable[[], bool]) -> Ended:
        """Steps until the last one; then the checkpoint, validation and export."""
        config, world, plan = self.plan.config, self.world, self.plan
        loop, data, optim, output = config.loop, config.data, config.optim, config.output
        peak = optim.learning_rate * (plan.global_batch if optim.scale_lr else 1)
        lr_at = schedule(optim.lr_scheduler, peak, optim.lr_warmup_steps, plan.total_steps)
        model = self._data_parallel()
        validator = self._validator()
        log = self._open_log()
        for line in self.fused:
            log.note(line)
        if self.step == plan.total_steps:
            log.note("all steps were done before; the pipeline is written again")
        meter = Meter(world.device)
        source = self.pairs if self.cached is None else self.cached
        windows = Windows(source, loop, data, world, self.step, plan.total_steps)
        try:
            while self.step < plan.total_steps:
                window, verdict, messages = windows.take(stop_requested())
                if verdict >= Verdict.STOP:
                    self.save()
                    if verdict is Verdict.BAD_SAMPLE:
                        raise UsageError(f"{messages[0]}; --on_bad_sample skip goes on without it")
                    log.note(f"stopped after step {self.step}; the same command goes on from here")
                    return Ended.STOPPED
                for message in messages:
                    log.note(f"skipped: {message}")
                lr = lr_at(self.step)
                result = train_step(
                    model,
                    map(self._samples, window),
                    loop.gradient_accumulation_steps,
                    self.loss_fn,
                    self.optimizer,
                    self.loss_scale,
                    world,
                    slots=plan.global_batch // world.size,
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
                with meter.paused():  # validated first: what a checkpoint's step logs is then whole
                    if validator is not None and validator.due(self.step, plan.total_steps):
                        with eager():  # its shapes are others
                            validator.run(self.step, self.ema, log)
                    if self.step % output.checkpointing_steps == 0 or last:
                        self.save()
            log.note(f"trained to step {self.step}: writing the pipeline to {plan.output}")
            self.export(newest_picture(self.pictures, self.step))
            log.note(f"done: {plan.output}")
            return Ended.DONE
        finally:
            log.close()

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
        discarded_step(model, self._blank(), self.loss_fn, self.optimizer)
        return model

    def _samples(self, batch: PixelBatch | CachedBatch) -> Samples:
        """What the step trains on, on the device."""
        if isinstance(batch, CachedBatch):
            return batch.to_samples(self.world.device)
        return self.encoders.encode(batch)

    @cached_property
    def encoders(self) -> Encoders:
        """On the device once they are asked for: a run from a cache only validates with them."""
        vae, text_encoder = load_encoders(self.plan.config.model)
        null_tokens = make_tokenize(self.plan.described.tokenizer)("")[None]
        return Encoders(vae, text_encoder, null_tokens, self.world.device, self.plan.dtype)

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
        self.unet.load_state_dict(resumed.tensors["unet"])
        self.optimizer.load_state(resumed.tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_state(resumed.tensors["ema"])
        self.loss_scale.scale.fill_(resumed.state["loss_scale"])
        self.loss_scale.good_steps.fill_(resumed.state["good_steps"])

    def export(self, picture: Path | None) -> None:
        """Writes the pipeline and its card to the output folder, and sends them if asked to."""
        with self.world.together():
            if self.world.is_main:
                self._export(picture)

    def _export(self, picture: Path | None) -> None:
        plan, config = self.plan, self.plan.config
        vae, text_encoder = load_encoders(config.model)  # ours may be rounded to half precision
        with self.ema.in_place() if self.ema is not None else nullcontext():
            save_pipeline(
                plan.output,
                unet=self.unet,
                components={
                    "vae": vae,
                    "text_encoder": text_encoder,
                    "tokenizer": plan.described.tokenizer,
                    "scheduler": plan.described.make_scheduler(),
                    **load_safety(config.model, torch.float32),
                },
                raw_weights=self.ema.averages if self.ema is not None else None,  # exchanged
                dtype=torch.float32,
            )
        model_card(
            plan.output,
            command=self.command,
            settings=flat(config) | {"ranks": self.world.size, "samples a step": plan.global_batch},
            base=str(config.model.pretrained_model_name_or_path),
            dataset=str(config.data.dataset_name or config.data.train_data_dir),
            versions=versions(),
            steps=self.step,
            picture=picture,
        )
        if config.output.push_to_hub:
            push(config.output, f"fusedit: step {self.step}")

    # Parts that only the loop needs.

    def _validator(self) -> Validator | None:
        plan, section = self.plan, self.plan.config.validation
        if not len(plan.held_out_rows) and plan.validation_image is None:
            return None
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
            self.pictures,
            self.world,
            batch_size=min(8, plan.config.loop.train_batch_size),
            on_bad_sample=plan.config.data.on_bad_sample,
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
