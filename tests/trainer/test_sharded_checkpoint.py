"""Parts that ranks write together: read back by them, or whole; and a disk that is full for one."""

import errno
import os
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from fusedit.trainer import checkpoint, sharded_checkpoint
from fusedit.trainer.checkpoint import Checkpoint
from fusedit.trainer.errors import UsageError
from fusedit.trainer.log import RunLog
from fusedit.trainer.saver import Save, Saver
from fusedit.trainer.sharding import Shards, make_mesh
from fusedit.trainer.world import World

RANKS = 3


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))  # rows for two of three ranks, or uneven


def _parts(shards):
    moments = {f"{name}.exp_avg": -p.detach().bfloat16() for name, p in shards.named.items()}
    counts = {f"{name}.step": torch.tensor(3.0) for name in shards.named}
    weights = {name: p.detach().clone() for name, p in shards.named.items()}
    return {"unet": weights, "optimizer": moments | counts}


def _assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for part, named in expected.items():
        assert found[part].keys() == named.keys()
        for name, value in named.items():
            assert found[part][name].dtype == value.dtype
            assert torch.equal(found[part][name], value), name


def _rank(rank, port, root):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    world = World(rank=rank, size=RANKS)
    shards = Shards(_model(), make_mesh("fsdp", world))
    parts = _parts(shards)
    assert len(shards.named) == (2 if rank == 2 else 4)

    def save(step):
        made = Checkpoint(parts, {"step": step})
        sharded_checkpoint.save(root, step, made, 1, shards, world)

    save(1)
    save(1)  # is there
    _assert_equal(sharded_checkpoint.read(root / "checkpoint-1", shards), parts)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(UsageError, match="checkpoint-2: no space is left on the disk"):
            save(2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(checkpoint, "sync", full)
        with pytest.raises(UsageError, match="checkpoint-2: no space is left on the disk"):
            save(2)
    world.barrier()
    assert [path.name for path in root.iterdir()] == ["checkpoint-1"]
    world.barrier()
    save(3)
    world.barrier()
    assert [path.name for path in root.iterdir()] == ["checkpoint-3"]
    _save_beside(root, parts, shards, world, full)
    dist.destroy_process_group()


def _save_beside(root, parts, shards, world, full):
    """By threads: the state of that moment, whatever the loop does and says meanwhile."""
    run, free, write = Saver(world, shards, RunLog.silent()), threading.Event(), dcp.save

    def held(*given, **named):
        assert free.wait(20)
        return write(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "save", held)
        run.save(4, [Save(root, Checkpoint(parts, {"step": 4}), 1)])
        for tensor in (tensor for named in parts.values() for tensor in named.values()):
            tensor.add_(1)
        assert [world.highest(number) for number in range(5)] == [*range(5)]
        assert run.pending is not None
        assert not run.pending.done()
        free.set()
        run.finish()
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(checkpoint, "sync", full)
        run.save(5, [Save(root, Checkpoint(parts, {"step": 5}), 1)])
        with pytest.raises(UsageError, match="checkpoint-5: no space is left on the disk"):
            run.finish()
    run.close()


def test_ranks_write_together_and_fail_together(tmp_path):
    root = tmp_path / "run"
    on_ranks(_rank, RANKS, root)
    folder = root / "checkpoint-4"
    assert checkpoint.broken(folder) is None
    assert checkpoint.read_state(folder) == {"step": 4}
    weights = _model().state_dict()
    moments = {f"{name}.exp_avg": -value.bfloat16() for name, value in weights.items()}
    counts = {f"{name}.step": torch.tensor(3.0) for name in weights}
    expected = {"unet": weights, "optimizer": moments | counts}
    _assert_equal(sharded_checkpoint.read(folder, None), expected)

    lost = next(folder.glob("shard-00002-*"))
    lost.unlink()
    assert checkpoint.broken(folder) == f"{lost.name} is missing"
