"""The one-pass optimizer against torch.optim.AdamW, clip_grad_norm_ and lerp, in fp64 and fp32."""

import copy
from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from accuracy import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import DTYPES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedit.kernels import chunks
from fusedit.kernels.adamw_ema import AdamWEma
from fusedit.kernels.adamw_ema_kernels import round_by_chance
from fusedit.kernels.grad_norm import grad_norm_reference
from fusedit.kernels.philox import words

CHUNK = 4096  # the true one takes the interpreter 64 blocks
SIZES = [(0,), (1,), (4,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (2, CHUNK), (320,)]
DECAYS = [0.5, 0.999]
SETTINGS = {"lr": 3e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", CHUNK)


def parameters(dtype: torch.dtype, device: str, sizes=SIZES) -> list[nn.Parameter]:
    """One of each size, one channels_last, and one that starts off 16 bytes."""
    made = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    made.append(torch.randn(8, 6, 3, 3, dtype=dtype, device=device))
    made[-1] = made[-1].to(memory_format=torch.channels_last)
    made.append(torch.randn(49, dtype=dtype, device=device)[1:])
    return [nn.Parameter(value) for value in made]


def fill_grads(of: list[nn.Parameter], scale: float = 1.0) -> list[Tensor]:
    for parameter in of:
        parameter.grad = torch.randn_like(parameter) * scale
    return [parameter.grad for parameter in of if parameter.grad is not None]


def copies(of: list[nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().to(dtype, copy=True)) for parameter in of]


def everything(optimizer: AdamWEma) -> list[Tensor]:
    """Copies of all that a step can move."""
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    averages = [tensor for of_one in optimizer.averages for tensor in of_one]
    return [t.detach().clone() for t in (*optimizer.parameters, *states, *averages)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor[None].view(torch.uint8)


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


class Torch:
    """The same steps by torch's own parts, in a dtype."""

    def __init__(self, start: list[nn.Parameter], dtype: torch.dtype, emas: int = 0) -> None:
        self.parameters = copies(start, dtype)
        self.optimizer = torch.optim.AdamW(self.parameters, **SETTINGS)
        self.averages = [copies(start, dtype) for _ in range(emas)]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], max_norm: float = torch.inf) -> Tensor:
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = None if grad is None else grad.to(parameter.dtype, copy=True)
        norm = nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.optimizer.step()
        for averages, decay in zip(self.averages, DECAYS, strict=False):
            for average, parameter in zip(averages, self.parameters, strict=True):
                average.lerp_(parameter, 1 - decay)
        return norm


def master(optimizer: AdamWEma, parameter: Tensor) -> Tensor:
    return optimizer.state[parameter].get("master", parameter.detach())


def compare(optimizer: AdamWEma, fp64: Torch, fp32: Torch) -> None:
    for index, parameter in enumerate(optimizer.parameters):
        for key in ("exp_avg", "exp_avg_sq"):
            truth, torch_says = (
                run.optimizer.state[run.parameters[index]][key] for run in (fp64, fp32)
            )
            assert_close_to_truth(key, optimizer.state[parameter][key], torch_says, truth)
        ours = (master(optimizer, parameter), *optimizer.averages[index])
        truths, torchs = (
            (run.parameters[index].detach(), *(a[index].detach() for a in run.averages))
            for run in (fp64, fp32)
        )
        for value, torch_says, truth in zip(ours, torchs, truths, strict=True):
            assert_close_to_truth("parameter or average", value, torch_says, truth)
        assert torch.equal(parameter.detach(), ours[0].to(parameter.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_steps_match_torch(dtype, device, launches):
    ours = parameters(dtype, device)
    emas = [[p.detach().float().clone() for p in ours] for _ in DECAYS]
    fp64, fp32 = Torch(ours, torch.float64, 2), Torch(ours, torch.float32, 2)
    optimizer = AdamWEma(ours, **SETTINGS, emas=emas, ema_decays=DECAYS, max_norm=1.0)
    for number in range(10):
        grads = fill_grads(ours, 1e-3 if number % 2 else 1.0)  # every other one is not clipped
        norm = optimizer.grad_norm()
        optimizer.step()
        truth = fp64.step(grads, 1.0)
        assert_close_to_truth("norm", norm, fp32.step(grads, 1.0), truth)
    assert {"_kernel", "_partial_kernel", "_total_kernel"} == set(launches)
    compare(optimizer, fp64, fp32)


def test_the_definition_and_the_kernel_agree(device, monkeypatch):
    results = []
    for on_device in (True, False):
        if not on_device:
            monkeypatch.setattr("fusedit.kernels.adamw_ema.runs_triton", lambda tensor: False)
        torch.manual_seed(0)
        ours = parameters(torch.bfloat16, device)
        emas = [[p.detach().float().clone() for p in ours]]
        optimizer = AdamWEma(
            ours,
            emas=emas,
            ema_decays=[0.9],
            max_norm=1.0,
            moments_dtype=torch.bfloat16,
            seed=2**40,
        )
        for _ in range(2):
            fill_grads(ours)
            norm = optimizer.grad_norm()
            optimizer.step()
        results.append([norm, *everything(optimizer)])
    for ours, definition in zip(*results, strict=True):
        # Off by one rounding of the fp32 value, a moment may round to its bf16 neighbour.
        few = (ours.float() - definition.float()).abs() > 1e-5 * definition.float().abs() + 1e-7
        assert few.sum() <= 1 + ours.numel() // 1000
        torch.testing.assert_close(ours, definition, rtol=1e-2, atol=1e-6)


def test_fp32_parameters_take_bf16_gradients(device):
    ours = parameters(torch.float32, device)
    fp64, fp32 = Torch(ours, torch.float64), Torch(ours, torch.float32)
    optimizer = AdamWEma(ours, **SETTINGS)
    for parameter in ours:
        parameter.grad_dtype = torch.bfloat16
    for _ in range(2):
        grads = [torch.randn_like(p, dtype=torch.bfloat16) for p in ours]
        for parameter, grad in zip(ours, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        fp64.step(grads)
        fp32.step(grads)
    compare(optimizer, fp64, fp32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_that_the_caller_keeps_are_written_to_their_copies(dtype, device, launches):
    ours = parameters(torch.float32, device)
    low = [parameter.detach().to(dtype) for parameter in ours]
    fp64, fp32 = Torch(ours, torch.float64), Torch(ours, torch.float32)
    optimizer = AdamWEma(ours, copies=low, **SETTINGS)
    for _ in range(3):
        grads = fill_grads(ours)
        current = optimizer.current()  # found once for both
        optimizer.grad_norm(current)
        optimizer.update(None, optimizer.one, optimizer.always, current=current)
        fp64.step(grads)
        fp32.step(grads)
    assert optimizer.tables_made <= 3
    compare(optimizer, fp64, fp32)
    assert launches
    for parameter, copy_ in zip(ours, low, strict=True):
        assert torch.equal(copy_, parameter.detach().to(dtype))


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.3, 0.4)], ids=str)
def test_any_beta_and_no_decay(betas, device):
    (ours,) = parameters(torch.float32, device, sizes=[])[:1]
    others = copies([ours], torch.float64) + copies([ours], torch.float32)
    choice = {"lr": 1e-2, "betas": betas, "weight_decay": 0.0}
    optimizer = AdamWEma([ours], **choice)
    theirs = [torch.optim.AdamW([other], **choice) for other in others]
    for number in range(3):
        (grad,) = fill_grads([ours], 10.0**-number)
        for other, its in zip(others, theirs, strict=True):
            other.grad = grad.to(other.dtype)
            its.step()
        optimizer.step()
    assert_close_to_truth("parameter", ours.detach(), others[1].detach(), others[0].detach())


def test_a_step_that_does_not_apply_leaves_every_bit(device):
    for moments in (torch.float32, torch.bfloat16):
        ours = parameters(torch.bfloat16, device, sizes=[(4,), (CHUNK + 1,)])
        emas = [[p.detach().float().clone() for p in ours]]
        options = {"emas": emas, "ema_decays": [0.9], "max_norm": 1.0, "moments_dtype": moments}
        optimizer = AdamWEma(ours, lr=0.1, **options)
        fill_grads(ours)
        optimizer.step()
        before = everything(optimizer)
        for value in (torch.nan, torch.inf):
            assert ours[1].grad is not None
            ours[1].grad.view(-1)[7] = value
            optimizer.step()
            assert not optimizer.grad_norm().isfinite()
            no = torch.zeros((), dtype=torch.bool, device=device)
            factor = torch.full((), value, device=device)
            optimizer.update(1e-3, factor, no, torch.full((1,), value, device=device))
        assert all_equal(before, everything(optimizer))
        fill_grads(ours)
        optimizer.step()
        assert not any(
            torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True)
        )


def test_without_max_norm_nothing_is_held_back(device):
    ours = nn.Parameter(torch.randn(8, device=device))
    optimizer = AdamWEma([ours])
    ours.grad = torch.full((8,), torch.nan, device=device)
    optimizer.step()
    assert ours.isnan().all()


def test_groups_have_their_own_settings(device):
    first, second = parameters(torch.float32, device, sizes=[])
    groups = [{"lr": 1e-2, "weight_decay": 0.5, "eps": 1e-3}, {"lr": 1e-3, "betas": (0.5, 0.9)}]
    runs = []
    for kind in (AdamWEma, torch.optim.AdamW):
        own = copies([first, second], torch.float32)
        made = [{"params": [p], **group} for p, group in zip(own, groups, strict=True)]
        runs.append((own, kind(made)))
    for number in range(4):
        grads = [torch.randn_like(first), torch.randn_like(second)]
        for own, optimizer in runs:
            for parameter, grad in zip(own, grads, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
            optimizer.param_groups[number % 2]["lr"] *= 0.5  # a schedule
            optimizer.param_groups[1]["weight_decay"] += 0.1
    torch.testing.assert_close(*([p.detach() for p in own] for own, _ in runs))
    assert runs[0][1].tables_made > 0


def test_the_learning_rate_is_a_number_or_a_tensor(device):
    results = []
    one, yes = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
    start, grad = torch.randn(2, 40, device=device), torch.randn(40, device=device)
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25, 0.25]), None, torch.tensor([0, 0.25])):
        ours = [nn.Parameter(row.clone()) for row in start]
        optimizer = AdamWEma([{"params": [p], "lr": 0.25} for p in ours])
        for parameter in ours:
            parameter.grad = grad
        optimizer.update(lr.to(device) if isinstance(lr, Tensor) else lr, one, yes)
        results.append([p.detach() for p in ours])
    assert all(all_equal(results[0], other) for other in results[1:4])
    assert torch.equal(results[4][0], start[0])
    assert torch.equal(results[4][1], results[0][1])


