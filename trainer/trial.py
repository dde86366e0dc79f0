"""The largest micro-batch of a run, by real updates on the GPU that is here."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .blank import blank_encoders, blank_unet
from .config import RunConfig
from .data import PixelBatch
from .diffusion import Diffusion
from .ema import Ema
from .encoders import Encoders, Samples
from .estimate import largest
from .families import SIZE_IDS, Text, text_widths
from .loss import EditLoss
from .optim import make_optimizer
from .plan import DTYPES, vae_dtype_of
from .power_ema import PowerEma
from .pretrained import Described
from .step import LossScale, Rates, train_step
from .unet import prepare_unet
from .world import World

STEPS = 2  # the second one meets all that the first one left


def largest_tried(make: Callable[[], Callable[[int], None]]) -> int:
    """The largest micro-batch that does not run out of a GPU's memory; 0: not even one.

    Args:
        make: gives what is called with images of a micro-batch; both may run out of memory.

    All that was allocated is given back.
    """
    update: Callable[[int], None] | None = None

    def runs(images: int) -> bool:
        nonlocal update
        try:
            if update is None:
                update = make()
            update(images)
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    def fits(images: int) -> bool:
        ran = runs(images)
        if not ran:
            free()  # out here nothing holds the error, which held what was allocated
        return ran

    found = largest(fits)
    update = None
    free()
    return found


def free() -> None:
    """Gives what nobody holds any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TrialRun:
    """The parts of a run by its flags; weights are what lay in memory, for only sizes matter.

    It runs eagerly, on one rank: what torch.compile, CUDA graphs and DDP take is not seen.
    """

    def __init__(self, config: RunConfig, described: Described, device: torch.device) -> None:
        self.config, self.device, self.world = config, device, World(device=device)
        self.dtype = DTYPES[config.precision.mixed_precision or "no"]
        on_gpu = device.type == "cuda"
        fused = on_gpu and not config.precision.plain
        self.prepared = prepare_unet(
            blank_unet(described).to_empty(device=device),
            device,
            gradient_checkpointing=config.precision.gradient_checkpointing,
            checkpointing_keeps=config.precision.checkpointing_keeps,
            checkpointing_levels=config.precision.checkpointing_levels,
            fused=fused,
            attention=config.precision.attention,
            param_dtype=config.precision.param_dtype,
            sums=not fused or config.sums_gradients(self.world.size),
            adapter=config.adapter,
            dtype=self.dtype,
        )
        named, masters = self.prepared.parameters, self.prepared.masters
        ema = Ema(named, config.optim.ema_decay) if config.optim.use_ema else None
        kept = [PowerEma(named, length) for length in config.optim.post_hoc_ema]
        self.optimizer = make_optimizer(named, config.optim, ema, masters, fused=fused, kept=kept)
        self.loss_scale = LossScale(self.dtype is torch.float16, device)
        diffusion = Diffusion.from_scheduler(
            described.scheduler, described.vae["scaling_factor"], device, config.diffusion
        )
        self.length = described.row_length
        self.side = config.data.resolution // described.vae_factor
        width, pooled_width = text_widths(described.unet)
        options: dict[str, Any] = {"dtype": self.dtype, "device": device}
        self.null_text = Text(
            torch.zeros(1, described.tokens, width, **options),
            torch.zeros(1, pooled_width, **options),
        )
        rates = config.conditioning.rates
        loss = EditLoss(diffusion, rates, self.null_text, config.loop.seed, self.dtype)
        adapter = self.prepared.adapter
        self.loss = loss if adapter is None else adapter.drawing(loss)
        self.encoders = None
        if config.data.cache_latents is None:
            vae, text_encoder = blank_encoders(config.model, described)
            vae.to_empty(device=device)
            text_encoder.to_empty(device=device)
            # Positions are a buffer that is read: what lay in memory would be out of range.
            for part in text_encoder.modules():
                for _, buffer in part.named_buffers(recurse=False):
                    buffer.zero_()
            tokens = self._zeros(1).tokens
            vae_dtype = vae_dtype_of(config, described)
            self.encoders = Encoders(
                vae, text_encoder, tokens, device, self.dtype, vae_dtype=vae_dtype, fused=fused
            )

    def update(self, images: int) -> None:
        """A few whole updates of a micro-batch of so many images."""
        if self.prepared.masters is not None:
            self.prepared.masters.zero_grad()  # of an update that ran out of memory
        for _ in range(STEPS):
            train_step(
                self.prepared.unet,
                self.loss,
                self.optimizer,
                self.loss_scale,
                self.world,
                [self._samples(images)],
                Rates.on(self.device, 0.0, *[0.0] * self.config.optim.averages),
                slots=images,
                max_grad_norm=1.0,
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _samples(self, images: int) -> Samples:
        batch = self._zeros(images)
        if self.encoders is not None:
            return self.encoders.encode(batch)
        latents = torch.zeros(images, 4, self.side, self.side, dtype=self.dtype, device=self.device)
        return Samples(
            target_mean=latents,
            target_std=latents,
            condition=latents,
            text=self.null_text.states.repeat(images, 1, 1),
            pooled=self.null_text.pooled.repeat(images, 1),
            size_ids=batch.size_ids,
            positions=batch.positions,
            weights=batch.weights,
        )

    def _zeros(self, images: int) -> PixelBatch:
        side = self.config.data.resolution

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(images, *shape, dtype=dtype, device=self.device)

        pixels = zeros(3, side, side, dtype=torch.uint8)
        tokens = zeros(self.length, dtype=torch.int64)
        size_ids = zeros(SIZE_IDS, dtype=torch.float32)
        positions, weights = zeros(dtype=torch.int64), zeros(dtype=torch.float32)
        return PixelBatch(pixels, pixels, tokens, size_ids, positions, weights, ())
