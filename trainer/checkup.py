"""What would stop or slow a long run, looked at before it: devices, ranks, folders, model, data.

Every check is called by all ranks, which learn the same; none changes anything that stays.
"""

import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from .alike import code
from .caching import in_bytes
from .errors import UsageError
from .world import World

Level = Literal["ok", "warning", "problem"]
EXCHANGED = (2**20, 2**23, 2**26)  # bytes of an all-reduce; a bucket has --bucket_mb
EXCHANGES = 5  # of each size, after two to warm up
# GB/s in one direction between cards of a machine, by their vendor's sheet.
NVLINK = {"A100": 300, "H100": 450, "H200": 450, "B200": 900}
SKEW_S = 2.0  # between machines' clocks: times in logs and of files would mislead
SEEN_S = 10.0  # in which a file of one machine must be seen by the others
WRITTEN = 2**28  # bytes at most to time the disk by
# What nvidia-smi calls a reason to run slower than asked; idleness is none.
SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")


class Finding(NamedTuple):
    """What a check found."""

    name: str
    level: Level
    text: str
    cure: str = ""


def devices(world: World) -> Finding:
    """Which machines and devices the ranks have."""
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else "CPU"
    seen = [json.loads(text) for text in world.texts(json.dumps([socket.gethostname(), device]))]
    machines = sorted({host for host, _ in seen})
    kinds = sorted({kind for _, kind in seen})
    text = f"{world.size} ranks on {len(machines)} machines ({', '.join(machines)}): "
    text += ", ".join(kinds)
    if len(kinds) > 1:
        cure = "all wait for the slowest in every step: take machines of one kind"
        return Finding("devices", "warning", text, cure)
    if not on_gpu:
        return Finding(
            "devices", "warning", text, "PyTorch sees no GPU: nvidia-smi should list one"
        )
    return Finding("devices", "ok", text)


def versions(world: World) -> Finding:
    """Libraries, driver and our own code, which must be the same everywhere."""
    facts = code()
    if world.device.type == "cuda":
        facts |= {"CUDA": str(torch.version.cuda), "driver": str(_nvidia_smi("driver_version"))}
    try:
        world.check_alike(facts, "install the same on all machines")
    except UsageError as error:
        told, cure = str(error).split("; ")
        return Finding("versions", "problem", told, cure)
    return Finding("versions", "ok", ", ".join(f"{name} {found}" for name, found in facts.items()))


def clocks(world: World) -> Finding:
    """How far the machines' clocks are apart, by when they leave a barrier."""
    world.barrier()
    times = [float(one) for one in world.gather(torch.tensor(time.time(), dtype=torch.float64))]
    apart = max(times) - min(times)
    text = f"{apart:.3f} s apart at most"
    if apart > SKEW_S:
        rank = max(range(world.size), key=lambda one: abs(times[one] - times[0]))
        return Finding("clocks", "warning", f"{text}: rank {rank}'s", "run NTP on all machines")
    return Finding("clocks", "ok", text)


def gpu_state(world: World) -> Finding | None:
    """Clocks as found, never set, and whether a card says that it holds itself back."""
    if world.device.type != "cuda":
        return None
    clock, most = _nvidia_smi("clocks.sm") or "?", _nvidia_smi("clocks.max.sm") or "?"
    slowed = [name for name in SLOWED if _nvidia_smi(f"clocks_event_reasons.{name}") == "Active"]
    told = world.texts(f"rank {world.rank}: {', '.join(slowed)}" if slowed else "")
    if any(told):
        cure = "look at its cooling and power; all ranks wait for the slowest"
        return Finding("GPU clocks", "warning", "; ".join(filter(None, told)), cure)
    return Finding("GPU clocks", "ok", f"rank 0's SM clock is {clock} of {most} MHz, as found")