def test_a_parameter_without_gradient_waits_and_its_average_follows(device):
    ours = parameters(torch.float32, device, sizes=[(CHUNK + 1,), (4,)])
    emas = [[torch.zeros_like(p) for p in ours] for _ in DECAYS]
    fp64, fp32 = Torch(ours, torch.float64, 2), Torch(ours, torch.float32, 2)
    for run in (fp64, fp32):
        for averages in run.averages:
            for average in averages:
                average.detach().zero_()
    optimizer = AdamWEma(ours, **SETTINGS, emas=emas, ema_decays=DECAYS)
    for number in range(5):
        grads: list[Tensor | None] = [*fill_grads(ours)]
        if number % 2:
            ours[0].grad = grads[0] = None
            ours[2].grad = grads[2] = None
        assert_close_to_truth(
            "norm",
            optimizer.grad_norm(),
            grad_norm_reference([g for g in grads if g is not None]),
            fp64.step(grads),
        )
        fp32.step(grads)
        optimizer.step()
    compare(optimizer, fp64, fp32)
    assert [float(optimizer.state[p]["step"]) for p in ours] == [3, 5, 3, 5]


def test_no_gradients_at_all(device):
    ours = parameters(torch.float32, device, sizes=[])
    optimizer = AdamWEma(ours, max_norm=1.0)
    before = everything(optimizer)
    assert optimizer.grad_norm() == 0
    optimizer.step()
    assert all_equal(before, everything(optimizer))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_two_runs_and_any_alignment_are_equal(moments, device):
    runs = []
    for start in (0, 0, 1):
        torch.manual_seed(0)
        ours = [nn.Parameter(torch.randn(size, device=device)) for size in (CHUNK, 4, 48)]
        emas = [[p.detach().clone() for p in ours]]
        options = {"emas": emas, "ema_decays": [0.9], "max_norm": 1.0, "moments_dtype": moments}
        optimizer = AdamWEma(ours, **options)
        for _ in range(2):
            for parameter in ours:
                place = torch.empty(parameter.numel() + 1, device=device)[start:]
                parameter.grad = place[: parameter.numel()].copy_(torch.randn_like(parameter))
            norm = optimizer.grad_norm()
            optimizer.step()
        assert optimizer.tables is not None
        aligned = {launch.aligned for launch in optimizer.tables.launches}
        assert aligned == ({False} if start else {True, False})
        runs.append([norm, *everything(optimizer)])
    assert all_equal(runs[0], runs[1])
    assert all_equal(runs[0], runs[2])


