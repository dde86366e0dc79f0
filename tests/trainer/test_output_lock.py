"""One run at a time in a folder; the kernel gives the lock back however its process ended."""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys

import pytest

from fusedit.trainer.errors import UsageError
from fusedit.trainer.output_lock import LOCK_FILE, OutputLock


def test_the_second_is_refused_by_name_and_harms_nothing(tmp_path):
    with OutputLock(tmp_path) as first:
        first.take()
        first.take()  # its own
        with (
            OutputLock(tmp_path) as second,
            pytest.raises(UsageError, match=rf"in use by another run \(process {os.getpid()} on "),
        ):
            second.take_if_there()
        with OutputLock(tmp_path) as third, pytest.raises(UsageError):
            third.take()
    with OutputLock(tmp_path) as next_one:
        next_one.take()


def test_a_folder_is_not_made_before_the_flags_fit(tmp_path):
    with OutputLock(tmp_path / "new") as lock:
        lock.take_if_there()
        assert not (tmp_path / "new").exists()
        lock.take()
        assert (tmp_path / "new" / LOCK_FILE).exists()


def _hold(folder, told):
    lock = OutputLock(folder)
    lock.take()
    # As a loader's worker: a program that outlives its parent for a while.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    told.send(child.pid)
    child.wait()


def test_a_killed_holder_frees_it_though_its_children_live(tmp_path):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    holder = context.Process(target=_hold, args=(tmp_path, there))
    holder.start()
    child = here.recv()
    try:
        with OutputLock(tmp_path) as lock, pytest.raises(UsageError, match=f"{holder.pid} on"):
            lock.take()
        holder.kill()
        holder.join()
        os.kill(child, 0)  # it lives
        with OutputLock(tmp_path) as lock:
            lock.take()
    finally:
        os.kill(child, 9)


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with OutputLock(tmp_path) as lock:
        lock.take()
        assert lock.file is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with OutputLock(tmp_path) as lock, pytest.raises(UsageError, match="cannot be written"):
        lock.take()
