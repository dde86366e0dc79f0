from contextlib import contextmanager
from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import DTYPES, group_norm_shapes
from torch.library import opcheck

from fusedit.benchmarks.accuracy import poisoned
from fusedit.kernels.group_norm import (
    add_group_norm,
    add_group_norm_reference,
    group_norm,
    group_norm_reference,
)

LAST, FIRST = torch.channels_last, torch.contiguous_format
WHOLE, SPLIT = (2, 64, 5, 7), (2, 64, 19, 17)  # fits on chip; is cut into tiles


def made(shape, dtype, device, memory_format=LAST, *, mean=0.0, weights=None):
    """Inputs by name, all with gradients: x, weight, bias."""
    channels, weights = shape[1], weights or dtype
    x = (torch.randn(shape, device=device) + mean).to(dtype, memory_format=memory_format)
    weight = torch.randn(channels, device=device).to(weights)
    bias = torch.randn(channels, device=device).to(weights)
    inputs = {"x": x, "weight": weight, "bias": bias}
    return {name: value.requires_grad_() for name, value in inputs.items()}


def embedding(shape, dtype, device):
    return torch.randn(shape[:2], device=device).to(dtype).requires_grad_()


def residual(shape, dtype, device, memory_format=LAST):
    made = torch.randn(shape, device=device).to(dtype, memory_format=memory_format)
    return made.requires_grad_()


def both(silu=False, groups=4, eps=1e-5):
    """Ours and the definition, as functions of tensors alone."""
    settings = {"groups": groups, "eps": eps, "silu": silu}
    return partial(group_norm, **settings), partial(group_norm_reference, **settings)


