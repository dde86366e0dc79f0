"""AdamWEma: clip, AdamW, low-precision copy and averages, in one pass over all parameters.

What a step moves: see adamw_ema_kernels. Off the GPU the definition runs, one tensor at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw_ema_kernels import adamw_ema_reference, adamw_scalars, halves_reference, update
from .chunks import (
    OP,
    PER_DRAW,
    Row,
    Tables,
    addresses,
    check_averages,
    check_copies,
    check_parameter,
    check_row,
    tables,
    upload,
)
from .dispatch import check_shape, runs_triton
from .grad_norm import grad_norm, grad_norm_reference
from .philox import MASK

MOMENTS = (torch.float32, torch.bfloat16)
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
# What torch.optim.AdamW keeps in its groups beside the four settings; other values are refused.
LIKE_TORCH = {"amsgrad": False, "maximize": False, "differentiable": False}
LEFT_TO_TORCH = {"foreach": None, "capturable": False, "fused": None}
DECOUPLED = {"decoupled_weight_decay": True}


class Current(NamedTuple):
    """Where all tensors of a step lie, found once for its norm and its update."""

    rows: list[Row]
    tables: Tables


class AdamWEma(torch.optim.Optimizer):
    """torch.optim.AdamW with averages of the parameters, and masters of low-precision ones.

    A bf16 or fp16 parameter has an fp32 master in the state and is itself the copy that is written;
    the master starts as the parameter is now: load the weights first. Moments and masters lie in
    memory as their parameter does and stay where they are: write into them, do not replace them.
    `state_dict` has torch.optim.AdamW's form, with "master" where there is one; either loads the
    other's. A parameter whose gradient is None keeps its moments and count, as in torch.
    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2.

    Args:
        params: parameters, named parameters or groups, as torch.optim.AdamW takes; all given now.
        emas: averages to move with the parameters; each a sequence of fp32 tensors, one for each
            parameter in order, of its shape and strides. They stay the caller's.
        copies: bf16 or fp16 tensors to write the parameters to, for masters that the caller keeps;
            one for each, which must be fp32, of its shape and strides.
        ema_decays: what `step` moves each of them by; `update` takes weights of its own.
        max_norm: global L2 norm that `step` clips to, and it skips a step that is not finite; None
            for neither.
        moments_dtype: fp32, or bf16 rounded up or down by chance, right on average.
        seed: 0 to 2**64 - 1, of those roundings: a function of (seed, purpose, element, count).
        purpose: 0 to 2**32 - 1, keeps these draws apart from others of the seed.

    Raises: ValueError, TypeError, naming what is not served: tensors with gaps, sparse or sharded
        ones (hand in the local shards), several devices, dtypes but fp32, bf16 and fp16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        emas: Sequence[Sequence[Tensor]] = (),
        copies: Sequence[Tensor] | None = None,
        ema_decays: Sequence[float] | None = None,
        max_norm: float | None = None,
        moments_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        purpose: int = 0,
    ) -> None:
        if moments_dtype not in MOMENTS:
            raise TypeError(f"{OP}: moments_dtype must be fp32 or bf16, got {moments_dtype}")
        if not (0 <= seed < 2**64 and 0 <= purpose < 2**32):
            raise ValueError(f"{OP}: seed has 64 bits, purpose 32, got {seed} and {purpose}")
        if ema_decays is not None and len(ema_decays) != len(emas):
            raise ValueError(f"{OP}: {len(emas)} emas need as many ema_decays, got {ema_decays}")
        self.built = False
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | LIKE_TORCH | LEFT_TO_TORCH | DECOUPLED)
        self.built = True
        self.parameters: list[Tensor] = [p for g in self.param_groups for p in g["params"]]
        self.device = self.parameters[0].device
        self.moments_dtype, self.max_norm = moments_dtype, max_norm
        self.seed, self.purpose = seed, purpose
        for parameter in self.parameters:
            check_parameter(parameter, self.device)
        self.averages = [tuple(of_one) for of_one in zip(*emas, strict=True)]
        self.averages = self.averages or [()] * len(self.parameters)
        check_averages(self.parameters, self.averages)
        self.copies = None if copies is None else [copy.detach() for copy in copies]
        if self.copies is not None:
            check_copies(self.parameters, self.copies)
        self._make_state()
        self.ema_weights = torch.tensor([1 - d for d in ema_decays or ()], device=self.device)
        self.ema_decays = ema_decays
        self.always = torch.ones((), dtype=torch.bool, device=self.device)
        self.one = torch.ones((), device=self.device)
        words = [seed & MASK, seed >> 32, purpose]
        self.key = torch.tensor(words, dtype=torch.int64, device=self.device)
        self.tables: Tables | None = None
        self.tables_made = 0
        self.captured: list[Tables] = []  # graphs read them for as long as they are replayed

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{OP}: it is tied to its tensors; copy or save its state_dict()")

    def _make_state(self) -> None:
        sizes = [len(group["params"]) for group in self.param_groups]
        self.group_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.group_of = self.group_of.to(self.device)
        self.lr = torch.zeros(len(sizes), dtype=torch.float64, device=self.device)
        self.settings = self.lr.new_zeros(4, len(sizes))
        self.settings_there: list[tuple[float, ...]] = []
        self.counts = torch.zeros(len(self.parameters), device=self.device)
        for parameter, count in zip(self.parameters, self.counts.unbind(), strict=True):
            detached = parameter.detach()
            state: dict[str, Tensor] = {"step": count}  # every one a place in one tensor
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(detached, dtype=self.moments_dtype)
            if parameter.dtype != torch.float32:
                state["master"] = detached.to(torch.float32, copy=True)
            self.state[parameter] = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.built:
            raise ValueError(f"{OP}: all groups must be given at construction")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        rules = {
            "lr": isinstance(lr, Tensor) or lr >= 0,
            "betas": 0 <= beta1 < 1 and 0 <= beta2 < 1,
            "eps": eps >= 0,
            "weight_decay": group["weight_decay"] >= 0,
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(
                    f"{OP}: {name} must be 0 or more, betas below 1, got {group[name]}"
                )

    def current(self) -> Current:
        """Looks every address up, which is the host's share of a step."""
        with self._on_device():
            rows = self._rows()
            return Current(rows, self._tables_of(rows))

    @torch.no_grad()
    def grad_norm(self, current: Current | None = None) -> Tensor:
        """[] fp32, the L2 norm of all gradients as they lie, by sums in a fixed order.

        Args:
            current: of the gradients as they are now; None looks them up.
        """
        rows, tables = current or self.current()
        if runs_triton(self.counts):
            with self._on_device():
                return grad_norm(tables)
        grads = [row.grad for row in rows if row.grad is not None and row.grad.numel()]
        return grad_norm_reference(grads) if grads else torch.zeros((), device=self.device)

    @torch.no_grad()
    def update(
        self,
        lr: float | Tensor | None,
        grad_factor: Tensor,
        applies: Tensor,
        ema_weights: Tensor | None = None,
        current: Current | None = None,
    ) -> None:
        """Moves parameters, moments, counts and averages; the device alone decides whether.

        Args:
            lr: one for all groups, or [groups] on the device; None for the groups' own. A graph
                replays a number as it was and reads a tensor anew.
            grad_factor: [] fp32; clipping, loss scale and sample count in one.
            applies: [] bool; False leaves every bit of everything, whatever the gradients are.
            ema_weights: [emas] fp32; 1 - decay of each.
            current: as for `grad_norm`.

        Raises: ValueError, if a gradient's strides are not its parameter's, or a tensor's shape,
            dtype or device is another than it must be.
        """
        if ema_weights is None:
            ema_weights = self.one.new_empty(0)
        count = len(self.averages[0])
        self._check("grad_factor", grad_factor, (), torch.float32)
        self._check("applies", applies, (), torch.bool)
        self._check("ema_weights", ema_weights, (count,), torch.float32)
        rows, tables = current or self.current()
        with self._on_device():
            self._write_lr(lr)
            self._write_settings()
            self.counts.add_(tables.has_grad * applies)
            settings = self.settings[:, self.group_of]
            scalars = adamw_scalars(self.counts, self.lr[self.group_of], settings)
            if runs_triton(self.counts):
                update(
                    tables, self.counts, scalars, self.key, grad_factor, applies,
                    ema_weights.contiguous(), self.moments_dtype,
                )  # fmt: skip
                return
        draw = 0
        for row, step, of_row in zip(rows, self.counts, scalars, strict=True):
            halves, size = None, row.parameter.numel()
            if self.moments_dtype == torch.bfloat16:
                halves = halves_reference(size, draw, step, self.seed, self.purpose)
            adamw_ema_reference(row, of_row, grad_factor, applies, ema_weights, halves)
            draw += -(-size // PER_DRAW)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, and only it tells of a capture."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.device(self.device) if on_gpu else nullcontext()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips and checks where `max_norm` is given, then updates by the groups' own lr.

        Raises: ValueError, if there are averages and `ema_decays` was not given.
        """
        if self.averages[0] and self.ema_decays is None:
            raise ValueError(f"{OP}: step moves the averages by ema_decays, which were not given")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        current, factor, applies = self.current(), self.one, self.always
        if self.max_norm is not None:
            norm = self.grad_norm(current)
            factor = (self.max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
            applies = norm.isfinite()
        self.update(None, factor, applies, self.ema_weights, current)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what this class or torch.optim.AdamW gave, into the tensors that are there.

        A parameter without a state starts anew; one without a master takes the parameter's value.

        Raises: ValueError, for other groups, or what torch serves and this class does not.
        """
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"{OP}: groups must have {sizes} parameters, the state has {saved_sizes}"
            )
        for saved in saved_groups:
            for name, value in (LIKE_TORCH | DECOUPLED).items():
                if saved.get(name, value) != value:
                    raise ValueError(f"{OP}: {name} must be {value}, got {saved[name]}")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group |= {name: value for name, value in saved.items() if name != "params"}
        numbers = [number for saved in saved_groups for number in saved["params"]]
        for parameter, number in zip(self.parameters, numbers, strict=True):
            saved = state_dict["state"].get(number, {})
            for name, tensor in self.state[parameter].items():
                if name in saved:
                    value = torch.as_tensor(saved[name])
                    check_shape(OP, f"{name} of parameter {number}", value, tuple(tensor.shape))
                    tensor.copy_(value)
                elif name == "master":
                    tensor.copy_(parameter)
                else:
                    tensor.zero_()

    def _rows(self) -> list[Row]:
        rows = []
        copies = self.copies or [None] * len(self.parameters)
        for parameter, copy, averages in zip(self.parameters, copies, self.averages, strict=True):
            state, moved = self.state[parameter], parameter.detach()
            if "master" in state:
                moved, copy = state["master"], moved
            moments = state["exp_avg"], state["exp_avg_sq"]
            rows.append(Row(parameter.grad, moved, *moments, copy, averages))
        return rows

    def _tables_of(self, rows: list[Row]) -> Tables:
        now = addresses(rows)
        if self.tables is None or self.tables.addresses != now:
            for row in rows:
                check_row(row)
            self.tables = tables(rows, self.device)
            self.tables_made += 1
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.captured.append(self.tables)
        return self.tables

    def _write_lr(self, lr: float | Tensor | None) -> None:
        if isinstance(lr, Tensor):
            if lr.shape not in ((), self.lr.shape):
                raise ValueError(
                    f"{OP}: lr must be [] or {list(self.lr.shape)}, got {list(lr.shape)}"
                )
            self.lr.copy_(lr.expand(len(self.lr)))
            return
        for group, place in zip(self.param_groups, self.lr.unbind(), strict=True):
            value = group["lr"] if lr is None else lr
            place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)

    def _write_settings(self) -> None:
        """[4, groups] fp64: beta1, beta2, eps, weight decay; uploaded where one has changed."""
        now = [(*g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        if self.settings_there != now:
            self.settings.copy_(upload(torch.tensor(now, dtype=torch.float64), self.device).T)
            self.settings_there = now

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check_shape(OP, name, tensor, shape)
        if tensor.dtype != dtype or tensor.device != self.device:
            wanted = f"{dtype} on {self.device}"
            raise ValueError(
                f"{OP}: {name} must be {wanted}, got {tensor.dtype} on {tensor.device}"
            )