def test_saves_to_torch_and_loads_from_it(device):
    ours = parameters(torch.float32, device, sizes=[(4,), (CHUNK + 1,)])
    theirs = copies(ours, torch.float32)
    first: list = [AdamWEma(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)]
    for steps, kinds in ((3, None), (3, (torch.optim.AdamW, AdamWEma)), (2, None)):
        if kinds:  # each goes on from what the other saved
            saved = [deepcopy(optimizer.state_dict()) for optimizer in first]
            assert saved[0]["state"].keys() == saved[1]["state"].keys()
            assert all(
                saved[0]["state"][i].keys() == saved[1]["state"][i].keys()
                for i in saved[0]["state"]
            )
            assert saved[0]["param_groups"][0].keys() == saved[1]["param_groups"][0].keys()
            first = [kind(p, lr=1.0) for kind, p in zip(kinds, (ours, theirs), strict=True)]
            for optimizer, state in zip(first, saved, strict=True):
                optimizer.load_state_dict(state)
        for _ in range(steps):
            grads = fill_grads(ours)
            for parameter, grad in zip(theirs, grads, strict=True):
                parameter.grad = grad.clone()
            for optimizer in first:
                optimizer.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs])


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_with_the_same_bits(moments, device):
    ours = parameters(torch.bfloat16, device, sizes=[(4,), (CHUNK + 1,)])
    whole = AdamWEma(ours, moments_dtype=moments, seed=5)
    fill_grads(ours)
    whole.step()
    saved, weights = deepcopy(whole.state_dict()), copies(ours, torch.bfloat16)
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    resumed = AdamWEma(weights, moments_dtype=moments, seed=5)
    resumed.load_state_dict(saved)
    for mine, other in zip(ours, weights, strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone(memory_format=torch.preserve_format)
    whole.step()
    resumed.step()
    assert all_equal(everything(whole), everything(resumed))


def test_a_state_without_masters_takes_the_parameters(device):
    ours = nn.Parameter(torch.ones(8, dtype=torch.bfloat16, device=device))
    optimizer = AdamWEma([ours])
    ours.data.fill_(2.0)
    groups = torch.optim.AdamW([ours]).state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    assert (optimizer.state[ours]["master"] == 2.0).all()


@given(st.floats(width=32, allow_nan=False), st.integers(0, 2**16 - 1))
@settings(max_examples=50, deadline=None)
def test_rounds_to_a_neighbour_and_leaves_what_bf16_holds(value, half):
    number = torch.tensor([value], dtype=torch.float32)
    rounded = round_by_chance(number, torch.tensor([half])).float()
    spacing = 2**16  # of bf16 in the bits of fp32
    distance = rounded.view(torch.int32).long() - number.view(torch.int32).long()
    assert abs(int(distance)) < spacing
    if number == number.bfloat16():
        assert distance == 0


def test_roundings_are_right_on_average_and_keyed(device):
    """The mean of n draws between neighbours a spacing apart is within 5 spacings / (2 sqrt n)."""
    size = 2 * CHUNK
    ours = nn.Parameter(torch.zeros(size, device=device))
    ours.grad = torch.full((size,), 1.7, device=device)
    seen = []
    for seed, purpose, steps in ((1, 0, 1), (2, 0, 1), (1, 1, 1), (1, 0, 2)):
        optimizer = AdamWEma([ours], moments_dtype=torch.bfloat16, seed=seed, purpose=purpose)
        for _ in range(steps):
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[ours][name].zero_()
            optimizer.step()
        state = optimizer.state[ours]
        for name, expected in (("exp_avg", 0.1 * 1.7), ("exp_avg_sq", 0.001 * 1.7**2)):
            values = state[name].double().unique()
            assert len(values) == 2
            bound = 5 * float(values[1] - values[0]) / 2 / size**0.5
            assert abs(float(state[name].double().mean()) - expected) < bound
        seen.append(torch.cat((state["exp_avg"], state["exp_avg_sq"])))
    halves = [*seen[0].chunk(2), *(other[:size] for other in seen[1:])]
    halves = [half == half.max() for half in halves]
    for index, first in enumerate(halves):  # draws of other keys do not know of each other
        for second in halves[:index]:
            up, also = first.double(), second.double()
            agreement = ((up - up.mean()) * (also - also.mean())).mean() / up.std() / also.std()
            assert abs(float(agreement)) < 5 / size**0.5


def test_roundings_are_philox_words(device):
    """exp_avg's half of word i of (counter, purpose, step), held against philox.words."""
    seed, purpose = 2**63 + 7, 2**32 - 1
    ours = [nn.Parameter(torch.zeros(size, device=device)) for size in (5, CHUNK + 64)]
    optimizer = AdamWEma(ours, moments_dtype=torch.bfloat16, seed=seed, purpose=purpose)
    for parameter in ours:
        parameter.grad = torch.full_like(parameter, 1.7)
    optimizer.step()
    positions = torch.tensor([1])  # the count
    word = words(seed, purpose, positions, 8 + CHUNK + 64)[0].to(device)
    exact = torch.lerp(torch.zeros(()), torch.tensor(1.7), torch.tensor(0.1)).to(device)
    for parameter, drawn in zip(ours, (word[:5], word[8:]), strict=True):
        expected = round_by_chance(exact.expand(parameter.shape).contiguous(), drawn & 0xFFFF)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)


