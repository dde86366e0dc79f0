"""The benchmark's accuracy bar as assertions, which also see whether a kernel ran."""

import torch
from launches import counted
from torch import Tensor, nn

from fusedit.benchmarks.accuracy import Op, as_tuple, error_share, judge, truth


def assert_as_accurate_as_torch(op: Op, definition: Op, inputs: dict[str, Tensor]) -> None:
    """Outputs and gradients of op are as near the truth as PyTorch's, and kernels made them.

    Args:
        op: ours, called with the inputs by name, as the definition is.
        inputs: floating-point tensors; those that require a gradient have it compared.
    """
    known = truth(definition, inputs)
    forward: list[int] = []  # how many kernels ran in it
    with counted() as launches:

        def watched(**given: Tensor) -> tuple[Tensor, ...]:
            outputs = as_tuple(op(**given))
            forward.append(len(launches))
            return outputs

        verdict = judge(watched, inputs, known)
    assert not verdict.note, verdict.note
    if any(value.numel() for value in known.directions):
        assert forward[-1], "no kernel ran in the forward"
        if any(value.requires_grad for value in inputs.values()):
            assert len(launches) > forward[-1], "no kernel ran in the backward"


def assert_close_to_truth(name: str, ours: Tensor, torch_says: Tensor, exact: Tensor) -> None:
    share, what = error_share(ours, torch_says, exact)
    assert share is not None, f"{name}: {what}"
    assert share <= 1, f"{name}: {what}"


def output_and_gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """A module's output and its parameters' gradients by name, under one random direction."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, parameters, direction)
    return {"output": out.detach(), **dict(zip(names, grads, strict=True))}
