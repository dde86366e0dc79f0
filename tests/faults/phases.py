"""What a rank is doing, told from outside the product; and its death by SIGKILL at a chosen moment.

A phase is a function of the product, wrapped in the process of a rank before it works. Its moments
are the calls made in it, Python's and C's (each write, sync and rename is one), so a moment is the
same code on a fast machine and a slow one. A kill may come some milliseconds after it: within a
call that writes.
"""

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ranks

START = "start"  # until the first phase below begins
PHASES = {  # name -> module, attribute
    "cache building": ("fusedit.trainer.caching", "Filling._fill"),
    "loading": ("fusedit.trainer.run", "Run.__init__"),
    "train step": ("fusedit.trainer.job", "train_step"),
    "validation": ("fusedit.trainer.validate", "Validator.run"),
    "copy": ("fusedit.trainer.saver", "HostCopy.take"),
    "save": ("fusedit.trainer.checkpoint", "save"),
    "rotation": ("fusedit.trainer.checkpoint", "delete_older"),
    "export": ("fusedit.trainer.run", "Run.export"),
}


class Strike(NamedTuple):
    """When a rank kills, and whom."""

    phase: str
    visit: int  # to the phase, from 1
    call: int  # in that visit, from 1
    delay_s: float
    victims: tuple[int, ...]  # ranks; the one that strikes last, if it is among them
    agent: bool = False  # kills the agent that started the ranks, and them not


class Phases:
    """Keeps in files of a folder what a rank does: its process, its phase, its calls in each.

    Args:
        strike: of this rank.
    """

    def __init__(self, folder: Path, rank: int, strike: Strike | None) -> None:
        self.folder, self.rank, self.strike = folder, rank, strike
        self.lock = threading.Lock()
        self.active: list[str] = []  # of all threads
        self.calls: dict[str, list[int]] = {name: [] for name in PHASES}  # of each visit
        self.visits = dict.fromkeys(PHASES, 0)
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        self.file = os.open(folder / f"phase-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        self._tell(START)

    def install(self) -> None:
        for name, (module, path) in PHASES.items():
            owner: Any = importlib.import_module(module)
            *classes, attribute = path.split(".")
            for one in classes:
                owner = getattr(owner, one)
            setattr(owner, attribute, self._wrapped(name, getattr(owner, attribute)))

    def _wrapped(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            outer, calls = sys.getprofile(), 0
            self.visits[phase] += 1
            strike = self.strike
            if strike and (strike.phase, strike.visit) != (phase, self.visits[phase]):
                strike = None

            def count(frame: Any, event: str, argument: Any) -> None:
                nonlocal calls
                if event in ("call", "c_call"):
                    calls += 1
                    if strike and calls == strike.call:
                        self._strike(strike)

            self._enter(phase)
            sys.setprofile(count)
            try:
                return function(*arguments, **named)
            finally:
                sys.setprofile(outer)
                if strike and calls < strike.call:  # less to do than in the run that was counted
                    self._strike(strike)
                self._leave(phase, calls)

        return wrapped

    def _enter(self, phase: str) -> None:
        with self.lock:
            self.active.append(phase)
            self._tell(self.active[-1])

    def _leave(self, phase: str, calls: int) -> None:
        with self.lock:
            self.active.remove(phase)
            self.calls[phase].append(calls)
            self._tell(self.active[-1] if self.active else "between")
            told = self.folder / f"calls-{self.rank}.json"
            told.write_text(json.dumps(self.calls))

    def _tell(self, phase: str) -> None:
        os.pwrite(self.file, phase.ljust(40).encode(), 0)

    def _strike(self, strike: Strike) -> None:
        def kill() -> None:
            time.sleep(strike.delay_s)
            (self.folder / "struck").write_text(strike.phase)
            if strike.agent:
                os.kill(os.getppid(), signal.SIGKILL)
            for rank in sorted(strike.victims, key=lambda rank: rank == self.rank):
                os.kill(int((self.folder / f"pid-{rank}").read_text()), signal.SIGKILL)

        if strike.delay_s:
            threading.Thread(target=kill, daemon=True).start()
        else:
            kill()


def rank_main(
    folder: Path, strikes: dict[int, Strike], rank: int, size: int, port: int, *rest: Any
) -> None:
    """The process of a rank, watched. `rest`: flags, log, threads."""
    os._exit(watched_rank(folder, strikes, rank, size, port, *rest))


def watched_rank(
    folder: Path, strikes: dict[int, Strike], rank: int, size: int, port: int, *rest: Any
) -> int:
    Phases(folder, rank, strikes.get(rank)).install()
    return ranks.run_rank(rank, size, size, port, *rest)


def agent_main(
    folder: Path, strikes: dict[int, Strike], size: int, flags: list[str], log: str
) -> None:
    """torchrun's agent, with ranks that are forked from here and so start in a moment."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=str(os.getpid()),
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.05,
    )
    elastic_launch(config, agents_rank)(folder, strikes, size, flags, log)


def agents_rank(
    folder: Path, strikes: dict[int, Strike], size: int, flags: list[str], log: str
) -> None:
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    if code := watched_rank(folder, strikes, rank, size, port, flags, log, 1):
        sys.exit(code)  # not os._exit: the agent waits for a rank that went well to say so


class Watched(ranks.Ranks):
    """Ranks whose phases are kept in a folder, and that strike as told.

    Args:
        strikes: by rank.
        agent: started by torchrun's agent, which is the one process here.
    """

    def __init__(
        self,
        size: int,
        flags: list[str],
        log: Path,
        folder: Path,
        strikes: dict[int, Strike] | None = None,
        *,
        agent: bool = False,
    ) -> None:
        self.log, self.folder, self.size = log, folder, size
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        strikes, start = strikes or {}, ranks._context.Process
        if agent:
            given = (folder, strikes, size, flags, str(log))
            self.processes = [start(target=agent_main, args=given)]
        else:
            port = ranks.free_port()
            self.processes = [
                start(
                    target=rank_main,
                    args=(folder, strikes, rank, size, port, flags, str(log), 1),
                )
                for rank in range(size)
            ]
        for process in self.processes:
            process.start()

    def phase(self, rank: int) -> str:
        path = self.folder / f"phase-{rank}"
        return path.read_text().strip() if path.exists() else START

    def await_orphans(self, timeout_s: float = 60) -> None:
        """Until no rank runs any more, also those whose agent is gone."""
        deadline = time.monotonic() + timeout_s
        for path in self.folder.glob("pid-*"):
            status = Path("/proc") / path.read_text() / "status"
            while _runs(status):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path.name} still runs: {self.output()}")
                time.sleep(0.005)


def _runs(status: Path) -> bool:
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
