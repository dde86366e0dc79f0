"""The whole update as one CUDA graph: the host launches once, not thousands of times.

The first updates run one by one, as real ones: kernels are compiled, memory is found, and DDP,
which times its first ten synchronized iterations by reading events, has done so. Then one update is
captured and from there on replayed: micro-steps, all-reduce, clip, optimizer, averages and loss
scale. What changes from one to the next is copied to where the graph reads it.
Source: PyTorch's notes on CUDA graphs, "Usage with DistributedDataParallel".
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from .encoders import Samples
from .errors import UsageError
from .step import Rates, StepResult

EAGER_STEPS = 11  # before the capture; what DDP asks for

Update = Callable[[Sequence[Samples], Rates], StepResult]


class Graph(Protocol):
    """What can be replayed, as torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


Record = Callable[[Callable[[], StepResult]], tuple[Graph, StepResult]]


def record_graph(call: Callable[[], StepResult]) -> tuple[Graph, StepResult]:
    """Captures a call on the current stream; it runs with the first replay."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    gc.collect()  # a finalizer that unloads a kernel would end the capture
    collects = gc.isenabled()
    gc.disable()
    try:
        # Held to what a capture allows is this thread alone: the loader's pins memory meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = call()
    except RuntimeError as error:
        cause: BaseException = error  # the end of a capture fails, too, and hides why
        while cause.__context__ is not None:
            cause = cause.__context__
        first = str(cause).partition("\n")[0]
        raise UsageError(
            f"the update cannot be captured as a CUDA graph ({first}); take --cuda_graphs off"
        ) from error
    finally:
        if collects:
            gc.enable()
    return graph, result


class Captured:
    """An update that is captured once and replayed; called as the update is.

    The caller's stream must be another than the default one, and what the update moves must stay
    where it is.

    Args:
        together: entered around the capture, so that all ranks fail alike.
        record: captures a call as a graph; tests hand in what needs no GPU.

    Raises: UsageError: the update cannot be captured.
    """

    def __init__(
        self,
        update: Update,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
        record: Record = record_graph,
        eager_steps: int = EAGER_STEPS,
    ) -> None:
        self.update, self.together, self.record = update, together, record
        self.left = eager_steps
        self.inputs: tuple[list[Samples], Rates] | None = None  # in one place, whoever reads them
        self.graph: Graph | None = None

    def __call__(self, micro_batches: Sequence[Samples], rates: Rates) -> StepResult:
        inputs = self._keep(micro_batches, rates)
        if self.left:
            self.left -= 1
            return self.update(*inputs)
        if self.graph is None:
            with self.together():
                self.graph, self.result = self.record(lambda: self.update(*inputs))
        self.graph.replay()
        return StepResult(*(value.clone() for value in self.result))  # the next replay overwrites

    def close(self) -> None:
        """Gives the graph back; before the process group goes, whose work it holds."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None

    def _keep(self, micro_batches: Sequence[Samples], rates: Rates) -> tuple[list[Samples], Rates]:
        """Copies the inputs to where the first ones were copied, from where a graph reads them."""
        if self.inputs is None:
            kept = [Samples(*(tensor.clone() for tensor in batch)) for batch in micro_batches]
            self.inputs = kept, Rates(*(rate.clone() for rate in rates))
            return self.inputs
        kept, kept_rates = self.inputs
        pairs = zip((*kept, kept_rates), (*micro_batches, rates), strict=True)
        for place, value in (pair for old, new in pairs for pair in zip(old, new, strict=True)):
            if place.shape != value.shape:
                raise ValueError(f"an update of {list(place.shape)}, then {list(value.shape)}")
            place.copy_(value)
        return self.inputs