@pytest.mark.parametrize(("shape", "eps", "silu", "adds"), group_norm_shapes(), ids=str)
def test_every_shape_of_the_unets(shape, eps, silu, adds, device):
    inputs = made(shape, torch.bfloat16, device)
    if adds:
        inputs["add"] = embedding(shape, torch.bfloat16, device)
    assert_as_accurate_as_torch(*both(silu, 32, eps), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("memory_format", [LAST, FIRST])
@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_matches_pytorch(shape, memory_format, silu, dtype, device):
    assert_as_accurate_as_torch(*both(silu), made(shape, dtype, device, memory_format))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_a_time_embedding_is_added(shape, dtype, device):
    inputs = made(shape, dtype, device) | {"add": embedding(shape, dtype, device)}
    assert_as_accurate_as_torch(*both(silu=True), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_a_residual_is_added_and_the_sum_comes_too(shape, dtype, device):
    inputs = made(shape, dtype, device) | {"residual": residual(shape, dtype, device, FIRST)}
    assert_as_accurate_as_torch(
        lambda **inputs: add_group_norm(groups=4, silu=True, **inputs),
        lambda **inputs: add_group_norm_reference(groups=4, silu=True, **inputs),
        inputs,
    )
    del inputs["residual"]
    inputs["add"] = residual(shape, dtype, device)
    assert_as_accurate_as_torch(*both(), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_fp32_weights_beside_a_narrow_input(shape, dtype, device):
    inputs = made(shape, dtype, device, weights=torch.float32)
    inputs["add"] = embedding(shape, torch.float32, device)
    assert_as_accurate_as_torch(*both(silu=True), inputs)


@pytest.mark.parametrize("mean", [10, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_a_mean_far_from_zero_loses_nothing(shape, dtype, mean, device):
    assert_as_accurate_as_torch(*both(), made(shape, dtype, device, mean=mean))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 6, 1, 1), 3), ((1, 1, 1, 9), 1), ((3, 6, 9, 1), 2), ((2, 30, 3, 3), 3),
        ((1, 7, 33, 9), 1), ((2, 5, 18, 19), 5), ((1, 300, 17, 17), 2), ((1, 600, 3, 2), 2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("memory_format", [LAST, FIRST])
def test_odd_sizes(shape, groups, memory_format, device):
    inputs = made(shape, torch.float32, device, memory_format)
    inputs["add"] = embedding(shape, torch.float32, device)
    assert_as_accurate_as_torch(*both(silu=True, groups=groups), inputs)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[:, ::2], lambda x: x[:, :, ::2], lambda x: x[::2], lambda x: x[..., 1:],
        lambda x: x.transpose(2, 3), lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["channels", "rows", "images", "columns", "transposed", "expanded"],
)  # fmt: skip
@pytest.mark.parametrize("memory_format", [LAST, FIRST])
def test_strided_input(cut, memory_format, device):
    inputs = made((3, 64, 6, 6), torch.float32, device, memory_format)
    x = cut(inputs["x"].detach()).requires_grad_()
    inputs = {"x": x, **{name: inputs[name][: x.shape[1]] for name in ("weight", "bias")}}
    assert_as_accurate_as_torch(*both(groups=4), inputs)


def test_an_expanded_input_whose_copies_lie_otherwise(device):
    x = torch.randn(3, 6, device=device).as_strided((3, 3, 3, 2), (1, 0, 6, 3)).requires_grad_()
    inputs = {
        "x": x,
        "weight": torch.randn(3, device=device),
        "bias": torch.randn(3, device=device),
    }
    assert_as_accurate_as_torch(*both(groups=3), inputs)


@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_strided_weights(shape, device):
    inputs = made(shape, torch.float32, device)
    inputs["weight"] = torch.randn(128, device=device)[::2].requires_grad_()
    inputs["bias"] = torch.randn(1, device=device).expand(64).requires_grad_()
    assert_as_accurate_as_torch(*both(silu=True), inputs)


@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_frozen_weights_cost_nothing(shape, device):
    inputs = made(shape, torch.float32, device)
    frozen = inputs | {name: inputs[name].detach() for name in ("weight", "bias")}
    outs = [group_norm(**given, groups=4) for given in (inputs, frozen)]
    direction = torch.randn(shape, device=device)
    grads = [
        torch.autograd.grad(out, given["x"], direction)[0]
        for out, given in zip(outs, (inputs, frozen), strict=True)
    ]
    assert torch.equal(*grads)
    with summed() as sums:
        group_norm(**frozen, groups=4).backward(direction)
    assert not sums


@pytest.mark.parametrize("shape", [(0, 64, 4, 4), (2, 64, 0, 4)], ids=str)
def test_nothing_to_do(shape, device):
    inputs = made(shape, torch.float32, device)
    out = group_norm(**inputs, groups=4)
    assert out.shape == shape
    out.sum().backward()
    assert not inputs["weight"].grad.any()
    assert inputs["x"].grad.shape == shape


@pytest.mark.parametrize("memory_format", [LAST, FIRST])
def test_the_memory_format_survives(memory_format, device):
    inputs = made(SPLIT, torch.float32, device, memory_format)
    out = group_norm(**inputs, groups=4)
    assert out.is_contiguous(memory_format=memory_format)
    (grad,) = torch.autograd.grad(out, inputs["x"], torch.randn_like(out))
    assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_two_runs_are_equal(shape, device):
    inputs = made(shape, torch.bfloat16, device) | {"add": embedding(shape, torch.bfloat16, device)}
    direction = torch.randn(shape, device=device).bfloat16()
    runs = []
    for _ in range(2):
        with poisoned():
            out = group_norm(**inputs, groups=4, silu=True)
            runs.append((out, *torch.autograd.grad(out, list(inputs.values()), direction)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_a_sum_that_alone_is_used_passes_its_gradient_on(shape, device):
    inputs = made(shape, torch.float32, device)
    other = residual(shape, torch.float32, device)
    _, total = add_group_norm(inputs["x"], other, inputs["weight"], inputs["bias"], 4)
    direction = torch.randn_like(total)
    for grad in torch.autograd.grad(total, (inputs["x"], other), direction):
        assert torch.equal(grad, direction)


@pytest.mark.parametrize("kind", ["plain", "embedding", "residual"])
@pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
def test_opcheck(shape, kind, device):
    inputs = made(shape, torch.float32, device)
    add = {
        "plain": None,
        "embedding": embedding(shape, torch.float32, device),
        "residual": residual(shape, torch.float32, device),
    }[kind]
    arguments = (inputs["x"], add, inputs["weight"], inputs["bias"], 4, 1e-5, True)
    opcheck(torch.ops.fusedit.group_norm.default, arguments)


@pytest.mark.parametrize("memory_format", [LAST, FIRST])
def test_compiles_whole(memory_format, device):
    inputs = made(SPLIT, torch.float32, device, memory_format)
    inputs["add"] = embedding(SPLIT, torch.float32, device)

    def block(op, x, **rest):
        return op(x * 2, groups=4, silu=True, **rest) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out, expected = compiled(group_norm, **inputs), block(group_norm_reference, **inputs)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(out)
    grads = [torch.autograd.grad(o, list(inputs.values()), direction) for o in (out, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@contextmanager
def summed():
    """What torch sums over images inside."""
    sums = []
    with pytest.MonkeyPatch.context() as patch:
        real = torch.sum
        patch.setattr(torch, "sum", lambda *a, **k: sums.append(1) or real(*a, **k))
        yield sums


# Properties

few = settings(max_examples=10, deadline=None)
sizes = st.sampled_from([WHOLE, SPLIT])


def draw(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=LAST)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    affine = torch.ones(shape[1], device=device), torch.zeros(shape[1], device=device)
    return x.to(device), *affine


@few
@given(sizes, st.integers(0, 2**32), st.floats(0.1, 100), st.floats(-50, 50))
def test_scale_and_shift_of_the_input_change_nothing(shape, seed, scale, shift):
    x, weight, bias = draw(shape, seed)
    plain = group_norm(x, weight, bias, 4, 0.0)
    moved = group_norm(x * scale + shift, weight, bias, 4, 0.0)
    torch.testing.assert_close(moved, plain, rtol=0, atol=2e-6 * (1 + abs(shift) / scale) * 10)


@few
@given(sizes, st.integers(0, 2**32))
def test_each_group_is_centred_and_of_variance_one(shape, seed):
    out = group_norm(*draw(shape, seed), 4, 0.0).unflatten(1, (4, -1)).flatten(2)
    torch.testing.assert_close(out.mean(-1), torch.zeros_like(out.mean(-1)), rtol=0, atol=1e-5)
    variance = out.var(-1, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-4)


@few
@given(sizes, st.integers(0, 2**32))
def test_the_gradient_has_no_part_along_a_shift_or_a_scale(shape, seed):
    x, weight, bias = draw(shape, seed)
    x.requires_grad_()
    out = group_norm(x, weight, bias, 4, 0.0)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
    grad, values = (t.detach().unflatten(1, (4, -1)).flatten(2) for t in (grad, x))
    zero = torch.zeros_like(grad[..., 0])
    torch.testing.assert_close(grad.sum(-1), zero, rtol=0, atol=1e-3)
    torch.testing.assert_close((grad * values).sum(-1), zero, rtol=0, atol=1e-3)


# Refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, 3)}, ValueError, "x must be"),
        ({"x": torch.zeros(()).expand(1, 8, 2**14, 2**14)}, ValueError, r"below 2\*\*31"),
        ({"groups": 3}, ValueError, "groups must divide 8 channels, got 3"),
        ({"groups": 0}, ValueError, "groups must divide 8 channels, got 0"),
        ({"weight": torch.zeros(4)}, ValueError, "weight must be"),
        ({"bias": torch.zeros(9)}, ValueError, "bias must be"),
        ({"add": torch.zeros(2, 4)}, ValueError, "add must be"),
        ({"add": torch.zeros(2, 8, 3, 4)}, ValueError, "add must be"),
        ({"add": torch.zeros(2, 8, 3, 3).half()}, TypeError, "a residual must be"),
        ({"x": torch.zeros(2, 8, 3, 3).double()}, TypeError, "x must be fp32, bf16 or fp16"),
    ],
)
def test_refuses_what_it_does_not_serve(change, error, message, device):
    ones = {"x": torch.ones(2, 8, 3, 3), "weight": torch.ones(8), "bias": torch.ones(8)}
    asked = {"groups": 2} | ones | change
    asked = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in asked.items()}
    with pytest.raises(error, match=message):
        group_norm(**asked)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 9 GB of GPU memory")
def test_offsets_beyond_31_bits():
    shape = (2**31 // (320 * 64 * 64) + 2, 320, 64, 64)
    x = torch.randn(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=LAST)
    affine = torch.ones(320, device="cuda"), torch.zeros(320, device="cuda")
    last = group_norm(x, *affine, 32, silu=True)[-2:]
    torch.testing.assert_close(last, group_norm(x[-2:].clone(), *affine, 32, silu=True))
