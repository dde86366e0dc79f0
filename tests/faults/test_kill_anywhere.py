"""Killed anywhere, the same command goes on to the same bits: a dozen in CI, a hundred by hand.

    python -m pytest -m slow tests/faults/test_kill_anywhere.py --kills=kills.json

One rank dies, all of them, or torchrun's agent; in a phase that the seed chooses, at a moment of it
that the seed chooses; and some at any moment by the clock. The histogram by phase is printed, and
with --kills added to a file.
"""

import json
import random

import pytest
from kills import ANY, ROWS, VICTIMS, draw, histogram, suffer, unkilled
from tiny import save_tiny_inputs

# In the order that a run comes to them, so that one run can suffer many.
EARLY = ("cache building", "cache building", "loading")
MIDDLE = ("train step", "copy", "save", "rotation", "validation", "save", "rotation", "validation")
LATE = ("export", "export")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), ROWS)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The unkilled run of each number of ranks, once."""
    made = {}

    def of(size):
        if size not in made:
            made[size] = unkilled(inputs, tmp_path_factory.mktemp(f"whole-{size}"), size)
        return made[size]

    return of


def _chain(seed, size):
    """13 kills: those before the loop, eight in it, and those at its end."""
    chance = random.Random(1000 * size + seed)
    middle = chance.sample(MIDDLE, len(MIDDLE))
    first, *others = [
        draw(chance, phase, size, VICTIMS[(seed + index) % 3])
        for index, phase in enumerate([*EARLY, *middle, *LATE])
    ]
    return [first._replace(moment=first.moment / 2), *others]  # some is left for the second


def _tell(request, came, size):
    found = histogram(came)
    print(json.dumps(found))
    path = request.config.getoption("--kills", default=None)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"ranks": size, "kills": found}) + "\n")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_dozen(inputs, whole, tmp_path, size):
    chance = random.Random(size)
    phases = {
        1: ("cache building", "save", "rotation", "export"),
        2: ("cache building", "validation", "save", "export"),
        3: ("train step", "rotation", ANY, "copy"),
    }[size]
    kills = [
        draw(chance, phase, size, VICTIMS[(size + index) % 2]) for index, phase in enumerate(phases)
    ]
    came = suffer(kills, inputs, tmp_path, size, whole(size))
    assert len(came) >= 3, (kills, came)


def test_torchrun_is_killed(inputs, whole, tmp_path):
    kills = [draw(random.Random(7), phase, 2, "torchrun") for phase in ("train step", "save")]
    assert len(suffer(kills, inputs, tmp_path, 2, whole(2))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hundred(inputs, whole, tmp_path, size, seed, request):
    kills = _chain(seed, size)
    came = suffer(kills, inputs, tmp_path, size, whole(size))
    _tell(request, came, size)
    assert [kill for kill, _ in came] == kills


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_at_any_moment(inputs, whole, tmp_path, size, request):
    chance = random.Random(size)
    kills = [draw(chance, ANY, size, VICTIMS[index % 2]) for index in range(8)]
    came = suffer(kills, inputs, tmp_path, size, whole(size))
    _tell(request, came, size)
