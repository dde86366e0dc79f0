"""The host never waits for the device inside a step.

On a CPU what would wait is counted: every read of a tensor's value by Python is an operation. On a
GPU the driver itself is asked.
"""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import save_tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel

from fusedit.trainer.config import OptimConfig
from fusedit.trainer.data import PixelBatch
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.ema import Ema
from fusedit.trainer.encoders import Encoders
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.optim import make_optimizer
from fusedit.trainer.step import LossScale, train_step
from fusedit.trainer.unet import grow_conv_in, prepare_unet
from fusedit.trainer.world import World

aten = torch.ops.aten
WAITS = {  # whose result Python sees, or whose shape depends on values
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function in WAITS:
            self.found.append(str(function))
        return function(*arguments, **(named or {}))


class Job:
    """Encoders, UNet and all that a step takes, on the device that there is."""

    def __init__(self, base, device: str, *, fused: bool, fp16: bool) -> None:
        self.device = torch.device(device)
        vae = AutoencoderKL.from_pretrained(base / "vae")
        text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
        self.tokens = torch.full((2, 8), 3)
        dtype = torch.float16 if fp16 and device == "cuda" else torch.float32
        self.encoders = Encoders(vae, text_encoder, self.tokens[:1], self.device, dtype)
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
        grow_conv_in(unet, "base")
        self.unet, _ = prepare_unet(
            unet, self.device, gradient_checkpointing=False, fused=device == "cuda"
        )
        scheduler = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
        diffusion = Diffusion.from_scheduler(scheduler, 0.18215, self.device)
        null_text = self.encoders.null_text
        self.loss_fn = EditLoss(diffusion, (0.05, 0.05, 0.05), null_text, 5, dtype)
        named = list(self.unet.named_parameters())
        self.optimizer = make_optimizer(named, OptimConfig(), Ema(named, 0.999), fused=fused)
        self.scale = LossScale(fp16, self.device)

    def batch(self, first: int) -> PixelBatch:
        images = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8)
        positions = torch.arange(first, first + 2)
        batch = PixelBatch(*images, self.tokens, positions, torch.ones(2), ())
        if self.device.type != "cuda":
            return batch
        return PixelBatch(*(one.pin_memory() for one in batch[:-1]), ())

    def step(self, number: int) -> None:
        window = [self.batch(4 * number), self.batch(4 * number + 2)]
        train_step(
            self.unet,
            map(self.encoders.encode, window),
            2,
            self.loss_fn,
            self.optimizer,
            self.scale,
            World(device=self.device),
            slots=4,
            number=number,
            lr=1e-4,
            max_grad_norm=1.0,
        )


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["pytorch", "one pass"])
def test_the_host_does_not_wait_for_a_step(fused, fp16, tmp_path, device):
    job = Job(save_tiny_pipeline(tmp_path / "base"), device, fused=fused, fp16=fp16)
    job.step(1)  # state is made, kernels are compiled
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            job.step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits() as waits:
        job.step(2)
    assert not waits.found


def test_what_waits_is_seen():
    with Waits() as waits:
        float(torch.ones(()))
        bool(torch.ones(()))
        torch.ones(3).nonzero()
    assert len(waits.found) == 3
