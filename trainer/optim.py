"""AdamW, clipping and the schedule: one update decided on the device, state kept by name."""

from collections.abc import Callable, Iterable

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from .config import OptimConfig
from .errors import UsageError


def schedule(name: str, peak: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate at an optimizer step, from 0, by one of diffusers' schedules."""
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    made = get_scheduler(
        name, unused, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    factor = made.lr_lambdas[0]
    return lambda step: peak * factor(step)


class AdamW:
    """AdamW over named parameters; the device alone decides what a step does.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2.

    Raises: UsageError: 8-bit moments were asked for where bitsandbytes cannot serve them.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], section: OptimConfig) -> None:
        self.parameters = dict(named)
        device = next(iter(self.parameters.values())).device
        self.eight_bit = section.use_8bit_adam
        settings = {
            "betas": (section.adam_beta1, section.adam_beta2),
            "eps": section.adam_epsilon,
            "weight_decay": section.adam_weight_decay,
        }
        if self.eight_bit:
            check_8bit(device.type)
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

            self.optimizer = AdamW8bit(self.parameters.values(), lr=0.0, **settings)
        else:
            lr = torch.zeros((), device=device)  # a tensor: changing it does not wait
            self.optimizer = torch.optim.AdamW(
                self.parameters.values(), lr=lr, fused=True, **settings
            )

    def grad_norm(self) -> Tensor:
        """[] fp32, the L2 norm of all gradients as they lie."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        return nn.utils.get_total_norm(grads)

    def update(self, lr: float, grad_factor: Tensor, applies: Tensor) -> None:
        """Moves the parameters by the gradients times a factor.

        Args:
            grad_factor: [] fp32; clipping, loss scale and sample count in one.
            applies: [] bool; False leaves parameters, moments and Adam's count as they are.
        """
        (group,) = self.optimizer.param_groups
        if self.eight_bit:
            if not applies.item():  # bitsandbytes decides on the host: this one waits
                return
            group["lr"] = lr
            for parameter in self.parameters.values():
                parameter.grad.mul_(grad_factor)  # pyright: ignore
        else:
            group["lr"].fill_(lr)
            # PyTorch's fused step takes both from these two, as its own GradScaler hands them.
            self.optimizer.grad_scale = grad_factor.reciprocal()  # pyright: ignore
            self.optimizer.found_inf = (~applies).float()  # pyright: ignore
        self.optimizer.step()

    def zero_grad(self) -> None:
        # Not to None: DDP's buckets hold the gradients, and accumulation would need a second copy.
        self.optimizer.zero_grad(set_to_none=False)

    def state(self) -> dict[str, Tensor]:
        """{"parameter.moment": tensor}, for instance conv_in.weight.exp_avg."""
        return {
            # bitsandbytes shares quantization maps among parameters; safetensors takes no shares.
            f"{name}.{key}": torch.as_tensor(value).clone() if self.eight_bit else value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave, on any device."""
        for path, value in state.items():
            name, key = path.rsplit(".", 1)
            parameter = self.parameters[name]
            if self.eight_bit and key == "step":
                self.optimizer.state[parameter][key] = int(value)
            else:
                if value.shape == parameter.shape:
                    # The fused step walks through memory: in the parameter's order, not the file's.
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                self.optimizer.state[parameter][key] = value.to(parameter.device)


def check_8bit(device_type: str) -> None:
    """Raises UsageError where --use_8bit_adam cannot be served."""
    if device_type != "cuda":
        raise UsageError("--use_8bit_adam needs a GPU; leave it out on a CPU")
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        raise UsageError(
            "--use_8bit_adam needs bitsandbytes: pip install 'fusedit[8bit]'"
        ) from None
