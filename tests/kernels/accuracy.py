"""The accuracy bar: no further from the truth than twice what PyTorch is in the same dtype.

Truth is the definition in fp64. Outputs and every gradient are compared, under random output
gradients (a sum's constant gradient hides a wrong norm), with buffers that start as NaN.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from launches import counted
from torch import Tensor

FACTOR = 2.0
FEW = 64
FP32_EPSILON = torch.finfo(torch.float32).eps

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_as_accurate_as_torch(
    op: Op, definition: Op, inputs: dict[str, Tensor], *, forward_only: bool = False
) -> None:
    """Runs op, definition in the same dtypes, and definition in fp64, on the same inputs.

    Args:
        op: ours, called with the inputs by name, as the definition is.
        inputs: floating-point tensors; those that require a gradient have it compared.
        forward_only: for ops without a backward.
    """
    with torch.no_grad():
        expected = _as_tuple(definition(**_doubles(inputs)))
    directions = [torch.randn_like(value) for value in expected]
    truth = _run(definition, _doubles(inputs), directions, forward_only)
    torch_says = _run(definition, inputs, directions, forward_only)
    with poisoned(), counted() as launches:
        ours = _run(op, inputs, directions, forward_only, launches)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert value.dtype == torch_says[name].dtype, f"{name} is {value.dtype}"
        assert_close_to_truth(name, value, torch_says[name], truth[name])


def assert_close_to_truth(name: str, ours: Tensor, torch_says: Tensor, truth: Tensor) -> None:
    """RMS and largest error at most FACTOR times PyTorch's, or those of the best rounding.

    Where PyTorch was luckier than fp32 can promise, the bar is that promise: an fp32 epsilon of the
    values' size. A few elements can be rounded well by luck: they get the bound of rounding.
    """
    assert ours.shape == truth.shape, f"{name}: {ours.shape} instead of {truth.shape}"
    if not truth.numel():
        return
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    rounding = (truth.to(ours.dtype) - truth).abs()
    if truth.numel() < FEW:
        rounding = truth.abs() * (torch.finfo(ours.dtype).eps / 2)
    errors = [(ours - truth).abs(), (torch_says - truth).abs(), rounding]
    for measure, reduce in (("RMS", lambda e: e.square().mean().sqrt()), ("largest", torch.max)):
        own, theirs, best = (float(reduce(error)) for error in errors)
        bar = FACTOR * max(theirs, best, FP32_EPSILON * float(reduce(truth.abs())))
        assert own <= bar, f"{name}: {measure} error {own:.3g}, PyTorch's is {theirs:.3g}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, `torch.empty` and its like come filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _run(op, inputs, directions, forward_only, launches: list[str] | None = None):
    """Outputs and gradients by name."""
    leaves = {  # with the strides of the inputs, holes too
        name: value.detach().requires_grad_(value.requires_grad and not forward_only)
        for name, value in inputs.items()
    }
    outputs = _as_tuple(op(**leaves))
    results = {f"output {index}": value.detach() for index, value in enumerate(outputs)}
    done = len(launches) if launches is not None else 0
    if launches is not None and any(value.numel() for value in outputs):
        assert done, "no kernel ran in the forward"
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if wanted:
        random = [d.to(value.dtype) for d, value in zip(directions, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(wanted.values()), random)
        results |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
        if launches is not None and any(value.numel() for value in outputs):
            assert len(launches) > done, "no kernel ran in the backward"
    return results


def _doubles(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
