import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from tiny import save_tiny_pipeline
from transformers import CLIPTextModel, CLIPTokenizer

from fusedit.trainer.data import PixelSample, collate, make_tokenize
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.draws import Purpose, draw_integers, draw_normal
from fusedit.trainer.encoders import Encoders, Samples
from fusedit.trainer.families import STABLE_DIFFUSION, Text, TextEncoder
from fusedit.trainer.loss import HELD_OUT, TRAINING, EditLoss

N, CHANNELS, SIDE, TOKENS, WIDTH = 64, 4, 3, 5, 7
SCALE = 0.18215
NULL = Text(torch.full((1, TOKENS, WIDTH), 9.0), torch.zeros(1, 0))


def _samples():
    shape = (N, CHANNELS, SIDE, SIDE)
    return Samples(
        target_mean=torch.randn(shape),
        target_std=torch.rand(shape),
        condition=torch.randn(shape),
        text=torch.randn(N, TOKENS, WIDTH),
        pooled=torch.zeros(N, 0),
        size_ids=torch.zeros(N, 6),
        positions=torch.arange(N) + 1000,
        weights=torch.arange(N) / N,
    )


def _loss(kind="epsilon", rates=(0.0, 0.0, 0.0)):
    config = {"beta_schedule": "scaled_linear", "prediction_type": kind}
    diffusion = Diffusion.from_scheduler(config, SCALE, torch.device("cpu"))
    return EditLoss(diffusion, rates, NULL, 3, torch.float32)


class _Recorder(torch.nn.Module):
    """Stands for a UNet; keeps what it is called with and predicts zeros."""

    def forward(self, latents, timesteps, text, added_cond_kwargs, return_dict):
        assert added_cond_kwargs is None
        self.latents, self.timesteps, self.text = latents, timesteps, text
        return (torch.zeros_like(latents[:, :4]),)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_input_and_target_are_the_papers(kind):
    samples, unet, loss_fn = _samples(), _Recorder(), _loss(kind)
    loss = loss_fn(unet, samples)
    posterior = draw_normal(3, Purpose.POSTERIOR, samples.positions, (CHANNELS, SIDE, SIDE))
    noise = draw_normal(3, Purpose.NOISE, samples.positions, (CHANNELS, SIDE, SIDE))
    timesteps = draw_integers(3, Purpose.TIMESTEP, samples.positions, 1000)
    latents = (samples.target_mean + samples.target_std * posterior) * SCALE
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(unet.latents[:, :4], noisy)
    assert torch.equal(unet.latents[:, 4:], samples.condition)  # the mode, not scaled
    assert torch.equal(unet.timesteps, timesteps)
    assert torch.equal(unet.text, samples.text)
    errors = target.square().mean((1, 2, 3))
    torch.testing.assert_close(loss, (samples.weights * errors).sum())


def test_dropped_conditions_become_null_text_and_zeros():
    samples, unet = _samples(), _Recorder()
    _loss(rates=(0.3, 0.2, 0.3))(unet, samples)
    no_text = (unet.text == 9.0).all((1, 2))
    no_image = (unet.latents[:, 4:] == 0).all((1, 2, 3))
    assert torch.equal(unet.text[~no_text], samples.text[~no_text])
    assert torch.equal(unet.latents[~no_image][:, 4:], samples.condition[~no_image])
    cases = {(bool(t), bool(i)) for t, i in zip(no_text, no_image, strict=True)}
    assert len(cases) == 4
    assert 0.3 < no_text.float().mean() < 0.7


def test_a_sample_is_drawn_by_its_position_alone():
    """On the reference every rank draws the same noise, timesteps and masks (defect 2)."""
    samples, loss_fn = _samples(), _loss(rates=(0.1, 0.1, 0.1))
    whole, parts = _Recorder(), []
    loss_fn(whole, samples)
    for rank in range(4):
        unet = _Recorder()
        loss_fn(unet, Samples(*(field[rank::4] for field in samples)))
        parts.append(unet)
    for rank, unet in enumerate(parts):
        assert torch.equal(unet.latents, whole.latents[rank::4])
        assert torch.equal(unet.timesteps, whole.timesteps[rank::4])
    assert len(set(whole.timesteps.tolist())) > N * 0.9
    assert not torch.equal(parts[0].latents, parts[1].latents)


def test_held_out_draws_are_not_those_of_training():
    samples, loss_fn = _samples(), _loss()
    keep = torch.zeros(N, dtype=torch.bool)
    training, held_out = (
        loss_fn.edit_input(samples, keep, keep, purposes) for purposes in (TRAINING, HELD_OUT)
    )
    assert not torch.equal(training.timesteps, held_out.timesteps)
    assert not torch.equal(training.latents, held_out.latents)


def test_the_encoders_give_posterior_and_mode(tmp_path):
    base = save_tiny_pipeline(tmp_path / "base")
    vae = AutoencoderKL.from_pretrained(base / "vae")
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    as_one = TextEncoder(STABLE_DIFFUSION, {"text_encoder": text_encoder})
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    tokenize = make_tokenize([tokenizer])
    original, edited = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8)
    batch = collate(
        [
            PixelSample(
                original[i], edited[i], tokenize("make it red"), torch.zeros(6), 40 + i, float(i)
            )
            for i in range(2)
        ]
    )
    encoders = Encoders(vae, as_one, tokenize("")[None], torch.device("cpu"), torch.float32)
    samples = encoders.encode(batch)
    with torch.no_grad():
        target = vae.encode(2 * (edited / 255) - 1).latent_dist
        condition = vae.encode(2 * (original / 255) - 1).latent_dist
        text, null = (
            text_encoder(
                tokenizer(words, padding="max_length", return_tensors="pt").input_ids
            ).last_hidden_state
            for words in ("make it red", "")
        )
    torch.testing.assert_close(samples.target_mean, target.mean)
    torch.testing.assert_close(samples.target_std, target.std)
    torch.testing.assert_close(samples.condition, condition.mode())
    torch.testing.assert_close(samples.text, text.expand(2, -1, -1))
    torch.testing.assert_close(encoders.null_text.states, null)
    assert samples.positions.tolist() == [40, 41]
    assert samples.weights.tolist() == [0.0, 1.0]
