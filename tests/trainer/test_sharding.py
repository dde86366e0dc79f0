"""Parts of parameters: what each rank has, how they become whole, what does not go with them."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny import TEXT_WIDTH, save_tiny_pipeline
from torch import nn

from fusedit.trainer.config import ModelConfig, OptimConfig, PrecisionConfig, RunConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.plan import _sharding_notes, check_precision
from fusedit.trainer.pretrained import load_unet
from fusedit.trainer.sharding import Shards, compile_blocks, make_mesh
from fusedit.trainer.step import no_all_reduce
from fusedit.trainer.unet import prepare_unet
from fusedit.trainer.world import World

MICRO_STEPS = 3


def _model():
    torch.manual_seed(0)
    # 5 and 2 rows: over 3 ranks one has fewer, or none
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2))


def _loss(model, images):
    return model(images).square().mean()


def _images(step, ranks):
    return torch.randn(ranks, 2, 3, 4, 4, generator=torch.Generator().manual_seed(step))


def _rank(rank, port, size, kind):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    model, alone = _model(), _model()
    shards = Shards(model, make_mesh(kind, World(rank=rank, size=size, local_size=2)))
    assert shards.count == (2 if kind == "hsdp" else size)

    for window in range(2):  # nothing is left over from the one before
        shards.zero_grad()
        alone.zero_grad()
        for step in range(MICRO_STEPS):
            images, last = _images(10 * window + step, size), step == MICRO_STEPS - 1
            if last:
                _loss(model, images[rank]).backward()
            else:
                with no_all_reduce(model):
                    _loss(model, images[rank]).backward()
            shards.take_gradients(last=last)
            _loss(alone, images.flatten(0, 1)).backward()
        norm = shards.norm(nn.utils.get_total_norm([p.grad for p in shards.named.values()]))
        torch.testing.assert_close(
            norm, nn.utils.get_total_norm(p.grad for p in alone.parameters())
        )
    grads = shards.gather({name: p.grad for name, p in shards.named.items()}, keeps=True)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
        part = parameter[shards.rows(name)]
        assert part.numel() == (shards.named[name].numel() if name in shards.named else 0)

    # What the optimizer moves is what the module gathers, and what its rows say.
    with torch.no_grad():
        for name, part in shards.named.items():
            assert torch.equal(part, dict(alone.named_parameters())[name][shards.rows(name)])
            part.add_(1)
        for parameter in alone.parameters():
            parameter.add_(1)
        found, expected = model(images[rank]), alone(images[rank])
    torch.testing.assert_close(found, expected)
    assert shards.gather(shards.named, keeps=rank == 0).keys() == (
        grads.keys() if rank == 0 else set()
    )
    dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 3), ("hsdp", 4)])
def test_ranks_have_parts_of_what_one_rank_has(kind, ranks):
    on_ranks(_rank, ranks, ranks, kind)


def _unet_rank(rank, port, size, base):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    section, device = ModelConfig(pretrained_model_name_or_path=base), torch.device("cpu")
    alone = prepare_unet(load_unet(section), device, fused=False).unet
    unet = prepare_unet(load_unet(section), device, fused=True, sharded=True).unet
    shards = Shards(unet, make_mesh("fsdp", World(rank=rank, size=size)))
    formats = []
    unet.conv_out.register_forward_pre_hook(
        lambda _, given: formats.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    torch.manual_seed(0)
    given = torch.randn(size, 8, 8, 8), torch.arange(size), torch.randn(size, 4, TEXT_WIDTH)
    truth = torch.randn(size, 4, 8, 8)

    def backward(model, rows):
        latents, timesteps, text = (one[rows] for one in given)
        answer = model(latents, timesteps, text, return_dict=False)[0]
        (answer - truth[rows]).square().mean().backward()

    backward(alone, slice(None))
    for compiled in (False, True):
        if compiled:
            compile_blocks(unet, backend="aot_eager")
        shards.zero_grad()
        backward(unet, slice(rank, rank + 1))
        shards.take_gradients(last=True)
        found = shards.gather({name: p.grad for name, p in shards.named.items()}, keeps=True)
        for name, parameter in alone.named_parameters():
            error = (found[name] - parameter.grad).norm()
            assert error < 1e-4 * parameter.grad.norm() + 1e-6, name
    assert formats == [True, True]
    dist.destroy_process_group()


def test_fused_and_compiled_blocks_meet_gathered_parameters(tmp_path):
    base = save_tiny_pipeline(tmp_path)
    on_ranks(_unet_rank, 2, 2, str(base))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"cuda_graphs": "on"}, "--cuda_graphs on"),
        ({"compile": "whole"}, "--compile whole"),
    ],
)
def test_what_cannot_be_sharded_is_refused(sections, told):
    with pytest.raises(UsageError, match=f"--sharding fsdp is not {told}.*take"):
        PrecisionConfig(sharding="fsdp", **sections)


def test_8bit_moments_are_refused():
    config = RunConfig(
        optim=OptimConfig(use_8bit_adam=True), precision=PrecisionConfig(sharding="hsdp")
    )
    with pytest.raises(UsageError, match=r"--sharding hsdp is not --use_8bit_adam.*take"):
        check_precision(config, "bf16", on_gpu=True)


@pytest.mark.parametrize(
    ("size", "local_size", "told"),
    [(6, 4, "4 of 6: take --sharding fsdp"), (6, 1, "has 1 rank: take --sharding fsdp")],
)
def test_machines_that_cannot_hold_the_whole_are_refused(size, local_size, told):
    with pytest.raises(UsageError, match=told):
        _sharding_notes(PrecisionConfig(sharding="hsdp"), World(size=size, local_size=local_size))


def test_one_rank_is_told_that_it_keeps_all():
    section = PrecisionConfig(sharding="fsdp")
    assert _sharding_notes(section, World()) == [
        "--sharding fsdp: one rank has nobody to share with; it keeps all"
    ]
    assert _sharding_notes(dataclasses.replace(section, sharding="ddp"), World(size=2)) == []
