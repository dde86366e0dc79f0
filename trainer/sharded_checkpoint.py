"""Checkpoints of sharded parameters: each rank writes its parts, by torch.distributed.checkpoint.

    checkpoint-500/
      shard-00002-model-00003-of-00004.safetensors    of rank 1: {part/name: rows}, and which rows
      state.json  manifest.json                       as in checkpoint.py

Whole or not there as any other: rank 0 renames the folder when all have written. Any number of
ranks, sharded or not, goes on from either kind of checkpoint.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import checkpoint
from .checkpoint import Checkpoint, disk_errors
from .sharding import Shards
from .world import World

FILES = "shard-*.safetensors"
OPTIMIZER = "optimizer"  # the part whose names end in that of a moment


def save(
    root: Path, step: int, made: Checkpoint, keep: int | None, shards: Shards, world: World
) -> None:
    """As `checkpoint.save`, by all ranks together.

    Args:
        made: of tensors, this rank's parts.
        world: of `World.aside` where a thread saves.

    Raises: UsageError, on all ranks alike.
    """
    final = root / f"checkpoint-{step}"
    # Removed by one rank, when all of them know: they might still be writing.
    with checkpoint.removed_if_it_fails(final, removes=world.is_main) as partial:
        there = False
        with world.together(), disk_errors(final):
            if world.is_main and not (there := checkpoint.is_there(final)):
                checkpoint.begin(partial)
        if world.highest(there):
            return
        with world.together(), disk_errors(final):
            _write(partial, made.tensors, shards, world)
        mine: dict[str, Any] = {}
        with world.together(), disk_errors(final):
            mine = checkpoint.fingerprints(partial, f"shard-{world.rank + 1:05}-*.safetensors")
        everyones = [json.loads(text) for text in world.texts(json.dumps(mine))]
        with world.together(), disk_errors(final):
            if world.is_main:
                files = {name: found for one in everyones for name, found in one.items()}
                checkpoint.finish(final, step, made.state, files)
                checkpoint.delete_older(root, step, keep)


def read(folder: Path, shards: Shards | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint that has been checked: this rank's parts, or all of them."""
    if any(folder.glob(FILES)):
        return _read_sharded(folder, shards)
    if shards is None:
        return checkpoint.read(folder).tensors
    return {path.stem: dict(_rows(path, shards)) for path in sorted(folder.glob("*.safetensors"))}


def _write(
    partial: Path, parts: dict[str, dict[str, Tensor]], shards: Shards, world: World
) -> None:
    """Fails on all ranks alike: they tell each other. One file a part, for memory's sake."""
    state: dict[str, Tensor] = {}
    file_of: dict[str, int] = {}  # all names are rank 0's, who has the first rows of everything
    for index, (part, named) in enumerate(parts.items(), start=1):
        for name, tensor in named.items():
            owner = _owner(part, name)
            lies = tensor.shape == shards.named[owner].shape  # a count lies as no parameter does
            state[f"{part}/{name}"] = shards.whole(owner, tensor.detach()) if lies else tensor
            file_of[f"{part}/{name}"] = index
    writer = dcp.HuggingFaceStorageWriter(
        str(partial), fqn_to_index_mapping=file_of, save_distributed=True
    )
    try:
        dcp.save(state, storage_writer=writer, process_group=world.group)
    except dcp.CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        if isinstance(cause, (OSError, SafetensorError)):
            raise cause from None
        raise


def _read_sharded(folder: Path, shards: Shards | None) -> dict[str, dict[str, Tensor]]:
    """Each rank for itself: of the files of all ranks, the rows that it has."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    parts: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(stored, dcp.TensorStorageMetadata):
            continue
        part, name = key.split("/", 1)
        owner, size, dtype = _owner(part, name), stored.size, stored.properties.dtype
        if shards is not None and owner not in shards.named:
            continue
        if shards is None or size != shards.sharded[owner].shape:
            state[key] = tensor = torch.empty(size, dtype=dtype)
        else:
            tensor = torch.empty_like(shards.named[owner], dtype=dtype, requires_grad=False)
            state[key] = shards.whole(owner, tensor)
        parts.setdefault(part, {})[name] = tensor
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(state, storage_reader=reader, no_dist=True)
    return parts


def _rows(path: Path, shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Of a file of whole tensors, this rank's."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            owner = _owner(path.stem, name)
            if owner not in shards.named:
                continue
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) == tuple(shards.sharded[owner].shape):
                yield name, stored[shards.rows(owner)]
            else:
                yield name, file.get_tensor(name)


def _owner(part: str, name: str) -> str:
    """The parameter that a tensor belongs to."""
    return name.rsplit(".", 1)[0] if part == OPTIMIZER else name
