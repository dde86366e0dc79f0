"""Trains the demo's base: a text-to-image pipeline of 2.7 M parameters that knows the demo's world.

`OMP_NUM_THREADS=1 python -m fusedit.launch.demo.make_base launch/demo/base` wrote the folder that
ships with fusedit: a VAE of factor 4, a CLIP text encoder with its tokenizer and a UNet of four
input channels, in diffusers' format. One busy core took 14 minutes for the VAE and 15 for the rest.
`--vae FOLDER` takes the VAE of an earlier run; few steps and pairs try the script in a minute.
"""

# diffusers and transformers take and return more than their annotations say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import argparse
import shutil
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from .base_parts import TOKENS, build_text_encoder, build_tokenizer, build_unet, build_vae
from .world import make_pair

TRAIN_SEED, HELD_OUT_SEED = 1, 2  # sequences of the world that the demo itself must not use
CAPTION_DROPOUT = 0.1
SCHEDULE = {  # Stable Diffusion's, with zero terminal SNR: few steps reach far, whatever the input
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


# Data


def to_tensor(image: Image.Image) -> Tensor:
    """[3, height, width] fp32 in -1..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def world_images(seed: int, pairs: int) -> tuple[Tensor, list[str]]:
    """Both images of each pair, [2 pairs, 3, SIZE, SIZE], and their captions."""
    images, captions = [], []
    for pair in (make_pair(index, seed) for index in range(pairs)):
        images += [to_tensor(pair.original), to_tensor(pair.edited)]
        captions += [pair.caption, pair.edited_caption]
    return torch.stack(images), captions


def batches(count: int, size: int, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Step numbers and shuffled rows, over the data as often as needed."""
    rows = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(rows) < size:
            rows = torch.cat([rows, torch.randperm(count)])
        yield step, rows[:size]
        rows = rows[size:]


# Training


def _optimizer(
    parameters: list[nn.Parameter], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    return optimizer, schedule


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """[batch] decibels, of images in -1..1."""
    return -10 * ((images.clamp(-1, 1) - truth) / 2).square().mean((1, 2, 3)).log10()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean decibels of the decoded posterior modes."""
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    return psnr(decoded, images).mean().item()


def train_vae(images: Tensor, held_out: Tensor, steps: int) -> AutoencoderKL:
    """Absolute and squared error; a light KL term keeps the latents smooth and near unit size."""
    vae, started = build_vae(), time.monotonic()
    optimizer, schedule = _optimizer(list(vae.parameters()), 2e-3, steps)
    for step, rows in batches(len(images), 8, steps):
        truth = images[rows]
        with torch.autocast("cpu", torch.bfloat16):  # 0.6 of fp32's time on a CPU that has it
            posterior = vae.encode(truth).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(decoded, truth) + 4 * F.mse_loss(decoded, truth) + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            decibels, seconds = reconstruction_psnr(vae, held_out), time.monotonic() - started
            print(f"vae {step} loss {loss:.4f} psnr {decibels:.2f} {seconds:.0f} s", flush=True)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior modes, unscaled."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(256)])


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[texts, TOKENS] int64, padded."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, max_length=TOKENS, **options).input_ids


def _diffusion_loss(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, latents: Tensor, states: Tensor
) -> Tensor:
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config["num_train_timesteps"], (len(latents),))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, states).sample
    return F.mse_loss(predicted, scheduler.get_velocity(latents, noise, timesteps))


def train_text_to_image(
    text_encoder: CLIPTextModel, latents: Tensor, tokens: Tensor, empty: Tensor, steps: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Text encoder and UNet together, by velocity; gives back their averages over the steps.

    Args:
        latents: [images, 4, 16, 16], scaled.
        tokens: [images, TOKENS], of their captions.
        empty: [1, TOKENS], of no caption.
    """
    unet = build_unet()
    average_unet, average_encoder = deepcopy(unet), deepcopy(text_encoder)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    averages = [*average_unet.parameters(), *average_encoder.parameters()]
    optimizer, schedule = _optimizer(parameters, 1e-3, steps)
    scheduler, started, total = DDPMScheduler(**SCHEDULE), time.monotonic(), 0.0
    for step, rows in batches(len(latents), 16, steps):
        dropped = torch.rand(len(rows), 1) < CAPTION_DROPOUT
        states = text_encoder(torch.where(dropped, empty, tokens[rows])).last_hidden_state
        loss = _diffusion_loss(unet, scheduler, latents[rows], states)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        total += loss.item()
        if step % 100 == 99:
            seconds = time.monotonic() - started
            print(f"unet {step + 1} loss {total / 100:.4f} {seconds:.0f} s", flush=True)
            total = 0.0
    return average_unet.eval(), average_encoder.eval()


# The folder


def save(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Replaces the folder `out` when all of it is written. VAE and UNet are stored as fp16."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as beside:
        folder = Path(beside) / out.name
        pipeline.vae.half()
        pipeline.unet.half()
        pipeline.save_pretrained(folder)
        # What transformers 4 reads; transformers 5 has written tokenizer.json.
        pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)


def _trained_vae(options: argparse.Namespace, images: Tensor) -> AutoencoderKL:
    held_out, _ = world_images(HELD_OUT_SEED, 50)
    if options.vae:
        vae = AutoencoderKL.from_pretrained(options.vae, use_safetensors=True).requires_grad_(False)
        vae.register_to_config(_name_or_path="")  # else the path of this machine is saved
    else:
        vae = train_vae(images, held_out, options.vae_steps)
    print(f"vae reconstructs at {reconstruction_psnr(vae, held_out):.2f} dB", flush=True)
    return vae


def make_base(options: argparse.Namespace) -> StableDiffusionPipeline:
    """The scheduler's last step ends at the clean image (set_alpha_to_one)."""
    images, captions = world_images(TRAIN_SEED, options.pairs)
    vae = _trained_vae(options, images)
    latents = encode(vae, images)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    if not options.vae:
        vae.save_pretrained(f"{options.out}-vae")  # for --vae
    tokenizer = build_tokenizer()
    unet, text_encoder = train_text_to_image(
        build_text_encoder(tokenizer),
        latents * vae.config["scaling_factor"],
        tokenize(tokenizer, captions),
        tokenize(tokenizer, [""]),
        options.unet_steps,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--vae", type=Path, help="a trained VAE's folder, to skip its training")
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--vae_steps", type=int, default=2500)
    parser.add_argument("--unet_steps", type=int, default=4000)
    options = parser.parse_args()
    torch.manual_seed(0)
    save(make_base(options), options.out)


if __name__ == "__main__":
    main()
