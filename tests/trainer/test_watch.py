"""What a rank says of the others when they do not go on; ranks as forks of this process."""

import multiprocessing
import os
import time

import pytest
from ranks import free_port

from fusedit.trainer.errors import RanksLost
from fusedit.trainer.world import World

TIMEOUT_S = 2.0


def _two_ranks(second_does):
    """What rank 0 was told, the exit code of rank 1, and the seconds both took."""
    context = multiprocessing.get_context("fork")
    port, told = free_port(), context.Queue()

    def rank_main(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        world = World(rank=rank, local_rank=rank, size=2)
        world.start(timeout_s=TIMEOUT_S)
        try:
            with world.watch:
                world.doing("reading step 3")
                if rank == 1:
                    second_does(world)
                world.highest(0)
        except RanksLost as error:
            told.put((rank, str(error), error.speaks))
            told.close()
            told.join_thread()
        os._exit(0)

    started = time.monotonic()
    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    said = told.get(timeout=60)
    for process in processes:
        process.join(60)
    return said, processes[1].exitcode, time.monotonic() - started


def test_a_rank_that_is_stuck_is_named_and_ends_itself(capfd):
    """Its thread still beats, so it is not gone; the others' end is what it sees."""
    (rank, message, speaks), code, seconds = _two_ranks(lambda world: time.sleep(1000))
    assert (rank, speaks, code) == (0, True, 1)
    told = "rank 0 stops: rank 1 has been reading step 3 for"
    assert message.startswith(told)
    assert message.endswith(f"(--timeout_s {TIMEOUT_S:g})")
    assert seconds < 30
    printed = capfd.readouterr().err
    assert "fusedit: rank 1 was stuck while reading step 3, and the others ended:" in printed
    assert "in <lambda>" in printed  # where it was


def test_a_rank_that_fails_by_itself_is_quoted():
    def fail(world):
        raise OSError("the disk is gone\nand more")

    (rank, message, speaks), code, _ = _two_ranks(fail)
    assert (rank, speaks) == (0, True)
    told = "rank 0 stops: rank 1 ended while reading step 3: OSError: the disk is gone"
    assert message == told
    assert code != 0


def test_alone_there_is_nobody_to_watch():
    world = World()
    world.doing("dividing")
    with pytest.raises(ZeroDivisionError), world.watch:
        print(1 / 0)
    assert world.watch.thread is None
