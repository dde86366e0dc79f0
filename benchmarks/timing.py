"""How long calls take on a GPU, and how fast that GPU is found to be.

Three ways, each a median of many with its 20th and 80th percentile:

- graph: a CUDA graph of calls that go round inputs which together exceed the L2 cache; the time of
  a replay over its calls. What a training step sees, without the host: the share of the card's
  bandwidth is taken from it.
- cold: one call at a time, the L2 cache overwritten before it; what the host takes to launch is in.
- warm: one call after another on the same input; what the host takes to launch is in.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .harness import Record, Timing, sm_clock_mhz

Call = Callable[[], object]

MODES = ("graph", "cold", "warm")
WARM_UP_CALLS = 5
BUDGET_MS = 60.0  # of one measurement, by which the number of runs is chosen
LEAST_RUNS, MOST_RUNS = 10, 100
GRAPH_MS = 1.0  # a replay lasts at least this, so that starting it is nothing
MOST_GRAPH_CALLS = 128
L2_TIMES = 3  # inputs gone round, and what is overwritten, over the size of the L2 cache
MOST_SETS = 64
COPY_BYTES = 2**31  # of the copy that finds the bandwidth; far above any L2 cache
MATRIX = 8192  # side of the product that finds the matrix rate


class Timer:
    """Measures on one GPU, on a stream of its own: what is captured must be made there too."""

    def __init__(self, device: torch.device) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(L2_TIMES * self.l2_bytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)

    def sets(self, least_bytes: int) -> int:
        """How many sets of inputs a call must go round to find none of them in the L2 cache."""
        return min(MOST_SETS, -(-L2_TIMES * self.l2_bytes // max(least_bytes, 1)))

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Inside, work is queued on the measuring stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def measure(self, calls: Sequence[Call], mode: str) -> Timing:
        """Milliseconds of a call.

        Args:
            calls: the same work on different inputs, each made inside `stream()`.
            mode: of MODES.
        """
        with self.stream():
            estimate_ms = self._estimate_ms(calls)
            if mode == "graph":
                return self._graph(calls, estimate_ms)
            runs = _runs(estimate_ms)
            if mode == "cold":
                return self._one_by_one([calls[i % len(calls)] for i in range(runs)], flush=True)
            return self._one_by_one([calls[0]] * runs, flush=False)

    def _estimate_ms(self, calls: Sequence[Call]) -> float:
        for i in range(max(WARM_UP_CALLS, len(calls))):
            calls[i % len(calls)]()
        start, end = _events()
        start.record()
        for i in range(WARM_UP_CALLS):
            calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / WARM_UP_CALLS

    def _one_by_one(self, calls: Sequence[Call], *, flush: bool) -> Timing:
        pairs = [_events() for _ in calls]
        for call, (start, end) in zip(calls, pairs, strict=True):
            if flush:
                self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return timing([start.elapsed_time(end) for start, end in pairs])

    def _graph(self, calls: Sequence[Call], estimate_ms: float) -> Timing:
        rounds = max(1, round(GRAPH_MS / estimate_ms / len(calls)))
        count = max(len(calls), min(rounds * len(calls), MOST_GRAPH_CALLS))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for i in range(count):
                calls[i % len(calls)]()
        for _ in range(2):
            graph.replay()
        pairs = [_events() for _ in range(_runs(count * estimate_ms))]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        graph.reset()
        return timing([start.elapsed_time(end) / count for start, end in pairs])


def timing(samples_ms: Sequence[float]) -> Timing:
    """Median and percentiles of at least two samples."""
    fifths = statistics.quantiles(samples_ms, n=5, method="inclusive")
    return Timing(statistics.median(samples_ms), fifths[0], fifths[3], len(samples_ms))


def ceilings(timer: Timer, device: torch.device) -> Record:
    """What this card does at best, as it is: copy (bytes read + written), matrix product, launch.

    noise is the difference between two measurements of the same copy, the first and the last
    thing done here, as a share.
    """
    with timer.stream():
        source = torch.randint(0, 100, (COPY_BYTES // 4,), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        a = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
        b = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
        tiny = torch.zeros(1, device=device)
    copies = [timer.measure([lambda: target.copy_(source)], "graph")]
    product = timer.measure([lambda: torch.mm(a, b)], "graph")
    clock = sm_clock_mhz()  # right after the card was busy
    launch = timer.measure([lambda: tiny.add_(1)], "graph")
    copies.append(timer.measure([lambda: target.copy_(source)], "graph"))
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES / min(c.median_ms for c in copies) * 1e3,
        "bf16_flops_per_s": 2 * MATRIX**3 / product.median_ms * 1e3,
        "graph_launch_us": launch.median_ms * 1e3,
        "noise": abs(copies[0].median_ms - copies[1].median_ms) / copies[0].median_ms,
        "sm_clock_mhz": clock,
    }


def _runs(of_ms: float) -> int:
    return max(LEAST_RUNS, min(MOST_RUNS, round(BUDGET_MS / max(of_ms, 1e-3))))


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
