"""The `fusedit` command.

    fusedit train [--nproc_per_node N] FLAGS   torchrun on this machine's devices
    fusedit cache [--nproc_per_node N] FLAGS   encodes the data of such a run into --cache_latents
    fusedit plan [--gpu TYPE] FLAGS            its memory, speed, hours and sizes, before it runs
    fusedit check-data [--report DIR] FLAGS    what is wrong with the data of such a run
    fusedit edit MODEL IMAGE "instruction"     one edit by a trained model
    fusedit ema RUN --length L --out FOLDER    a run's pipeline with averages of another length
    fusedit export RUN [--merge] [--out DIR]   a run's checkpoint as a pipeline, its LoRA merged
    fusedit demo                               the whole job on a drawn world, in minutes
    fusedit COMMAND --help                     tells more
    fusedit --version

Exit codes: 0 done, 2 a mistake the user can put right, 75 stopped by a signal after a checkpoint.
"""

import argparse
import logging
import os
import sys
from importlib.metadata import version

from ..trainer.errors import UsageError

USAGE = f"usage: fusedit COMMAND ...\n{str(__doc__).split(chr(10), 1)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    # Each command imports what it needs when it is called: torch and diffusers take seconds.
    if command in ("train", "cache"):
        return on_all_devices(command, rest)
    if command == "plan":
        from . import plan

        return plan.main(rest)
    if command == "check-data":
        from . import check_data

        return check_data.main(rest)
    if command == "edit":
        from . import edit

        return edit.main(rest)
    if command == "ema":
        from . import ema

        return ema.main(rest)
    if command == "export":
        from . import export

        return export.main(rest)
    if command == "demo":
        from .demo import run

        return run.main(rest)
    if command == "--version":
        print(f"fusedit {version('fusedit')}")
        return 0
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    print(f"fusedit: no command {command}\n{USAGE}", file=sys.stderr)
    return 2


def on_all_devices(command: str, argv: list[str]) -> int:
    """Checks the flags, then runs on all devices: one process alone, several under torchrun.

    Args:
        command: train or cache.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--nproc_per_node", "--nproc-per-node", type=int)
    own.add_argument("--master_port", "--master-port", type=int)
    machine, flags = own.parse_known_args(argv)

    import torch

    from .flags import parse
    from .train import MISTAKE
    from .train import main as run_alone

    try:
        parse(flags).run.check_complete()
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    ranks = machine.nproc_per_node or max(torch.cuda.device_count(), 1)
    if ranks == 1:
        return run_alone(flags, cache_only=command == "cache")
    return torchrun(command, ranks, machine.master_port, flags)


def torchrun(command: str, ranks: int, port: int | None, flags: list[str]) -> int:
    """`torchrun --nproc-per-node RANKS -m fusedit.launch.COMMAND FLAGS`, with our exit codes.

    Args:
        command: train or cache.
        port: of the rendezvous; None finds a free one.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from .train import DONE, MISTAKE, STOPPED

    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else torchrun warns that it says 1
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # s, for the last checkpoint
    # What went wrong has been said by rank 0; torchrun's own lines would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    where = ["--standalone"] if port is None else ["--master-port", str(port)]
    arguments = [*where, "--nproc-per-node", str(ranks), "-m", f"fusedit.launch.{command}", *flags]
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return max(error.get_first_failure()[1].exitcode, 1)
    except SignalException:
        return STOPPED
    except DistNetworkError as error:
        message = str(error).splitlines()[0]
        print(f"fusedit: --master_port {port} cannot be used: {message}", file=sys.stderr)
        return MISTAKE
    return DONE


if __name__ == "__main__":
    sys.exit(main())
