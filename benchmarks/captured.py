"""The kernels as the ops launch them, recorded on a machine without a GPU and not run.

Every op runs forward and backward over the UNets' shapes on CPU tensors. In place of a launch the
recorder keeps what the JIT would give to the compiler: types, 16-byte alignment, divisibility by
16, ones turned into constants, the configuration of the family's table. What tensors hold is
whatever the memory held, and nothing depends on it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ..kernels import (
    adamw_ema,
    attention,
    dispatch,
    edit_input,
    geglu,
    group_norm,
    layer_norm,
    tables,
    weighted_mse,
)
from .shapes import GROUPS, AttentionShape, GroupNormShape, RowShape, shapes

PRESETS = ("sd15-256", "sd15-512", "sdxl-1024")
UNEVEN = [  # lengths of no tile, few keys and many, and head widths between the UNets'
    AttentionShape(1, 8, width, 300, keys)
    for width in (8, 40, 64, 80, 96, 128, 136, 160)
    for keys in (7, 32, 77, 96, 128, 300)
]
BATCH = 2  # as an argument, 1 would become a constant
MAIN = torch.bfloat16  # activations under autocast, with weights in fp32; every shape
SIZES = [32, 64, 128]  # of the latents, height and width
WIDER = [RowShape(1, 256, width) for width in (2560, 5120, 8192)]  # what LayerNorm serves beside


def target(family: str) -> GPUTarget:
    """The compiler's target for a table: sm_90 is compute capability 9.0."""
    return GPUTarget("cuda", int(family.removeprefix("sm_")), 32)


@dataclass(frozen=True, slots=True)
class Launch:
    """One specialization of a kernel: all that its machine code depends on, and plain data."""

    module: str
    function: str
    signature: dict[str, str]  # parameter -> "*bf16", "i32", "constexpr"
    constants: dict[tuple[int, ...], Any]  # position -> value
    attributes: dict[tuple[int, ...], list]  # position -> divisibility by 16
    options: dict[str, Any]  # num_warps, num_stages

    @property
    def kernel(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.function}"

    @property
    def arguments(self) -> str:
        """Types in order, with :16 where address or value is a multiple of 16; x4 for four."""
        kinds = [
            kind + (":16" if self.attributes.get((index,)) else "")
            for index, kind in enumerate(self.signature.values())
            if kind != "constexpr"
        ]
        runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
        return " ".join(kind if count == 1 else f"{kind} x{count}" for kind, count in runs)

    @property
    def configuration(self) -> str:
        names = list(self.signature)
        constants = {names[path[0]]: value for path, value in self.constants.items()}
        return " ".join(f"{name}={value}" for name, value in (constants | self.options).items())

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.arguments, self.configuration


Entry = tuple[str, tuple[tuple[str, int], ...]]  # a kernel's name in the tables, its blocks


@dataclass
class Captured:
    launches: dict[tuple[str, str, str], Launch] = field(default_factory=dict)  # by key
    picked: set[Entry] = field(default_factory=set)

    def unreached(self, family: str) -> list[Entry]:
        """What the family's table holds and no launch has used."""
        committed = [
            entry(kernel, values)
            for kernel, listed in tables.entries(family).items()
            for values in listed
        ]
        return [one for one in committed if one not in self.picked]


def entry(kernel: str, values: dict) -> Entry:
    return kernel, tuple((name, value) for name, value in values.items() if name != "up_to")


@contextmanager
def recorded(family: str) -> Iterator[Captured]:
    """Inside, ops launch into the record, configured as on a GPU of the family."""
    captured, backend, pick = Captured(), make_backend(target(family)), tables.pick

    def record(kernel: JITFunction, *arguments, grid, warmup, **named):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*arguments, **named)
        _, signature, constants, attributes = kernel._pack_args(
            backend, named, bound, specialization, options
        )
        module, function = kernel.fn.__module__, kernel.fn.__name__
        launch = Launch(module, function, signature, constants, attributes, options)
        captured.launches.setdefault(launch.key, launch)

    def picking(kernel: str, device: torch.device, **sizes: int) -> dict[str, int]:
        blocks = pick(kernel, device, **sizes)
        captured.picked.add(entry(kernel, blocks))
        return blocks

    with ExitStack() as stack:
        stack.enter_context(patch.object(dispatch, "INTERPRETED", True))
        stack.enter_context(patch.object(tables, "family", lambda device: family))
        stack.enter_context(patch.object(JITFunction, "run", record))
        ours = [m for name, m in sys.modules.items() if name.startswith(f"{tables.__package__}.")]
        for module in ours:
            if vars(module).get("pick") is pick:
                stack.enter_context(patch.object(module, "pick", picking))
        yield captured


def captured(family: str, ops: Sequence[str]) -> Captured:
    """All launches of the ops over the UNets' shapes."""
    with recorded(family) as record:
        for op in ops:
            case = CASES[op]
            for shape in case.shapes:
                case.run(shape, MAIN)
            for dtype in case.others:
                case.run(case.shapes[0], dtype)
    return record


def _there_and_back(op: Callable, *inputs: Any, **options: Any) -> None:
    """The op's forward, and its backward for the inputs that require a gradient."""
    outputs = op(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [output for output in outputs if output.requires_grad]
    given = (*inputs, *options.values())
    leaves = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])


def _geglu(shape: RowShape, dtype: torch.dtype) -> None:
    projected = torch.empty(BATCH, shape.tokens, 2 * shape.width, dtype=dtype, requires_grad=True)
    _there_and_back(geglu.geglu, projected)


