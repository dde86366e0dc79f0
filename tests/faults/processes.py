"""Processes as Linux tells of them: whose children they are, and what has become of them."""

import os
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """All that it started and that live, and theirs."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (stat := _stat(int(folder.name))):
            parents[int(folder.name)] = int(stat[1])
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return sorted(found - {pid})


def alive(pid: int) -> bool:
    """Whether it runs: neither gone nor a zombie."""
    stat = _stat(pid)
    return stat is not None and stat[0] != "Z"


def await_end(pids: list[int], within_s: float = 20) -> list[int]:
    """Those that live on after a while, which should be none."""
    until = time.monotonic() + within_s
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def tell(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _stat(pid: int) -> list[str] | None:
    """State, parent and so on: what follows the name in /proc/PID/stat."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
