"""The whole update as one CUDA graph: the host launches once, not thousands of times.

The first updates run one by one, as real ones: kernels are compiled, memory is found, and DDP,
which times its first ten synchronized iterations by reading events, has done so. Then one update is
captured and from there on replayed: micro-steps, all-reduce, clip, optimizer, averages and loss
scale. What changes from one to the next is copied to where the graph reads it. Each bucket of
images has a graph of its own; all take their memory from one pool, for one runs at a time.
Source: PyTorch's notes on CUDA graphs, "Usage with DistributedDataParallel".
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

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


Record = Callable[[Callable[[], StepResult], Graph | None], tuple[Graph, StepResult]]


def record_graph(
    call: Callable[[], StepResult], beside: Any = None
) -> tuple[torch.cuda.CUDAGraph, StepResult]:
    """Captures a call on the current stream; it runs with the first replay.

    Args:
        beside: a graph whose memory it shares: they never run at the same time.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    gc.collect()  # a finalizer that unloads a kernel would end the capture
    collects = gc.isenabled()
    gc.disable()
    try:
        # Held to what a capture allows is this thread alone: the loader's pins memory meanwhile.
        with torch.cuda.graph(
            graph,
            pool=None if beside is None else beside.pool(),
            stream=stream,
            capture_error_mode="thread_local",
        ):
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
        self.buckets: dict[torch.Size, Bucket] = {}  # by the shape of their latents
        self.first: Graph | None = None  # that was captured

    def __call__(self, micro_batches: Sequence[Samples], rates: Rates) -> StepResult:
        shape = micro_batches[0].target_mean.shape
        if shape not in self.buckets:
            self.buckets[shape] = Bucket(micro_batches, rates)
        bucket = self.buckets[shape]
        bucket.take(micro_batches, rates)
        if self.left or not bucket.ran:
            self.left = max(0, self.left - 1)
            bucket.ran = True
            return self.update(bucket.samples, bucket.rates)
        if bucket.graph is None:
            with self.together():
                call = partial(self.update, bucket.samples, bucket.rates)
                bucket.graph, bucket.result = self.record(call, self.first)
                self.first = self.first or bucket.graph
        bucket.graph.replay()
        # The next replay overwrites what this one has returned.
        return StepResult(*(value.clone() for value in bucket.result))

    def close(self) -> None:
        """Gives the graphs back; before the process group goes, whose work they hold."""
        for bucket in self.buckets.values():
            if bucket.graph is not None:
                bucket.graph.reset()
                bucket.graph = None


class Bucket:
    """Updates of one shape: their inputs, in one place, where a graph reads them, and the graph."""

    def __init__(self, micro_batches: Sequence[Samples], rates: Rates) -> None:
        self.samples = [Samples(*(tensor.clone() for tensor in batch)) for batch in micro_batches]
        self.rates = Rates(*(rate.clone() for rate in rates))
        self.ran = False  # one by one, so that what is found at the first time has been
        self.graph: Graph | None = None
        self.result: StepResult  # of the graph

    def take(self, micro_batches: Sequence[Samples], rates: Rates) -> None:
        """Copies the inputs to their place."""
        pairs = zip((*self.samples, self.rates), (*micro_batches, rates), strict=True)
        for place, value in (pair for old, new in pairs for pair in zip(old, new, strict=True)):
            if place.shape != value.shape:
                raise ValueError(f"an update of {list(place.shape)}, then {list(value.shape)}")
            place.copy_(value)
