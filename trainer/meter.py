"""The numbers of a run between two lines of its log, added up without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .log import memory_gib
from .step import StepResult


class StepFacts(NamedTuple):
    """A step as the host has read it."""

    loss: float  # a sample
    samples: int
    grad_norm: float
    applied: bool
    spike: bool


class Meter:
    """Adds up results on the device between two lines of the log; reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.skipped_steps = 0
        self.read_steps: list[StepFacts] = []  # those of the last reading
        self._reset()

    def _reset(self) -> None:
        self.results: list[StepResult] = []
        self.started = time.perf_counter()

    def add(self, result: StepResult) -> None:
        self.results.append(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not the loop's; steps that are still on their way are."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        since = time.perf_counter()
        yield
        self.started += time.perf_counter() - since

    def read(self) -> dict[str, float]:
        """Means since the last reading."""
        columns = [
            torch.stack([value.float() for value in column])
            for column in zip(*self.results, strict=True)
        ]
        read = torch.stack(columns).tolist()  # waits for the device
        seconds = time.perf_counter() - self.started
        loss, samples, grad_norm, applied, _ = read
        self.skipped_steps += int(len(applied) - sum(applied))
        self.read_steps = [
            StepFacts(total / max(count, 1.0), int(count), norm, bool(moved), bool(spike))
            for total, count, norm, moved, spike in zip(*read, strict=True)
        ]
        self._reset()
        return {
            "loss": sum(loss) / max(sum(samples), 1.0),
            "grad_norm": grad_norm[-1],
            "images_per_second": sum(samples) / seconds,
            "memory_gib": memory_gib(self.device),
            "skipped_steps": self.skipped_steps,
        }
