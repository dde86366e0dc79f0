"""The true Stable Diffusion 1.5 architecture with random weights; the real step is marked slow."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from fusedit.trainer.config import OptimConfig
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.encoders import Samples
from fusedit.trainer.families import Text
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.optim import AdamW
from fusedit.trainer.step import LossScale, Rates, train_step
from fusedit.trainer.unet import grow_conv_in
from fusedit.trainer.world import World

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _unet(device):
    with torch.device(device):
        unet = UNet2DConditionModel(**SD15)
        grow_conv_in(unet, "SD1.5")
    return unet.train()


def _samples(n, side, device):
    latents = torch.randn(n, 4, side, side, device=device)
    return Samples(
        target_mean=latents,
        target_std=latents.abs(),
        condition=latents,
        text=torch.randn(n, 77, 768, device=device),
        pooled=torch.zeros(n, 0, device=device),
        size_ids=torch.zeros(n, 6, device=device),
        positions=torch.arange(n, device=device),
        weights=torch.ones(n, device=device),
    )


def _loss(device):
    diffusion = Diffusion.from_scheduler(SCHEDULE, 0.18215, torch.device(device))
    null_text = Text(torch.zeros(1, 77, 768, device=device), torch.zeros(1, 0, device=device))
    return EditLoss(diffusion, (0.05, 0.05, 0.05), null_text, 0, torch.float32)


@pytest.mark.parametrize("pixels", [256, 512])
def test_every_shape_of_a_step(pixels):
    """On the meta device: no memory, no arithmetic, all shapes and all gradients."""
    unet = _unet("meta")
    assert sum(p.numel() for p in unet.parameters()) == 859_532_484  # counted, shapes.md
    assert len(list(unet.parameters())) == 686
    loss = _loss("meta")(unet, _samples(4, pixels // 8, "meta"))
    assert loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in unet.parameters())


@pytest.mark.slow  # 14 GB, a minute
def test_one_real_step():
    unet = _unet("cpu")
    before = {name: p.detach().clone() for name, p in unet.named_parameters() if "conv_in" in name}
    result = train_step(
        unet,
        _loss("cpu"),
        AdamW(dict(unet.named_parameters()), OptimConfig()),
        LossScale(False, torch.device("cpu")),
        World(),
        [_samples(2, 8, "cpu")],
        Rates.on(torch.device("cpu"), 1e-4),
        slots=2,
        max_grad_norm=1.0,
    )
    assert result.applied
    assert result.loss / result.samples == pytest.approx(1.0, abs=0.5)  # noise is predicted as ~0
    for name, value in before.items():
        moved = (unet.get_parameter(name) - value).abs().max()
        assert 0 < moved < 2e-4  # Adam's first step is the learning rate
