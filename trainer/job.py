"""What a run trains and trains with: UNet, loss, optimizer, averages, and its update."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .adapters import load_trained
from .cache import CachedBatch, CachedPairs
from .captured import Captured, Update
from .compiled import allow_forms, check_gradients, compile_unet
from .config import Compile
from .data import EditPairs, PixelBatch, Source, collate, make_tokenize
from .diffusion import Diffusion
from .ema import Ema
from .encoders import Encoders, Samples, SideStream
from .export import model_of
from .families import Text
from .loss import EditLoss
from .masters import reduce_in_bf16
from .optim import MOMENTS, make_optimizer
from .plan import Plan
from .power_ema import PowerEma, part_of
from .pretrained import load_encoders, load_unet
from .sharding import Shards, compile_blocks, make_mesh
from .step import LossScale, SpikeGuard, discarded_step, train_step
from .unet import prepare_unet
from .world import World


class Job:
    """The parts that an update moves, or needs; all of them on the device.

    Args:
        cached: what is trained from, where it is not encoded anew.

    Raises: UsageError: what was asked for cannot be compiled, or the model cannot be read.
    """

    shards: Shards | None = None  # of the UNet, where --sharding divides it

    def __init__(self, plan: Plan, world: World, cached: CachedPairs | None) -> None:
        config, device = plan.config, world.device
        self.plan, self.world = plan, world
        # Here: all ranks make it together, and nothing has failed yet on one of them.
        sharding = config.precision.sharding
        mesh = make_mesh(sharding, world) if sharding != "ddp" and world.size > 1 else None
        self.kernels_run = device.type == "cuda" and not config.precision.plain
        self.unet, self.masters, self.fused, self.adapter = prepared = prepare_unet(
            load_unet(config.model),
            device,
            gradient_checkpointing=config.precision.gradient_checkpointing,
            checkpointing_keeps=config.precision.checkpointing_keeps,
            checkpointing_levels=config.precision.checkpointing_levels,
            fused=self.kernels_run,
            attention=config.precision.attention,
            param_dtype=config.precision.param_dtype,
            sums=not self.kernels_run or config.sums_gradients(world.size),
            adapter=config.adapter,
            dtype=plan.dtype,
            seed=config.loop.seed,
            sharded=mesh is not None,
        )
        if mesh is not None:
            section = config.precision
            self.shards = Shards(
                self.unet,
                mesh,
                param_dtype=MOMENTS[section.param_dtype],
                reduce_dtype=MOMENTS[section.all_reduce_dtype],
            )
        self.tokenize = make_tokenize(plan.described.tokenizers)
        self.cached = cached
        self.loss_fn = EditLoss(
            Diffusion.from_scheduler(
                plan.described.scheduler,
                plan.described.vae["scaling_factor"],
                device,
                config.diffusion,
            ),
            config.conditioning.rates,
            plan.described.null_text(self._empty_text()),
            config.loop.seed,
            plan.dtype,
        )
        self.training_loss = self.adapter.drawing(self.loss_fn) if self.adapter else self.loss_fn
        self.aside = SideStream(device)  # what it works with is on the device by now
        self.named = named = prepared.parameters if self.shards is None else self.shards.named
        self.ema = None
        if config.optim.use_ema:
            publish = None if self.masters is None else self.masters.publish
            self.ema = Ema(named, config.optim.ema_decay, publish)
        self.kept = {length: PowerEma(named, length) for length in config.optim.post_hoc_ema}
        self.optimizer = make_optimizer(
            named,
            config.optim,
            self.ema,
            self.masters,
            fused=self.kernels_run,
            seed=config.loop.seed if self.shards is None else self.shards.seed(config.loop.seed),
            kept=list(self.kept.values()),
            shards=self.shards,
        )
        self.loss_scale = LossScale(plan.dtype is torch.float16, device)
        self.guard = SpikeGuard(config.loop.spike_factor, config.loop.skip_spikes, device)
        self.pairs = EditPairs(
            plan.rows,
            plan.train_rows,
            config.data,
            config.loop.seed,
            plan.global_batch,
            self.tokenize,
            plan.buckets,
        )
        if self.shards is None:
            self._compile(config.precision.compile)

    def _compile(self, parts: Compile) -> None:
        """Compiles the UNet, with proof; by the weights it starts from, also where it resumes."""
        if parts == "auto":
            # What cannot be traced: a DoRA, and results that are picked out operation by operation.
            config = self.plan.config
            keeps = config.precision.checkpointing_keeps != "nothing"
            traced = not (config.adapter.use_dora or keeps)
            parts = "blocks" if self.kernels_run and traced else "off"
        if parts == "off":
            return
        buckets = self.plan.used_buckets
        allow_forms(len(buckets))
        if self.shards is None:
            compile_unet(self.unet, parts)
        else:
            compile_blocks(self.unet)
        for bucket in buckets:
            blank = self._blank(bucket)
            check_gradients(self.unet, self.training_loss, blank, self.plan.dtype, parts)

    def _empty_text(self) -> Text:
        """The encoding of ""."""
        if self.cached is None:
            return self.encoders.null_text
        return Text(*(part.to(self.world.device) for part in self.cached.null_text()))

    def _blank(self, bucket: int) -> Samples:
        """A micro-batch of weight 0, in the shapes of all others of a bucket."""
        count = self.plan.config.loop.train_batch_size
        if self.cached is not None:
            return self.samples([self.cached.blank(count, bucket)])[0]
        return self.samples([collate([self.pairs.blank(bucket)] * count)])[0]

    def update(self) -> Update:
        """What the loop calls for each window: one by one, or as a CUDA graph."""
        config, section = self.plan.config, self.plan.config.precision
        if self.shards is not None:
            # Only now: ranks gather for it, which all of them have come to. They fail alike.
            with self.world.together():
                self._compile(section.compile)
        update = partial(
            train_step,
            self._data_parallel(),
            self.training_loss,
            self.optimizer,
            self.loss_scale,
            self.world,
            slots=self.plan.global_batch // self.world.size,
            max_grad_norm=config.optim.max_grad_norm,
            guard=self.guard,
        )
        wanted = section.cuda_graphs == "on" or (
            section.cuda_graphs == "auto"
            and self.kernels_run
            and not self.optimizer.eight_bit
            and self.shards is None
        )
        return Captured(update, self.world.together) if wanted else update

    def _data_parallel(self) -> nn.Module:
        """The UNet as the loop calls it: with several ranks, in DDP with its buckets settled.

        A sharded one needs no wrapper, and no discarded backward: its sums have one order.
        """
        if self.world.size == 1 or self.shards is not None:
            return self.unet
        section, on_gpu = self.plan.config.precision, self.world.device.type == "cuda"
        model = DistributedDataParallel(
            self.unet,
            device_ids=[self.world.local_rank] if on_gpu else None,
            bucket_cap_mb=self.plan.config.loop.bucket_mb,
            gradient_as_bucket_view=True,
            **_sends_no_buffers(),
            static_graph=True,
        )
        if self.masters is not None:
            sent = torch.bfloat16 if section.all_reduce_dtype == "bf16" else torch.float32
            model.register_comm_hook(None, self.masters.reduce_in_buckets(self.world.size, sent))
        elif section.all_reduce_dtype == "bf16":
            model.register_comm_hook(None, reduce_in_bf16(self.world.size))
        blank = self._blank(self.plan.used_buckets[0])
        for _ in range(2):  # a static graph is learned in the first, its buckets in the second
            discarded_step(model, blank, self.training_loss, self.optimizer)
        return model

    def samples(self, window: Sequence[PixelBatch | CachedBatch]) -> list[Samples]:
        """What the step trains on, on the device."""
        return self.aside(
            lambda: [
                batch.to_samples(self.world.device)
                if isinstance(batch, CachedBatch)
                else self.encoders.encode(batch)
                for batch in window
            ]
        )

    @cached_property
    def encoders(self) -> Encoders:
        """On the device once they are asked for: a run from a cache only validates with them."""
        vae, text_encoder = load_encoders(self.plan.config.model)
        return Encoders(
            vae,
            text_encoder,
            self.tokenize("")[None],
            self.world.device,
            self.plan.dtype,
            vae_dtype=self.plan.vae_dtype,
            fused=self.kernels_run,
        )

    @property
    def source(self) -> Source:
        """What micro-batches are taken from."""
        return self.pairs if self.cached is None else self.cached

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint keeps of it, by part and name; of what is sharded, this rank's."""
        parts = {
            "unet": {name: weights.detach() for name, weights in self.named.items()},
            "optimizer": self.optimizer.state(),
        }
        parts |= {} if self.ema is None else {"ema": self.ema.averages}
        return parts | self.snapshot()

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """The averages of --post_hoc_ema, by part and name."""
        return {part_of(length): kept.averages for length, kept in self.kept.items()}

    def ema_weights(self, step: int) -> list[float]:
        """How far each of the averages moves after an optimizer step, from 1."""
        return [averages.weight(step) for averages in self.optimizer.averages]

    def load_tensors(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """Takes what `tensors` gave."""
        if self.adapter is not None:
            load_trained(self.unet, parts["unet"])
        else:
            (self.masters or self.shards or self.unet).load_state_dict(parts["unet"])
        self.optimizer.load_state(parts["optimizer"])
        if self.ema is not None:
            self.ema.load_state(parts["ema"])
        for length, kept in self.kept.items():
            kept.load_state(parts[part_of(length)])

    @contextmanager
    def exported(self) -> Iterator[tuple[nn.Module, dict[str, Tensor] | None]]:
        """The UNet to export and, where it holds averages, its raw weights. All ranks enter.

        Of a sharded one, rank 0 is given all of it on the CPU, and the others nothing.
        """
        averages = None if self.ema is None else self.ema.averages
        if self.shards is None:
            with (
                self.ema.in_place() if self.ema is not None else nullcontext(),
                self.masters.in_place() if self.masters is not None else nullcontext(),
            ):
                yield self.unet, averages  # exchanged
            return
        main = self.world.is_main
        raw = self.shards.gather(self.shards.named, keeps=main)
        weights = raw if averages is None else self.shards.gather(averages, keeps=main)
        unet = model_of(UNet2DConditionModel, self.unet.config, weights) if main else self.unet
        yield unet, None if averages is None else raw


def _sends_no_buffers() -> dict[str, Any]:
    """For DDP: they never change. torch 2.13 has another name for it, and warns of the old one."""
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    return {new if new in names else old: False}
