"""torchrun --nproc-per-node=N -m fusedit.launch.train FLAGS: one process of a run.

Also `python -m fusedit.launch.train FLAGS`, which is one rank alone.
Exit codes: 0 done, 2 a mistake the user can put right, 75 stopped by a signal after a checkpoint.
"""

import errno
import os
import shlex
import signal
import sys
from types import FrameType

import torch

from ..trainer.errors import UsageError
from ..trainer.world import World
from .flags import parse

DONE, MISTAKE, STOPPED = 0, 2, 75  # 75: EX_TEMPFAIL, what schedulers requeue
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class StopSignals:
    """SIGTERM and SIGINT ask the loop to stop after the step; a second SIGINT ends the process.

    A second SIGTERM does not: a scheduler tells a whole process group, and torchrun tells it again.
    Until the loop first asks there is nothing to save, and a signal ends the process as ever.
    """

    def __init__(self) -> None:
        self.asked = self.listening = False

    def requested(self) -> bool:
        """Whether the loop shall stop."""
        if not self.listening:
            self.listening = True
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask)
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True


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
    rank = int(os.environ.get("RANK", 0))
    world = World()
    try:
        flags = parse(argv, quiet=rank != 0)
        if flags.local_rank >= 0 and rank == 0:
            print("--local_rank is ignored: torchrun's LOCAL_RANK is used", file=sys.stderr)
        # Seconds of imports, not needed to refuse a flag.
        from ..trainer.caching import build_cache
        from ..trainer.run import train

        quiet_libraries()
        signals = StopSignals()
        world = make_world()
        world.start()
        told = {"stop_requested": signals.requested, "dry_run": flags.dry_run}
        if cache_only:
            done = build_cache(flags.run, world, **told)
        else:
            command = shlex.join([*starter(world), *argv])
            done = train(flags.run, world, command=command, **told)
    except UsageError as error:  # on all ranks alike, so all leave; after a bug others may wait
        if rank == 0:
            print(f"fusedit: {error}", file=sys.stderr)
        code = MISTAKE
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
    world.stop()  # here: an exception's traceback would have held the run, which must go first
    return code


if __name__ == "__main__":
    sys.exit(main())
