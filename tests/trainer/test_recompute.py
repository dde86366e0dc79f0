"""Gradient checkpointing: the same gradients, and nothing made again that is kept."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import save_tiny_inputs, save_tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from fusedit.launch import train
from fusedit.launch.flags import parse
from fusedit.trainer.estimate import count_run
from fusedit.trainer.pretrained import describe
from fusedit.trainer.recompute import checkpoint_blocks

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.counts[function._opname] += 1
        return function(*arguments, **(named or {}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"), in_channels=8)


def found(base, **settings):
    """Every gradient, and how often each operation was called."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet").train()
    if settings:
        checkpoint_blocks(unet, **settings)
    torch.manual_seed(0)
    given = torch.randn(2, 8, 16, 16), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    with Calls() as calls:
        unet(*given).sample.square().mean().backward()
    return {name: p.grad for name, p in unet.named_parameters()}, calls.counts


@pytest.fixture(scope="module")
def plain(base):
    return found(base)


@pytest.mark.parametrize("levels", [None, 1, 2])
@pytest.mark.parametrize("keeps", ["nothing", "attention", "products"])
def test_gradients_are_the_same_to_the_bit(base, plain, keeps, levels):
    gradients, _ = found(base, keeps=keeps, levels=levels)
    for name, value in plain[0].items():
        assert torch.equal(gradients[name], value), name


@pytest.mark.parametrize(
    ("keeps", "attention_again", "products_again"),
    [("nothing", True, True), ("attention", False, True), ("products", False, False)],
)
def test_what_is_kept_is_not_made_again(base, plain, keeps, attention_again, products_again):
    _, counts = found(base, keeps=keeps)
    before = plain[1]
    for names, again in (
        ((ATTENTION,), attention_again),
        (("convolution", "addmm", "mm"), products_again),
    ):
        assert all((counts[name] > before[name]) == again for name in names), names
    assert counts["native_group_norm"] > before["native_group_norm"]


def test_levels_are_those_of_the_largest_maps(base):
    _, one = found(base, levels=1)
    _, two = found(base, levels=2)
    _, every = found(base, levels=None)
    assert one["convolution"] < two["convolution"] < every["convolution"]
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    checkpoint_blocks(unet, levels=1)
    checkpointed = [n for n, m in unet.named_modules() if getattr(m, "gradient_checkpointing", 0)]
    assert {name.split(".")[0] + name.split(".")[1] for name in checkpointed} == {
        "down_blocks0",
        "up_blocks1",
    }


def flags(folder, *more):
    return [
        f"--pretrained_model_name_or_path={folder / 'base'}",
        f"--train_data_dir={folder / 'data'}",
        f"--output_dir={folder / 'out'}",
        *("--resolution=16", "--train_batch_size=2", "--max_train_steps=2", "--report_to=none"),
        *("--mixed_precision=no", *more),
    ]


def test_the_plan_tells_what_it_saves(tmp_path):
    inputs = save_tiny_inputs(tmp_path, 4)

    def peak(*more):
        config = parse(flags(inputs, "--center_crop", *more)).run
        return count_run(config, describe(config.model)).unet.peak(64)[1]

    on = "--gradient_checkpointing"
    least = peak(on)
    attention, products = (
        peak(on, f"--checkpointing_keeps={k}") for k in ("attention", "products")
    )
    assert least < attention < products < peak()
    assert least <= peak(on, "--checkpointing_levels=1") < peak()


def test_a_run_with_it_and_mistakes(tmp_path, capfd):
    inputs = save_tiny_inputs(tmp_path, 4)
    keeps = "--checkpointing_keeps=products"
    assert train.main(flags(inputs, "--gradient_checkpointing", keeps)) == 0
    for words, told in (
        ([keeps], "--checkpointing_keeps products needs --gradient_checkpointing"),
        (["--checkpointing_levels=2"], "--checkpointing_levels 2 needs --gradient_checkpointing"),
        (
            ["--gradient_checkpointing", keeps, "--compile=blocks"],
            "--compile blocks is not --checkpointing_keeps products",
        ),
    ):
        assert train.main(flags(inputs, "--overwrite", *words)) == 2
        assert told in capfd.readouterr().err
