"""Kills drawn from a seed, a run that suffers them one after the other, and what it must end in."""

import json
import random
import time
from pathlib import Path
from typing import NamedTuple

from phases import PHASES, START, Strike, Watched
from ranks import run_flags

STEPS = 16
ROWS = 15
LATE_S = 0.004  # at most, after the moment: within a call
STATE = ("unet.safetensors", "ema.safetensors", "optimizer.safetensors")
EXPORTED = ("unet", "unet_raw", "vae", "text_encoder")
MAIN_ONLY = ("copy", "save", "rotation")
ANY = "any moment"  # by the clock, from outside
VICTIMS = ("one rank", "all ranks", "torchrun")


class Kill(NamedTuple):
    """A moment, and who dies at it."""

    phase: str
    moment: float  # 0 to 1, of the phase's calls, or of the run's time
    late_s: float
    victims: str
    rank: int  # the victim, where it is one
    visit: int  # to the phase


def draw(chance: random.Random, phase: str, size: int, victims: str) -> Kill:
    late = chance.choice((0.0, chance.uniform(0, LATE_S)))
    visit = 2 if phase == "rotation" else 1  # the first has nothing to delete
    return Kill(phase, chance.random(), late, victims, chance.randrange(size), visit)


def flags(inputs: Path, output: Path, size: int) -> list[str]:
    return [
        *run_flags(inputs, output, size, STEPS),
        "--cache_crops=2",
        f"--cache_latents={output / 'cache'}",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=3",
        "--held_out=2",
        "--validation_steps=3",
        "--checkpointing_steps=2",
        "--checkpoints_total_limit=1",
    ]


class Whole(NamedTuple):
    """A run that nobody killed."""

    state: dict[str, bytes]
    calls: dict[int, dict[str, list[int]]]  # of each rank, each phase, each visit
    seconds: float


def state(output: Path) -> dict[str, bytes]:
    """All that a run ends in: checkpoint, pipeline, pictures, and each step's numbers."""
    files = [output / f"checkpoint-{STEPS}" / name for name in STATE]
    files += [path for part in EXPORTED for path in (output / part).glob("*.safetensors")]
    files += sorted((output / "validation").iterdir())
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    keep = ("loss", "grad_norm", "lr", "held_out/full", "held_out/neither")
    told = [(line["step"], *(line.get(name) for name in keep)) for line in lines]
    found = {str(path.relative_to(output)): path.read_bytes() for path in files}
    return {**found, "log": json.dumps(told).encode()}


def unkilled(inputs: Path, folder: Path, size: int) -> Whole:
    """The run to compare with; it also counts the calls of each phase."""
    output = folder / "run"
    since = time.monotonic()
    ran = Watched(size, flags(inputs, output, size), folder / "log", folder / "watch")
    assert ran.wait() == [0] * size, ran.output()
    taken = time.monotonic() - since
    calls = {
        rank: json.loads((folder / "watch" / f"calls-{rank}.json").read_text())
        for rank in range(size)
    }
    return Whole(state(output), calls, taken)


def suffer(
    kills: list[Kill], inputs: Path, folder: Path, size: int, whole: Whole
) -> list[tuple[Kill, str]]:
    """Starts the same command again and again, each time killed, then once to its end.

    Returns: each kill that came before the run's end, and the phase that it came in.
    """
    output, log = folder / "run", folder / "log"
    command = flags(inputs, output, size)
    came = []
    for kill in kills:
        ran = _start(kill, command, log, folder / "watch", size, whole)
        if kill.phase == ANY:
            time.sleep(kill.moment * whole.seconds)
            phase = ran.phase(0)
            victims = ran.processes if kill.victims == "all ranks" else [ran.processes[kill.rank]]
            died = all(process.is_alive() for process in victims)
            ran.kill(victims)
        codes = ran.wait()
        ran.await_orphans()
        if kill.phase != ANY:
            struck = folder / "watch" / "struck"
            died, phase = struck.exists(), kill.phase
        if died:
            came.append((kill, phase))
        else:
            assert codes == [0] * len(codes), (kill, codes, ran.output())
    ran = Watched(size, command, log, folder / "watch")
    assert ran.wait() == [0] * size, ran.output()
    ended, output_names = state(output), sorted(path.name for path in output.iterdir())
    differ = [name for name in whole.state if ended.get(name) != whole.state[name]]
    assert not differ, (differ, kills, ran.output())
    assert not [name for name in output_names if name.endswith((".partial", ".deleted"))], kills
    assert [name for name in output_names if name.startswith("checkpoint-")] == [
        f"checkpoint-{STEPS}"
    ]
    return came


def _start(
    kill: Kill, command: list[str], log: Path, watch: Path, size: int, whole: Whole
) -> Watched:
    agent = kill.victims == "torchrun"
    if kill.phase == ANY:
        return Watched(size, command, log, watch)
    striker = 0 if kill.phase in MAIN_ONLY or kill.victims == "all ranks" else kill.rank
    calls = min(whole.calls[striker][kill.phase][kill.visit - 1 :])
    victims = tuple(range(size)) if kill.victims == "all ranks" else (kill.rank,)
    call = 1 + int(kill.moment * calls)
    strike = Strike(kill.phase, kill.visit, call, kill.late_s, () if agent else victims, agent)
    return Watched(size, command, log, watch, {striker: strike}, agent=agent)


def histogram(came: list[tuple[Kill, str]]) -> dict[str, dict[str, int]]:
    """How many kills came in each phase, by victims."""
    names = [START, *PHASES, "between"]
    found = {name: dict.fromkeys(VICTIMS, 0) for name in names}
    for kill, phase in came:
        found[phase][kill.victims] += 1
    return {name: counts for name, counts in found.items() if any(counts.values())}
