import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from tiny import save_tiny_pipeline
from transformers import CLIPTextModel, CLIPTokenizer

from fusedit.trainer.config import DiffusionConfig
from fusedit.trainer.data import PixelSample, collate, make_tokenize
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.draws import Purpose, draw_integers, draw_normal
from fusedit.trainer.encoders import Encoders, Samples
from fusedit.trainer.families import STABLE_DIFFUSION, Text, TextEncoder
from fusedit.trainer.loss import GROUPS, HELD_OUT, TRAINING, EditLoss

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


def _loss(kind="epsilon", rates=(0.0, 0.0, 0.0), **options):
    config = {"beta_schedule": "scaled_linear", "prediction_type": kind}
    section = DiffusionConfig(**options)
    diffusion = Diffusion.from_scheduler(config, SCALE, torch.device("cpu"), section)
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


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_more_noise_is_as_in_the_siblings(kind):
    """Of train_text_to_image.py: the offset is predicted, the perturbation is not."""
    samples, unet = _samples(), _Recorder()
    loss = _loss(kind, noise_offset=0.3, input_perturbation=0.2)(unet, samples)
    posterior, noise, more = (
        draw_normal(3, purpose, samples.positions, (CHANNELS, SIDE, SIDE)).double()
        for purpose in (Purpose.POSTERIOR, Purpose.NOISE, Purpose.INPUT_PERTURBATION)
    )
    offset = draw_normal(3, Purpose.NOISE_OFFSET, samples.positions, (CHANNELS, 1, 1)).double()
    latents = (samples.target_mean.double() + samples.target_std.double() * posterior) * SCALE
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64).square()
    alpha_bar = (1 - betas).cumprod(0)[unet.timesteps].view(-1, 1, 1, 1)
    noise = noise + 0.3 * offset
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * (noise + 0.2 * more)
    torch.testing.assert_close(unet.latents[:, :4].double(), noisy, rtol=1e-4, atol=1e-5)
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    target = noise if kind == "epsilon" else velocity
    expected = (samples.weights * target.square().mean((1, 2, 3))).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_samples_error_and_not_the_held_out_loss(kind):
    samples, plain, unet = _samples(), _Recorder(), _Recorder()
    _loss(kind)(plain, samples)
    loss_fn = _loss(kind, snr_gamma=5.0)
    loss = loss_fn(unet, samples)
    assert torch.equal(unet.latents, plain.latents)
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64).square()
    alpha_bar = (1 - betas).cumprod(0)[unet.timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    divisor = snr if kind == "epsilon" else snr + 1
    keep = torch.zeros(N, dtype=torch.bool)
    given = loss_fn.edit_input(samples, keep, keep, TRAINING)
    errors = given.target.double().square().mean((1, 2, 3))
    expected = (samples.weights * snr.clamp(max=5.0) / divisor * errors).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    held_out = loss_fn.errors(unet, given, samples.weights)[0].double()
    torch.testing.assert_close(held_out, (samples.weights * errors).sum(), rtol=1e-5, atol=0)


def test_held_out_noise_is_plain_whatever_is_trained():
    samples, keep = _samples(), torch.zeros(N, dtype=torch.bool)
    plain = _loss().edit_input(samples, keep, keep, HELD_OUT)
    more = _loss(noise_offset=0.3, input_perturbation=0.2)
    assert torch.equal(more.edit_input(samples, keep, keep, HELD_OUT).latents, plain.latents)
    assert not torch.equal(more.edit_input(samples, keep, keep, TRAINING).latents, plain.latents)


def test_timesteps_come_from_the_range_alone_and_from_all_of_it():
    samples, keep = _samples()._replace(positions=torch.arange(N) * 7), torch.zeros(N).bool()
    for purposes in (TRAINING, HELD_OUT):
        loss_fn = _loss(min_timestep=500, max_timestep=504)
        timesteps = loss_fn.edit_input(samples, keep, keep, purposes).timesteps
        assert set(timesteps.tolist()) == {500, 501, 502, 503}


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


def test_the_loss_is_told_by_what_was_dropped_and_by_timestep():
    """Against each sample alone, sorted by what its UNet was given."""
    samples, loss_fn = _samples(), _loss(rates=(0.3, 0.2, 0.3), snr_gamma=5.0)
    expected: dict[str, list[float]] = {name: [0.0, 0.0] for name in loss_fn.groups}
    for index in range(N):
        unet = _Recorder()
        loss = loss_fn(unet, Samples(*(field[index : index + 1] for field in samples)))
        text, image = (unet.text == 9.0).all(), (unet.latents[:, 4:] == 0).all()
        names = {(0, 0): "full", (1, 0): "no_text", (0, 1): "no_image", (1, 1): "neither"}
        start = int(unet.timesteps) // 250 * 250
        for name in (
            f"loss_by_condition/{names[int(text), int(image)]}",
            f"loss_by_timestep/{start}-{start + 249}",
        ):
            expected[name][0] += float(loss)
            expected[name][1] += float(samples.weights[index])
    by_group = torch.zeros(2, GROUPS)
    loss = loss_fn(_Recorder(), samples, by_group)
    assert dict(zip(loss_fn.groups, by_group.T.tolist(), strict=True)) == {
        name: pytest.approx(both, rel=1e-4) for name, both in expected.items()
    }
    torch.testing.assert_close(by_group[0].view(2, 4).sum(1), torch.stack((loss, loss)))
    assert loss == loss_fn(_Recorder(), samples)


def test_what_is_not_finite_stays_in_its_own_groups():
    samples, loss_fn = _samples(), _loss("v_prediction", rates=(0.3, 0.2, 0.3))
    samples.target_mean[5] = float("nan")
    by_group = torch.zeros(2, GROUPS)
    loss_fn(_Recorder(), samples, by_group)
    assert (~by_group[0].isfinite()).view(2, 4).sum(1).tolist() == [1, 1]


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
