from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import DTYPES, row_shapes
from torch.library import opcheck

from fusedit.benchmarks.accuracy import poisoned
from fusedit.kernels import layer_norm as module
from fusedit.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)

ODD = [(5,), (1, 1), (3, 7, 10), (2, 33, 77), (3, 321), (2, 8192)]
BOTH = pytest.mark.parametrize("adds", [False, True], ids=["norm", "add"])


def made(shape, dtype, device, adds=True, *, affine=None):
    """Inputs by name, all with gradients: x, weight, bias and, if it adds, residual."""
    affine = affine or dtype
    inputs = {
        "x": torch.randn(shape, dtype=dtype, device=device),
        "weight": torch.randn(shape[-1], dtype=affine, device=device),
        "bias": torch.randn(shape[-1], dtype=affine, device=device),
    }
    if adds:
        inputs["residual"] = torch.randn(shape, dtype=dtype, device=device)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def ops(adds):
    """Ours and the definition."""
    if adds:
        return add_layer_norm, add_layer_norm_reference
    return layer_norm, layer_norm_reference


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ODD, *row_shapes("layer_norms", rows=19)], ids=str)
def test_matches_pytorch(shape, dtype, adds, device):
    assert_as_accurate_as_torch(*ops(adds), made(shape, dtype, device, adds))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weights_as_under_autocast(dtype, adds, device):
    inputs = made((19, 320), dtype, device, adds, affine=torch.float32)
    assert_as_accurate_as_torch(*ops(adds), inputs)


@BOTH
@pytest.mark.parametrize("rows", [127, 700])
def test_a_program_of_the_backward_takes_several_tiles(rows, adds, device, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 3)
    assert_as_accurate_as_torch(*ops(adds), made((rows, 24), torch.float32, device, adds))


@BOTH
@pytest.mark.parametrize("without", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_weight_and_bias_are_optional(without, adds, device):
    inputs = made((9, 70), torch.bfloat16, device, adds)
    for name in without:
        del inputs[name]
    absent = dict.fromkeys(without)
    assert_as_accurate_as_torch(*(partial(op, **absent) for op in ops(adds)), inputs)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ("x",)], ids=str)
def test_only_the_gradients_that_are_asked_for(frozen, device, launches):
    inputs = made((9, 70), torch.float32, device, adds=False)
    for name in frozen:
        inputs[name].requires_grad_(False)
    assert_as_accurate_as_torch(layer_norm, layer_norm_reference, inputs)
    assert launches.count("sum_kernel") == (0 if frozen == ("weight", "bias") else 1)


def test_one_of_both_outputs_is_used(device):
    inputs = made((9, 70), torch.bfloat16, device)
    assert_as_accurate_as_torch(
        lambda **inputs: add_layer_norm(**inputs)[0],
        lambda **inputs: add_layer_norm_reference(**inputs)[0],
        inputs,
    )
    total, direction = add_layer_norm(**inputs)[1], torch.randn_like(inputs["x"])
    grads = torch.autograd.grad(total, [inputs["x"], inputs["residual"]], direction)
    assert all(torch.equal(grad, direction) for grad in grads)


@pytest.mark.parametrize("mean", [300.0, -1e4])
def test_a_large_mean_costs_no_accuracy(mean, device):
    inputs = made((5, 320), torch.float32, device, adds=False)
    inputs["x"] = (inputs["x"].detach() + mean).requires_grad_()
    assert_as_accurate_as_torch(layer_norm, layer_norm_reference, inputs)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.5])
def test_eps_bounds_rows_that_are_nearly_constant(eps, device):
    inputs = made((5, 33), torch.float32, device, adds=False)
    inputs["x"] = (inputs["x"].detach() * 1e-3).requires_grad_()
    assert_as_accurate_as_torch(*(partial(op, eps=eps) for op in ops(adds=False)), inputs)


@BOTH
def test_a_row_that_is_not_finite_spoils_itself_alone(adds, device):
    inputs = made((5, 33), torch.float32, device, adds)
    with torch.no_grad():
        inputs["x"][2, 7] = torch.inf
    out = ops(adds)[0](**inputs)
    normalized = out[0] if adds else out
    (grad,) = torch.autograd.grad(normalized, inputs["x"], torch.randn_like(normalized))
    for result in (normalized, grad):
        finite = result.isfinite().all(dim=1)
        assert finite.tolist() == [True, True, False, True, True]


@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    affine=st.sampled_from(DTYPES),
    adds=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_and_mix_of_dtypes(rows, width, dtype, affine, adds):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_as_accurate_as_torch(*ops(adds), made((rows, width), dtype, device, adds, affine=affine))


