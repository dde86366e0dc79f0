"""A forward, and its backward alone, as calls that a timer can repeat."""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.errors import TritonError

from .accuracy import Inputs, as_tuple
from .accuracy import Op as Function
from .harness import Timing
from .ops import Case
from .timing import MODES, Call, Timer

FAILURES = (RuntimeError, ValueError, TritonError)  # of an implementation that cannot serve inputs


def told(failure: BaseException) -> str:
    """Its kind, and the first line of what it says."""
    first = (str(failure).strip() or "no message").splitlines()[0]
    return f"{type(failure).__name__}: {first}"


def directions(inputs: Inputs) -> list[str]:
    """What can be timed of an op: an op whose inputs take no gradient has no backward."""
    differentiable = any(value.requires_grad for value in inputs.values())
    return ["forward", "backward"] if differentiable else ["forward"]


def timed(
    case: Case, function: Function, direction: str, timer: Timer, modes: Sequence[str] = MODES
) -> dict[str, Timing]:
    """Milliseconds of one direction, in each way of measuring."""
    least = case.op.least_bytes(case.inputs("meta"))[0]
    with timer.stream():
        sets = [case.inputs("cuda") for _ in range(timer.sets(least))]
        make = forward if direction == "forward" else backward
        calls = [make(function, inputs) for inputs in sets]
    return {mode: timer.measure(calls, mode) for mode in modes}


def forward(function: Function, inputs: Inputs) -> Call:
    return lambda: function(**inputs)


def backward(function: Function, inputs: Inputs) -> Call:
    """Of a forward that is done here, with random output gradients; it can run again and again."""
    outputs = [value for value in as_tuple(function(**inputs)) if value.requires_grad]
    leaves: list[Tensor] = [value for value in inputs.values() if value.requires_grad]
    gradients = [torch.randn_like(value) for value in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
