"""Runs of `fusedit.launch.train` as torchrun starts them, without its seconds of imports.

A server process imports everything once and is forked for each rank.
"""

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import multiprocessing as torch_processes

GRACE_S = 10

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["fusedit.trainer.run", "fusedit.trainer.metrics"])


class Ranks:
    """The processes of one run.

    Args:
        log: file that all ranks' output goes to.
        threads: of each rank; fixed, for sums depend on it.
        local_size: ranks of a machine; None: all are on one.
        absent: ranks that never start.
        own_flags: of a rank, behind those of all.
        module: of fusedit.launch.
        hosts: a network namespace for each rank, of `two_hosts`; None: this machine's network.
    """

    def __init__(
        self,
        size: int,
        flags: list[str],
        log: Path,
        threads: int = 1,
        local_size: int | None = None,
        absent: Container[int] = (),
        own_flags: Mapping[int, list[str]] = MappingProxyType({}),
        module: str = "train",
        hosts: Sequence[str] | None = None,
    ) -> None:
        self.log = log
        port = free_port()
        local_size = local_size or size
        self.processes = [
            _context.Process(
                target=_rank,
                args=(
                    rank,
                    size,
                    local_size,
                    port,
                    [*flags, *own_flags.get(rank, [])],
                    str(log),
                    threads,
                    module,
                    hosts and hosts[rank],
                ),
            )
            for rank in range(size)
            if rank not in absent
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout_s: float = 300) -> list[int | None]:
        """Exit codes; the rest are killed when one fails, as torchrun does."""
        for process in self.processes:
            process.join(timeout_s)
            if process.exitcode != 0:
                for other in self.processes:  # a mistake ends all alike, some a moment later
                    other.join(GRACE_S)
                self.kill(self.processes)
        return [process.exitcode for process in self.processes]

    def kill(self, which) -> None:
        """SIGKILL."""
        for process in which:
            process.kill()
            process.join()

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def run(size: int, flags: list[str], log: Path, local_size: int | None = None) -> str:
    """Runs to the end, which must be a good one; returns what was printed."""
    ranks = Ranks(size, flags, log, local_size=local_size)
    codes = ranks.wait()
    assert codes == [0] * size, ranks.output()
    return ranks.output()


def on_ranks(function: Callable[..., None], size: int, *given: Any) -> None:
    """Calls function(rank, port, *given) in as many processes; an error there is raised here."""
    port = free_port()
    torch_processes.start_processes(function, (port, *given), size, start_method="forkserver")


def _rank(*given: Any, **named: Any) -> None:
    os._exit(run_rank(*given, **named))


def run_rank(
    rank: int,
    size: int,
    local_size: int,
    port: int,
    flags: list[str],
    log: str,
    threads: int,
    module: str = "train",
    host: str | None = None,
) -> int:
    """A rank's command in this process, which becomes it; returns its exit code."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank % local_size),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(local_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        HF_HUB_OFFLINE="1",
    )
    if host is not None:
        from hosts import ADDRESSES, NAME
        from relay import enter

        enter(host)
        os.environ.update(MASTER_ADDR=ADDRESSES[0], GLOO_SOCKET_IFNAME=NAME)
    command = importlib.import_module(f"fusedit.launch.{module}")
    # The launcher shares out the cores it may run on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: threads * size])
    torch.set_num_threads(threads)
    with (
        open(log, "a", buffering=1) as file,
        contextlib.redirect_stderr(file),
        contextlib.redirect_stdout(file),
    ):
        code = command.main(flags)
        sys.stderr.flush()
    return code


def run_flags(inputs: Path, output: Path, ranks: int, steps: int) -> list[str]:
    """Of a small run with 12 samples a step, by any of 1, 2, 3 and 6 ranks.

    Args:
        inputs: of `save_tiny_inputs`.
    """
    return [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=16",
        "--random_flip",
        f"--train_batch_size={6 // ranks}",
        "--gradient_accumulation_steps=2",
        f"--max_train_steps={steps}",
        "--conditioning_dropout_prob=0.1",
        "--use_ema",
        "--validation_inference_steps=2",
        "--log_every=1",
        "--report_to=none",
        f"--output_dir={output}",
    ]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
