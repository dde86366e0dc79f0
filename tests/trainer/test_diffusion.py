import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from fusedit.trainer.config import DiffusionConfig
from fusedit.trainer.diffusion import Diffusion, trained_scheduler
from fusedit.trainer.errors import UsageError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")
V = {"prediction_type": "v_prediction"}


def alpha_bars():
    """[1000] fp64, of Stable Diffusion's betas, written out anew."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    return np.cumprod(1 - betas)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_tables_are_those_of_diffusers(zero_snr):
    config = SD | {"rescale_betas_zero_snr": zero_snr}
    ours = Diffusion.from_scheduler(config, 1.0, CPU)
    ones, zeros, timesteps = torch.ones(1000, 1), torch.zeros(1000, 1), torch.arange(1000)
    theirs = DDPMScheduler(**config)
    torch.testing.assert_close(ours.signal[:, None], theirs.add_noise(ones, zeros, timesteps))
    torch.testing.assert_close(ours.noise[:, None], theirs.add_noise(zeros, ones, timesteps))


def test_zero_terminal_snr_is_the_papers():
    """Lin et al. 2023, algorithm 1: sqrt(alpha bar) shifted to end in 0, then scaled."""
    section = DiffusionConfig(rescale_betas_zero_snr=True, **V)
    config = trained_scheduler(SD | {"_class_name": "DDIMScheduler"}, section)
    ours = Diffusion.from_scheduler(config, 1.0, CPU, section)
    signal = np.sqrt(alpha_bars())
    expected = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    np.testing.assert_allclose(ours.signal, expected, atol=3e-6)
    np.testing.assert_allclose(ours.noise, np.sqrt(1 - expected**2), atol=3e-5)
    assert (ours.signal[-1], ours.noise[-1]) == (0, 1)


def test_another_prediction_is_refused():
    with pytest.raises(ValueError, match="got sample"):
        Diffusion.from_scheduler(SD | {"prediction_type": "sample"}, 1.0, CPU)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 1e9])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_papers(kind, gamma):
    """Hang et al. 2023: min(SNR, gamma) over SNR, over SNR + 1 for v."""
    snr = alpha_bars() / (1 - alpha_bars())
    expected = np.minimum(snr, gamma) / (snr if kind == "epsilon" else snr + 1)
    config = SD | {"prediction_type": kind}
    ours = Diffusion.from_scheduler(config, 1.0, CPU, DiffusionConfig(snr_gamma=gamma))
    np.testing.assert_allclose(ours.loss_weights, expected, rtol=5e-4)
    assert Diffusion.from_scheduler(config, 1.0, CPU).loss_weights is None


def test_min_snr_weights_of_zero_terminal_snr_are_numbers():
    config = SD | {"rescale_betas_zero_snr": True} | V
    weights = Diffusion.from_scheduler(config, 1.0, CPU, DiffusionConfig(snr_gamma=5)).loss_weights
    assert weights.isfinite().all()
    assert weights[-1] == 0  # SNR 0
    assert (weights[:-1] > 0).all()


def test_timesteps_are_those_asked_for():
    def timesteps(**section):
        return Diffusion.from_scheduler(SD, 1.0, CPU, DiffusionConfig(**section)).timesteps

    assert timesteps() == range(1000)
    assert timesteps(min_timestep=200) == range(200, 1000)
    assert timesteps(min_timestep=200, max_timestep=300) == range(200, 300)


def sampler_of(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def saved(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    return dict(type(scheduler).load_config(tmp_path))


def test_the_sampler_is_left_alone_unless_asked(tmp_path):
    config = saved(PNDMScheduler(**SD, skip_prk_steps=True), tmp_path)
    assert trained_scheduler(config, DiffusionConfig(snr_gamma=5, noise_offset=0.1)) == config


def test_the_prediction_is_exported(tmp_path):
    config = saved(PNDMScheduler(**SD, skip_prk_steps=True), tmp_path)
    changed = trained_scheduler(config, DiffusionConfig(**V))
    assert changed == config | V
    assert sampler_of(changed).config["prediction_type"] == "v_prediction"
    assert Diffusion.from_scheduler(changed, 1.0, CPU).prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", [PNDMScheduler, DPMSolverMultistepScheduler])
def test_zero_terminal_snr_is_exported_and_sampled_from_the_last_step(kind, tmp_path):
    config = saved(kind(**SD, steps_offset=1), tmp_path)
    changed = trained_scheduler(config, DiffusionConfig(rescale_betas_zero_snr=True, **V))
    sampler = sampler_of(changed)
    known = kind is DPMSolverMultistepScheduler
    assert type(sampler) is (kind if known else diffusers.DDIMScheduler)
    told = saved(sampler, tmp_path / "exported")
    assert told["rescale_betas_zero_snr"] is True
    assert told["timestep_spacing"] == "trailing"
    assert told["prediction_type"] == "v_prediction"
    assert told.get("clip_sample") is (None if known else False)
    assert {name: told[name] for name in SD} == SD
    sampler.set_timesteps(4)
    assert sampler.timesteps[0] == 999
    assert sampler.alphas_cumprod[-1] <= 2**-20
    assert math.isclose(sampler.alphas_cumprod[0], alpha_bars()[0], rel_tol=1e-5)


@pytest.mark.parametrize(
    ("pipeline", "section", "message"),
    [
        ({}, {"rescale_betas_zero_snr": True}, "--rescale_betas_zero_snr, which needs v-predicti"),
        (
            V | {"rescale_betas_zero_snr": True},
            {"prediction_type": "epsilon"},
            "the pipeline's scheduler has rescale_betas_zero_snr, .* predicts epsilon: take --pred",
        ),
        ({}, {"max_timestep": 1001}, "--max_timestep 1001 must be at most 1000: the schedule has"),
        ({"num_train_timesteps": 50}, {"min_timestep": 50}, "--min_timestep 50 must be at most 49"),
    ],
)
def test_what_the_pipelines_schedule_does_not_serve_is_refused(pipeline, section, message):
    config = SD | {"_class_name": "DDIMScheduler"} | pipeline
    with pytest.raises(UsageError, match=message) as caught:
        trained_scheduler(config, DiffusionConfig(**section))
    assert "\n" not in str(caught.value)
