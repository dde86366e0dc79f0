"""What an adapter is: its layers, its dropout, and what else in the UNet knows of it."""

import re
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import save_tiny_pipeline
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from fusedit.trainer.adapters import Draws, Dropout, load_trained
from fusedit.trainer.compiled import check_gradients, compile_unet
from fusedit.trainer.config import AdapterConfig
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.encoders import Samples
from fusedit.trainer.errors import UsageError
from fusedit.trainer.families import Text
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.unet import Prepared, grow_conv_in, prepare_unet

CPU = torch.device("cpu")
CONFIG = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"))


def grown(base) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    grow_conv_in(unet, "base")
    return unet


def prepared(base, section: AdapterConfig, dtype=torch.float32, **more) -> Prepared:
    told = {"fused": False, "adapter": section, "dtype": dtype, "seed": 7} | more
    return prepare_unet(grown(base), CPU, **told)


def moved(made: Prepared) -> Prepared:
    """As after some training: its second matrices are no zeros."""
    torch.manual_seed(4)
    for name, parameter in made.parameters.items():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made


@torch.no_grad()
def said(unet: UNet2DConditionModel, dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    latents, text = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 16)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        return unet(latents, torch.tensor([3, 900]), text, return_dict=False)[0]


# Dropout.


def dropout(rate: float, layer: int = 0, seed: int = 0) -> Dropout:
    return Dropout(rate, layer, Draws(seed), CPU)


def hidden(module: Dropout, positions: list[int], shape=(20, 14)) -> torch.Tensor:
    module.draws.positions = torch.tensor(positions)
    return module(torch.ones(len(positions), *shape)) == 0


def test_dropout_hides_its_share_and_keeps_the_mean():
    module = dropout(0.3)
    module.draws.positions = torch.arange(50)
    out = module(torch.ones(50, 40, 25))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((out == 0).float().mean() - 0.3) < 4 * (0.3 * 0.7 / out.numel()) ** 0.5
    assert abs(out.mean() - 1) < 0.02


def test_what_is_hidden_belongs_to_seed_sample_and_layer_alone():
    module = dropout(0.5)
    both = hidden(module, [3, 4])
    assert torch.equal(both[1:], hidden(module, [4]))
    assert torch.equal(both, hidden(dropout(0.5), [3, 4]))
    others = dropout(0.5, layer=1), dropout(0.5, seed=1)
    for other in (hidden(module, [4, 3]), *(hidden(one, [3, 4]) for one in others)):
        assert 0.3 < (other != both).float().mean() < 0.7
    images = hidden(module, [3, 4], (5, 14, 4))
    module.draws.positions = torch.tensor([3, 4])
    last = module(torch.ones(2, 5, 14, 4).to(memory_format=torch.channels_last)) == 0
    assert torch.equal(images, last)


def test_dropout_ends_with_training_and_wants_to_know_its_samples():
    module = dropout(0.5)
    with pytest.raises(ValueError, match="must be told its samples"):
        module(torch.ones(1, 4))
    assert module.eval()(torch.ones(1, 4)).all()


# What is attached.


def test_it_changes_nothing_before_it_is_trained_and_starts_as_diffusers_scripts(base):
    section = AdapterConfig(lora_rank=64)
    made = prepared(base, section)
    assert torch.equal(said(made.unet), said(grown(base).to(memory_format=torch.channels_last)))
    first = [p for name, p in made.parameters.items() if "lora_A" in name]
    spread = torch.cat([p.flatten() for p in first])
    assert abs(spread.std() * 64 - 1) < 0.03  # N(0, 1 / rank)
    assert not torch.equal(first[0], first[1])
    again, other = (prepared(base, section, seed=seed).parameters for seed in (7, 8))
    assert all(torch.equal(p, again[name]) for name, p in made.parameters.items())
    assert not any(torch.equal(p, other[n]) for n, p in made.parameters.items() if "lora_A" in n)


def test_a_layer_adds_its_product_times_alpha_by_rank(base):
    made = moved(prepared(base, AdapterConfig(lora_rank=2, lora_alpha=6)))
    layer = made.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 16)
    plain = F.linear(x, layer.base_layer.weight)
    torch.testing.assert_close(layer(x), plain + 3.0 * (x @ first.T @ second.T))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_frozen_base_is_rounded_as_autocast_would(base, dora):
    section = AdapterConfig(lora_rank=2, use_dora=dora)
    half = moved(prepared(base, section, torch.bfloat16)).unet
    full = moved(prepared(base, section)).unet
    assert torch.equal(said(half, torch.bfloat16), said(full, torch.bfloat16))
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    kept = [name for name in dtypes if "lora" in name or "norm" in name or "conv_in." in name]
    kept += [name for name in dtypes if dora and "base_layer" in name]
    assert {dtypes[name] for name in kept} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - set(kept)} == {torch.bfloat16}


