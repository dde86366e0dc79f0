import pytest
import torch
from diffusers import DDPMScheduler

from fusedit.trainer.diffusion import Diffusion

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_tables_are_those_of_diffusers(zero_snr):
    config = SD | {"rescale_betas_zero_snr": zero_snr}
    ours = Diffusion.from_scheduler(config, 1.0, torch.device("cpu"))
    ones, zeros, timesteps = torch.ones(1000, 1), torch.zeros(1000, 1), torch.arange(1000)
    theirs = DDPMScheduler(**config)
    torch.testing.assert_close(ours.signal[:, None], theirs.add_noise(ones, zeros, timesteps))
    torch.testing.assert_close(ours.noise[:, None], theirs.add_noise(zeros, ones, timesteps))


def test_zero_terminal_snr_ends_in_pure_noise():
    config = SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert Diffusion.from_scheduler(config, 1.0, torch.device("cpu")).signal[-1] == 0


def test_another_prediction_is_refused():
    with pytest.raises(ValueError, match="got sample"):
        Diffusion.from_scheduler(SD | {"prediction_type": "sample"}, 1.0, torch.device("cpu"))
