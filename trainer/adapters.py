"""A LoRA trained in place of the UNet: peft's layers as diffusers adds them, and conv_in in full.

conv_in takes four channels that the base has not, so no adapter on it could say what it learns. All
else is frozen, and lies in the dtype that its products have: what autocast would round again in
each step is rounded once, so the bits stay, in half the memory. Norms, which autocast leaves in
fp32, stay there; so do the layers of DoRA, whose norms are taken in fp32. What is trained is fp32.
Source: Hu et al. 2021 (arXiv:2106.09685); Liu et al. 2024 (arXiv:2402.09353) for DoRA.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..kernels.philox import MASK, philox
from .config import AdapterConfig
from .draws import Purpose, draw_normal
from .encoders import Samples
from .errors import UsageError

NAME = "default"  # of the adapter, as peft calls it
PURPOSES = 16  # bits of a counter's word that number the purpose; the layer is above them

Loss = Callable[..., Tensor]  # (unet, samples, by_group) -> loss, as of EditLoss


@dataclass
class Draws:
    """What every dropout of an adapter draws by."""

    seed: int
    positions: Tensor | None = None  # [n] int64, of the samples that the UNet is given next


class Dropout(nn.Module):
    """Hides elements of a layer's input from its adapter, each by (seed, sample's position, layer).

    So any cut into ranks and micro-steps, a resumed run and what gradient checkpointing computes
    again see the same ones, and there is no generator whose state a CUDA graph would have to move:
    it reads the positions where the update finds its samples. Integers alone, which Inductor makes
    one pass.

    Args:
        rate: the share that is hidden.
        layer: numbers it among those of the UNet.
    """

    layer: Tensor

    def __init__(self, rate: float, layer: int, draws: Draws, device: torch.device) -> None:
        super().__init__()
        self.rate, self.draws = rate, draws
        # A tensor: a number would have each transformer block compiled anew.
        self.register_buffer("layer", torch.tensor(layer, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.draws.positions
        if not self.training:
            return x
        if positions is None:
            raise ValueError("an adapter's dropout must be told its samples: Adapter.drawing")
        count = x[0].numel()
        blocks = torch.arange(-(-count // 4), device=x.device)[None, :]
        purpose = (self.layer << PURPOSES) + Purpose.ADAPTER_DROPOUT
        seed, position = self.draws.seed, positions[:, None]
        words = philox(
            (seed & MASK, seed >> 32), (blocks, purpose, position & MASK, position >> 32)
        )
        drawn = torch.stack(words, dim=-1).flatten(1)[:, :count].view(x.shape)
        kept = drawn >= round(self.rate * 2**32)
        return torch.where(kept, x * (1 / (1 - self.rate)), 0.0)


class Adapter:
    """What `attach` has put into a UNet.

    Args:
        settings: peft's LoraConfig.
        draws: of its dropout; None: it has none.
    """

    def __init__(self, settings: Any, draws: Draws | None) -> None:
        self.settings, self.draws = settings, draws

    def drawing(self, loss_fn: Loss) -> Loss:
        """The loss, with the dropout told the samples first."""
        draws = self.draws
        if draws is None:
            return loss_fn

        def loss(unet: nn.Module, samples: Samples, by_group: Tensor | None = None) -> Tensor:
            draws.positions = samples.positions
            return loss_fn(unet, samples, by_group)

        return loss


def attach(
    unet: UNet2DConditionModel, section: AdapterConfig, dtype: torch.dtype, seed: int
) -> Adapter:
    """Adds an adapter that changes nothing yet, and freezes all but it and conv_in.

    Args:
        unet: 8 channels, fp32, on its device.
        dtype: of its products.
        seed: of the adapter's first matrices and of its dropout.

    Raises: UsageError: peft is not installed, or a target is no layer that can have an adapter.
    """
    check_peft()
    from peft import LoraConfig

    rank = cast(int, section.lora_rank)
    _check_targets(unet, section.targets)
    settings = LoraConfig(
        r=rank,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(section.targets),
        use_dora=section.use_dora,
        init_lora_weights="gaussian",  # as diffusers' scripts; drawn anew below
    )
    try:
        unet.add_adapter(settings)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--lora_targets {section.lora_targets}: {reason}") from None
    unet.conv_in.requires_grad_(True)
    draws = Draws(seed) if section.lora_dropout else None
    for number, layer in enumerate(_layers(unet)):
        first: Any = layer.lora_A[NAME].weight
        drawn = draw_normal(seed, Purpose.ADAPTER, torch.tensor([number]), tuple(first.shape))
        first.data.copy_(drawn[0] / rank)  # the standard deviation of "gaussian"
        if draws is not None:
            layer.lora_dropout[NAME] = Dropout(section.lora_dropout, number, draws, first.device)
        # Else a half-precision input is made fp32, and autocast makes it half again.
        layer.cast_input_dtype_enabled = section.use_dora or dtype is torch.float32
    _round_frozen(unet, dtype, but=_layers(unet) if section.use_dora else [])
    return Adapter(settings, draws)


def check_peft() -> None:
    """Raises UsageError where --lora_rank cannot be served."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError("--lora_rank needs peft: pip install 'fusedit[lora]'") from None


def _check_targets(unet: nn.Module, targets: tuple[str, ...]) -> None:
    names = [name for name, _ in unet.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UsageError(
                f"--lora_targets {target}: no layer of the UNet is called so; for instance to_q, "
                "to_out.0, ff.net.2, proj_in or conv1"
            )


def _layers(unet: nn.Module) -> list[Any]:
    """Those with an adapter, in the UNet's order."""
    from peft.tuners.lora import LoraLayer

    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


def _round_frozen(unet: nn.Module, dtype: torch.dtype, but: list[Any]) -> None:
    """Gives frozen linear layers and convolutions the dtype that autocast gives them."""
    kept = {layer.get_base_layer() for layer in but}
    for module in unet.modules():
        product = type(module) in (nn.Linear, nn.Conv2d) and module not in kept
        if product and not any(p.requires_grad for p in module.parameters()):
            module.to(dtype)


def in_one_pass(unet: nn.Module) -> None:
    """Has PyTorch's dropout in the place of ours, which eager mode would count op by op."""
    for layer in _layers(unet):
        dropout = layer.lora_dropout[NAME]
        if isinstance(dropout, Dropout):
            layer.lora_dropout[NAME] = nn.Dropout(dropout.rate)


@contextmanager
def evaluating(unet: nn.Module) -> Iterator[None]:
    """Inside, no dropout."""
    unet.eval()
    try:
        yield
    finally:
        unet.train()


@torch.no_grad()
def load_trained(unet: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Takes the values of all that is trained, by parameter name.

    Raises: ValueError: they are not those of this adapter.
    """
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    if trained.keys() != tensors.keys():
        different = sorted(trained.keys() ^ tensors.keys())
        raise ValueError(f"not the values of this adapter: {', '.join(different[:3])}")
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])


def merge(unet: UNet2DConditionModel) -> None:
    """Adds the adapter to the weights it stands beside, and leaves a UNet without any.

    Args:
        unet: in fp32.
    """
    unet.fuse_lora()
    unet.unload_lora()
