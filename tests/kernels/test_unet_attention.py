"""The attention processor that `fuse` installs, on one transformer block's two attentions."""

import copy
from collections import Counter

import pytest
import torch
from accuracy import assert_close_to_truth, output_and_gradients
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusedit.kernels import attention_choice
from fusedit.kernels.unet import fuse, unfuse
from fusedit.kernels.unet_attention import FusedAttention

HEADS, WIDTH, TEXT_WIDTH, TEXT = 2, 40, 24, 7
SELF = ["forward_kernel", "backward_queries_kernel", "backward_keys_kernel"]
CROSS = ["forward_kernel", "backward_kernel", "sum_kernel"]


class Block(nn.Module):
    def __init__(self, **changes) -> None:
        super().__init__()
        inner = HEADS * WIDTH
        sizes = {"query_dim": inner, "heads": HEADS, "dim_head": WIDTH, **changes}
        self.attn1 = Attention(**sizes)
        self.attn2 = Attention(**sizes, cross_attention_dim=TEXT_WIDTH)

    def forward(self, states, text, **given):
        states = states + self.attn1(states, **given)
        return states + self.attn2(states, text, **given)


class Adapted(nn.Linear):
    """A projection with an adapter, as LoRA makes one: frozen weight, small trained product."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 8)

    def forward(self, input):
        return super().forward(input) + input @ self.down.T @ self.up.T


class Wrapped(nn.Module):
    """A projection inside another module, as peft does it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.up = nn.Parameter(torch.randn(base_layer.out_features, base_layer.in_features) / 64)

    def forward(self, input):
        return self.base_layer(input) + input @ self.up.T


def block(dtype=torch.float32, **changes) -> Block:
    torch.manual_seed(0)
    return Block(**changes).to(dtype)


def inputs(dtype, device="cpu", rows=150):
    torch.manual_seed(1)
    states = torch.randn(2, rows, HEADS * WIDTH).to(device, dtype)
    return states, torch.randn(2, TEXT, TEXT_WIDTH).to(device, dtype)


def outcome(module, given, call=None):
    return output_and_gradients(module, (module if call is None else call)(*given))