def exchange(world: World) -> tuple[Finding, list[dict[str, float]]]:
    """The ranks' all-reduce, timed by size; bus bandwidth is 2 (n - 1) / n of bytes a second."""
    if world.size == 1:
        return Finding("all-reduce", "ok", "one rank has nobody to exchange with"), []
    rows = []
    for size in EXCHANGED:
        values = torch.ones(size // 4, device=world.device)
        seconds = statistics.median(
            [_one_exchange(world, values) for _ in range(EXCHANGES + 2)][2:]
        )
        bus = 2 * (world.size - 1) / world.size * size / seconds / 1e9
        rows.append({"bytes": size, "ms": 1e3 * seconds, "bus_gb_per_s": bus})
    text = ", ".join(f"{in_bytes(row['bytes'])}: {row['bus_gb_per_s']:.3g} GB/s" for row in rows)
    text += " bus bandwidth, measured"
    link = _link(world)
    if link is None:
        return Finding("all-reduce", "ok", text), rows
    text += f"; NVLink has {link} by its sheet"
    if rows[-1]["bus_gb_per_s"] < link / 4:
        cure = "nvidia-smi topo -m should say NV between the cards; look for NCCL_P2P_DISABLE"
        return Finding("all-reduce", "warning", text, cure), rows
    return Finding("all-reduce", "ok", text), rows


def shared_folder(world: World, folder: Path) -> Finding:
    """Whether what rank 0 writes is soon seen by all."""
    place = _existing(folder)
    name, failed = f".fusedit-doctor-{secrets.token_hex(8)}", ""
    if world.is_main:
        try:
            (place / name).write_text(name)
        except OSError as error:
            failed = str(error)
    # Rank 0's choice of name, and whether it could write.
    name, failed = json.loads(world.texts(json.dumps([name, failed]))[0])
    if failed:
        cure = "give an --output_dir that can be written"
        return Finding("output folder", "problem", failed, cure)
    until = time.monotonic() + SEEN_S
    while not (seen := (place / name).exists()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = [int(one) for one in world.gather(torch.tensor(not seen, dtype=torch.int64))]
    if world.is_main:
        (place / name).unlink()
    if any(blind):
        ranks = ", ".join(str(rank) for rank, one in enumerate(blind) if one)
        cure = "give an --output_dir that all machines see under one name"
        return Finding(
            "output folder", "problem", f"rank {ranks} does not see what rank 0 writes", cure
        )
    return Finding("output folder", "ok", f"{place}: all ranks see what rank 0 writes")


def room(world: World, folder: Path, checkpoint_bytes: float, kept: int | None) -> list[Finding]:
    """Space for the checkpoints, and how long one takes: what a scheduler must leave at the end.

    Args:
        kept: checkpoints that stay; None: all of them, whose number is not looked at.
    """
    place = _existing(folder)
    # One more than stay: the old one goes when the new one is whole.
    needed, free = ((kept or 1) + 1) * checkpoint_bytes, shutil.disk_usage(place).free
    text = f"{in_bytes(free)} free, {in_bytes(checkpoint_bytes)} a checkpoint"
    cure = f"make room, or lower --checkpoints_total_limit: {in_bytes(needed)} are needed"
    if free <= needed:
        return [Finding("space", "problem", text, cure)]
    found = [Finding("space", "ok", text)]
    seconds = torch.zeros((), dtype=torch.float64)
    if world.is_main:
        size = min(WRITTEN, int(checkpoint_bytes) or 1)
        seconds += _seconds_to_write(place, size) * checkpoint_bytes / size
    takes = float(world.gather(seconds)[0])
    text = (
        f"a checkpoint takes about {takes:.0f} s here, by a file of {in_bytes(WRITTEN)} at most: "
        f"give torchrun TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace_s(takes)}, and as many seconds to "
        "Slurm's --signal or terminationGracePeriodSeconds"
    )
    if grace_s(takes) > 30 and torch.__version__ < "2.12":
        cure = "torchrun before 2.12 kills after 30 s whatever it is told: install torch 2.12"
        return [*found, Finding("last checkpoint", "warning", text, cure)]
    return [*found, Finding("last checkpoint", "ok", text)]


def grace_s(takes_s: float) -> int:
    """What to leave between warning and end: twice what is expected, and a step."""
    return 60 + 2 * round(takes_s)


def _one_exchange(world: World, values: torch.Tensor) -> float:
    world.barrier()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    started = time.perf_counter()
    dist.all_reduce(values)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - started


def _link(world: World) -> int | None:
    """The bandwidth to expect; None where it is not known, as between machines."""
    if world.device.type != "cuda" or world.local_size != world.size:
        return None
    name = torch.cuda.get_device_name(world.device)
    speeds = [speed for kind, speed in NVLINK.items() if kind in name and "PCIe" not in name]
    return speeds[0] if speeds else None


def _seconds_to_write(place: Path, size: int) -> float:
    path = place / f".fusedit-doctor-{secrets.token_hex(8)}"
    block = secrets.token_bytes(min(size, 2**24))  # zeros might be packed
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return time.perf_counter() - started


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir()
    )


def _nvidia_smi(query: str) -> str | None:
    """One property of the current GPU, read only; None where nvidia-smi is not there."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    told = (
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        f"--query-gpu={query}",
        "--format=csv,noheader,nounits",
    )
    try:
        done = subprocess.run(told, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
