import json

import pytest
import torch

from fusedit.trainer.audit import AUDIT_FILE, Audit, rows_of_step
from fusedit.trainer.data import Order
from fusedit.trainer.log import RunLog
from fusedit.trainer.meter import StepFacts

GOOD = StepFacts(loss=0.1, samples=4, grad_norm=1.0, applied=True, spike=False)
SKIPPED = GOOD._replace(loss=float("nan"), grad_norm=float("inf"), applied=False)
EMPTY = GOOD._replace(samples=0, loss=0.0, applied=False)
SPIKE = GOOD._replace(loss=9.0, spike=True)


@pytest.fixture
def audit(tmp_path):
    made = Audit(tmp_path / AUDIT_FILE, 0, lambda step: [step * 10, step], RunLog.silent(), 3)
    yield made
    made.close()


def _lines(folder):
    return [json.loads(line) for line in (folder / AUDIT_FILE).read_text().splitlines()]


def test_what_is_unusual_is_kept_with_its_rows(audit, tmp_path):
    assert audit.look(3, [GOOD, SKIPPED, GOOD]) == ""
    assert audit.look(5, [SPIKE, EMPTY]) == ""
    skipped, spike, empty = _lines(tmp_path)
    assert skipped == {
        "step": 2, "what": "loss or gradient were not finite", "applied": False,
        "loss": "nan", "grad_norm": "inf", "rows": [20, 2],
    }  # fmt: skip
    assert (spike["step"], spike["applied"], spike["what"]) == (4, True, "the loss jumped to 9")
    assert (empty["step"], empty["what"]) == (5, "no sample could be read")


def test_so_many_in_a_row_stop_the_run_across_readings(audit):
    assert audit.look(2, [SKIPPED, SKIPPED]) == ""
    assert audit.look(4, [GOOD, SKIPPED]) == ""
    reason = audit.look(6, [SKIPPED, SKIPPED])
    assert reason.startswith("the last 3 steps up to 6 moved nothing (loss or gradient were not")
    assert "the weights are those of step 3" in reason


def test_other_ranks_decide_alike_and_write_nothing(tmp_path):
    audit = Audit(None, 0, lambda step: 1 / 0, RunLog.silent(), 2)
    assert audit.look(2, [SKIPPED, SKIPPED])
    audit.close()
    assert not list(tmp_path.iterdir())


def test_the_rows_of_a_step_are_those_of_all_ranks():
    order = Order(torch.arange(10), 3, 4)
    epoch = [row for step in (1, 2, 3) for row in rows_of_step(order, 4, step)]
    assert sorted(epoch) == [*range(10)]  # without padding
    assert rows_of_step(order, 4, 4) == order.rows(torch.arange(12, 16)).tolist()
