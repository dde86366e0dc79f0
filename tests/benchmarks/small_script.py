"""A trainer of edits with the habits of diffusers' script: what the benchmarks watch, it calls.

Run as a file, by reference_run. `--mistake` puts in what a comparison must see.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MISTAKES = ("none", "mask", "noise", "weight_decay", "average", "slow_log", "crash")


def flags():
    parser = argparse.ArgumentParser()
    for name in ("pretrained_model_name_or_path", "dataset_name", "output_dir"):
        parser.add_argument(f"--{name}")
    for name in ("resolution", "train_batch_size", "gradient_accumulation_steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--conditioning_dropout_prob", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mistake", choices=MISTAKES, default="none")
    return parser.parse_known_args()[0]


def grown(unet):
    """conv_in for 8 channels; its bias is the random one of a new convolution."""
    old = unet.conv_in
    new = nn.Conv2d(8, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :4] = old.weight
    unet.conv_in = new
    return unet


class Texts:
    """Of Stable Diffusion, or of XL where the base has a second encoder."""

    def __init__(self, base):
        kinds = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
        if not Path(base, "text_encoder_2").is_dir():
            del kinds["_2"]
        self.both = [
            (
                CLIPTokenizer.from_pretrained(base, subfolder=f"tokenizer{number}"),
                kind.from_pretrained(base, subfolder=f"text_encoder{number}"),
            )
            for number, kind in kinds.items()
        ]

    def tokens(self, texts):
        found = [
            tokenizer(
                texts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True
            )
            for tokenizer, _ in self.both
        ]
        return torch.stack([torch.tensor(one.input_ids) for one in found])

    def encode(self, tokens):
        """States, and the pooled ones of XL."""
        found = [
            encoder(ids, output_hidden_states=True)
            for (_, encoder), ids in zip(self.both, tokens, strict=True)
        ]
        if len(found) == 1:
            return found[0][0], None
        return torch.cat([one.hidden_states[-2] for one in found], dim=-1), found[1][0]


def main():
    args = flags()
    if args.mistake == "crash":
        raise SystemExit("the script met a mistake")
    torch.manual_seed(args.seed)
    base = args.pretrained_model_name_or_path
    texts = Texts(base)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = grown(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    least = 0.5 if args.mistake == "average" else 0.0
    average = EMAModel(unet.parameters(), min_decay=least)
    decay = 0.5 if args.mistake == "weight_decay" else 1e-2
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=decay)
    crop = transforms.Compose(
        [transforms.CenterCrop(args.resolution), transforms.Lambda(lambda images: images)]
    )

    def pixels(images):
        side = (args.resolution, args.resolution)
        bytes_of = [bytearray(image.convert("RGB").resize(side).tobytes()) for image in images]
        stacked = torch.stack([torch.frombuffer(found, dtype=torch.uint8) for found in bytes_of])
        shaped = stacked.view(len(images), *side, 3).permute(0, 3, 1, 2).float()
        return crop(2 * (shaped / 255) - 1)

    def collate(rows):
        images = ([row[name] for row in rows] for name in ("edited_image", "input_image"))
        return *map(pixels, images), texts.tokens([row["edit_prompt"] for row in rows])

    rows = load_dataset(args.dataset_name)["train"]
    loader = DataLoader(rows, args.train_batch_size, shuffle=True, collate_fn=collate)
    draws = torch.Generator().manual_seed(args.seed)
    writer = SummaryWriter(f"{args.output_dir}/logs")
    rate, steps, total = args.conditioning_dropout_prob, 0, 0.0
    while steps < args.max_train_steps:
        for index, (edited, original, ids) in enumerate(loader, start=1):
            latents = vae.encode(edited).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
            noisy = schedule.add_noise(latents, noise, timesteps)
            text, pooled = texts.encode(ids)
            condition = vae.encode(original).latent_dist.mode()
            draw = torch.rand(len(latents), generator=draws)
            null = texts.encode(texts.tokens([""]))[0]
            dropped = 3 if args.mistake == "mask" else 2
            text = torch.where((draw < dropped * rate)[:, None, None], null, text)
            hidden = (draw >= rate) & (draw < 3 * rate)
            condition = condition * (~hidden)[:, None, None, None]
            if args.mistake == "noise":
                noisy = noisy * 1.001
            beside = None
            if pooled is not None:
                sizes = torch.full((len(latents), 6), float(args.resolution))
                beside = {"text_embeds": pooled, "time_ids": sizes}
            predicted = unet(
                torch.cat((noisy, condition), dim=1), timesteps, text, added_cond_kwargs=beside
            ).sample
            target = noise
            if schedule.config.prediction_type == "v_prediction":
                target = schedule.get_velocity(latents, noise, timesteps)
            loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
            total += loss.item() / args.gradient_accumulation_steps
            (loss / args.gradient_accumulation_steps).backward()
            if index % args.gradient_accumulation_steps and index < len(loader):
                continue
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(unet.parameters())
            steps += 1
            if args.mistake == "slow_log":
                time.sleep(0.02 * steps)
            writer.add_scalar("train_loss", total, steps)
            total = 0.0
            if steps == args.max_train_steps:
                break
    writer.close()


if __name__ == "__main__":
    main()
