import pytest
import torch
from diffusers import DDPMScheduler

from fusedit.trainer.diffusion import Diffusion

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_diffusers(kind, zero_snr):
    config = SD | {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr}
    ours = Diffusion.from_scheduler(config, 1.0, torch.device("cpu"))
    theirs = DDPMScheduler(**config)
    latents, noise = torch.randn(2, 5, 4, 3, 3)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps)
    )
    expected = noise if kind == "epsilon" else theirs.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(ours.target(latents, noise, timesteps), expected)


def test_zero_terminal_snr_ends_in_pure_noise():
    config = SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert Diffusion.from_scheduler(config, 1.0, torch.device("cpu")).signal[-1] == 0


def test_another_prediction_is_refused():
    with pytest.raises(ValueError, match="got sample"):
        Diffusion.from_scheduler(SD | {"prediction_type": "sample"}, 1.0, torch.device("cpu"))
