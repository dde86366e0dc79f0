"""The ranks of a run: who I am, what device I have, and the few things ranks tell each other."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UsageError

MESSAGE_BYTES = 2048  # of an error told to the other ranks; longer ones are cut


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among the others. One rank needs no process group and has none."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks of this machine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start(self, timeout_s: float = 1800.0) -> None:
        """Joins the process group; torch finds the others by MASTER_ADDR and MASTER_PORT.

        Raises: UsageError: the port is taken, or the first rank cannot be reached.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # All work is done on one stream that is not the default one, which a CUDA graph cannot
            # be captured on; DDP and autograd remember the stream that they were built on.
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        if self.size > 1:
            # Gloo beside NCCL: what the host decides (stop, errors) must not wait for the GPU.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            timeout = timedelta(seconds=timeout_s)
            try:
                dist.init_process_group(
                    backend, rank=self.rank, world_size=self.size, timeout=timeout
                )
            except dist.DistNetworkError as error:
                raise UsageError(
                    f"rank {self.rank} cannot join the others: {str(error).splitlines()[0]}; is "
                    "MASTER_PORT free and MASTER_ADDR reached from here?"
                ) from None

    def stop(self) -> None:
        """Leaves the process group, which nothing of the run may hold any more.

        DDP's reducer would otherwise drop it last, and wait for gloo's thread while holding the
        lock of the interpreter that gloo's thread waits for.
        """
        if self.size > 1 and dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place; on a GPU the host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def highest(self, value: int) -> int:
        """The largest of the ranks' values. The host waits for the other hosts, not for GPUs."""
        if self.size == 1:
            return value
        values = torch.tensor([value])
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values.item())

    def barrier(self) -> None:
        """Waits until every host is here."""
        self.highest(0)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Each rank's tensor, in the order of ranks; all on the CPU and of one shape."""
        if self.size == 1:
            return [mine]
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        return everyones

    def texts(self, text: str) -> list[str]:
        """Each rank's text, cut to MESSAGE_BYTES, in the order of ranks."""
        return self._texts(text.encode()[:MESSAGE_BYTES], MESSAGE_BYTES)

    def whole_texts(self, text: str) -> list[str]:
        """As `texts`, however long they are."""
        encoded = text.encode()
        return self._texts(encoded, self.highest(len(encoded)))

    def _texts(self, encoded: bytes, size: int) -> list[str]:
        mine = torch.zeros(size, dtype=torch.uint8)
        mine[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        return [bytes(t.tolist()).rstrip(b"\0").decode(errors="ignore") for t in self.gather(mine)]

    def check_same(self, facts: dict[str, int], cure: str) -> None:
        """Raises UsageError on all ranks when they see different facts, which it names."""
        everyones = self.gather(torch.tensor(list(facts.values())))
        for index, name in enumerate(facts):
            seen = [int(one[index]) for one in everyones]
            if len(set(seen)) > 1:
                raise UsageError(f"the ranks see different {name}: {seen}; {cure}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stage that all ranks end alike: a UsageError of one is raised on every one of them.

        No collective may run inside, for a rank that fails would leave the others waiting.
        """
        mistake = ""
        try:
            yield
        except UsageError as error:
            mistake = str(error) or "unknown mistake"
        if self.highest(bool(mistake)):
            raise UsageError(next(text for text in self.texts(mistake) if text))