def test_nan_survives_the_rounding_by_chance(device):
    ours = nn.Parameter(torch.zeros(64, device=device))
    optimizer = AdamWEma([ours], moments_dtype=torch.bfloat16)
    ours.grad = torch.full((64,), -1, dtype=torch.int32, device=device).view(torch.float32)
    optimizer.step()
    assert optimizer.state[ours]["exp_avg"].isnan().all()
    ones = torch.full((4,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert round_by_chance(ones, torch.full((4,), 0xFFFF)).isnan().all()


def test_tables_are_made_when_an_address_changes_and_only_then(device):
    ours = parameters(torch.float32, device, sizes=[])
    optimizer = AdamWEma(ours, max_norm=1.0)
    fill_grads(ours)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert optimizer.tables_made == 1
    held = [parameter.grad for parameter in ours]  # or the new ones would lie where they lay
    fill_grads(ours)
    before = ours[0].detach().clone()
    optimizer.step()
    assert optimizer.tables_made == 2
    assert not torch.equal(before, ours[0])
    ours[0].data = ours[0].data.clone()
    fill_grads(ours[:1])
    before = ours[0].detach().clone()
    optimizer.step()
    assert optimizer.tables_made == 3
    assert not torch.equal(before, ours[0])
    assert len(held) == 2


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")
        if any(name in str(func) for name in waits):
            raise AssertionError(f"the host reads from the device by {func}")
        return func(*args, **(kwargs or {}))


def test_the_host_never_reads(device, monkeypatch):
    ours = parameters(torch.bfloat16, device, sizes=[(4,)])
    emas = [[p.detach().float().clone() for p in ours]]
    optimizer = AdamWEma(ours, emas=emas, ema_decays=[0.9], max_norm=1.0)
    fill_grads(ours)
    optimizer.step()  # the tables are made on the host, from what the host knows
    with NoReads():
        optimizer.grad_norm()
        optimizer.step()
        one, yes = optimizer.one, optimizer.always
        optimizer.update(1e-3, one, yes, optimizer.ema_weights)
        with pytest.raises(AssertionError, match="reads from the device"):
            one.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
def test_a_graph_captures_it(device):
    ours = parameters(torch.bfloat16, device)
    eager = copies(ours, torch.bfloat16)
    captured, plain = AdamWEma(ours, max_norm=1.0), AdamWEma(eager, max_norm=1.0)
    for parameter, other in zip(ours, eager, strict=True):
        parameter.grad = torch.zeros_like(parameter)
        other.grad = parameter.grad
    captured.step()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        for parameter in ours:
            assert parameter.grad is not None
            parameter.grad.normal_()
        graph.replay()
        plain.step()
    assert all_equal(everything(captured), everything(plain))
    ours[0].grad = None
    with pytest.raises(RuntimeError, match="has moved"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured.step()


def test_closures_and_schedulers_work(device):
    ours = nn.Parameter(torch.ones(4, device=device))
    optimizer = AdamWEma([("weight", ours)], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = ours.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight"]
    torch.testing.assert_close(ours.detach(), torch.full((4,), 1 - 0.1 * 0.01 - 0.1, device=device))


def test_refuses_what_it_does_not_serve(device):
    good = nn.Parameter(torch.zeros(4, 4, device=device))
    one, yes = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
    with pytest.raises(TypeError, match="parameter must be fp32, bf16 or fp16"):
        AdamWEma([nn.Parameter(torch.zeros(2, dtype=torch.float64, device=device))])
    with pytest.raises(ValueError, match="without gaps"):
        AdamWEma([nn.Parameter(torch.zeros(4, 4, device=device)[:, ::2])])
    with pytest.raises(ValueError, match="average must be fp32, shaped"):
        AdamWEma([good], emas=[[torch.zeros(4, 3, device=device)]])
    with pytest.raises(ValueError, match="1 parameters, but 2 averages"):
        AdamWEma([good], emas=[[good.detach(), good.detach()]])
    with pytest.raises(ValueError, match="a copy must be bf16 or fp16, of an fp32 parameter"):
        AdamWEma([good], copies=[torch.zeros(4, 4, device=device)])
    with pytest.raises(ValueError, match="a copy must be bf16 or fp16"):
        AdamWEma([good], copies=[torch.zeros(4, 4, device=device).bfloat16().T])
    with pytest.raises(ValueError, match="1 parameters, but 0 copies"):
        AdamWEma([good], copies=[])
    with pytest.raises(TypeError, match="moments_dtype must be fp32 or bf16"):
        AdamWEma([good], moments_dtype=torch.float16)
    with pytest.raises(ValueError, match="seed has 64 bits"):
        AdamWEma([good], seed=-1)
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be 0 or more"):
            AdamWEma([good], **wrong)
    optimizer = AdamWEma([good], emas=[[torch.zeros(4, 4, device=device)]])
    with pytest.raises(ValueError, match="at construction"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="ema_decays, which were not given"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"ema_weights must be \[1\], got \[0\]"):
        optimizer.update(1e-3, one, yes)
    with pytest.raises(ValueError, match=r"applies must be torch.bool"):
        optimizer.update(1e-3, one, one, one[None])
    with pytest.raises(ValueError, match=r"lr must be \[\] or \[1\], got \[2\]"):
        optimizer.update(torch.zeros(2, device=device), one, yes, one[None])
    good.grad = torch.zeros(4, 4, device=device).T
    with pytest.raises(ValueError, match="must lie in memory as its parameter"):
        optimizer.grad_norm()
    state = torch.optim.AdamW([good], amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad must be False, got True"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"groups must have \[1\] parameters, the state has \[2\]"):
        optimizer.load_state_dict(torch.optim.AdamW([good, nn.Parameter(good + 1)]).state_dict())


def test_it_is_not_copied_with_its_tensors_left_behind(device):
    optimizer = AdamWEma([torch.zeros(3, device=device, requires_grad=True)])
    with pytest.raises(TypeError, match="copy or save its state_dict"):
        copy.deepcopy(optimizer)
