"""Two hosts on one machine: network namespaces, joined by a veth pair or by relay.py's wire."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAME = "net0"  # of the interface, in both


def why_not() -> str | None:
    """Why this machine makes no namespaces, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    made = _ip("netns", "add", probe := f"fusedit-probe-{os.getpid()}", check=False)
    if made.returncode == 0:
        _ip("netns", "del", probe)
        return None
    return f"this machine makes no network namespaces: {made.stderr.strip()}"


@contextmanager
def two_hosts(slowed: tuple[float, float] | None = None) -> Iterator[list[str]]:
    """Their namespaces' names.

    Args:
        slowed: delay in seconds and bytes a second of the wire; None: a veth pair.
    """
    names = [f"fusedit-{os.getpid()}-{end}" for end in "ab"]
    wire = None
    try:
        for name in names:
            _ip("netns", "add", name)
        if slowed is None:
            first, second = names
            peer = ("peer", "name", NAME, "netns", second)
            _ip("link", "add", NAME, "netns", first, "type", "veth", *peer)
        else:
            script = Path(__file__).with_name("relay.py")
            command = [sys.executable, script, *names, *map(str, slowed)]
            wire = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert wire.stdout is not None
            assert wire.stdout.readline() == b"ready\n"
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", NAME)
            for device in ("lo", NAME):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        if wire is not None:
            wire.communicate(timeout=10)
        for name in names:
            _ip("netns", "del", name, check=False)


def cut(name: str) -> None:
    _ip("-n", name, "link", "set", NAME, "down")


def join(name: str) -> None:
    _ip("-n", name, "link", "set", NAME, "up")


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)
