"""The signals that ask a run to stop, and processes that must not hear them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

# A scheduler's, Ctrl-C, the warning of Slurm's --signal, and the end of a terminal.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP})


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started inside never hear STOP_SIGNALS, from their first moment on.

    A scheduler and Ctrl-C tell a whole process group, but the loop still wants data of its workers
    for the step it is in. A mask is inherited, also by a process that is still importing; one that
    comes to this process meanwhile is heard at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # The first spawned process starts it, and would end our mask on the way.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
