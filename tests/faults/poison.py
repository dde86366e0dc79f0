"""Ranks whose numbers go wrong at chosen steps, from outside the product."""

from pathlib import Path
from typing import Any, NamedTuple

import ranks


class Poison(NamedTuple):
    """What becomes infinite or NaN, on one rank, from a step to before another; steps from 0."""

    what: str  # loss, gradient or moments
    rank: int
    first: int
    last: int
    global_batch: int


def rank_main(poison: Poison, rank: int, size: int, port: int, *rest: Any) -> None:
    """The process of a rank: `ranks._rank`. `rest`: flags, log, threads."""
    if rank == poison.rank:
        (_spoil_moments if poison.what == "moments" else _spoil_loss)(poison)
    ranks._rank(rank, size, size, port, *rest)


def _spoil_loss(poison: Poison) -> None:
    from fusedit.trainer.loss import EditLoss

    sound = EditLoss.__call__

    def spoiled(self: EditLoss, model: Any, samples: Any, by_group: Any = None) -> Any:
        loss = sound(self, model, samples, by_group)
        step = int(samples.positions[0]) // poison.global_batch
        if poison.first <= step < poison.last:
            if poison.what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    EditLoss.__call__ = spoiled


def _spoil_moments(poison: Poison) -> None:
    from fusedit.trainer import job

    sound, calls = job.train_step, 0

    def spoiled(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if calls == poison.first:
            state = arguments[2].state()
            next(value for name, value in state.items() if name.endswith("exp_avg")).fill_(
                float("inf")
            )
        calls += 1
        return sound(*arguments, **named)

    job.train_step = spoiled


class Poisoned(ranks.Ranks):
    """Ranks, one of them poisoned."""

    def __init__(self, size: int, flags: list[str], log: Path, poison: Poison) -> None:
        self.log, port = log, ranks.free_port()
        self.processes = [
            ranks._context.Process(
                target=rank_main, args=(poison, rank, size, port, flags, str(log), 1)
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()
