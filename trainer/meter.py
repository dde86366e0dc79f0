"""The numbers of a run between two lines of its log, added up without waiting for the device.

    loss                      the samples' mean
    loss_by_condition/NAME    the same, by what the UNet saw: full, no_text, no_image, neither
    loss_by_timestep/A-B      the same, of those whose timestep was from A to B, ends included
    grad_norm                 of the last step, before clipping
    images_per_second         of all ranks, without pauses for validation and checkpoints
    memory_gib                the most so far, of rank 0
    skipped_steps             since the start, that moved nothing
    seconds/PHASE             of rank 0's host, since the line before; together all that passed

A group without a sample has no key. The phases are the loop's: where it waits. On a GPU the host
runs ahead of the device, whose time then shows where the host next has to wait for it.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .log import PHASES, memory_gib
from .step import StepResult

SCALARS = 5  # of a result; then its groups


class StepFacts(NamedTuple):
    """A step as the host has read it."""

    loss: float  # a sample
    samples: int
    grad_norm: float
    applied: bool
    spike: bool


class Meter:
    """Adds up results on the device between two lines of the log; reading them waits for it.

    Args:
        groups: names of those that the loss is told by.
    """

    def __init__(self, device: torch.device, groups: Sequence[str]) -> None:
        self.device, self.groups = device, groups
        self.skipped_steps = 0
        self.read_steps: list[StepFacts] = []  # those of the last reading
        self.results: list[StepResult] = []
        self.phase: str = "update"
        self.since = time.perf_counter()  # of the phase
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps_s = 0.0  # without pauses, since the last reading

    def add(self, result: StepResult) -> None:
        self.results.append(result)

    def enter(self, phase: str) -> None:
        """From now on the time is this phase's."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        if self.phase in ("data", "update"):
            self.steps_s += now - self.since
        self.phase, self.since = phase, now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, the time is this phase's."""
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not the loop's; steps that are still on their way are."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self.during("validation"):
            yield

    def read(self) -> dict[str, float]:
        """Means since the last reading."""
        rows = [torch.cat([value.float().flatten() for value in one]) for one in self.results]
        columns = torch.stack(rows, dim=1).tolist()  # waits for the device
        seconds = self.take_seconds()
        loss, samples, grad_norm, applied, _ = columns[:SCALARS]
        self.skipped_steps += int(len(applied) - sum(applied))
        self.read_steps = [
            StepFacts(total / max(count, 1.0), int(count), norm, bool(moved), bool(spike))
            for total, count, norm, moved, spike in zip(*columns[:SCALARS], strict=True)
        ]
        sums = [sum(column) for column in columns[SCALARS:]]
        by_group = zip(self.groups, sums, sums[len(sums) // 2 :], strict=False)
        found = {
            "loss": sum(loss) / max(sum(samples), 1.0),
            "grad_norm": grad_norm[-1],
            "images_per_second": sum(samples) / self.steps_s,
            "memory_gib": memory_gib(self.device),
            "skipped_steps": self.skipped_steps,
            **{name: total / count for name, total, count in by_group if count},
            **seconds,
        }
        self.results, self.steps_s = [], 0.0
        return found

    def take_seconds(self) -> dict[str, float]:
        """By phase, since the last call."""
        self.enter(self.phase)
        told = {f"seconds/{phase}": round(spent, 4) for phase, spent in self.seconds.items()}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return told
