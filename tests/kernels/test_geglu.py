import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from sizes import DTYPES, row_shapes
from torch.library import opcheck

from fusedit.benchmarks.accuracy import poisoned
from fusedit.kernels.geglu import geglu, geglu_reference

ODD = [(1, 2), (3, 7, 10), (2, 33, 514)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ODD, *row_shapes("geglus", rows=5, factor=2)], ids=str)
def test_matches_pytorch(shape, dtype, device):
    projected = torch.randn(shape, dtype=dtype, device=device) * 3
    assert_as_accurate_as_torch(geglu, geglu_reference, {"projected": projected.requires_grad_()})


def test_far_gates_neither_overflow_nor_lose_their_tails(device):
    gates = torch.tensor([-1e4, -30.0, -9.0, -4.0, -1e-8, 0.0, 1e-8, 4.0, 9.0, 30.0, 1e4])
    projected = torch.cat((torch.ones_like(gates), gates)).to(device)
    assert_as_accurate_as_torch(geglu, geglu_reference, {"projected": projected.requires_grad_()})


def test_a_far_gate_beside_a_large_value_is_zero(device):
    projected = torch.tensor([1e30, -1e30], device=device, requires_grad=True)
    out = geglu(projected)
    (grad,) = torch.autograd.grad(out, projected, torch.ones(1, device=device))
    assert not out.any()
    assert not grad.any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
def test_nothing_to_do(shape, device):
    projected = torch.zeros(shape, device=device, requires_grad=True)
    out = geglu(projected)
    assert out.shape == geglu_reference(projected).shape
    out.sum().backward()
    assert projected.grad is not None
    assert projected.grad.shape == shape


def test_strided_rows_and_columns(device):
    wide = torch.randn(6, 5, 24, device=device)
    for view in (wide[:, :, 4:20], wide[::2], wide.transpose(0, 1), wide[..., ::2]):
        assert_as_accurate_as_torch(geglu, geglu_reference, {"projected": view.requires_grad_()})
        wide = wide.detach()


def test_inputs_are_left_alone_and_two_runs_are_equal(device):
    projected = torch.randn(7, 40, device=device, requires_grad=True)
    before, direction = projected.detach().clone(), torch.randn(7, 20, device=device)
    runs = []
    for _ in range(2):
        with poisoned():
            out = geglu(projected)
            runs.append((out, *torch.autograd.grad(out, projected, direction)))
    assert torch.equal(projected, before)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_opcheck(device):
    opcheck(torch.ops.fusedit.geglu, (torch.randn(3, 8, device=device, requires_grad=True),))


def test_compiles_whole(device):
    projected = torch.randn(3, 40, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: geglu(x * 2) + 1, fullgraph=True, backend="aot_eager")
    direction = torch.randn(3, 20, device=device)
    out = compiled(projected)
    torch.testing.assert_close(out, geglu_reference(projected * 2) + 1)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(o, projected, direction)
            for o in (out, geglu_reference(projected * 2))
        )
    )


def test_refuses_what_it_does_not_serve(device):
    with pytest.raises(ValueError, match=r"must be even, got \[2, 3\]"):
        geglu(torch.zeros(2, 3, device=device))
    with pytest.raises(TypeError, match="projected must be fp32, bf16 or fp16"):
        geglu(torch.zeros(2, 4, dtype=torch.float64, device=device))