def test_values_of_another_adapter_are_not_taken(base):
    made = prepared(base, AdapterConfig(lora_rank=2))
    other = prepared(base, AdapterConfig(lora_rank=2, lora_targets="to_q")).parameters
    with pytest.raises(ValueError, match=r"not the values of this adapter: .*to_k"):
        load_trained(made.unet, other)


# What else knows of it.


def gradients(made: Prepared, *, compiled: str | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    latents = torch.randn(2, 4, 8, 8)
    samples = Samples(
        target_mean=latents, target_std=latents.abs(), condition=latents,
        text=torch.randn(2, 5, 16), pooled=torch.zeros(2, 0), size_ids=torch.zeros(2, 6),
        positions=torch.arange(2), weights=torch.ones(2),
    )  # fmt: skip
    diffusion = Diffusion.from_scheduler(CONFIG, 0.18215, CPU)
    null_text = Text(torch.zeros(1, 5, 16), torch.zeros(1, 0))
    loss_fn = EditLoss(diffusion, (0.0, 0.0, 0.0), null_text, 5, torch.float32)
    assert made.adapter is not None
    loss_fn = made.adapter.drawing(loss_fn)
    if compiled is not None:
        compile_unet(made.unet, "blocks", backend=compiled)
        check_gradients(made.unet, loss_fn, samples, torch.float32, "blocks")
    loss_fn(made.unet, samples).backward()
    grads = {name: p.grad for name, p in made.unet.named_parameters() if p.grad is not None}
    assert grads.keys() == made.parameters.keys()
    return grads


ALL_OVER = "to_q,to_k,to_v,to_out.0,ff.net.0.proj,conv1,conv_shortcut,time_emb_proj,proj_out"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_fused_modules_serve_an_adapter_and_name_what_they_leave(base, dora):
    """Their definitions here; in tests/kernels the kernels agree with those."""
    section = AdapterConfig(lora_rank=2, lora_targets=ALL_OVER, use_dora=dora, lora_dropout=0.3)
    fused = moved(prepared(base, section, fused=True, attention="triton"))
    plain = moved(prepared(base, section))
    expected = gradients(plain)
    for name, grad in gradients(fused).items():
        assert (grad - expected[name]).norm() < 1e-4 * expected[name].norm(), name
    carried = "attn1.to_q: it carries an adapter or a hook (Linear): q, k and v are projected one"
    assert any(carried in line for line in fused.fused)


def test_checkpointing_hides_the_same_when_it_computes_again(base):
    section = AdapterConfig(lora_rank=2, lora_dropout=0.5)
    once, twice = (
        gradients(moved(prepared(base, section, gradient_checkpointing=again)))
        for again in (False, True)
    )
    assert all(torch.equal(grad, once[name]) for name, grad in twice.items())


def test_blocks_are_compiled_once_for_all_and_proved_by_what_is_trained(base):
    torch._dynamo.reset()
    counters.clear()
    made = moved(prepared(base, AdapterConfig(lora_rank=2, lora_dropout=0.5)))
    compiled = gradients(made, compiled="aot_eager")
    eager = gradients(moved(prepared(base, AdapterConfig(lora_rank=2, lora_dropout=0.5))))
    for name, grad in compiled.items():
        torch.testing.assert_close(grad, eager[name])
    blocks = [m for m in made.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    widths = {block.norm1.normalized_shape for block in blocks}
    assert counters["stats"]["unique_graphs"] == len(widths) < len(blocks)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("to_q,to_x", "--lora_targets to_x: no layer of the UNet is called so"),
        ("to_out", "--lora_targets to_out: Target module"),
        ("norm1", "--lora_targets norm1: Target module"),
    ],
)
def test_what_is_no_layer_is_refused(base, targets, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        prepared(base, AdapterConfig(lora_rank=2, lora_targets=targets))


def test_without_peft_the_extra_is_named(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"--lora_rank needs peft: pip install 'fusedit\[lora\]'"):
        prepared(base, AdapterConfig(lora_rank=2))
