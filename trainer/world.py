"""The ranks of a run: who I am, what device I have, and the few things ranks tell each other."""

import gc
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RanksLost, UsageError
from .watch import Watch


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among the others. One rank needs no process group and has none."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks of this machine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watch: Watch = field(default_factory=Watch, compare=False)
    group: dist.ProcessGroup | None = field(default=None, compare=False)  # None: all ranks' first

    @staticmethod
    def alone() -> "World":
        """One rank, on the GPU if there is one."""
        if torch.cuda.is_available():
            return World(device=torch.device("cuda", torch.cuda.current_device()))
        return World()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start(self, timeout_s: float = 1800.0) -> None:
        """Joins the process group; torch finds the others by MASTER_ADDR and MASTER_PORT.

        Args:
            timeout_s: how long a rank waits for the others, now and in every collective.

        Raises:
            UsageError: the port is taken.
            RanksLost: some did not come in time, or the first rank cannot be reached.
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
            store = self._meet(timeout)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
            )
            own = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
            self.watch.start(own, self.rank, self.size, timeout_s)

    def _meet(self, timeout: timedelta) -> dist.Store:
        """The store that all ranks share, once all of them are there."""
        try:
            # As if alone: the store would wait for the others, and not know whom it waited for.
            store, *_ = next(dist.rendezvous("env://", self.rank, 1, timeout=timeout))
        except dist.DistNetworkError as error:
            reason = f"rank {self.rank} cannot join the others: {str(error).splitlines()[0]}; is "
            if self.is_main:
                raise UsageError(reason + "MASTER_PORT free?") from None
            raise RanksLost(reason + "rank 0 there, at MASTER_ADDR and MASTER_PORT?") from None
        present = [f"present/{rank}" for rank in range(self.size)]
        store.set(present[self.rank], socket.gethostname())
        try:
            store.wait(present, timeout)
        except dist.DistStoreError:
            there = [rank for rank, key in enumerate(present) if store.check([key])]
            missing = ", ".join(str(rank) for rank in range(self.size) if rank not in there)
            raise RanksLost(
                f"rank {self.rank} waited {timeout.total_seconds():g} s for rank {missing} of "
                f"{self.size}, which did not start",
                speaks=self.rank == min(there, default=self.rank),
            ) from None
        return store

    def stop(self) -> None:
        """Leaves the process group, which nothing of the run may hold any more.

        DDP's reducer would otherwise drop it last, and wait for gloo's thread while holding the
        lock of the interpreter that gloo's thread waits for.
        """
        self.watch.stop()
        if self.size > 1 and dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()

    def aside(self) -> "World":
        """The same ranks with messages of their own, for a thread. All ranks call it.

        What the hosts tell each other there cannot cross what the loop's do.
        """
        if self.size == 1:
            return self
        timeout = timedelta(seconds=self.watch.timeout_s)
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout), watch=Watch())

    def doing(self, what: str) -> None:
        """What others say of this rank when they wait for it: "reading step 120"."""
        self.watch.doing(what)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place; on a GPU the host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def highest(self, value: int) -> int:
        """The largest of the ranks' values. The host waits for the other hosts, not for GPUs."""
        if self.size == 1:
            return value
        values = torch.tensor([value])
        with self.watch.waiting():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return int(values.item())

    def barrier(self) -> None:
        """Waits until every host is here."""
        self.highest(0)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Each rank's tensor, in the order of ranks; all on the CPU and of one shape."""
        if self.size == 1:
            return [mine]
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        with self.watch.waiting():
            dist.all_gather(everyones, mine, group=self.group)
        return everyones

    def texts(self, text: str) -> list[str]:
        """Each rank's text, in the order of ranks."""
        encoded = text.encode()
        mine = torch.zeros(max(1, self.highest(len(encoded))), dtype=torch.uint8)
        mine[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        return [bytes(t.tolist()).rstrip(b"\0").decode() for t in self.gather(mine)]

    def check_same(self, facts: dict[str, int], cure: str) -> None:
        """Raises UsageError on all ranks when they see different facts, which it names."""
        everyones = self.gather(torch.tensor(list(facts.values())))
        for index, name in enumerate(facts):
            seen = [int(one[index]) for one in everyones]
            if len(set(seen)) > 1:
                raise UsageError(f"the ranks see different {name}: {seen}; {cure}")

    def check_alike(self, facts: dict[str, str], cure: str) -> None:
        """Raises UsageError on all ranks when one has other facts than rank 0, which it names."""
        first, *others = [json.loads(text) for text in self.texts(json.dumps(facts))]
        for rank, found in enumerate(others, start=1):
            for name in first | found:
                if first.get(name) != found.get(name):
                    raise UsageError(
                        f"rank {rank} has {name} {found.get(name)}, rank 0 {first.get(name)}; "
                        f"{cure}"
                    )

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
