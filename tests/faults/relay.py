"""A wire between two network namespaces in user space, as slow as it is told, or cut.

Linux gives each end a tun device, whose packets are read here and written at the other end. Run
by root as `python relay.py A B DELAY_S BYTES_PER_S`; it tells "ready", and ends with its input.
"""

import ctypes
import fcntl
import os
import selectors
import struct
import sys
import time
from collections import deque
from contextlib import suppress

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
PACKET_BYTES = 2048
NAME = "net0"


def enter(namespace: str) -> None:
    """Moves this thread, and those it starts, into a network namespace of `ip netns`."""
    folder = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(folder, 0) != 0:
        raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    os.close(folder)


def _open_end(namespace: str) -> int:
    enter(namespace)
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", NAME.encode(), IFF_TUN | IFF_NO_PI))
    return end


def relay(ends: list[int], delay_s: float, bytes_per_s: float) -> None:
    """Until the standard input ends."""
    wires = {ends[0]: deque(), ends[1]: deque()}  # by where packets come from: (due, packet)
    free_at = dict.fromkeys(ends, 0.0)
    selector = selectors.DefaultSelector()
    for source in (*ends, sys.stdin.fileno()):
        selector.register(source, selectors.EVENT_READ)
    while True:
        due = min((wire[0][0] for wire in wires.values() if wire), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        for key, _ in selector.select(wait):
            if key.fd not in wires:
                return
            packet = os.read(key.fd, PACKET_BYTES)
            started = max(time.monotonic(), free_at[key.fd])
            free_at[key.fd] = started + len(packet) / bytes_per_s
            wires[key.fd].append((free_at[key.fd] + delay_s, packet))
        now = time.monotonic()
        for source, other in (ends, ends[::-1]):
            while wires[source] and wires[source][0][0] <= now:
                with suppress(OSError):  # an end that is not up yet loses it, as a wire would
                    os.write(other, wires[source].popleft()[1])


if __name__ == "__main__":
    ends = [_open_end(namespace) for namespace in sys.argv[1:3]]
    print("ready", flush=True)
    relay(ends, *map(float, sys.argv[3:5]))
