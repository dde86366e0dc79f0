"""The demo's base pipeline as it is committed: a diffusers folder, small, and good enough."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from fusedit.launch.demo import make_base
from fusedit.launch.demo.world import PHRASES, make_pair

FOLDER = Path(make_base.__file__).parent / "base"
HELD_OUT_SEED = 12345  # neither trained on nor looked at while training
PHOTO = "a photo of a red house with a green roof and tree by day on grass"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encoded(pipeline: StableDiffusionPipeline, text: str) -> torch.Tensor:
    tokens = make_base.tokenize(pipeline.tokenizer, [text])
    return pipeline.text_encoder(tokens).last_hidden_state[0]


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8e6


def test_it_is_a_text_to_image_pipeline_in_fp32(pipeline):
    assert pipeline.unet.conv_in.in_channels == 4
    assert pipeline.safety_checker is None
    assert pipeline.vae_scale_factor == 4
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}


def test_the_schedule_predicts_velocity_and_ends_in_noise(pipeline):
    schedule = DDPMScheduler.from_pretrained(FOLDER / "scheduler")
    for config in (schedule.config, pipeline.scheduler.config):
        assert config["prediction_type"] == "v_prediction"
        assert config["timestep_spacing"] == "trailing"
        assert not config["clip_sample"]
    assert schedule.alphas_cumprod[-1] == 0
    assert pipeline.scheduler.final_alpha_cumprod == 1


def test_the_vae_reconstructs_scenes_it_has_not_seen(pipeline):
    images, _ = make_base.world_images(HELD_OUT_SEED, 50)
    assert make_base.reconstruction_psnr(pipeline.vae, images) >= 30


def test_latents_have_unit_size(pipeline):
    images, _ = make_base.world_images(HELD_OUT_SEED, 50)
    latents = make_base.encode(pipeline.vae, images) * pipeline.vae.config["scaling_factor"]
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_the_text_encoder_tells_all_instructions_apart(pipeline):
    phrases = [
        phrase.format(to="red", was="day") for several in PHRASES.values() for phrase in several
    ]
    states = torch.stack([encoded(pipeline, phrase) for phrase in phrases]).flatten(1)
    distances = torch.cdist(states, states).fill_diagonal_(torch.inf)
    assert distances.min() > 0.2 * states.norm(dim=1).mean()


def test_it_draws_what_a_caption_says(pipeline):
    """A day above grass has a blue sky over green ground; at night all is dark."""
    captions = [PHOTO, PHOTO.replace("by day", "at night")]
    noise = torch.Generator().manual_seed(0)
    images = pipeline(
        captions, num_inference_steps=10, guidance_scale=2.0, generator=noise, output_type="pt"
    ).images
    day, night = images.float()
    assert day.mean() > night.mean() + 0.15
    sky, ground = day[:, :8].mean((1, 2)), day[:, -8:].mean((1, 2))
    assert sky.argmax() == 2
    assert ground.argmax() == 1


def test_the_world_is_what_the_base_was_trained_on(pipeline):
    """The UNet's loss tells a scene's own caption from one of another style."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pairs = [make_pair(4 + 10 * index, HELD_OUT_SEED) for index in range(32)]
    assert {pair.kind for pair in pairs} == {"negative"}
    images = torch.stack([make_base.to_tensor(pair.edited) for pair in pairs])
    latents = make_base.encode(pipeline.vae, images) * pipeline.vae.config["scaling_factor"]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((len(pairs),), 950)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    losses = []
    for texts in ([p.edited_caption for p in pairs], [p.caption for p in pairs]):
        with torch.no_grad():
            states = torch.stack([encoded(pipeline, text) for text in texts])
            losses.append(
                (pipeline.unet(noisy, timesteps, states).sample - velocity).square().mean()
            )
    assert losses[0] < 0.8 * losses[1]


def test_it_names_no_path_of_the_machine_it_was_made_on():
    for file in FOLDER.rglob("config.json"):
        named = json.loads(file.read_text()).get("_name_or_path", "")
        assert not named.startswith("/"), file
