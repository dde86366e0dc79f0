"""A rank that writes down, at each line of its log, what it holds: memory, open files, CPU time."""

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import ranks

PART_BYTES = 2**13  # of the log, so that a short run rotates it too


def rank_main(told: Path, *rest: Any) -> None:
    """The process of a rank: `ranks._rank`. `rest`: what that takes."""
    from fusedit.trainer import log, meter

    sound = meter.Meter.read
    log.Lines = functools.partial(log.Lines, part_bytes=PART_BYTES)

    def read(self: meter.Meter) -> dict[str, float]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = {
            "bytes": pages * os.sysconf("SC_PAGESIZE"),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "cpu_s": time.process_time(),
        }
        with told.open("a") as file:
            file.write(json.dumps(held) + "\n")
        return sound(self)

    meter.Meter.read = read
    ranks._rank(*rest)


class Counted(ranks.Ranks):
    """One rank alone, that writes what it holds to a file."""

    def __init__(self, flags: list[str], log: Path, told: Path) -> None:
        self.log = log
        given = (told, 0, 1, 1, ranks.free_port(), flags, str(log), 1)
        self.processes = [ranks._context.Process(target=rank_main, args=given)]
        self.processes[0].start()
