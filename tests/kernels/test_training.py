"""One step's gradient, with every kernel in its place, as the trainer calls them."""

from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import save_tiny_pipeline
from transformers import CLIPTextModel

from fusedit.kernels import edit_input, weighted_mse
from fusedit.kernels.unet import FusedResnetBlock
from fusedit.trainer.config import Format
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.encoders import Encoders, Samples
from fusedit.trainer.families import STABLE_DIFFUSION, Text, TextEncoder
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.unet import grow_conv_in, prepare_unet

CONFIG = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


def samples(width: int, device: str) -> Samples:
    shape = (3, 4, 8, 8)
    return Samples(
        target_mean=torch.randn(shape, device=device),
        target_std=torch.rand(shape, device=device),
        condition=torch.randn(shape, device=device),
        text=torch.randn(3, 5, width, device=device),
        pooled=torch.zeros(3, 0, device=device),
        size_ids=torch.zeros(3, 6, device=device),
        positions=torch.tensor([7, 2**33, 9], device=device),
        weights=torch.tensor([1.0, 1.0, 0.0], device=device),
    )


def gradients(
    base, fused: bool, device: str, dtype: torch.dtype = torch.float32, param_dtype: Format = "fp32"
) -> dict[str, torch.Tensor]:
    """The loss and the gradient of each parameter, computed under autocast to dtype."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    grow_conv_in(unet, "base")
    unet, _, lines, _ = prepare_unet(
        unet, torch.device(device), fused=fused, attention="triton", param_dtype=param_dtype
    )
    assert ("time embedding + GroupNorm + SiLU" in str(lines)) == fused
    width = unet.config["cross_attention_dim"]
    diffusion = Diffusion.from_scheduler(CONFIG, 0.18215, torch.device(device))
    null_text = Text(torch.zeros(1, 5, width, device=device), torch.zeros(1, 0, device=device))
    loss_fn = EditLoss(diffusion, (0.2, 0.2, 0.2), null_text, 5, dtype)
    loss = loss_fn(unet, samples(width, device))
    names, parameters = zip(*unet.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def test_the_gradient_is_that_of_plain_pytorch(tmp_path, launches, monkeypatch, device):
    base = save_tiny_pipeline(tmp_path / "base")
    fused = gradients(base, True, device)
    ran = Counter(launches)
    assert ran["whole_kernel"] == ran["backward_whole_kernel"] > 0  # GroupNorm
    # GEGLU; once forward the edit input, once backward the loss
    assert ran["_forward_kernel"] == ran["_backward_kernel"] > 1
    assert ran["_finish_kernel"] == 1  # the loss
    for module in (edit_input, weighted_mse):
        monkeypatch.setattr(module, "runs_triton", lambda _: False)
    plain = gradients(base, False, device)
    assert Counter(launches) == ran
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_the_trainers_kernels_run_under_autocast(param_dtype, tmp_path, launches, device):
    base = save_tiny_pipeline(tmp_path / "base")
    truth = gradients(base, False, device)
    before = len(launches)
    fused = gradients(base, True, device, torch.bfloat16, param_dtype)
    ran = Counter(launches[before:])
    assert ran["whole_kernel"] == ran["backward_whole_kernel"] > 0  # GroupNorm
    # Of 12 LayerNorms, and of the 2 attentions whose heads are 8 wide; the others' are 12.
    assert ran["forward_kernel"] == ran["backward_kernel"] == 14
    plain = gradients(base, False, device, torch.bfloat16, param_dtype)

    def error(found: dict[str, torch.Tensor]) -> float:
        """Of all gradients, each in parts of its own size."""
        return float(sum((found[name] - v).norm() / v.norm() for name, v in truth.items()))

    assert error(fused) <= 1.5 * error(plain)


def test_the_vae_encodes_by_our_norms(tmp_path, launches, device):
    base = save_tiny_pipeline(tmp_path / "base")
    images = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8)
    found = []
    for fused, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        vae = AutoencoderKL.from_pretrained(base / "vae")
        clip = CLIPTextModel.from_pretrained(base / "text_encoder")
        text_encoder = TextEncoder(STABLE_DIFFUSION, {"text_encoder": clip})
        tokens = torch.full((1, 8), 3)
        where = torch.device(device)
        encoders = Encoders(vae, text_encoder, tokens, where, dtype, fused=fused)
        before = len(launches)
        found.append(encoders.encode_images(*images))
        blocks = sum(type(m) is FusedResnetBlock for m in vae.modules())
        assert len(launches) - before == 2 * blocks == (2 * blocks if fused else 0)
        assert not fused or blocks > 1
    for plain, ours, rounded in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rounded.float(), plain, rtol=0.05, atol=0.05)
