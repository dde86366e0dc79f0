"""audit.jsonl: steps that moved nothing and losses far above the usual, with the rows they were of.

The device decides (see step.py) and the host reads it with the log's numbers: nothing waits for it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .data import Order
from .log import AUDIT_FILE, Lines, RunLog
from .meter import StepFacts

SHOWN_ROWS = 8  # in a line on the screen; the file has all


def rows_of_step(order: Order, global_batch: int, step: int) -> list[int]:
    """The dataset's rows that an optimizer step, from 1, was of, over all ranks."""
    start = (step - 1) * global_batch
    rows = order.rows(torch.arange(start, start + global_batch))
    return rows[rows >= 0].tolist()


class Audit:
    """What a run keeps of steps that were not as others. All ranks look alike; rank 0 writes.

    Args:
        path: of the file; None on other ranks.
        first_step: optimizer steps done before.
        rows_of: step -> its rows.
        max_skips: steps in a row that may move nothing.
    """

    def __init__(
        self,
        path: Path | None,
        first_step: int,
        rows_of: Callable[[int], list[int]],
        log: RunLog,
        max_skips: int,
    ) -> None:
        self.lines = None if path is None else Lines(path, first_step)
        self.rows_of, self.log = rows_of, log
        self.max_skips = max_skips
        self.in_a_row = 0

    def look(self, step: int, facts: Sequence[StepFacts]) -> str:
        """Notes what was unusual in the steps up to this one.

        Returns: why the run has to stop, on all ranks alike, or nothing.
        """
        stops = ""
        for number, fact in enumerate(facts, start=step - len(facts) + 1):
            self.in_a_row = 0 if fact.applied else self.in_a_row + 1
            if not fact.applied or fact.spike:
                self._keep(number, fact)
            if self.in_a_row == self.max_skips:
                stops = (
                    f"the last {self.in_a_row} steps up to {number} moved nothing "
                    f"({_reason(fact)}), as --max_skips says: the weights are those of step "
                    f"{number - self.in_a_row}; {AUDIT_FILE} names the rows"
                )
        return stops

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()

    def _keep(self, step: int, fact: StepFacts) -> None:
        if self.lines is None:
            return
        rows, reason = self.rows_of(step), _reason(fact)
        line: dict[str, Any] = {"step": step, "what": reason, "applied": fact.applied}
        numbers = {"loss": fact.loss, "grad_norm": fact.grad_norm}
        finite = {name: v if abs(v) < float("inf") else str(v) for name, v in numbers.items()}
        told = self.lines.add({**line, **finite, "rows": rows})
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
        moved = "" if fact.applied else " and moved nothing"
        self.log.note(f"step {step}: {reason}{moved}; rows {shown}{told and f'; {told}'}")


def _reason(fact: StepFacts) -> str:
    if not fact.samples:
        return "no sample could be read"
    if fact.spike:
        return f"the loss jumped to {fact.loss:.4g}"
    return "loss or gradient were not finite"
