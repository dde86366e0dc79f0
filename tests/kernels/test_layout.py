"""Activations stay channels_last from conv_in to conv_out and back: no copy turns one."""

import torch
from diffusers import UNet2DConditionModel
from tiny import save_tiny_pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedit.trainer.unet import grow_conv_in, prepare_unet

aten = torch.ops.aten
COPIES = {aten.clone.default, aten._to_copy.default, aten.copy_.default, aten.contiguous.default}


class Turned(TorchDispatchMode):
    """Notes what copies an image from one layout to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if function in COPIES and isinstance(result, Tensor) and result.dim() == 4:
            # copy_ takes from its second argument, and may pair a gradient with its place.
            source = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)][-1]
            if _both(result, source) and _last(result) != _last(source):
                self.found.append(f"{function}: {list(source.shape)} {source.stride()}")
        return result


def _both(*tensors: Tensor) -> bool:
    """Whether these are images whose layouts can be told apart."""
    return all(t.dim() == 4 and t.shape[1] > 1 and t.shape[2] * t.shape[3] > 1 for t in tensors)


def _last(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1


def _run(base, device, fused, turns=False):
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    grow_conv_in(unet, "base")
    unet = prepare_unet(unet, torch.device(device), fused=fused, attention="triton").unet
    unet = unet.to(memory_format=torch.channels_last)
    latents = torch.randn(2, 8, 8, 8, device=device)
    latents = latents.contiguous(memory_format=torch.channels_last)
    text = torch.randn(2, 5, unet.config["cross_attention_dim"], device=device)
    times = torch.tensor([1, 500], device=device)
    with Turned() as turned, torch.autocast(device, torch.bfloat16):
        out = unet(latents, times, text, return_dict=False)[0]
        if turns:
            out = out.contiguous()
    with turned:
        out.backward(torch.randn_like(out))
    return turned.found


def test_no_layout_is_turned_between_ops(tmp_path, device):
    assert _run(save_tiny_pipeline(tmp_path / "base"), device, fused=True) == []


def test_a_turn_would_be_seen(tmp_path, device):
    assert _run(save_tiny_pipeline(tmp_path / "base"), device, fused=True, turns=True)
