"""The micro-batches of each optimizer step, and what all ranks do with them."""

from enum import IntEnum
from typing import Any

from .config import DataConfig, LoopConfig
from .data import Source, StepSampler, make_loader
from .world import World

DEAD_WORKER = "DataLoader worker"  # how PyTorch's message begins


class Verdict(IntEnum):
    """What the ranks agree on before a step; the highest of theirs wins."""

    GO = 0
    SKIPPED = 1  # some rank has an unreadable sample and may go on without it
    STOP = 2
    BAD_SAMPLE = 3  # some rank has an unreadable sample and must not
    NO_DATA = 4  # a process of some rank that reads has died


class Windows:
    """This rank's micro-batches, a window of them for each step from first_step to last_step."""

    def __init__(
        self,
        source: Source,
        loop: LoopConfig,
        data: DataConfig,
        world: World,
        first_step: int,
        last_step: int,
    ) -> None:
        sampler = StepSampler(
            first_step=first_step,
            last_step=last_step,
            rank=world.rank,
            ranks=world.size,
            micro_batch=loop.train_batch_size,
            micro_steps=loop.gradient_accumulation_steps,
        )
        loader = make_loader(
            source,
            sampler,
            workers=data.dataloader_num_workers,
            prefetch=data.dataloader_prefetch,
            pin_memory=world.device.type == "cuda",
        )
        self.batches = iter(loader)
        self.micro_steps = loop.gradient_accumulation_steps
        self.on_bad_sample = Verdict.SKIPPED if data.on_bad_sample == "skip" else Verdict.BAD_SAMPLE
        self.world = world

    def take(self, stop_requested: bool) -> tuple[list[Any], Verdict, list[str]]:
        """The next window, the ranks' verdict on it, and what is wrong with samples on any rank."""
        verdict = Verdict.STOP if stop_requested else Verdict.GO
        try:
            window = [next(self.batches) for _ in range(self.micro_steps)]
            errors = [error for batch in window for error in batch.errors]
            verdict = max(verdict, self.on_bad_sample) if errors else verdict
        except RuntimeError as error:
            if not str(error).startswith(DEAD_WORKER):
                raise
            window, errors, verdict = [], [_told(error)], Verdict.NO_DATA
        # The hosts agree by themselves, while the devices still work on the step before.
        verdict = Verdict(self.world.highest(verdict))
        if verdict in (Verdict.GO, Verdict.STOP):
            return window, verdict, []
        told = self.world.texts("\n".join(errors))
        return window, verdict, [line for text in told for line in text.splitlines()]


def _told(error: RuntimeError) -> str:
    reason = str(error).partition("\n")[0]
    return f"{reason}: was a file of the dataset taken away while it was read, or memory short?"
