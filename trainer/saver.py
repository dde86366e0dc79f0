"""Checkpoints written beside the loop, which waits for a copy of its state, not for the disk.

The copy goes to the host's memory, which is kept from save to save. Then one thread looks whether
all numbers are finite, hashes, writes, syncs, renames and deletes what is old. At most one save is
on its way: the next one waits for it. One that fails leaves older checkpoints as they were and does
not end the run, whose next one may succeed; until then each line of the log tells of it.

Sharded parameters are written by the threads of all ranks, which agree on each stage of it by
messages of their own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import checkpoint, sharded_checkpoint
from .checkpoint import Checkpoint
from .errors import RanksLost, UsageError
from .log import RunLog
from .sharding import Shards
from .world import World

BLOCK_BYTES = 2**28  # a power of two, as PyTorch makes each piece of page-locked memory anyway
ALIGN_BYTES = 64
TIMED_OUT = "Timed out"  # in gloo's message of ranks that did not come
TOLD_WAIT_S = 1.0  # waiting for a save is told from here on

Parts = dict[str, dict[str, Tensor]]


class Save(NamedTuple):
    """A checkpoint to be written."""

    root: Path
    checkpoint: Checkpoint  # of tensors, those in training
    keep: int | None


class HostCopy:
    """Memory of the host for one copy of a state, page-locked where the state is on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.places: dict[tuple[str, str], Tensor] = {}
        self.block = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def take(self, parts: Mapping[str, Mapping[str, Tensor]]) -> Parts:
        """The copy, contiguous and whole when this returns; the next call overwrites it.

        Raises: UsageError: the host has no memory for it.
        """
        copied: Parts = {}
        for part, named in parts.items():
            copied[part] = {}
            for name, tensor in named.items():
                place = self._place((part, name), tensor)
                copied[part][name] = place.copy_(tensor, non_blocking=True)
        if self.device.type == "cuda":  # the host waits, so that no later update is seen
            torch.cuda.current_stream(self.device).synchronize()
        return copied

    def _place(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """Where a tensor is copied to, found at its first copy."""
        place = self.places.get(key)
        if place is not None and (place.shape, place.dtype) == (tensor.shape, tensor.dtype):
            return place
        size = -(-tensor.nbytes // ALIGN_BYTES) * ALIGN_BYTES
        if size > len(self.block):
            self.block = self._memory(max(size, BLOCK_BYTES))
        own, self.block = self.block[: tensor.nbytes], self.block[size:]
        self.places[key] = own.view(tensor.dtype).view(tensor.shape)
        return self.places[key]

    def _memory(self, count: int) -> Tensor:
        on_gpu = self.device.type == "cuda"
        try:
            return torch.empty(count, dtype=torch.uint8, pin_memory=on_gpu)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"the host has no memory for a copy of the state: {reason}") from None


class Saver:
    """Writes what a run keeps of itself. All ranks call each method alike.

    Without shards rank 0 alone copies and writes, and the others do not wait for it.
    """

    def __init__(self, world: World, shards: Shards | None, log: RunLog) -> None:
        self.world, self.shards, self.log = world, shards, log
        self.aside = world if shards is None else world.aside()
        self.host = HostCopy(world.device)
        on_gpu = world.device.type == "cuda"  # a thread's own GPU is the first one, if not told
        told = {"initializer": torch.cuda.set_device, "initargs": (world.device,)} if on_gpu else {}
        self.thread = ThreadPoolExecutor(1, "checkpoint", **told)
        self.pending: Future[None] | None = None
        self.step, self.roots = -1, frozenset[Path]()  # of the newest save
        self.failed: dict[int, str] = {}  # step of a save: why it failed

    @property
    def writes(self) -> bool:
        """Whether this rank has something to save."""
        return self.world.is_main or self.shards is not None

    def save(self, step: int, saves: Sequence[Save]) -> None:
        """Takes the state as it is; on the disk it is later, all of it or none."""
        roots = frozenset(one.root for one in saves)
        if not self.writes:
            return
        self.wait()
        if step == self.step and roots <= self.roots and step not in self.failed:
            return
        self.step, self.roots = step, roots
        self.failed.pop(step, None)
        self._done(step, lambda: self._begin(step, saves))

    def _begin(self, step: int, saves: Sequence[Save]) -> None:
        parts = {part: named for one in saves for part, named in one.checkpoint.tensors.items()}
        with self.world.together() if self.shards is not None else nullcontext():
            copied = self.host.take(parts)
        mine = [
            one._replace(checkpoint=Checkpoint(_of(one, copied), one.checkpoint.state))
            for one in saves
        ]
        self.pending = self.thread.submit(_write, step, mine, self.shards, self.aside)

    def tell(self, step: int) -> None:
        """Says at a line of the log that the newest checkpoint could not be written."""
        if self.pending is not None and self.pending.done():
            self._settle(step)
        elif self.step in self.failed:
            self.log.note(f"WARNING: the newest state is not saved: {self.failed[self.step]}")

    def wait(self) -> None:
        """Until what was taken is on the disk, or has failed."""
        if self.pending is None:
            return
        since, idle = time.perf_counter(), self.pending.done()
        self._settle(self.step)
        waited = time.perf_counter() - since
        if not idle and waited > TOLD_WAIT_S:
            self.log.note(f"waited {waited:.1f} s for the checkpoint of step {self.step}")

    def finish(self) -> None:
        """Waits for the last save, which must have succeeded.

        Raises: UsageError, on all ranks alike: it failed.
        """
        with self.world.together():
            self.wait()
            if self.step in self.failed:
                raise UsageError(self.failed[self.step])
        for reason in self.failed.values():
            self.log.note(f"not saved on the way: {reason}")

    def close(self) -> None:
        """Waits for the thread, whatever becomes of its save."""
        self.thread.shutdown()

    def _settle(self, step: int) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            self._done(step, pending.result)

    def _done(self, step: int, result: Callable[[], None]) -> None:
        """Takes the end of a save, good or bad.

        Args:
            step: that the run is at.
        """
        try:
            result()
        except UsageError as error:
            self.failed[self.step] = str(error)
            self.log.event(step, "save failed", f"WARNING: not saved: {error}")
        except RuntimeError as error:
            if TIMED_OUT not in str(error):
                raise
            raise RanksLost(
                f"rank {self.world.rank} stops: not every rank has written its part of "
                f"checkpoint-{self.step} within --timeout_s: look at the disks of the machines"
            ) from None


def _of(one: Save, copied: Parts) -> Parts:
    return {part: copied[part] for part in one.checkpoint.tensors}


def _write(step: int, saves: Sequence[Save], shards: Shards | None, world: World) -> None:
    """In the thread; the run meets what it raises when it looks after the save."""
    for root, made, keep in saves:
        if shards is None:
            check_finite(step, made.tensors)
            checkpoint.save(root, step, made, keep)
        else:
            with world.together():
                check_finite(step, made.tensors)
            sharded_checkpoint.save(root, step, made, keep, shards, world)


def check_finite(step: int, parts: Parts) -> None:
    """Raises UsageError where a number is not: an older checkpoint is what to go on from then."""
    for part, named in parts.items():
        for name, tensor in named.items():
            if not tensor.isfinite().all():
                raise UsageError(
                    f"checkpoint-{step} is not written: {part} {name} holds numbers that are not "
                    "finite; an older one is whole"
                )
