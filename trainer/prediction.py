"""What a run will take, all together: the answer of `fusedit plan`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .blank import blank_encoders, blank_safety_checker, bytes_of
from .buckets import Size
from .cache_files import shape_of
from .config import RunConfig
from .estimate import (
    Counted,
    checkpoint_bytes,
    count_run,
    fits_in,
    largest,
    memory_bytes,
    pipeline_bytes,
    snapshot_bytes,
    step_ms,
)
from .gpus import Gpu
from .plan import DTYPES
from .pretrained import Described

Change = Callable[[RunConfig], RunConfig]


class Data(NamedTuple):
    """What is known of a dataset."""

    rows: int  # to train on
    pairs: int  # of those rows, that a cache keeps


class Prediction:
    """What a run will take.

    Args:
        config: with --mixed_precision.
        data: None: not known; then neither are hours, unless --max_train_steps is given.
    """

    def __init__(
        self, config: RunConfig, described: Described, gpu: Gpu, ranks: int, data: Data | None
    ) -> None:
        self.config, self.described, self.gpu, self.ranks = config, described, gpu, ranks
        self.data = data
        self._counts: dict[Any, Counted] = {}
        self.counted = self._count(config)
        self.batch = config.loop.train_batch_size
        self.memory = memory_bytes(self.counted, config, self.batch, ranks)
        self.room = gpu.memory_mib * 2**20
        self.largest = self._largest(config)
        self.times_ms = step_ms(self.counted, config, gpu, ranks)
        vae, text_encoder = blank_encoders(config.model, described)
        others = 0
        if config.adapter.lora_rank is None:
            others = bytes_of(vae, text_encoder, blank_safety_checker(config.model))
        self.pipeline = pipeline_bytes(self.counted, config.optim, others)
        self.checkpoint = checkpoint_bytes(self.counted, config.optim)
        self.snapshot = snapshot_bytes(self.counted, config.optim)
        side = config.data.resolution  # buckets are no larger
        self.shape = shape_of(
            config.data,
            [Size(side, side)],
            described,
            DTYPES[config.precision.mixed_precision or "no"],
        )

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        return sum(self.times_ms.values()) / 1000

    @property
    def images_per_second(self) -> float:
        return self.config.loop.global_batch(self.ranks) / self.step_s

    @property
    def steps(self) -> int | None:
        loop = self.config.loop
        if loop.max_train_steps is not None or self.data is None:
            return loop.max_train_steps
        return loop.num_train_epochs * -(-self.data.rows // loop.global_batch(self.ranks))

    @property
    def cache(self) -> tuple[int, int] | None:
        """Bytes of a cache's pairs, exactly, and of its texts, at most."""
        if self.data is None:
            return None
        pairs = self.data.pairs
        return pairs * self.shape.pair_bytes, (pairs + 1) * self.shape.text_bytes

    def _count(self, config: RunConfig) -> Counted:
        counted_by = config.data, config.validation, config.precision, config.adapter
        if counted_by not in self._counts:
            self._counts[counted_by] = count_run(config, self.described)
        return self._counts[counted_by]

    def _largest(self, config: RunConfig) -> int:
        return largest(fits_in(self.gpu, self._count(config), config, self.ranks))

    def facts(self) -> dict[str, Any]:
        """All of it for machines: bytes, ms, and what is not known as null."""
        loop = self.config.loop
        return {
            "estimated_not_measured": True,
            "gpu": self.gpu.name,
            "gpu_bytes": self.room,
            "ranks": self.ranks,
            "micro_batch": self.batch,
            "global_batch": loop.global_batch(self.ranks),
            "memory_bytes": {name: round(size) for name, size in self.memory.items()},
            "memory_total_bytes": round(self.total),
            "fits": self.total <= self.room,
            "largest_micro_batch": self.largest,
            "flops_per_image": round(self.counted.unet.flops[1].sum().item()),
            "step_ms": self.times_ms,
            "images_per_second": self.images_per_second,
            "steps": self.steps,
            "hours": None if self.steps is None else self.steps * self.step_s / 3600,
            "cache_bytes": None if self.cache is None else sum(self.cache),
            "checkpoint_bytes": round(self.checkpoint),
            "snapshot_bytes": self.snapshot,
            "pipeline_bytes": self.pipeline,
            "advice": self.advice(),
        }

    def advice(self) -> str:
        """What to change where it does not fit."""
        if self.total <= self.room:
            return "it fits as it is"
        helping = [_cut(self.config, self.largest)] if self.largest else []
        flags, config = {}, self.config
        for what, flag, change in _savings(self.config, self.ranks):
            flags[what], config = flag, change(config)  # of two for the same, the stronger
            if self._largest(change(self.config)) >= self.batch:
                helping.append(flag)
        if helping:
            return f"it does not fit; any of these makes it fit: {'; or '.join(helping)}"
        all_flags, most = " ".join(flags.values()), self._largest(config)
        if most:
            return f"it does not fit; {all_flags} {_cut(config, most)} does"
        return (
            f"it does not fit, even with {all_flags} --train_batch_size 1: take a GPU with more "
            "memory"
        )


def _cut(config: RunConfig, most: int) -> str:
    """Flags that make the same global batch of micro-batches of at most so many images."""
    loop = config.loop
    whole = loop.train_batch_size * loop.gradient_accumulation_steps
    images = max(n for n in range(1, most + 1) if whole % n == 0)
    return f"--train_batch_size {images} --gradient_accumulation_steps {whole // images}"


def _savings(config: RunConfig, ranks: int) -> Iterator[tuple[str, str, Change]]:
    """What memory is saved of, by a flag that is not given, and what it makes of a run."""

    def replaced(section: str, **values: Any) -> Change:
        return lambda run: dataclasses.replace(
            run, **{section: dataclasses.replace(getattr(run, section), **values)}
        )

    data, optim, precision = config.data, config.optim, config.precision
    if data.cache_latents is None:
        crops = None if data.one_crop else 4
        flag = "--cache_latents DIR" + ("" if crops is None else f" --cache_crops {crops}")
        yield "encoders", flag, replaced("data", cache_latents="DIR", cache_crops=crops)
    if not precision.gradient_checkpointing:
        flag = "--gradient_checkpointing"
        yield "activations", flag, replaced("precision", gradient_checkpointing=True)
    adapts = config.adapter.lora_rank is not None
    if precision.mixed_precision == "bf16" and precision.param_dtype == "fp32" and not adapts:
        flag = "--param_dtype bf16"
        yield "parameters", flag, replaced("precision", param_dtype="bf16")
    if not optim.use_8bit_adam and optim.adam_moments_dtype == "fp32":
        flag = "--adam_moments_dtype bf16"
        yield "moments", flag, replaced("optim", adam_moments_dtype="bf16")
    if optim.use_8bit_adam or precision.sharding != "ddp":
        return  # not both
    if ranks > 1 and precision.cuda_graphs != "on" and precision.compile != "whole":
        yield "states", "--sharding fsdp", replaced("precision", sharding="fsdp")
    elif optim.adam_moments_dtype == "fp32":
        eight = replaced("optim", use_8bit_adam=True, adam_moments_dtype="fp32")
        yield "moments", "--use_8bit_adam", eight
