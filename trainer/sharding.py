"""The UNet in parts over the ranks, by PyTorch's FSDP2: `--sharding fsdp` and `hsdp`.

Each rank keeps a part of the rows of every parameter, in fp32, with the gradient, moments and
averages of that part. A block's parameters are gathered before its forward, in bf16 where
--param_dtype says so, dropped after it, and gathered again for its backward, which ends in a
reduce-scatter. So also in micro-steps that are not the last: gradients of the whole UNet would
otherwise wait on every rank, which is what is to be saved, and next to the two gathers that a
micro-step needs anyway it is a third of the traffic.

The optimizer and the averages see plain tensors, by name: those parts that this rank has.
Source: Rajbhandari et al. 2020 (arXiv:1910.02054), stage 3; Zhao et al. 2023 (arXiv:2304.11277).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .config import Sharding
from .world import World

# What is gathered at once; the UNet's few other parameters are one more.
UNITS = (BasicTransformerBlock, Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D)


def make_mesh(kind: Sharding, world: World) -> DeviceMesh:
    """The ranks that share parameters: all, or with hsdp those of a machine. All ranks call it."""
    shape, names = (world.size,), ("shard",)
    if kind == "hsdp":
        shape = (world.size // world.local_size, world.local_size)
        names = ("replicate", "shard")
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def units(unet: nn.Module) -> list[nn.Module]:
    """What is gathered at once beside the UNet's own, the inner ones first."""
    found: list[nn.Module] = [m for m in unet.modules() if isinstance(m, UNITS)]
    return [module for module in reversed(found) if next(module.parameters(), None) is not None]


class Shards:
    """This rank's parts of a UNet, which is sharded here.

    Args:
        unet: fp32 and contiguous, on its device.
        param_dtype: of what is gathered and computed with.
        reduce_dtype: of gradients on their way.
    """

    def __init__(
        self,
        unet: nn.Module,
        mesh: DeviceMesh,
        *,
        param_dtype: torch.dtype = torch.float32,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        )
        for module in (*units(unet), unet):
            # The root as well: after a forward alone it would keep the weights of that moment.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # Copies on the host, of which a checkpoint is written, lie over the same ranks.
        self.host_mesh = mesh
        if mesh.device_type != "cpu":
            self.host_mesh = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        self.group = mesh.get_group("shard")
        self.index, self.count = mesh.get_local_rank("shard"), self.group.size()
        self.sharded = cast(dict[str, DTensor], dict(unet.named_parameters()))
        with torch.no_grad():
            own = {name: p.to_local() for name, p in self.sharded.items()}
        # A parameter of fewer rows than ranks has nothing for some of them.
        self.named = {name: nn.Parameter(part) for name, part in own.items() if part.numel()}

    @torch.no_grad()
    def take_gradients(self, *, last: bool) -> None:
        """After the last backward of a window: the gradients, of all micro-steps and ranks."""
        if not last:  # FSDP2 adds them up
            return
        for name, parameter in self.named.items():
            gradient: Any = self.sharded[name].grad
            parameter.grad = gradient.to_local()

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for parameter in (*self.sharded.values(), *self.named.values()):
            parameter.grad = None

    def seed(self, seed: int) -> int:
        """Of what is drawn by place in a part: another one in each part, one in all its copies."""
        return (seed + self.index) % 2**64

    def norm(self, own: Tensor) -> Tensor:
        """[] fp32, the L2 norm over all parts, of that over this rank's."""
        squares = own.square()
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes this rank's parts by name."""
        for name, part in state.items():
            self.named[name].copy_(part)

    def rows(self, name: str) -> slice:
        """Of a parameter, those that this rank has."""
        total = self.sharded[name].shape[0]
        each = -(-total // self.count)
        return slice(min(self.index * each, total), min((self.index + 1) * each, total))

    def whole(self, name: str, part: Tensor) -> DTensor:
        """A tensor that lies as a parameter does, as DTensor over the parts of all ranks.

        Args:
            part: this rank's, on its device or on the host.
        """
        like = self.sharded[name]
        return DTensor.from_local(
            part,
            like.device_mesh if part.device == like.device else self.host_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    @torch.no_grad()
    def gather(self, parts: Mapping[str, Tensor], *, keeps: bool) -> dict[str, Tensor]:
        """Whole tensors on the CPU, gathered one by one. All ranks call it.

        Args:
            parts: this rank's, by name of the parameter that they lie as.
            keeps: whether this rank wants them; else it only sends.
        """
        gathered = {}
        for name, like in self.sharded.items():
            part = parts[name].detach() if name in parts else like.to_local()
            whole = self.whole(name, part).full_tensor()
            if keeps:
                gathered[name] = whole.cpu()
        return gathered


@contextmanager
def no_reduce_between_machines(model: FSDPModule) -> Iterator[None]:
    """With hsdp machines tell each other their gradients once a window, not in each micro-step.

    Their sums wait in parts, in the dtype that travels: bf16 would lose some of them.
    """
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)


def compile_blocks(unet: UNet2DConditionModel, backend: str = "inductor") -> None:
    """Compiles each transformer block within the gather of its parameters, which cannot be."""
    kinds: Any = unet._repeated_blocks
    for module in unet.modules():
        if any(kind.__name__ in kinds for kind in type(module).__mro__):
            compiled: Callable[..., Any] = torch.compile(
                module.forward, fullgraph=True, dynamic=False, backend=backend
            )
            module.forward = compiled
