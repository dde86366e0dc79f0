"""Averaged copies of the weights, fp32, kept by name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOGETHER = 64  # tensors in one launch; their differences take memory for a moment


class Averages:
    """Moving averages of parameters; how far they move is each kind's own.

    Args:
        named: fp32; masters, where the UNet's own weights are copies.
        publish: called after parameters and averages were exchanged: writes the copies.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], publish: Callable[[], None] | None = None
    ) -> None:
        self.parameters, self.publish = dict(named), publish
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    def weight(self, n: int) -> float:
        """How far the averages move towards the parameters after optimizer step n, from 1."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, weight: Tensor, applies: Tensor) -> None:
        """Moves the averages to the parameters after an optimizer step.

        Args:
            weight: [] fp64, of `weight`.
            applies: [] bool; False leaves the averages as they are, decided on the device.
        """
        weight = weight.float() * applies
        averages = list(self.averages.values())
        parameters: list[Tensor] = list(self.parameters.values())
        for start in range(0, len(averages), TOGETHER):
            chunk = averages[start : start + TOGETHER]
            difference = torch._foreach_sub(parameters[start : start + TOGETHER], chunk)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(chunk, difference)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters hold the averages; afterwards their own bits again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # By value: a sharded module, and whoever knows an address, finds them where they were.
        for name, parameter in self.parameters.items():
            raw = parameter.clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(raw)
        if self.publish is not None:
            self.publish()

    def load_state(self, averages: dict[str, Tensor]) -> None:
        for name, average in averages.items():
            self.averages[name].copy_(average)


class Ema(Averages):
    """Exponential moving average of parameters.

    Source: the warm-up min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ... is that of the
    LitEma class InstructPix2Pix was trained with.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        decay: float,
        publish: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(named, publish)
        self.decay = decay

    def weight(self, n: int) -> float:
        return 1.0 - min(self.decay, (1 + n) / (10 + n))
