"""torch.compile of the UNet, and the proof, before the first step, that its gradients are right.

Inductor of torch 2.13 computes wrong gradients for the whole UNet on a CPU (exactly zero below the
first upsampler, while the output is right); its repeated blocks are exact. So whatever is compiled
must first agree with eager PyTorch on this device, with real shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.tensor import DTensor

from .encoders import Samples
from .errors import UsageError

Parts = Literal["blocks", "whole"]

# Of a gradient's L2 norm, and of all gradients' typical one, for those that all but vanish. Sums in
# another order stay below, a gradient that is wrong does not.
TOLERANCES = {torch.float32: (1e-2, 1e-4), torch.bfloat16: (0.2, 1e-2), torch.float16: (0.2, 1e-2)}
COMPILED_FORMS = 8  # of a code object for one size of images; PyTorch's own limit
NAMED = 3  # parameters in a message


def allow_forms(buckets: int) -> None:
    """Raises dynamo's limit to what so many sizes of images are compiled for, each anew."""
    limit = COMPILED_FORMS * buckets
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)


def compile_unet(unet: UNet2DConditionModel, parts: Parts, backend: str = "inductor") -> None:
    """Compiles in place: each transformer block, of which all of a kind share one, or the whole.

    Shapes are static; names of parameters and modules stay.
    """
    if parts == "blocks":
        unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    else:
        unet.compile(fullgraph=True, dynamic=False, backend=backend)


@contextmanager
def eager() -> Iterator[None]:
    """Inside, what is compiled runs as it is written: other shapes compile nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


def check_gradients(
    unet: nn.Module,
    loss_fn: Callable[[nn.Module, Samples], Tensor],
    samples: Samples,
    dtype: torch.dtype,
    parts: Parts,
) -> None:
    """Compares every gradient with eager PyTorch's; those that there are stay as they are.

    Args:
        samples: of the run's shapes; their weights are taken as 1.
        dtype: of the UNet's products.
        parts: what is compiled, for the message.

    Raises: UsageError, naming the parameters that are furthest off, or what the compiler lacks.
    """
    cure = "take --compile off" if parts == "blocks" else "take --compile blocks"
    samples = samples._replace(weights=torch.ones_like(samples.weights))
    with eager():
        expected = _gradients(unet, loss_fn, samples)
    try:
        found = _gradients(unet, loss_fn, samples)
    except TorchDynamoException as error:  # its own errors and those of its backends
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"--compile {parts}: cannot be compiled: {first}; {cure}") from None
    wrong = differing(found, expected, *TOLERANCES[dtype])
    if wrong:
        worst = sorted(wrong, key=lambda name: wrong[name], reverse=True)[:NAMED]
        told = ", ".join(f"{name} by {wrong[name]:.0%}" for name in worst)
        raise UsageError(
            f"--compile {parts}: torch {torch.__version__} compiles wrong gradients for "
            f"{len(wrong)} of {len(expected)} parameters ({told}); {cure}"
        )


def differing(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float, of_typical: float
) -> dict[str, float]:
    """Name -> error in parts of the gradient's norm, of those beyond the tolerance."""
    names = list(expected)
    norms = torch.stack(torch._foreach_norm([expected[name] for name in names]))
    errors = torch._foreach_sub([found[name] for name in names], [expected[name] for name in names])
    errors = torch.stack(torch._foreach_norm(errors))
    typical = norms.square().mean().sqrt()
    beyond = ~(errors <= relative * norms + of_typical * typical)  # not a number is beyond, too
    return {
        name: float(error / norm)
        for name, error, norm, is_wrong in zip(
            names, errors.tolist(), norms.clamp(min=1e-30).tolist(), beyond.tolist(), strict=True
        )
        if is_wrong
    }


def _gradients(unet: nn.Module, loss_fn, samples: Samples) -> dict[str, Tensor]:
    """By name; the parameters' own stay theirs, for `Masters` reads them where they lie."""
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    own = {name: parameter.grad for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = None
    loss_fn(unet, samples).backward()
    found = {name: _part(cast(Tensor, p.grad)) for name, p in named.items()}
    for name, parameter in named.items():
        parameter.grad = own[name]
    return found


def _part(gradient: Tensor) -> Tensor:
    """All of it, or the part that this rank has of a sharded one."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
