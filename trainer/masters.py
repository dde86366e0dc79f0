"""fp32 masters of bf16 parameters: what the optimizer moves, averages and checkpoints.

The UNet's own weights are bf16 copies of them, so autocast has nothing to cast. Gradients come in
bf16 and are added up, over micro-steps and over ranks, in the masters' fp32.
Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.1.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.chunks import WIDE

Hook = Callable[[object, dist.GradBucket], torch.futures.Future[Tensor]]


class Masters:
    """The masters of a module, which is rounded to bf16; they lie in memory as its parameters do.

    Args:
        module: in fp32, on its device, in its memory format.
        sums: whether several gradients are added up in an update, of micro-steps or ranks; else the
            one that there is stays in bf16, and there are no sums to keep. PyTorch's own AdamW
            takes no bf16 gradient for an fp32 parameter.
    """

    def __init__(self, module: nn.Module, *, sums: bool = True) -> None:
        self.copies = dict(module.named_parameters())
        self.named = {
            name: nn.Parameter(copy.detach().clone()) for name, copy in self.copies.items()
        }
        module.to(torch.bfloat16)
        self._sums: Tensor | None = None  # all gradients of the masters, in a row
        self._given: Tensor | None = None  # of the copies
        if sums:
            self._sums = _gradients_of(list(self.named.values()), torch.float32)
            self._given = _gradients_of(list(self.copies.values()), torch.bfloat16)
        else:
            for name, copy in self.copies.items():
                self.named[name].grad_dtype = copy.dtype

    @torch.no_grad()
    def take_gradients(self, *, last: bool) -> None:
        """Adds the gradients of a micro-step to the masters' and forgets them."""
        if self._sums is None:
            for name, copy in self.copies.items():
                self.named[name].grad = copy.grad
        elif self._given is not None:
            self._sums.add_(self._given)
            if not last:  # else the next update's zero_grad does
                self._given.zero_()
        elif not last:  # else the hook has taken them
            grads = gradients(self.copies)
            torch._foreach_add_(gradients(self.named), grads)
            torch._foreach_zero_(grads)

    def zero_grad(self) -> None:
        """Forgets all gradients, also of an update that was not ended."""
        for row in (self._sums, self._given):
            if row is not None:
                row.zero_()
        if self._sums is None and (grads := gradients(self.copies)):
            torch._foreach_zero_(grads)

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters to the copies."""
        torch._foreach_copy_(list(self.copies.values()), list(self.named.values()))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes fp32 values by name."""
        with torch.no_grad():
            for name, value in state.items():
                self.named[name].copy_(value)
        self.publish()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module holds the masters; for its export, when no step comes any more."""
        own = {name: copy.data for name, copy in self.copies.items()}
        for name, copy in self.copies.items():
            copy.grad, copy.data = None, self.named[name].data
        try:
            yield
        finally:
            for name, copy in self.copies.items():
                copy.data = own[name]

    def reduce_in_buckets(self, ranks: int, dtype: torch.dtype) -> Hook:
        """DDP's communication hook: the mean over ranks goes to the masters, in the overlap.

        Args:
            dtype: that travels.
        """
        self._given = None  # DDP's buckets hold them
        of: dict[Tensor, Tensor] = {c: self.named[name] for name, c in self.copies.items()}
        for copy in of:
            copy.grad = None

        def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            received = bucket.buffer()
            grads: list[Any] = [_in_memory(of[copy].grad) for copy in bucket.parameters()]
            sizes = [grad.numel() for grad in grads]
            # Not bucket.gradients(), which reads what lies channels_last as if it were contiguous.
            torch._foreach_add_(grads, list(received.split(sizes)))
            sent = torch.cat(grads).to(dtype).div_(ranks)
            work: Any = dist.all_reduce(sent, async_op=True)

            def store(done: torch.futures.Future[list[Tensor]]) -> Tensor:
                (mean,) = done.value()
                torch._foreach_copy_(grads, list(mean.split(sizes)))
                return received.zero_()

            return work.get_future().then(store)

        return hook


def reduce_in_bf16(ranks: int) -> Hook:
    """DDP's communication hook without masters: the mean over ranks, rounded on its way.

    PyTorch's own, bf16_compress_hook, refuses gloo.
    """

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        mean = bucket.buffer()
        work: Any = dist.all_reduce(mean.to(torch.bfloat16).div_(ranks), async_op=True)
        return work.get_future().then(lambda done: mean.copy_(done.value()[0]))

    return hook


def gradients(parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Those that there are."""
    return [p.grad for p in parameters.values() if p.grad is not None]


def _gradients_of(parameters: list[nn.Parameter], dtype: torch.dtype) -> Tensor:
    """Gives each a gradient, all of them one row of zeros: one kernel adds or clears it.

    Sizes that would take wide loads from what comes behind them are last.
    """
    row = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    start = 0
    for parameter in sorted(parameters, key=lambda p: p.numel() % WIDE != 0):
        part = row[start : start + parameter.numel()]
        parameter.grad = part.as_strided(parameter.shape, parameter.stride())
        start += parameter.numel()
    return row


def _in_memory(tensor: Any) -> Tensor:
    """[elements], a view in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