def assert_as_near_the_truth_as_plain(module, dtype, device):
    """The fused module against its unfused copy, both in dtype, and that in fp64."""
    plain = copy.deepcopy(module)
    unfuse(plain)
    truth = outcome(plain.double(), inputs(torch.float64))
    theirs = outcome(plain.to(device, dtype), inputs(dtype, device))
    ours = outcome(module.to(device, dtype), inputs(dtype, device))
    for name, exact in truth.items():
        assert_close_to_truth(name, ours[name].cpu(), theirs[name].cpu(), exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_attention_is_as_near_the_truth_as_plain(dtype, bias, device, launches):
    module = block(bias=bias)
    fuse(module, attention="triton")
    assert_as_near_the_truth_as_plain(module, dtype, device)
    assert Counter(launches) == Counter(SELF + CROSS)


def test_there_is_one_product_for_q_k_and_v(device):
    module = block().to(device, torch.bfloat16)
    products = []

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            if function is F.linear:
                products.append(tuple(arguments[1].shape))
            return function(*arguments, **(named or {}))

    fuse(module, attention="triton")
    with Products():
        module(*inputs(torch.bfloat16, device))
    inner = HEADS * WIDTH
    assert products == [
        (3 * inner, inner), (inner, inner), (inner, inner), (2 * inner, TEXT_WIDTH), (inner, inner)
    ]  # fmt: skip


def test_parameters_stay_and_unfuse_restores():
    module = block()
    before = {name: value.data_ptr() for name, value in module.state_dict().items()}
    processors = [module.attn1.processor, module.attn2.processor]
    made = fuse(module, attention="triton")
    assert made.fused == {"attn1": "self-attention", "attn2": "cross-attention"}
    assert not made.left
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == before
    fuse(module)  # again: not a processor around a processor
    assert type(module.attn1.processor.plain) is AttnProcessor2_0
    twin = copy.deepcopy(module)
    assert type(twin.attn1.processor) is FusedAttention
    unfuse(module)
    assert [module.attn1.processor, module.attn2.processor] == processors


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapter", [Adapted, Wrapped])
def test_projections_with_an_adapter_stay_apart(adapter, when, device, launches):
    module = block()
    made = fuse(module, attention="triton")
    for name in ("attn1.to_k", "attn2.to_q", "attn2.to_v"):
        module.set_submodule(name, adapter(module.get_submodule(name)))
    if when == "before":
        made = fuse(module, attention="triton")
        assert set(made.fused) == {"attn1", "attn2"}
        assert set(made.left) == {"attn1.to_k", "attn2.to_q", "attn2.to_v"}
        assert f"it carries an adapter or a hook ({adapter.__name__})" in made.left["attn1.to_k"]
    assert_as_near_the_truth_as_plain(module, torch.bfloat16, device)
    assert Counter(launches) == Counter(SELF + CROSS)


def hook(linear, called):
    linear.register_forward_hook(lambda *_: called.append("to_v"))


def backward_hook(linear, called):
    linear.register_full_backward_hook(lambda *_: called.append("to_v"))


def own_forward(linear, called):
    """As accelerate and diffusers hook a module."""
    forward = linear.forward

    def hooked(*given):
        called.append("to_v")
        return forward(*given)

    linear.forward = hooked


@pytest.mark.parametrize("way", [hook, backward_hook, own_forward])
def test_a_hook_on_a_projection_is_called(way, device):
    module = block().to(device, torch.bfloat16)
    called = []
    way(module.attn1.to_v, called)
    made = fuse(module, attention="triton")
    module(*inputs(torch.bfloat16, device)).sum().backward()
    assert called == ["to_v"]
    assert "adapter or a hook" in made.left["attn1.to_v"]


def test_weights_stored_in_another_type_stay_apart(device, launches):
    module = block().to(device, torch.bfloat16)
    for part in (module.attn1.to_q, module.attn1.to_k, module.attn1.to_v):
        part.weight = nn.Parameter(part.weight.detach().to(torch.float8_e4m3fn), False)
    made = fuse(module, attention="triton")
    assert {"attn1.to_q", "attn1.to_k", "attn1.to_v"} <= set(made.left)


def test_an_ip_adapter_finds_a_processor_to_make():
    fuse(module := block(), attention="triton")
    made = module.attn1.processor.__class__()  # as diffusers does for what it keeps
    assert type(made.plain) is AttnProcessor2_0
    assert made.backend == "auto"


def test_frozen_projections_get_no_gradient(device):
    module = block().to(device, torch.bfloat16)
    fuse(module, attention="triton")
    module.attn1.to_k.requires_grad_(False)
    module(*inputs(torch.bfloat16, device)).sum().backward()
    assert module.attn1.to_k.weight.grad is None
    assert module.attn1.to_q.weight.grad is not None


def masked():
    states, text = inputs(torch.bfloat16, rows=TEXT)
    mask = torch.zeros(2, 1, TEXT, dtype=torch.bfloat16)
    mask[:, :, 2:] = -10000
    return block(), {"states": states, "text": text, "attention_mask": mask}


def image():
    attn = Attention(query_dim=16, heads=2, dim_head=8)
    return attn, {"hidden_states": torch.randn(2, 16, 3, 5, dtype=torch.bfloat16)}


@pytest.mark.parametrize("case", [masked, image])
def test_a_mask_and_an_image_are_the_stock_processors(case, device, launches):
    module, given = case()
    module = module.to(device, torch.bfloat16)
    given = {name: value.to(device) for name, value in given.items()}
    with torch.no_grad():
        plain = module(**given)
        fuse(module, attention="triton")
        assert torch.equal(module(**given), plain)
    assert not launches


@pytest.mark.parametrize("backend", ["triton", "auto", "sdpa", "flash"])
def test_compiles_whole(backend, device, launches, monkeypatch):
    measured(monkeypatch, device, [(100, 100), (200, 200)])
    module = block().to(device, torch.bfloat16)
    fuse(module, attention=backend)
    given = inputs(torch.bfloat16, device)
    torch._dynamo.reset()
    compiled = torch.compile(
        module, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    ours, eager = outcome(module, given, compiled), outcome(module, given)
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name], msg=name)
    kernels = {"triton": SELF + CROSS, "auto": SELF}.get(backend, [])
    assert Counter(launches) == Counter(2 * kernels)


def test_it_can_be_plain_when_compiled(device, launches):
    module = block().to(device, torch.bfloat16)
    fuse(module, attention="triton", compiled_ops=())
    torch._dynamo.reset()
    torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs(torch.bfloat16, device))
    assert not launches