def _group_norm(shape: GroupNormShape, dtype: torch.dtype, *, nchw: bool = False) -> None:
    channels, size = shape.channels, shape.size
    layout = torch.contiguous_format if nchw else torch.channels_last
    x, residual = (
        torch.empty(BATCH, channels, size, size, dtype=dtype)
        .to(memory_format=layout)
        .requires_grad_()
        for _ in range(2)
    )
    weight, bias = _affine(channels)
    embedding = torch.empty(BATCH, channels, dtype=dtype, requires_grad=True)
    options = {"groups": GROUPS, "eps": shape.eps, "silu": shape.silu}
    if shape.time_embedding:
        _there_and_back(group_norm.group_norm, x, weight, bias, add=embedding, **options)
    else:
        _there_and_back(group_norm.group_norm, x, weight, bias, **options)
        _there_and_back(group_norm.add_group_norm, x, residual, weight, bias, **options)


def _layer_norm(shape: RowShape, dtype: torch.dtype) -> None:
    x, residual = (
        torch.empty(BATCH, shape.tokens, shape.width, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    weight, bias = _affine(shape.width)
    _there_and_back(layer_norm.layer_norm, x, weight, bias)
    _there_and_back(layer_norm.add_layer_norm, x, residual, weight, bias)


def _edit_input(size: int, dtype: torch.dtype) -> None:
    mean, std, condition = (torch.empty(BATCH, 4, size, size, dtype=dtype) for _ in range(3))
    positions, timesteps = (torch.zeros(BATCH, dtype=torch.int64) for _ in range(2))
    dropped = torch.zeros(BATCH, dtype=torch.bool)
    signal, noise = torch.empty(1000), torch.empty(1000)
    more: dict[str, Any] = {"noise_offset": 0.1, "input_perturbation": 0.1}
    for prediction, amounts in product(("epsilon", "v_prediction"), ({}, more)):
        edit_input.edit_input(
            mean, std, condition, positions, timesteps, dropped, signal, noise,
            seed=2**63, posterior_purpose=3, noise_purpose=4, latent_scale=0.18215,
            prediction_type=prediction, dtype=dtype, **amounts,
        )  # fmt: skip


def _weighted_mse(size: int, dtype: torch.dtype) -> None:
    layout = torch.channels_last
    predicted, target = (
        torch.empty(BATCH, 4, size, size, dtype=kind).to(memory_format=layout)
        for kind in (dtype, torch.float32)
    )
    weights = torch.empty(BATCH)
    _there_and_back(weighted_mse.weighted_mse, predicted.requires_grad_(), target, weights)


def _adamw_ema(averages: int, dtype: torch.dtype) -> None:
    """A gradient at a multiple of 16 bytes, and one that is not, as in a bucket of DDP's."""
    for moments in (torch.float32, torch.bfloat16):
        parameters = [torch.zeros(size, dtype=dtype, requires_grad=True) for size in (70_000, 4096)]
        bucket = torch.zeros(80_000, dtype=dtype)
        parameters[0].grad, parameters[1].grad = bucket[:70_000], bucket[70_001 : 70_001 + 4096]
        emas = [[torch.zeros(one.shape) for one in parameters] for _ in range(averages)]
        adamw_ema.AdamWEma(
            parameters, emas=emas, ema_decays=[0.999] * averages, max_norm=1.0,
            moments_dtype=moments,
        ).step()  # fmt: skip


def _attention(shape: AttentionShape, dtype: torch.dtype) -> None:
    """Packed, as `fuse` calls it, and with several programs a head in the backward."""
    queries = BATCH, shape.queries, shape.heads, shape.width
    if shape.keys == shape.queries:
        packed = torch.empty(*queries[:2], 3, *queries[2:], dtype=dtype, requires_grad=True)
        _there_and_back(attention.attention, packed)
    else:
        q = torch.empty(queries, dtype=dtype, requires_grad=True)
        sizes = BATCH, shape.keys, 2, shape.heads, shape.width
        _there_and_back(attention.attention, q, torch.empty(sizes, dtype=dtype, requires_grad=True))


def _affine(width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias as autocast leaves them, in fp32."""
    return torch.empty(width, requires_grad=True), torch.empty(width, requires_grad=True)


def _distinct(kind: str) -> list:
    """Every shape of the UNets that is in the list: "group_norms", or another of Shapes."""
    return list(dict.fromkeys(s for preset in PRESETS for s in getattr(shapes(preset), kind)))


class Case(NamedTuple):
    run: Callable[[Any, torch.dtype], None]  # called with one of the shapes
    shapes: list
    others: tuple[torch.dtype, ...] = ()  # dtypes beside MAIN, of the first shape alone


CASES = {
    "geglu": Case(_geglu, _distinct("geglus"), (torch.float32, torch.float16)),
    "group_norm": Case(_group_norm, _distinct("group_norms")),
    "group_norm_nchw": Case(partial(_group_norm, nchw=True), _distinct("group_norms")[:1]),
    "layer_norm": Case(_layer_norm, _distinct("layer_norms") + WIDER, (torch.float32,)),
    "attention": Case(_attention, _distinct("attentions") + UNEVEN, (torch.float16,)),
    "edit_input": Case(_edit_input, SIZES),
    "weighted_mse": Case(_weighted_mse, SIZES),
    "adamw_ema": Case(_adamw_ema, [1, 0, 2, 3], (torch.float32,)),
}
