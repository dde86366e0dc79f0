"""What the meter tells at a line of the log."""

import time

import pytest
import torch

from fusedit.trainer.log import PHASES
from fusedit.trainer.loss import GROUPS
from fusedit.trainer.meter import Meter
from fusedit.trainer.step import StepResult

NAMES = [f"group {index}" for index in range(GROUPS)]


def _result(loss: float, samples: float, groups: dict[int, tuple[float, float]]) -> StepResult:
    by_group = torch.zeros(2, GROUPS)
    for index, both in groups.items():
        by_group[:, index] = torch.tensor(both)
    yes = torch.tensor(True)
    return StepResult(
        torch.tensor(loss), torch.tensor(samples), torch.tensor(0.5), yes, ~yes, by_group
    )


def test_a_group_has_its_samples_mean_and_none_without_samples():
    meter = Meter(torch.device("cpu"), NAMES)
    meter.add(_result(6.0, 4.0, {0: (2.0, 1.0), 4: (6.0, 4.0)}))
    meter.add(_result(2.0, 4.0, {0: (1.0, 2.0), 5: (0.0, 4.0)}))
    read = meter.read()
    assert read["loss"] == 1.0
    told = {name: value for name, value in read.items() if name.startswith("group")}
    assert told == {"group 0": 1.0, "group 4": 1.5, "group 5": 0.0}
    assert [fact.loss for fact in meter.read_steps] == [1.5, 0.5]
    meter.add(_result(1.0, 1.0, {1: (1.0, 1.0)}))
    assert "group 0" not in meter.read()


def test_the_seconds_of_all_phases_are_those_that_passed(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter(torch.device("cpu"), NAMES)
    with meter.during("data"):
        clock[0] += 1.0
    clock[0] += 2.0
    meter.add(_result(1.0, 12.0, {}))
    with meter.paused():
        clock[0] += 4.0
        with meter.during("checkpoint"):
            clock[0] += 8.0
        clock[0] += 0.5
    clock[0] += 1.0
    read = meter.read()
    assert {phase: read[f"seconds/{phase}"] for phase in PHASES} == {
        "data": 1.0, "update": 3.0, "validation": 4.5, "checkpoint": 8.0, "export": 0.0,
    }  # fmt: skip
    assert read["images_per_second"] == pytest.approx(12 / 4)
    clock[0] += 0.25
    assert meter.take_seconds()["seconds/update"] == 0.25
    assert sum(meter.take_seconds().values()) == 0.0
