"""torchrun --nproc-per-node=N -m fusedit.launch.train FLAGS: one process of a run.

Also `python -m fusedit.launch.train FLAGS`, which is one rank alone.
Exit codes: 0 done, 1 other ranks are gone, 2 a mistake the user can put right, 75 stopped by a
signal after a checkpoint.
"""

import ctypes
import errno
import os
import shlex
import signal
import socket
import sys
import threading
import time
from typing import Any

import torch

from ..trainer.errors import RanksLost, UsageError
from ..trainer.signals import STOP_SIGNALS
from ..trainer.world import World
from .flags import parse

DONE, LOST, MISTAKE, STOPPED = 0, 1, 2, 75  # 75: EX_TEMPFAIL, what schedulers requeue
SAME_REQUEST_S = 2.0  # between one signal and its echo
PR_SET_PDEATHSIG = 1  # linux/prctl.h
TRAINS_LESS = (
    "lower --train_batch_size and raise --gradient_accumulation_steps by as much, or add "
    "--gradient_checkpointing; `fusedit plan` with the same flags tells what fits"
)
ENCODES_LESS = "end what else runs on this GPU, or lower --resolution"
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class StopSignals:
    """The first of STOP_SIGNALS asks the loop to stop after the step; a second ends the process.

    A scheduler tells a whole process group, and torchrun tells it again: what comes within
    SAME_REQUEST_S is the same request, unless it is Ctrl-C. Until the loop first asks there is
    nothing to save, and a signal ends the process as ever.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.heard: socket.socket | None = None
        self.before: dict[int, Any] = {}  # handlers

    def requested(self) -> bool:
        """Whether the loop shall stop."""
        if self.heard is None:
            self._listen()
        return self.asked_at is not None

    def close(self) -> None:
        """Hears no more, where it ever did."""
        if self.heard is not None:
            signal.set_wakeup_fd(-1)
            self.heard.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _listen(self) -> None:
        """A thread hears them: Python's own handlers wait while a collective does."""
        listener, self.heard = socket.socketpair()
        self.heard.setblocking(False)
        signal.set_wakeup_fd(self.heard.fileno())
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self.before[number] = signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._hear, args=(listener,), daemon=True).start()

    def _hear(self, listener: socket.socket) -> None:
        with listener:
            while number := listener.recv(1):
                if number[0] in STOP_SIGNALS:
                    self.ask(number[0])

    def ask(self, number: int) -> None:
        """What a signal does."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif number == signal.SIGINT or now - self.asked_at > SAME_REQUEST_S:
            # What is being written has not got its name yet, and loader workers end by themselves.
            os._exit(128 + number)


def end_with_parent() -> None:
    """Has Linux kill this process with torchrun: its ranks would train on, and hold the GPUs."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_flight_records(folder: str) -> None:
    """Where NCCL writes its last collectives when one does not end: in the run's folder, by rank.

    PyTorch's flight recorder; `torchfrtrace` reads what all ranks wrote.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder}/nccl_trace_rank_")


def make_world() -> World:
    """This process's place, as torchrun tells it by environment variables; alone without them."""
    rank, local_rank, size, local_size = (
        int(os.environ.get(name, default))
        for name, default in (
            ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1),
        )
    )  # fmt: skip
    if not torch.cuda.is_available():
        # torchrun gives each of several processes one thread, unless told; they share the cores.
        if local_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        return World(rank=rank, local_rank=local_rank, size=size, local_size=local_size)
    if local_size > torch.cuda.device_count():
        raise UsageError(
            f"--nproc-per-node {local_size} is more than the {torch.cuda.device_count()} GPUs here"
        )
    device = torch.device("cuda", local_rank)
    return World(rank=rank, local_rank=local_rank, size=size, local_size=local_size, device=device)


def starter(world: World) -> list[str]:
    """What starts a run of as many ranks as this one, in words, for the model card."""
    if world.size == 1:
        return ["fusedit", "train"]
    local_size = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["torchrun", f"--nproc-per-node={local_size}", "-m", "fusedit.launch.train"]


def quiet_libraries() -> None:
    """Silences hints that do not concern the user: those of a run are the run's own."""
    import datasets
    import diffusers
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    for library in (diffusers, transformers, datasets):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def main(argv: list[str] | None = None, *, cache_only: bool = False) -> int:
    """Runs this rank to its end and returns the exit code.

    Args:
        cache_only: fills --cache_latents and trains nothing.
    """
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    end_with_parent()
    rank = int(os.environ.get("RANK", 0))
    world, signals = World(), StopSignals()
    try:
        flags = parse(argv, quiet=rank != 0)
        if flags.local_rank >= 0 and rank == 0:
            print("--local_rank is ignored: torchrun's LOCAL_RANK is used", file=sys.stderr)
        # Seconds of imports, not needed to refuse a flag.
        from ..trainer.alike import code
        from ..trainer.caching import build_cache
        from ..trainer.run import train

        quiet_libraries()
        world = make_world()
        keep_flight_records(flags.run.output.output_dir)
        world.start(flags.run.loop.timeout_s)
        told = {"stop_requested": signals.requested, "dry_run": flags.dry_run}
        with world.watch:
            world.check_alike(code(), "install the same on all machines")
            if cache_only:
                done = build_cache(flags.run, world, **told)
            else:
                command = shlex.join([*starter(world), *argv])
                done = train(flags.run, world, command=command, **told)
    except UsageError as error:  # on all ranks alike, so all leave; after a bug others may wait
        if rank == 0:
            print(f"fusedit: {error}", file=sys.stderr)
        code = MISTAKE
    except RanksLost as error:
        if error.speaks:
            print(f"fusedit: {error}", file=sys.stderr, flush=True)
        return LOST
    except torch.OutOfMemoryError as error:  # of this rank alone, perhaps
        cure = ENCODES_LESS if cache_only else TRAINS_LESS
        reason = str(error).partition(". ")[0]
        print(f"fusedit: rank {rank}: {reason}: {cure}", file=sys.stderr, flush=True)
        return MISTAKE
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(
            f"fusedit: {error.filename or 'a file'} cannot be written: {error.strerror}; "
            "what was written before still stands",
            file=sys.stderr,
        )
        return MISTAKE
    else:
        code = DONE if done else STOPPED
    finally:
        signals.close()
    world.stop()  # here: an exception's traceback would have held the run, which must go first
    return code


if __name__ == "__main__":
    sys.exit(main())