@BOTH
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_nothing_to_do(shape, adds, device):
    inputs = made(shape, torch.float32, device, adds)
    with poisoned():
        out = ops(adds)[0](**inputs)
        normalized = out[0] if adds else out
        normalized.sum().backward()
    assert normalized.shape == shape
    assert all(torch.equal(v.grad, torch.zeros_like(v)) for v in inputs.values())


def test_strided_rows_and_columns(device):
    wide = torch.randn(6, 5, 24, device=device)
    for view in (wide[:, :, 4:20], wide[::2], wide.transpose(0, 1), wide[..., ::2]):
        inputs = made(view.shape, torch.float32, device)
        inputs["x"] = view.detach().requires_grad_()
        assert_as_accurate_as_torch(add_layer_norm, add_layer_norm_reference, inputs)
        inputs["residual"], inputs["x"] = inputs["x"], inputs["residual"]
        assert_as_accurate_as_torch(add_layer_norm, add_layer_norm_reference, inputs)


def test_strided_weights_and_gradients(device):
    inputs = made((3, 7, 16), torch.float32, device)
    for name in ("weight", "bias"):
        inputs[name] = torch.randn(16, 2, device=device)[:, 1].requires_grad_()
    assert_as_accurate_as_torch(  # the gradients of parts are slices of the whole's
        lambda **inputs: torch.cat(add_layer_norm(**inputs), dim=-1),
        lambda **inputs: torch.cat(add_layer_norm_reference(**inputs), dim=-1),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_rounded_sum(dtype, device):
    x, weight, bias, residual = made((9, 70), dtype, device).values()
    normalized, total = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert torch.equal(normalized, layer_norm(total, weight, bias))


def test_inputs_are_left_alone_and_two_runs_are_equal(device):
    inputs = made((700, 40), torch.bfloat16, device, affine=torch.float32)
    before = {name: value.detach().clone() for name, value in inputs.items()}
    directions = [torch.randn(700, 40, device=device).bfloat16() for _ in range(2)]
    runs = []
    for _ in range(2):
        with poisoned():
            out = add_layer_norm(**inputs)
            runs.append((*out, *torch.autograd.grad(out, list(inputs.values()), directions)))
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_opcheck(device):
    inputs = made((3, 8), torch.float32, device)
    x, weight, bias, residual = inputs.values()
    opcheck(torch.ops.fusedit.layer_norm, (x, weight, bias, 1e-5))
    opcheck(torch.ops.fusedit.layer_norm, (x, None, None, 1e-5))
    opcheck(torch.ops.fusedit.add_layer_norm, (x, residual, weight, bias, 1e-5))


def test_compiles_whole(device):
    inputs = made((3, 40), torch.bfloat16, device, affine=torch.float32)
    direction = torch.randn(3, 40, device=device).bfloat16()

    def block(add, norm, x, residual, weight, bias):
        normalized, total = add(x * 2, residual, weight, bias)
        return norm(total, weight, None) + normalized

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    ours = compiled(add_layer_norm, layer_norm, **inputs)
    theirs = block(add_layer_norm_reference, layer_norm_reference, **inputs)
    torch.testing.assert_close(ours, theirs)
    leaves = list(inputs.values())
    torch.testing.assert_close(
        *(torch.autograd.grad(out, leaves, direction) for out in (ours, theirs)),
        atol=0.05,  # gradients that arrive by three ways are rounded in another order
        rtol=0.02,
    )


def test_refuses_what_it_does_not_serve(device):
    x, weight = torch.zeros(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"last dimension of x must be 1 to 8192, got \[2, 8193\]"):
        layer_norm(torch.zeros(2, 8193, device=device), None, None)
    with pytest.raises(ValueError, match=r"last dimension of x must be 1 to 8192, got \[\]"):
        layer_norm(torch.zeros((), device=device), None, None)
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \[4\], got \[3\]"):
        layer_norm(x, weight[:3], None)
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \[4\], got \[1, 4\]"):
        layer_norm(x, weight, weight[None])
    with pytest.raises(TypeError, match="layer_norm: x must be fp32, bf16 or fp16"):
        layer_norm(x.double(), weight, None)
    with pytest.raises(ValueError, match=r"residual must be \[2, 4\], got \[1, 4\]"):
        add_layer_norm(x, x[:1], weight, None)
    with pytest.raises(TypeError, match=r"x's dtype, torch\.float32, got torch\.float16"):
        add_layer_norm(x, x.half(), weight, None)
