"""Every op that is timed: what it is, its inputs at a shape, the work it cannot avoid, its rivals.

To add an op, add an entry to OPS. Weights come in the activations' dtype, which PyTorch serves
fastest: beside fp32 weights it would also pay for casts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention_choice
from ..kernels.edit_input import edit_input, edit_input_reference
from ..kernels.geglu import geglu, geglu_reference
from ..kernels.group_norm import (
    add_group_norm,
    add_group_norm_reference,
    group_norm,
    group_norm_reference,
)
from ..kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from ..kernels.weighted_mse import weighted_mse, weighted_mse_reference
from . import attention
from .accuracy import Inputs
from .accuracy import Op as Function
from .others import (
    ATTENTIONS,
    apex_group_norm,
    flash_add_layer_norm,
    flash_layer_norm,
    liger_layer_norm,
)
from .shapes import GROUPS, GroupNormShape, RowShape, Shapes, shapes

PRESETS = {"sd15-256": 32, "sd15-512": 32, "sdxl-1024": 8}  # preset -> batch on a GPU
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORMAL_ULPS = 8  # kernels/philox.py promises them
LATENT_CHANNELS = 4
STEPS = 1000  # of the diffusion
FLOPS_A_BYTE = 256  # of matrix products, in the time of a byte; H100: 790 TFLOP/s, 3 TB/s


@dataclass(frozen=True, slots=True)
class LatentShape:
    times: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Op:
    """One op of the library; a shape is one of its inventory's, with `times`."""

    name: str
    ours: Function
    definition: Function
    shapes: Callable[[Shapes, int], list[Any]]  # of a UNet and the size of its latents
    inputs: Callable[[Any, int, torch.dtype, torch.device], Inputs]  # shape, batch, ...
    keywords: Callable[[Any, torch.dtype], dict[str, Any]] = lambda shape, dtype: {}
    # Least bytes and operations of (forward, backward), from the inputs; a fused pass is assumed.
    least_bytes: Callable[[Inputs], tuple[int, int]]
    flops: Callable[[Inputs], tuple[int, int]]
    rivals: dict[str, Function | None] = field(default_factory=dict)  # None: not installed
    normal_ulps: int = 0
    kernel_dtypes: tuple[str, ...] = tuple(DTYPES)  # what runs as kernels; the definition has all


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An op at a shape, ready to run."""

    op: Op
    preset: str
    shape: Any
    batch: int
    dtype: str

    @property
    def labels(self) -> dict[str, str | int]:
        inputs = self.inputs("meta")
        dims = "x".join(str(size) for size in next(iter(inputs.values())).shape)
        extra = [name for name, value in self.keywords.items() if value is True]
        extra += ["add"] if "add" in inputs else []
        extra += [f"{inputs['k'].shape[1]}keys"] if "k" in inputs else []
        shape = "+".join([dims, *extra])
        return {"op": self.op.name, "preset": self.preset, "shape": shape, "dtype": self.dtype}

    @property
    def keywords(self) -> dict[str, Any]:
        return self.op.keywords(self.shape, DTYPES[self.dtype])

    def inputs(self, device: torch.device | str) -> Inputs:
        """Fresh random inputs."""
        return self.op.inputs(self.shape, self.batch, DTYPES[self.dtype], torch.device(device))

    def bind(self, function: Function) -> Function:
        """The function of the inputs alone."""
        keywords = self.keywords

        def bound(**inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            return function(**inputs, **keywords)

        return bound


def cases(names: list[str], presets: list[str], batch: int | None, dtype: str) -> Iterator[Case]:
    """Every shape of some ops and presets, in each preset those with most work first."""
    for preset in presets:
        latent_size = int(preset.partition("-")[2]) // 8
        every = []
        for name in names:
            op = OPS[name]
            for shape in op.shapes(shapes(preset), latent_size):
                size = batch or PRESETS.get(preset, 8)
                every.append(Case(op=op, preset=preset, shape=shape, batch=size, dtype=dtype))
        yield from sorted(every, key=step_work, reverse=True)


def step_work(case: Case) -> float:
    """What bounds the case in a step, bytes or matrix products, in bytes."""
    inputs = case.inputs("meta")
    flops = sum(case.op.flops(inputs)) / FLOPS_A_BYTE
    return case.shape.times * max(sum(case.op.least_bytes(inputs)), flops)


def _passes(forward: int, backward: int) -> Callable[[Inputs], tuple[int, int]]:
    """Bytes, in passes over the first input; weights and statistics are nothing beside it."""

    def bytes_of(inputs: Inputs) -> tuple[int, int]:
        size = next(iter(inputs.values())).nbytes
        return forward * size, backward * size

    return bytes_of


def _operations(forward: int, backward: int) -> Callable[[Inputs], tuple[int, int]]:
    """Operations an element of the first input."""

    def flops_of(inputs: Inputs) -> tuple[int, int]:
        count = next(iter(inputs.values())).numel()
        return forward * count, backward * count

    return flops_of


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _norm_weights(width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    weight = 1 + 0.1 * _random(width, dtype=dtype, device=device)
    bias = 0.1 * _random(width, dtype=dtype, device=device)
    return {"weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def _image(shape: GroupNormShape, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    sizes = (batch, shape.channels, shape.size, shape.size)
    image = _random(*sizes, dtype=dtype, device=device)
    return image.contiguous(memory_format=torch.channels_last).requires_grad_()


def _group_norm_inputs(
    shape: GroupNormShape, batch: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    inputs = {"x": _image(shape, batch, dtype, device)}
    inputs |= _norm_weights(shape.channels, dtype, device)
    if shape.time_embedding:
        add = _random(batch, shape.channels, dtype=dtype, device=device)
        inputs["add"] = add.requires_grad_()
    return inputs


def _add_group_norm_inputs(
    shape: GroupNormShape, batch: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    inputs = {"x": _image(shape, batch, dtype, device)}
    inputs["residual"] = _image(shape, batch, dtype, device)
    return inputs | _norm_weights(shape.channels, dtype, device)


def _norm_keywords(shape: GroupNormShape, dtype: torch.dtype) -> dict[str, Any]:
    return {"groups": GROUPS, "eps": shape.eps, "silu": shape.silu}


def _row_inputs(shape: RowShape, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows = (batch, shape.tokens, shape.width)
    inputs = {"x": _random(*rows, dtype=dtype, device=device).requires_grad_()}
    return inputs | _norm_weights(shape.width, dtype, device)


def _two_row_inputs(
    shape: RowShape, batch: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    inputs = _row_inputs(shape, batch, dtype, device)
    residual = torch.randn_like(inputs["x"], requires_grad=True)
    return {"x": inputs["x"], "residual": residual} | inputs


def _geglu_inputs(shape: RowShape, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    projected = _random(batch, shape.tokens, 2 * shape.width, dtype=dtype, device=device)
    return {"projected": projected.requires_grad_()}


def _edit_inputs(
    shape: LatentShape, batch: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    latents = (batch, LATENT_CHANNELS, shape.size, shape.size)
    moments = {
        name: _random(*latents, dtype=dtype, device=device)
        for name in ("target_mean", "target_std", "condition")
    }
    return moments | {
        "positions": torch.arange(batch, device=device),
        "timesteps": torch.randint(0, STEPS, (batch,), device=device),
        "drop_image": torch.arange(batch, device=device) % 8 == 0,
        "signal": torch.linspace(1, 0, STEPS, device=device),
        "noise": torch.linspace(0, 1, STEPS, device=device),
    }


def _edit_keywords(shape: LatentShape, dtype: torch.dtype) -> dict[str, Any]:
    purposes = {"posterior_purpose": 6, "noise_purpose": 7}
    options = {"latent_scale": 0.18215, "prediction_type": "epsilon", "dtype": dtype}
    return {"seed": 42, **purposes, **options}


def _edit_bytes(inputs: Inputs) -> tuple[int, int]:
    """Reads three latents, writes two in their dtype and an fp32 target."""
    latents = inputs["target_mean"]
    return 5 * latents.nbytes + 4 * latents.numel(), 0


def _mse_inputs(shape: LatentShape, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    latents = (batch, LATENT_CHANNELS, shape.size, shape.size)
    images = torch.channels_last
    predicted = _random(*latents, dtype=dtype, device=device).contiguous(memory_format=images)
    target = _random(*latents, dtype=torch.float32, device=device)
    return {
        "predicted": predicted.requires_grad_(),
        "target": target.contiguous(memory_format=images),
        "weights": torch.rand(batch, device=device) / batch,
    }


def _mse_bytes(inputs: Inputs) -> tuple[int, int]:
    """predicted, target -> slope in fp32; slope -> gradient."""
    predicted, slopes = inputs["predicted"].nbytes, inputs["target"].nbytes
    return predicted + 2 * slopes, slopes + predicted


OPS = {
    op.name: op
    for op in (
        Op(
            name="group_norm",
            ours=group_norm,
            definition=group_norm_reference,
            shapes=lambda unet, latent_size: unet.group_norms,
            inputs=_group_norm_inputs,
            keywords=_norm_keywords,
            # Two passes: x, x -> out; x, grad, x, grad -> grad of x.
            least_bytes=_passes(3, 5),
            flops=_operations(12, 30),
            rivals={"apex": apex_group_norm},
        ),
        Op(
            name="add_group_norm",
            ours=add_group_norm,
            definition=add_group_norm_reference,
            shapes=lambda unet, latent_size: [s for s in unet.group_norms if not s.time_embedding],
            inputs=_add_group_norm_inputs,
            keywords=_norm_keywords,
            # x, residual -> sum; sum -> out; sum, grad, sum, grad, grad of sum -> one gradient.
            least_bytes=_passes(5, 6),
            flops=_operations(13, 31),
        ),
        Op(
            name="layer_norm",
            ours=layer_norm,
            definition=layer_norm_reference,
            shapes=lambda unet, latent_size: unet.layer_norms,
            inputs=_row_inputs,
            least_bytes=_passes(2, 3),  # x -> out; x, grad -> grad of x
            flops=_operations(8, 14),
            rivals={"flash-attn": flash_layer_norm, "liger": liger_layer_norm},
        ),
        Op(
            name="add_layer_norm",
            ours=add_layer_norm,
            definition=add_layer_norm_reference,
            shapes=lambda unet, latent_size: unet.layer_norms,
            inputs=_two_row_inputs,
            # x, residual -> sum, out; sum, grad, grad of sum -> one gradient for both.
            least_bytes=_passes(4, 4),
            flops=_operations(9, 15),
            rivals={"flash-attn": flash_add_layer_norm},
        ),
        Op(
            name="geglu",
            ours=geglu,
            definition=geglu_reference,
            shapes=lambda unet, latent_size: unet.geglus,
            inputs=_geglu_inputs,
            # In halves of the input: 2 -> 1; 3 -> 2.
            least_bytes=lambda inputs: (
                inputs["projected"].nbytes * 3 // 2,
                inputs["projected"].nbytes * 5 // 2,
            ),
            flops=_operations(10, 20),
        ),
        Op(
            name="attention",
            ours=attention.ours,
            definition=attention.definition,
            shapes=lambda unet, latent_size: unet.attentions,
            inputs=attention.inputs,
            least_bytes=attention.least_bytes,
            flops=attention.flops,
            rivals=ATTENTIONS,
            kernel_dtypes=tuple(attention_choice.DTYPES.values()),
        ),
        Op(
            name="edit_input",
            ours=edit_input,
            definition=edit_input_reference,
            shapes=lambda unet, latent_size: [LatentShape(1, latent_size)],
            inputs=_edit_inputs,
            keywords=_edit_keywords,
            least_bytes=_edit_bytes,
            flops=_operations(120, 0),  # two normals: half a Philox block each, log, sine, cosine
            normal_ulps=NORMAL_ULPS,
        ),
        Op(
            name="weighted_mse",
            ours=weighted_mse,
            definition=weighted_mse_reference,
            shapes=lambda unet, latent_size: [LatentShape(1, latent_size)],
            inputs=_mse_inputs,
            least_bytes=_mse_bytes,
            flops=_operations(5, 1),
        ),
    )
}