def test_auto_is_compiled_once_for_many_lengths(device, launches, monkeypatch):
    measured(monkeypatch, device, [(100, 100), (200, 200)])
    module = block().to(device, torch.bfloat16)
    fuse(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (60, 150, 151, 153, 250):
            given = inputs(torch.bfloat16, device, rows)
            torch.testing.assert_close(compiled(*given), module(*given))
    assert launches.count("forward_kernel") == 2 * 3  # of the lengths from 100 to 200


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_a_choice_that_cannot_serve_does_not_raise(backend, device, monkeypatch):
    rows = [(150, 150), (150, TEXT), (TEXT, TEXT)]
    measured(monkeypatch, device, rows, backend)
    module = block().to(device, torch.bfloat16)
    fuse(module)
    module(*inputs(torch.bfloat16, device)).sum().backward()
    mask = torch.zeros(2, 1, TEXT, device=device, dtype=torch.bfloat16)
    module(*inputs(torch.bfloat16, device, rows=TEXT), attention_mask=mask).sum().backward()


def test_recomputed_activations_change_no_bit(device, launches):
    module = block().to(device, torch.bfloat16)
    fuse(module, attention="triton")
    given = inputs(torch.bfloat16, device)
    plain = outcome(module, given)
    again = outcome(module, given, lambda *given: checkpoint(module, *given, use_reentrant=False))
    assert all(torch.equal(value, plain[name]) for name, value in again.items())
    assert launches.count("forward_kernel") == 2 + 4


def measured(monkeypatch, device, lengths, backend="triton"):
    """As if on this machine's card these (queries, keys) had been measured."""
    choices = [
        {"width": WIDTH, "dtype": "bf16", "queries": queries, "keys": keys, "backend": backend}
        for queries, keys in lengths
    ]
    origin = {"device": attention_choice.name(torch.device(device)), "commit": "abc"}
    table = {"measured": origin, "choices": choices}
    monkeypatch.setattr(attention_choice, "measured", lambda family: table)
    # Asked anew at each call, and not left behind for other tests.
    monkeypatch.setattr(attention_choice, "_known", attention_choice._known.__wrapped__)


@pytest.mark.parametrize("autocast", [False, True])
def test_auto_goes_by_the_dtype_that_the_products_have(autocast, device, launches, monkeypatch):
    measured(monkeypatch, device, [(150, 150), (150, TEXT)])
    module = block().to(device)
    fuse(module)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        module(*inputs(torch.float32, device)).sum().backward()
    assert Counter(launches) == (Counter(SELF + CROSS) if autocast else Counter())


@pytest.mark.parametrize(
    ("backend", "changes", "why"),
    [
        ("triton", {"norm_num_groups": 8}, "it has a group_norm"),
        ("triton", {"qk_norm": "layer_norm"}, "it has a norm_q"),
        ("triton", {"residual_connection": True}, "it adds its input, or rescales its output"),
        ("triton", {"rescale_output_factor": 2.0}, "it adds its input, or rescales its output"),
        ("triton", {"kv_heads": 1}, "its keys are not those of its heads alone"),
        ("triton", {"dim_head": 20}, "its heads are 20 wide; served are multiples of 8 to 160"),
        ("triton", {"dim_head": 168}, "its heads are 168 wide; served are multiples of 8 to 160"),
        ("triton", {"scale_qk": False}, "its processor is AttnProcessor"),
        ("triton", {"dtype": torch.float64}, "its weights are torch.float64"),
        ("cudnn", {"dim_head": 160}, "its heads are 160 wide, and cuDNN's backward stops at 128"),
    ],
)
def test_what_is_not_served_is_left_and_named(backend, changes, why):
    module = block(**changes)
    made = fuse(module, attention=backend)
    assert made.left["attn1"] == why
    assert not isinstance(module.attn1.processor, FusedAttention)


def test_cudnn_serves_heads_up_to_where_its_backward_stops():
    assert not fuse(block(dim_head=128), attention="cudnn").left


def test_attention_can_be_left_out():
    module = block()
    made = fuse(module, ops=("group_norm", "geglu", "layer_norm"))
    assert made.left == dict.fromkeys(("attn1", "attn2"), "attention was not asked for")
    assert type(module.attn1.processor) is AttnProcessor2_0


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="auto, triton, sdpa, cudnn, flash; got 'xformers'"):
        fuse(block(), attention="xformers")
