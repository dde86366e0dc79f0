import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import save_tiny_pipeline

from fusedit.trainer.config import ModelConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.pretrained import check_resolution, describe, load_unet
from fusedit.trainer.unet import grow_conv_in


@pytest.fixture
def unet(tmp_path):
    return UNet2DConditionModel.from_pretrained(save_tiny_pipeline(tmp_path / "base") / "unet")


def test_a_grown_unet_says_what_it_said_whatever_the_condition(unet):
    """Weight and bias of the old channels are kept (the reference's defect 1), the new are zero."""
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, unet.config.cross_attention_dim)
    weight, bias = unet.conv_in.weight.clone(), unet.conv_in.bias.clone()
    assert bias.abs().max() > 0
    with torch.no_grad():
        before = unet(latents, 3, text).sample
        grow_conv_in(unet, "base")
        after = unet(torch.cat((latents, torch.randn(2, 4, 8, 8)), 1), 3, text).sample
    torch.testing.assert_close(after, before)
    assert torch.equal(unet.conv_in.weight[:, :4], weight)
    assert torch.equal(unet.conv_in.bias, bias)
    assert not unet.conv_in.weight[:, 4:].any()
    assert unet.config.in_channels == 8


def test_an_editing_unet_is_left_as_it_is(unet):
    grow_conv_in(unet, "base")
    conv_in = unet.conv_in
    grow_conv_in(unet, "base")
    assert unet.conv_in is conv_in


def test_other_channel_counts_are_refused_before_weights_load(tmp_path):
    folder = save_tiny_pipeline(tmp_path / "inpainting")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UsageError, match=r"takes 9 input channels; 4 .* or 8"):
        describe(ModelConfig(pretrained_model_name_or_path=str(folder)))


def test_an_8_channel_pipeline_is_gone_on_from(tmp_path):
    """The reference crashes on one (defect 3, diffusers #3455)."""
    folder = save_tiny_pipeline(tmp_path / "edits", in_channels=8)
    section = ModelConfig(pretrained_model_name_or_path=str(folder))
    assert describe(section).unet["in_channels"] == 8
    stored = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    for name, value in load_unet(section).state_dict().items():
        assert torch.equal(value, stored[name])


def test_another_unet_can_stand_in(tmp_path):
    base = save_tiny_pipeline(tmp_path / "base")
    other = save_tiny_pipeline(tmp_path / "other", in_channels=8)
    section = ModelConfig(pretrained_model_name_or_path=str(base), unet=str(other / "unet"))
    stored = UNet2DConditionModel.from_pretrained(other / "unet").conv_in.weight
    assert torch.equal(load_unet(section).conv_in.weight, stored)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere/at-all", "neither a folder here nor to be had from the hub"),
        ("empty", "empty has no folder unet"),
    ],
)
def test_what_is_no_pipeline_is_told_in_one_line(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message) as caught:
        describe(ModelConfig(pretrained_model_name_or_path=model))
    assert "\n" not in str(caught.value)


def test_a_size_the_vae_cannot_halve_is_refused_with_ones_it_can(tmp_path):
    folder = save_tiny_pipeline(tmp_path / "base")
    described = describe(ModelConfig(pretrained_model_name_or_path=str(folder)))
    check_resolution(16, described)
    with pytest.raises(UsageError, match=r"--resolution 17 must be a multiple of 2.*try 16 or 18"):
        check_resolution(17, described)
