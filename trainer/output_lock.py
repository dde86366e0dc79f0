"""That one run at a time works in an output folder: a second one is refused before it reads it.

The lock is the kernel's, on a file, and goes with the process however that ends. Programs that the
process starts do not inherit it, so loader workers that outlive a killed rank do not hold it.
On NFS the server keeps it for all its clients, unless the folder is mounted with nolock or
local_lock: then runs of several machines do not see each other.
"""

import errno
import fcntl
import os
import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from .errors import UsageError

LOCK_FILE = ".lock"
SECOND_TRY_S = 0.05  # somebody may only look: `is_held` has the lock for some microseconds
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # Lustre without -o flock, some NFS


class OutputLock(AbstractContextManager["OutputLock"]):
    """Held from `take` to the end of the context. For rank 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: TextIO | None = None

    def take_if_there(self) -> None:
        """Before a folder is read. One that is not there is made later, when all flags fit."""
        if self.folder.is_dir():
            self.take()

    def take(self) -> None:
        """Raises UsageError: another run works in the folder, or it cannot be written."""
        if self.file is not None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK_FILE).open("a+")
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(SECOND_TRY_S)
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            except OSError:
                file.close()
                raise
        except BlockingIOError:
            holder = (self.folder / LOCK_FILE).read_text() or "its process is not told"
            raise UsageError(
                f"--output_dir {self.folder} is in use by another run ({holder}): wait for its "
                "end, stop it, or give another folder"
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return  # such a file system cannot tell; a run there is as before
            raise UsageError(f"--output_dir {self.folder} cannot be written: {error}") from None
        self.file = file

    def __exit__(self, *of_error: object) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def is_held(folder: Path) -> bool:
    """Whether a run works in the folder now; False where the file system has no locks."""
    try:
        with (folder / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back with the file
    except BlockingIOError:
        return True
    except OSError:  # there was never a run, or nobody can tell
        return False
    return False
