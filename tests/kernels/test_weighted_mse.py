import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import DTYPES
from torch.library import opcheck

from fusedit.benchmarks.accuracy import poisoned
from fusedit.kernels.weighted_mse import weighted_mse, weighted_mse_reference

LAST, FIRST = torch.channels_last, torch.contiguous_format
LAYOUTS = pytest.mark.parametrize("layouts", [(LAST, LAST), (LAST, FIRST), (FIRST, LAST)], ids=str)
SHAPES = [(1, 1, 1, 1), (3, 4, 5, 7), (2, 4, 32, 32), (2, 4, 64, 64), (1, 4, 128, 128)]


def made(shape, dtype, device, layouts=(LAST, LAST)):
    return {
        "predicted": torch.randn(shape, device=device)
        .to(dtype, memory_format=layouts[0])
        .requires_grad_(),
        "target": torch.randn(shape, device=device).to(memory_format=layouts[1]),
        "weights": torch.rand(shape[0], device=device),
    }


def check(inputs):
    assert_as_accurate_as_torch(weighted_mse, weighted_mse_reference, inputs)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_pytorch(shape, dtype, layouts, device):
    check(made(shape, dtype, device, layouts))


def test_many_samples(device):
    check(made((37, 4, 3, 3), torch.bfloat16, device))


def test_other_strides(device):
    inputs = made((3, 4, 6, 10), torch.float32, device)
    wide = torch.randn(6, 8, 6, 10, device=device)
    for view in (wide[::2, ::2], wide[:3, :4].transpose(2, 3).reshape(3, 4, 10, 6).mT):
        check(inputs | {"predicted": view.detach().requires_grad_()})
        check(inputs | {"target": view.detach()})
    check(inputs | {"weights": torch.rand(3, 2, device=device)[:, 1]})


@given(
    shape=st.tuples(*(st.integers(1, most) for most in (5, 5, 9, 9))),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations([1, 2, 3]),
)
@settings(max_examples=20, deadline=None)
def test_any_dense_layout(shape, dtype, order):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = made(shape, dtype, device)
    dims = [0, *order]
    dense = inputs["predicted"].detach().permute(dims).contiguous()
    predicted = dense.permute([dims.index(dim) for dim in range(4)]).requires_grad_()
    check(inputs | {"predicted": predicted})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_the_gradient_has_the_dtype_and_strides_of_predicted(layout, dtype, device):
    inputs = made((2, 4, 5, 6), dtype, device, (layout, FIRST))
    (grad,) = torch.autograd.grad(weighted_mse(**inputs)[0], inputs["predicted"])
    assert (grad.dtype, grad.stride()) == (dtype, inputs["predicted"].stride())


def test_a_small_fp16_gradient_survives_by_the_loss_scale(device):
    inputs = made((2, 4, 5, 6), torch.float16, device)
    inputs["weights"] *= 1e-6
    grads = [
        torch.autograd.grad(op(**inputs)[0] * 2**16, inputs["predicted"])[0]
        for op in (weighted_mse, weighted_mse_reference)
    ]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_no_gradient_flows_through_the_errors(device):
    loss, errors = weighted_mse(**made((2, 4, 3, 3), torch.float32, device))
    assert loss.requires_grad
    assert not errors.requires_grad


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_weight_of_zero_hides_nothing(bad, device):
    inputs = made((3, 4, 3, 3), torch.float32, device)
    inputs["weights"][1] = 0
    with torch.no_grad():
        inputs["predicted"][1, 2, 0, 0] = bad
    results = []
    for op in (weighted_mse, weighted_mse_reference):
        loss, errors = op(**inputs)
        results.append((loss, errors, *torch.autograd.grad(loss, inputs["predicted"])))
    torch.testing.assert_close(*results, equal_nan=True)
    assert results[0][0].isnan()


def test_no_samples(device, launches):
    inputs = made((0, 4, 3, 3), torch.bfloat16, device)
    with poisoned():
        loss, errors = weighted_mse(**inputs)
        (grad,) = torch.autograd.grad(loss, inputs["predicted"])
    assert (loss.item(), errors.shape, grad.shape) == (0, (0,), (0, 4, 3, 3))
    assert not launches


def test_launches_once_for_partials_finish_and_backward(device, launches):
    inputs = made((3, 4, 32, 32), torch.bfloat16, device)
    torch.autograd.grad(weighted_mse(**inputs)[0], inputs["predicted"])
    assert launches == ["_partial_kernel", "_finish_kernel", "_backward_kernel"]


def test_inputs_are_left_alone_and_two_runs_are_equal(device):
    inputs = made((3, 4, 32, 32), torch.bfloat16, device, (LAST, FIRST))
    before = {name: value.detach().clone() for name, value in inputs.items()}
    runs = []
    for _ in range(2):
        with poisoned():
            loss, errors = weighted_mse(**inputs)
            runs.append((loss, errors, *torch.autograd.grad(loss, inputs["predicted"])))
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@LAYOUTS
def test_opcheck(layouts, device):
    opcheck(
        torch.ops.fusedit.weighted_mse,
        tuple(made((2, 4, 3, 5), torch.bfloat16, device, layouts).values()),
    )


def test_compiles_whole(device):
    inputs = made((3, 4, 5, 6), torch.float32, device)
    compiled = torch.compile(
        lambda predicted, **rest: weighted_mse(predicted * 2, **rest),
        fullgraph=True,
        backend="aot_eager",
    )
    theirs = weighted_mse_reference(inputs["predicted"] * 2, inputs["target"], inputs["weights"])
    ours = compiled(**inputs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss * 3, inputs["predicted"]) for loss, _ in (ours, theirs))
    )


def test_refuses_what_it_does_not_serve(device):
    predicted, target, weights = made((2, 4, 3, 3), torch.float32, device).values()
    with pytest.raises(ValueError, match=r"predicted must be \[n, c, h, w\].*got \[2, 4, 3\]"):
        weighted_mse(predicted[..., 0], target, weights)
    with pytest.raises(ValueError, match=r"of at least 1, got \[2, 0, 3, 3\]"):
        weighted_mse(predicted[:, :0], target, weights)
    with pytest.raises(ValueError, match=r"target must be \[2, 4, 3, 3\], got \[1, 4, 3, 3\]"):
        weighted_mse(predicted, target[:1], weights)
    with pytest.raises(ValueError, match=r"weights must be \[2\], got \[1\]"):
        weighted_mse(predicted, target, weights[:1])
    with pytest.raises(TypeError, match="predicted must be fp32, bf16 or fp16"):
        weighted_mse(predicted.double(), target, weights)
    with pytest.raises(TypeError, match=r"target must be fp32, got torch\.float16"):
        weighted_mse(predicted, target.half(), weights)
    with pytest.raises(ValueError, match="weights must not require a gradient"):
        weighted_mse(predicted, target, weights.requires_grad_())
