"""What diffusers' script draws and computes in its first updates, written down from outside.

One safetensors file an update, `update-0001.safetensors`: what each micro-step was given and drew,
its loss, then the gradient before clipping, its norm, the learning rate, and the weights and
averages after it; `start.safetensors` has the weights before the first. `replay.py` reads them.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders import vae
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import CLIPTextModel

UPDATES = 20
START = "start.safetensors"


def file_of(update: int) -> str:
    return f"update-{update:04}.safetensors"


class Recorder:
    """Tensors of the update on its way, by name; of a micro-step `0.noise`, `1.noise`."""

    def __init__(self, folder: Path, whole: Container[int]) -> None:
        self.folder, self.whole = folder, whole
        self.update, self.micro_step = 1, 0
        self.tensors: dict[str, Tensor] = {}
        self.unet: nn.Module | None = None

    def keep(self, name: str, value: Tensor) -> None:
        """Of a micro-step; the first of a name, for later ones are of something else."""
        if self.update <= UPDATES:
            self.tensors.setdefault(f"{self.micro_step}.{name}", _kept(value))

    def keep_named(self, kind: str, named: dict[str, Tensor]) -> None:
        if self.update <= UPDATES and (kind == "update" or self.update in self.whole):
            self.tensors |= {f"{kind}.{name}": _kept(value) for name, value in named.items()}

    def weights(self) -> dict[str, Tensor]:
        return {} if self.unet is None else dict(self.unet.named_parameters())

    def end(self) -> None:
        """Writes the update, once its averages have moved."""
        if self.update <= UPDATES:
            save_file(self.tensors, self.folder / file_of(self.update))
        self.tensors, self.micro_step = {}, 0
        self.update += 1


@contextmanager
def recorded(folder: Path, whole: Container[int] = range(1, UPDATES + 1)) -> Iterator[None]:
    """Inside, the script's draws, losses, gradients, weights and averages are written down.

    Args:
        whole: updates whose gradients, weights and averages are kept; of others their norm is.
    """
    recorder = Recorder(folder, whole)
    keep = recorder.keep

    def with_result(
        name: str, function: Callable[..., Tensor], among: str = ""
    ) -> Callable[..., Tensor]:
        def called(*args: Any, **kwargs: Any) -> Tensor:
            result = function(*args, **kwargs)
            if not among or kwargs.get(among) is not None:
                keep(name, result)
            return result

        return called

    encode_text, encode_image = CLIPTextModel.forward, AutoencoderKL.encode
    backward, average = Tensor.backward, EMAModel.step
    clip, forward = nn.utils.clip_grad_norm_, UNet2DConditionModel.forward

    def text(self: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        keep("tokens", tokens)  # the first of a micro-step; the second is the empty instruction
        return encode_text(self, tokens, *args, **kwargs)

    def image(self: Any, pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        second = f"{recorder.micro_step}.edited" in recorder.tensors
        keep("original" if second else "edited", pixels)
        return encode_image(self, pixels, *args, **kwargs)

    def predict(self: UNet2DConditionModel, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        if recorder.unet is None:
            recorder.unet = self
            start = {name: _kept(value) for name, value in recorder.weights().items()}
            save_file(start, folder / START)
        return forward(self, latents, *args, **kwargs)

    def went_back(self: Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        recorder.micro_step += 1

    def clipped(parameters: Any, *args: Any, **kwargs: Any) -> Tensor:
        named = recorder.weights().items()
        recorder.keep_named(
            "gradient", {name: value.grad for name, value in named if value.grad is not None}
        )
        norm = clip(parameters, *args, **kwargs)
        recorder.keep_named("update", {"grad_norm": norm})
        return norm

    def stepped(optimizer: Optimizer, *_: object) -> None:
        lr = torch.tensor(float(optimizer.param_groups[0]["lr"]), dtype=torch.float64)
        recorder.keep_named("update", {"lr": lr})
        recorder.keep_named("weight", recorder.weights())
        if not averages:
            recorder.end()

    def averaged(self: EMAModel, *args: Any, **kwargs: Any) -> None:
        average(self, *args, **kwargs)
        named = zip(recorder.weights(), self.shadow_params, strict=True)
        recorder.keep_named("average", dict(named))
        recorder.end()

    averages: list[EMAModel] = []
    own_init = EMAModel.__init__

    def made(self: EMAModel, *args: Any, **kwargs: Any) -> None:
        averages.append(self)
        own_init(self, *args, **kwargs)

    changes: tuple[tuple[Any, str, Any], ...] = (
        (torch, "randn_like", with_result("noise", torch.randn_like)),
        (torch, "randint", with_result("timesteps", torch.randint)),
        (torch, "rand", with_result("dropout", torch.rand, among="generator")),  # not the flips
        (vae, "randn_tensor", with_result("posterior", vae.randn_tensor)),
        (F, "mse_loss", with_result("loss", F.mse_loss)),
        (CLIPTextModel, "forward", text),
        (AutoencoderKL, "encode", image),
        (UNet2DConditionModel, "forward", predict),
        (Tensor, "backward", went_back),
        (nn.utils, "clip_grad_norm_", clipped),
        (EMAModel, "__init__", made),
        (EMAModel, "step", averaged),
    )
    hook = register_optimizer_step_post_hook(stepped)
    with ExitStack() as stack:
        for owner, name, changed in changes:
            stack.enter_context(patch.object(owner, name, changed))
        try:
            yield
        finally:
            hook.remove()


def _kept(value: Tensor) -> Tensor:
    """A copy that the script cannot change any more."""
    return value.detach().to("cpu", copy=True).contiguous()
