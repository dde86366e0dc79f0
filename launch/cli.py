"""The `fusedit` command.

    fusedit train [--nproc_per_node N] FLAGS   torchrun on this machine's devices
    fusedit cache [--nproc_per_node N] FLAGS   encodes the data of such a run into --cache_latents
    fusedit doctor [--json FILE] FLAGS         what would stop or slow such a run, before it starts
    fusedit plan [--gpu TYPE] FLAGS            its memory, speed, hours and sizes, before it runs
    fusedit check-data [--report DIR] FLAGS    what is wrong with the data of such a run
    fusedit edit MODEL IMAGE "instruction"     one edit by a trained model, or a folder's
    fusedit edit --ui MODEL                    a page to edit in
    fusedit evaluate MODEL --out FOLDER        measures a model's edits by a protocol
    fusedit compare A.json B.json              two such results side by side
    fusedit report RUN [--out FILE] [--watch]  a run as one HTML page: numbers, edits, settings
    fusedit ema RUN --length L --out FOLDER    a run's pipeline with averages of another length
    fusedit export RUN [--merge] [--out DIR]   a run's checkpoint as a pipeline, its LoRA merged
    fusedit demo                               the whole job on a drawn world, in minutes
    fusedit COMMAND --help                     tells more
    fusedit --version

On several machines train, cache and doctor take torchrun's --nnodes, --node_rank, --rdzv_endpoint,
--rdzv_id, --rdzv_conf, --master_addr, --local_addr and --max_restarts, or its PET_NNODES and so on.

Exit codes: 0 done, 1 other ranks are gone (of doctor: problems were found), 2 a mistake the user
can put right, 75 stopped by a signal after a checkpoint.
"""

import argparse
import logging
import os
import sys
from importlib import import_module
from importlib.metadata import version

from ..trainer.errors import UsageError

SHUTDOWN_S = 600  # that torchrun leaves its ranks for the last checkpoint
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's own, and Slurm's warning
OF_TORCHRUN = (
    "nnodes", "node_rank", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "master_addr", "master_port",
    "local_addr", "max_restarts",
)  # fmt: skip
MEETING = ("--nnodes", "--master-addr", "--master-port")  # where there is no --rdzv-endpoint

HERE = {  # command -> module, in this process
    "plan": ".plan", "check-data": ".check_data", "edit": ".edit", "compare": ".compare",
    "report": ".report", "ema": ".ema", "export": ".export", "demo": ".demo.run",
}  # fmt: skip

USAGE = f"usage: fusedit COMMAND ...\n{str(__doc__).split(chr(10), 1)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    # Each command imports what it needs when it is called: torch and diffusers take seconds.
    if command in ("train", "cache", "doctor"):
        return on_all_devices(command, rest)
    if command == "evaluate":
        return evaluate_on_all_devices(rest)
    if command in HERE:
        return import_module(HERE[command], __package__).main(rest)
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
        command: train, cache or doctor.
    """
    machines, flags = launcher_flags(argv)
    from . import doctor, train
    from .flags import parse

    try:
        parse(doctor.own_flags(flags)[1] if command == "doctor" else flags).run.check_complete()
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return train.MISTAKE
    ranks, given = places(machines)
    if ranks > 1 or given or "PET_NNODES" in os.environ:
        return torchrun(command, ranks, given, flags)
    if command == "doctor":
        return doctor.main(flags)
    return train.main(flags, cache_only=command == "cache")


def evaluate_on_all_devices(argv: list[str]) -> int:
    """As `on_all_devices`, of an evaluation."""
    machines, flags = launcher_flags(argv)
    from . import evaluate
    from .train import MISTAKE

    try:
        evaluate.parse(flags)
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    ranks, given = places(machines)
    if ranks > 1 or given or "PET_NNODES" in os.environ:
        return torchrun("evaluate", ranks, given, flags)
    return evaluate.main(flags)


def launcher_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Those that say where a run's processes are, and the rest."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--nproc_per_node", "--nproc-per-node", type=int)
    for name in OF_TORCHRUN:
        own.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return own.parse_known_args(argv)


def places(machines: argparse.Namespace) -> tuple[int, list[str]]:
    """How many processes this machine has, and torchrun's own arguments."""
    import torch

    given = [
        word
        for name in OF_TORCHRUN
        if (value := getattr(machines, name)) is not None
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    return machines.nproc_per_node or max(torch.cuda.device_count(), 1), given


def torchrun(command: str, ranks: int, given: list[str], flags: list[str]) -> int:
    """`torchrun --nproc-per-node RANKS -m fusedit.launch.COMMAND FLAGS`, with our exit codes.

    Args:
        command: train, cache, doctor or evaluate.
        given: arguments of torchrun's own; without any, one machine finds a free port.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    from .train import DONE, LOST, MISTAKE, STOPPED

    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else torchrun warns that it says 1
    # Not --shutdown-timeout, which torch 2.11 does not have.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    given_by_name = dict(zip(given[::2], given[1::2], strict=True))
    if ":" in given_by_name.get("--nnodes", os.environ.get("PET_NNODES", "")):  # MIN:MAX
        # torchrun tells where its store is at the first meeting alone: who comes later waits for it
        # in vain. Without it rank 0 makes one for each meeting.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # What went wrong has been said by rank 0; torchrun's own lines would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    where = given
    if "--rdzv-endpoint" in given:
        where = ["--rdzv-backend", "c10d", *given]
    elif not {*MEETING} & {*given} and "PET_NNODES" not in os.environ:
        where = ["--standalone", *given]
    arguments = [*where, "--nproc-per-node", str(ranks), "--signals-to-handle", SIGNALS]
    try:
        run(parse_args([*arguments, "-m", f"fusedit.launch.{command}", *flags]))
    except ChildFailedError as error:
        return max(error.get_first_failure()[1].exitcode, 1)
    except SignalException:
        return STOPPED
    except RendezvousError as error:
        print(f"fusedit: the machines did not meet ({' '.join(where)}): {error}", file=sys.stderr)
        return LOST
    except DistNetworkError as error:
        message = str(error).splitlines()[0]
        print(f"fusedit: {' '.join(where)} cannot be used: {message}", file=sys.stderr)
        return MISTAKE
    return DONE


if __name__ == "__main__":
    sys.exit(main())
