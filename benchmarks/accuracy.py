"""A wrong answer has no speed: the bar that every test of a kernel and every timed op passes.

Truth is the definition in fp64; the largest and the RMS error of each output and gradient may be
twice PyTorch's in the same dtype, or twice the best rounding's where that is more, or twice what
fp32 can promise, an epsilon of the values' size, where PyTorch was luckier. Output
gradients are random, and buffers start as NaN, so that what was not written is seen. An op that
draws normals is held to their promise, so many units in the last place, beside the rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0
FEW = 64  # below so many elements, rounding that happens to be good is no bar
FP32_EPSILON = torch.finfo(torch.float32).eps

Inputs = dict[str, Tensor]
Op = Callable[..., Tensor | tuple[Tensor, ...]]


class Truth(NamedTuple):
    """What an op must be near: by name, outputs and gradients."""

    directions: list[Tensor]  # random output gradients, fp64
    exact: Inputs
    torch_says: Inputs


class Verdict(NamedTuple):
    error: float | None  # largest over what is allowed; above 1 is wrong; None: not finite
    note: str = ""  # what is wrong

    @property
    def name(self) -> str:
        return "wrong" if self.note else "right"


def truth(definition: Op, inputs: Inputs) -> Truth:
    """Runs the definition in fp64 and in the inputs' own dtypes."""
    doubles = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        shapes = as_tuple(definition(**doubles))
    directions = [torch.randn_like(value, dtype=torch.float64) for value in shapes]
    return Truth(
        directions, run(definition, doubles, directions), run(definition, inputs, directions)
    )


def judge(
    op: Op, inputs: Inputs, truth: Truth, *, normal_ulps: int = 0, poison: bool = True
) -> Verdict:
    """Whether op is as accurate on these inputs as it must be.

    Args:
        normal_ulps: of fp32, how far the normals it draws may be from the definition's.
        poison: whether new buffers start as NaN; what is compiled would be compiled again for it.
    """
    with poisoned() if poison else nullcontext():
        ours = run(op, inputs, truth.directions)
    return compare(ours, truth, normal_ulps)


def compare(ours: Inputs, truth: Truth, normal_ulps: int = 0) -> Verdict:
    """What is wrong first, or the largest error."""
    worst = 0.0
    for name, value in ours.items():
        share, what = error_share(value, truth.torch_says[name], truth.exact[name], normal_ulps)
        if share is None or share > 1:
            return Verdict(share, f"{name}: {what}")
        worst = max(worst, share)
    return Verdict(worst)


def run(op: Op, inputs: Inputs, directions: list[Tensor]) -> Inputs:
    """Outputs and gradients by name; outputs without a gradient (counts, logged values) too."""
    leaves = {name: v.detach().requires_grad_(v.requires_grad) for name, v in inputs.items()}
    outputs = as_tuple(op(**leaves))
    results = {f"output {index}": value.detach() for index, value in enumerate(outputs)}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if wanted:
        pairs = [(o, d) for o, d in zip(outputs, directions, strict=True) if o.requires_grad]
        random = [direction.to(output.dtype) for output, direction in pairs]
        grads = torch.autograd.grad([output for output, _ in pairs], [*wanted.values()], random)
        results |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, `torch.empty` and its like come filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error_share(
    ours: Tensor, torch_says: Tensor, exact: Tensor, normal_ulps: int = 0
) -> tuple[float | None, str]:
    """The larger of the RMS and the largest error, over what is allowed; and in words.

    None in place of a share: another shape or dtype, values that are not finite.
    """
    if ours.shape != exact.shape:
        return None, f"shape {list(ours.shape)} instead of {list(exact.shape)}"
    if ours.dtype != torch_says.dtype:
        return None, f"{ours.dtype} instead of {torch_says.dtype}"
    if not exact.numel():
        return 0.0, ""
    if not torch.isfinite(ours).all():
        return None, "not finite"
    half_ulp = torch.finfo(ours.dtype).eps / 2
    rounding = (exact.to(ours.dtype) - exact).abs()
    if exact.numel() < FEW or normal_ulps:
        rounding = exact.abs() * half_ulp
    drawn = normal_ulps * FP32_EPSILON * max(1.0, float(exact.abs().max()))
    worst, words = 0.0, ""
    for measure, reduce in (("RMS", _rms), ("largest", torch.max)):
        errors = ((ours - exact).abs(), (torch_says - exact).abs(), rounding)
        own, theirs, best = (float(reduce(error)) for error in errors)
        promised = FP32_EPSILON * float(reduce(exact.abs()))
        bar = FACTOR * max(theirs, best, promised) + drawn
        if own > worst * bar or not words:
            if own and not bar:
                return None, f"{measure} error {own:.3g}, where PyTorch has none"
            worst = own / bar if bar else 0.0
            words = f"{measure} error {own:.3g}, allowed {bar:.3g}"
    return worst, words


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
