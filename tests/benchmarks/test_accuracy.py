import pytest
import torch

from fusedit.benchmarks.accuracy import judge, truth
from fusedit.kernels.geglu import geglu_reference


def inputs(dtype=torch.bfloat16):
    return {"projected": torch.randn(32, 64, dtype=dtype, requires_grad=True)}


def verdict(op, dtype=torch.bfloat16, definition=geglu_reference, **options):
    given = inputs(dtype)
    return judge(op, given, truth(definition, given), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_itself_is_right_by_half(dtype):
    found = verdict(geglu_reference, dtype)
    assert found.name == "right"
    assert found.error is not None
    assert 0.1 < found.error <= 0.5  # below a half where fp32 promises less than it did


class SkewedGradient(torch.autograd.Function):
    """The right output, with a gradient that is 3% too long."""

    @staticmethod
    def forward(ctx, projected):
        ctx.save_for_backward(projected)
        return geglu_reference(projected)

    @staticmethod
    def backward(ctx, *grads):
        projected = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = geglu_reference(projected)
        return 1.03 * torch.autograd.grad(out, projected, grads)[0]


def unwritten(projected):
    out = torch.empty_like(geglu_reference(projected))
    out[1:] = geglu_reference(projected)[1:]
    return out


@pytest.mark.parametrize(
    ("op", "told"),
    [
        (lambda projected: 1.03 * geglu_reference(projected), "output 0: "),
        (SkewedGradient.apply, "gradient of projected: "),
        (unwritten, "output 0: not finite"),
        (lambda projected: geglu_reference(projected).float(), "output 0: torch.float32 instead"),
        (lambda projected: geglu_reference(projected)[:, :8], r"output 0: shape \[32, 8\] instead"),
    ],
)
def test_what_is_wrong_is_named(op, told):
    given = inputs()
    made = truth(geglu_reference, given)
    if "shape" in told:
        made.directions[0] = made.directions[0][:, :8]
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(judge(op, given, made).note)


@pytest.mark.parametrize(("ulps", "name"), [(7, "right"), (80, "wrong")])
def test_an_op_that_draws_is_held_to_its_ulps(ulps, name):
    drawn = {"normals": torch.rand(32, 64)}
    made = truth(lambda normals: normals.clone(), drawn)
    found = judge(lambda normals: normals + ulps * 2**-23, drawn, made, normal_ulps=8)
    assert found.name == name
