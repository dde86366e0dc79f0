"""`fuse` on the architecture of Stable Diffusion 1.5, narrowed so that the kernels can be read."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from accuracy import output_and_gradients
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from fusedit.benchmarks.shapes import shapes
from fusedit.kernels.unet import OPS, Fused, fuse, unfuse

# Every norm runs interpreted, forward and backward, so the narrow UNet has narrow images too.
NARROW = {
    "sample_size": 16, "in_channels": 8, "block_out_channels": (32, 64, 128, 128),
    "cross_attention_dim": 16, "attention_head_dim": 2,
}  # fmt: skip
NARROW_XL = {
    "sample_size": 8, "in_channels": 8, "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 16,
    "attention_head_dim": (2, 2, 4), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}  # fmt: skip


def unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(**{**NARROW, **changes})
    for parameter in model.parameters():  # norms start as 1 and 0, which hides a swap
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight.data += 1
    return model.to(memory_format=torch.channels_last)


def inputs(model, dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    channels, width = model.config["in_channels"], model.config["cross_attention_dim"]
    latents = torch.randn(2, channels, 16, 16).to(memory_format=torch.channels_last)
    given = {"sample": latents, "encoder_hidden_states": torch.randn(2, 3, width)}
    if model.config["addition_embed_type"]:
        pooled, sizes = torch.randn(2, 16), torch.full((2, 6), 64.0)
        given["added_cond_kwargs"] = {"text_embeds": pooled.to(device, dtype), "time_ids": sizes}
    moved = {k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return moved | {"timestep": torch.tensor([3, 800], device=device)}


def outcome(model, given, call=None) -> dict[str, torch.Tensor]:
    out = (model if call is None else call)(**given, return_dict=False)[0]
    return output_and_gradients(model, out)


def errors(found, truth) -> dict[str, float]:
    """RMS error of each, in parts of its RMS."""
    size = {name: value.square().mean().sqrt() for name, value in truth.items()}
    return {
        name: float((found[name].double() - value).square().mean().sqrt() / size[name])
        for name, value in truth.items()
    }


def assert_no_further_from_the_truth(ours, plain, truth):
    """As the bar of one op, but over hundreds of tensors, of which some are lucky in either."""
    theirs = errors(plain, truth)
    usual = sorted(theirs.values())[len(theirs) // 2]
    for name, error in errors(ours, truth).items():
        bar = 2 * max(theirs[name], usual)
        assert error <= bar, f"{name}: {error:.2g}, plain {theirs[name]:.2g}"
    assert sum(errors(ours, truth).values()) <= 1.2 * sum(theirs.values())


def true_unet(**changes):
    with torch.device("meta"):
        return UNet2DConditionModel(**{"in_channels": 8, "cross_attention_dim": 768, **changes})


SDXL = {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def test_the_true_sd15_is_fused_whole():
    model = true_unet()
    made = fuse(model)
    kinds = Counter(made.fused.values())
    assert kinds == {
        "GroupNorm": 16, "GroupNorm + SiLU": 23, "time embedding + GroupNorm + SiLU": 22,
        "GEGLU": 16, "LayerNorm": 16, "residual + LayerNorm": 32,
        "self-attention": 16, "cross-attention": 16,
    }  # fmt: skip
    assert not made.left
    assert made.plain_when_compiled == ("geglu", "layer_norm")
    assert len(list(model.parameters())) == 686


@pytest.mark.parametrize(("preset", "changes"), [("sd15-512", {}), ("sdxl-1024", SDXL)])
def test_the_inventory_of_shapes_is_that_of_the_true_unets(preset, changes):
    model, listed = true_unet(**changes), shapes(preset)
    count = sum(p.numel() for p in model.parameters())
    assert count == listed.parameters
    fused = fuse(model).fused
    for op, rows in (("GroupNorm", listed.group_norms), ("LayerNorm", listed.layer_norms)):
        widths = Counter()
        for row in rows:
            widths[row.channels if op == "GroupNorm" else row.width] += row.times
        norms = [model.get_submodule(name) for name, kind in fused.items() if op in kind]
        assert Counter(norm.weight.numel() for norm in norms) == widths
    gates = [model.get_submodule(name) for name, kind in fused.items() if kind == "GEGLU"]
    widths = Counter()
    for row in listed.geglus:
        widths[row.width] += row.times
    assert Counter(gate.proj.out_features // 2 for gate in gates) == widths
    for own in (True, False):
        widths = Counter()
        for row in listed.attentions:
            if (row.queries == row.keys) == own:
                widths[row.heads, row.width] += row.times
        kind = "self-attention" if own else "cross-attention"
        found = [model.get_submodule(name) for name, what in fused.items() if what == kind]
        assert Counter((one.heads, one.inner_dim // one.heads) for one in found) == widths
    with_silu = [kind for kind in fused.values() if "SiLU" in kind]
    assert len(with_silu) == sum(row.times for row in listed.group_norms if row.silu)
    embedded = [kind for kind in fused.values() if "time embedding" in kind]
    assert len(embedded) == sum(row.times for row in listed.group_norms if row.time_embedding)


@pytest.fixture(scope="module")
def truth():
    model = unet().double()
    return outcome(model, inputs(model, torch.float64))


@pytest.fixture(scope="module")
def plain():
    model = unet()
    return outcome(model, inputs(model))


def test_fused_sd15_is_as_near_the_truth_as_plain(truth, plain, launches, device):
    model = unet().to(device)
    fuse(model)
    ours = outcome(model, inputs(model, device=device))
    assert Counter(launches)["_forward_kernel"] == 16  # GEGLU
    assert len(ours) == 1 + 686
    assert_no_further_from_the_truth({k: v.cpu() for k, v in ours.items()}, plain, truth)


NORMS = pytest.param(("group_norm",), id="norms", marks=pytest.mark.slow)  # all of them have it too


@pytest.mark.parametrize("compiled_ops", [NORMS, pytest.param(OPS, id="all")])
def test_compiled_is_as_near_too(compiled_ops, launches, device):
    # aot_eager: Inductor of torch 2.13 is wrong on a CPU, whatever the norms (see the README).
    short = {"layers_per_block": 1}
    exact = unet(**short).double()
    truth = outcome(exact, inputs(exact, torch.float64))
    model = unet(**short).to(device)
    given = inputs(model, device=device)
    plain = outcome(model, given)
    fuse(model, compiled_ops=compiled_ops)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = outcome(model, given, compiled)
    assert ("_forward_kernel" in launches) == (compiled_ops == OPS)
    assert "whole_kernel" in launches
    cpu = [{k: v.cpu() for k, v in found.items()} for found in (ours, plain)]
    assert_no_further_from_the_truth(*cpu, truth)


# Interpreted, ours takes two minutes; test_attention.py and test_unet_attention.py have it too.
OURS = pytest.param("triton", marks=[] if torch.cuda.is_available() else pytest.mark.slow)


@pytest.mark.parametrize("attention", ["sdpa", OURS])
def test_fp32_weights_under_autocast(attention, device, launches):
    short = {"layers_per_block": 1}
    exact = unet(**short).double()
    truth = outcome(exact, inputs(exact, torch.float64))
    model = unet(**short).to(device)
    given = inputs(model, device=device)

    def autocast(**given):
        with torch.autocast(device, torch.bfloat16):
            return model(**given)

    plain = outcome(model, given, autocast)
    fuse(model, attention=attention)
    dtypes = []
    model.conv_norm_out.register_forward_hook(lambda _, given, out: dtypes.append(out.dtype))
    ours = outcome(model, given, autocast)
    assert dtypes == [torch.bfloat16]  # takes and gives the compute dtype
    if attention == "triton":
        assert launches.count("backward_keys_kernel") == 3  # of 256 tokens, those at full size
    cpu = [{k: v.cpu() for k, v in found.items()} for found in (ours, plain)]
    assert_no_further_from_the_truth(*cpu, truth)


def test_fused_sdxl_agrees(device):
    model = unet(**NARROW_XL).to(device)
    given = inputs(model, device=device)
    plain = outcome(model, given)
    made = fuse(model)
    assert not made.left
    for name, value in outcome(model, given).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("channels", [4, 9])
def test_any_number_of_input_channels(channels):
    model = unet(in_channels=channels)
    made = fuse(model)
    assert sum("GroupNorm" in kind for kind in made.fused.values()) == 61


def test_names_and_weights_stay_and_unfuse_restores():
    model = unet()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    fuse(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert any(isinstance(module, Fused) for module in model.modules())
    assert all(isinstance(model.get_submodule(name), kind) for name, kind in classes.items())
    unfuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any(hasattr(module, "fused_when_compiled") for module in model.modules())


def test_what_looks_for_the_names_of_classes_finds_them():
    model = unet()
    names = [type(module).__name__ for module in model.modules()]
    fuse(model)
    assert [type(module).__name__ for module in model.modules()] == names
    model.compile_repeated_blocks(backend="aot_eager")
    block = model.mid_block.attentions[0].transformer_blocks[0]
    assert type(pickle.loads(pickle.dumps(block.norm1))) is type(block.norm1)
    resnet = model.mid_block.resnets[0]
    assert type(pickle.loads(pickle.dumps(resnet))) is type(resnet)


def test_fusing_again_takes_what_is_asked_for_now():
    model = unet()
    fuse(model)
    made = fuse(model, ops=("geglu",))
    assert set(made.fused.values()) == {"GEGLU"}
    assert made.left["conv_norm_out"] == "group_norm was not asked for"


def test_a_copy_of_a_fused_unet_is_fused_and_saves_as_any_other(tmp_path):
    model = unet()
    fuse(model)
    twin = copy.deepcopy(model)
    assert type(twin.mid_block.resnets[0]) is type(model.mid_block.resnets[0])
    twin.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_gradient_checkpointing_changes_no_bit(device):
    levels = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = unet(layers_per_block=1, **levels).to(device).train()
    fuse(model, attention="sdpa")  # of ours: test_unet_attention.py
    given = inputs(model, device=device)
    kept = outcome(model, given)
    model.enable_gradient_checkpointing()
    assert all(torch.equal(value, kept[name]) for name, value in outcome(model, given).items())


@pytest.mark.parametrize("batch", [2, 64])
def test_an_image_is_doubled_where_it_lies(batch):
    plain = Upsample2D(8, use_conv=True).to(memory_format=torch.channels_last)
    fused = nn.Sequential(copy.deepcopy(plain))
    fuse(fused, ops=["group_norm"])
    assert isinstance(fused[0], Fused)
    assert type(fused[0]).__name__ == "Upsample2D"
    images = torch.randn(batch, 8, 3, 5).to(memory_format=torch.channels_last)
    results = []
    for module in (plain, fused):
        leaf = images.clone(memory_format=torch.preserve_format).requires_grad_()
        out = module(leaf)
        direction = torch.ones_like(out).cumsum(0)
        results.append((out, *torch.autograd.grad(out, [leaf, *module.parameters()], direction)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert results[1][1].is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_fused_is_named_and_left(device):
    model = unet(resnet_time_scale_shift="scale_shift").to(device)
    model.mid_block.attentions[0].norm.register_forward_hook(lambda *_: None)
    model.down_blocks[0].attentions[0].norm = nn.GroupNorm(32, 32, affine=False)
    block = model.down_blocks[1].attentions[0].transformer_blocks[0]
    block.norm2 = nn.LayerNorm(64).double()
    made = fuse(model)
    why = made.left
    assert why["mid_block.resnets.0.norm1"] == "its block's time_embedding_norm is scale_shift"
    assert "forward hooks" in why["mid_block.attentions.0.norm"]
    assert why["down_blocks.0.attentions.0.norm"] == "it has no weight"
    assert "float64" in why["down_blocks.1.attentions.0.transformer_blocks.0.norm1"]
    assert "left as it is: mid_block.attentions.0.norm: it has forward hooks" in str(made)


def test_another_activation_is_left(device):
    made = fuse(unet(act_fn="gelu").to(device))
    assert made.left["conv_norm_out"] == "GELU follows it, not SiLU"
    assert made.left["mid_block.resnets.0.norm2"] == "GELU follows it, not SiLU"


def test_the_report_is_printed_when_asked_for(capsys):
    fuse(unet(), report=True)
    assert "22 x time embedding + GroupNorm + SiLU" in capsys.readouterr().out


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match=r"ops are group_norm, .*, attention; got 'convolution'"):
        fuse(unet(), ops=("convolution",))
