"""What ranks tell each other; several of them as threads of one process cannot be, so as forks."""

import multiprocessing
import os

import pytest
import torch
from ranks import free_port

from fusedit.trainer.errors import UsageError
from fusedit.trainer.world import World


def _on_ranks(size, function):
    """function(world) on each rank; the results in the order of ranks."""
    context = multiprocessing.get_context("fork")
    port, queue = free_port(), context.Queue()

    def rank_main(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        world = World(rank=rank, local_rank=rank, size=size)
        world.start(timeout_s=60)
        queue.put((rank, function(world)))
        world.stop()

    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in range(size))
    for process in processes:
        process.join()
    return [results[rank] for rank in range(size)]


def _tell_everything(world):
    total = world.sum(torch.tensor([1.0, world.rank])).tolist()
    texts = world.texts("ä" * world.rank)
    gathered = [t.tolist() for t in world.gather(torch.tensor([world.rank]))]
    return total, world.highest(world.rank % 2), texts, gathered


def test_ranks_agree():
    expected = ([3.0, 3.0], 1, ["", "ä", "ää"], [[0], [1], [2]])
    assert _on_ranks(3, _tell_everything) == [expected] * 3


def test_one_rank_needs_no_group():
    assert _tell_everything(World()) == ([1.0, 0.0], 0, [""], [[0]])


def _fail_on_the_last(world):
    try:
        with world.together():
            if world.rank == world.size - 1:
                raise UsageError("no space on this machine " + "x" * 4096)
    except UsageError as error:
        return str(error)[:24]
    return "nothing"


def test_a_mistake_of_one_rank_is_raised_on_all():
    assert _on_ranks(2, _fail_on_the_last) == ["no space on this machine"] * 2
    with pytest.raises(UsageError, match="no space"), World().together():
        raise UsageError("no space")


def _see(world):
    try:
        world.check_same({"steps": 4, "rows": 8 + world.rank // 2}, "share the folder")
    except UsageError as error:
        return str(error)
    return "the same"


def test_ranks_that_see_different_things_say_which():
    assert _on_ranks(2, _see) == ["the same"] * 2
    assert _on_ranks(3, _see) == ["the ranks see different rows: [8, 8, 9]; share the folder"] * 3


def _be_of_another_kind(world):
    try:
        world.check_alike({"torch": "2.13" if world.rank < 2 else "2.12"}, "install the same")
    except UsageError as error:
        return str(error)
    return "the same"


def test_a_rank_of_another_version_is_named():
    assert _on_ranks(2, _be_of_another_kind) == ["the same"] * 2
    told = "rank 2 has torch 2.12, rank 0 2.13; install the same"
    assert _on_ranks(3, _be_of_another_kind) == [told] * 3


def test_other_exceptions_are_not_swallowed():
    with pytest.raises(ZeroDivisionError), World().together():
        print(1 / 0)
