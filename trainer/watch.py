"""What each rank is doing, told to the others, so that a rank that is waited for has a name.

A thread of each rank writes it to the process group's store, about once a second; it touches no
device and takes part in no collective. From what they wrote a rank that waits long says for whom,
and one that lost the others says which are gone. One that is stuck after the others ended ends.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from .errors import RanksLost, UsageError

# What PyTorch's messages have in common when the other side is gone or late.
OF_LOST_RANKS = ("gloo", "Gloo", "NCCL", "Connection closed", "Connection reset", "Timed out")
ANSWER_S = 5.0  # in which the store answers, or counts as gone
BEATS = 4  # that a rank must miss to count as silent
LOST = "lost the others"
Answer = TypeVar("Answer")


class Beat(NamedTuple):
    """What a rank last wrote."""

    number: int
    doing: str  # "reading step 120"
    for_s: float
    waits: bool  # for the others, in a collective
    ended: str = ""  # why it could not go on; LOST is nobody's fault


class Watch:
    """This rank's thread, and what it knows of the others. Does nothing before `start`."""

    def __init__(self) -> None:
        self.doing_now, self.since, self.waits = "starting", time.monotonic(), False
        self.ended, self.number, self.timeout_s = "", 0, 1800.0
        self.thread: threading.Thread | None = None

    def start(self, store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
        """Begins to tell and to look. All ranks call it; it waits for each one's first beat.

        Args:
            store: of no one else: its connection is held while it waits for an answer.
        """
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.every_s = min(1.0, timeout_s / 20)
        self.slow_s = min(60.0, timeout_s / 4)  # of waiting, before it is told
        self.store, self.lock, self.stopping = store, threading.Lock(), threading.Event()
        self._beat()
        self.store.wait([self._key(other) for other in range(size)])
        self.thread = threading.Thread(target=self._run, name="fusedit watch", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.thread is not None:
            self.stopping.set()
            self.thread.join(ANSWER_S)  # it may be waiting for the store
            self.thread = None

    def doing(self, what: str) -> None:
        """What the messages of others say of this rank from now on."""
        self.doing_now, self.since = what, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank is ready and waits for the others."""
        what = self.doing_now
        self.doing_now, self.since, self.waits = f"waiting after {what}", time.monotonic(), True
        yield
        self.doing_now, self.since, self.waits = what, time.monotonic(), False

    # The rank's end, whatever it is.

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises: RanksLost: instead of PyTorch's error about a rank that is gone or late."""
        if self.thread is None or error is None or isinstance(error, UsageError):
            self.stop()
            return
        lost = isinstance(error, RuntimeError) and any(
            words in str(error) for words in OF_LOST_RANKS
        )
        self.ended = LOST if lost else f"{type(error).__name__}: {error}".partition("\n")[0]
        try:
            self._asked(self._beat)
            if lost:
                raise self._who_is_lost() from None
        except dist.DistError:
            if lost:
                raise RanksLost(
                    f"rank {self.rank} lost the others while {self.doing_now}, and cannot ask for "
                    "them: the machine of rank 0 is gone, or the network to it"
                ) from None
        finally:
            self.stop()

    def _who_is_lost(self) -> RanksLost:
        """Looks twice, some beats apart: who is gone does not beat any more."""
        first = self._asked(self._read)
        time.sleep(BEATS * self.every_s)
        last = self._asked(self._read)
        if self.rank == 0:  # perhaps the store is this process's, and the others want to ask
            time.sleep(2 * self.every_s)
        silent = [rank for rank in last if last[rank].number == first[rank].number]
        left = [rank for rank in last if rank not in silent and last[rank].ended in ("", LOST)]
        told = [
            f"rank {rank} ended while {beat.doing}: {beat.ended}"
            for rank, beat in last.items()
            if beat.ended not in ("", LOST)
        ] or [
            f"rank {rank} is gone or frozen; it was {last[rank].doing} when it was last heard of"
            for rank in silent
        ]
        late = [
            f"rank {rank} has been {beat.doing} for {beat.for_s:.0f} s (--timeout_s "
            f"{self.timeout_s:g})"
            for rank, beat in last.items()
            if rank in left and not beat.waits and not beat.ended
        ]
        told = told or late or ["the connection between ranks broke, and all of them answer"]
        speaks = self.rank == min((rank for rank in left if last[rank].ended == LOST), default=0)
        return RanksLost(f"rank {self.rank} stops: {'; '.join(told)}", speaks=speaks)

    # The thread.

    def _run(self) -> None:
        told_at = self.slow_s
        while not self.stopping.wait(self.every_s):
            lasts_s = time.monotonic() - self.since
            stuck = lasts_s > self.timeout_s + 2 * self.every_s  # a wait would have timed out
            try:
                self._beat()
                if not self.waits:
                    told_at = self.slow_s
                elif lasts_s > told_at:
                    told_at *= 4
                    self._tell_whom_it_waits_for(lasts_s)
                others_ended = stuck and any(beat.ended for beat in self._read().values())
            except dist.DistError:
                others_ended = True  # the store's process at least
            if stuck and others_ended and not self.ended:
                _say(f"rank {self.rank} was stuck while {self.doing_now}, and the others ended:")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)  # nothing else ends a thread that waits for a disk or a device

    def _tell_whom_it_waits_for(self, waited: float) -> None:
        beats = self._read()
        others = [f"rank {rank} ({beat.doing})" for rank, beat in beats.items() if not beat.waits]
        if others and self.rank == min(rank for rank, beat in beats.items() if beat.waits):
            _say(f"rank {self.rank} has waited {waited:.0f} s for {', '.join(others)}")

    # The store.

    def _beat(self) -> None:
        with self.lock:
            self.number += 1
            for_s = time.monotonic() - self.since
            beat = Beat(self.number, self.doing_now, for_s, self.waits, self.ended)
            self.store.set(self._key(self.rank), json.dumps(beat))

    def _read(self) -> dict[int, Beat]:
        keys = [self._key(rank) for rank in range(self.size)]
        with self.lock:
            texts = self.store.multi_get(keys)
        return {rank: Beat(*json.loads(text)) for rank, text in enumerate(texts)}

    def _asked(self, question: Callable[[], Answer]) -> Answer:
        """What the store says; over a dead link PyTorch would wait for it, whatever its timeout.

        Raises: DistStoreError: it says nothing.
        """
        answers: list[Answer] = []

        def ask() -> None:
            with suppress(dist.DistError):
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ANSWER_S)
        if not answers:
            raise dist.DistStoreError("the store does not answer")
        return answers[0]

    def _key(self, rank: int) -> str:
        return f"watch/{rank}"


def _say(text: str) -> None:
    print(f"fusedit: {text}", file=sys.stderr, flush=True)
