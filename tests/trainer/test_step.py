import copy
import math
from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch import nn

from fusedit.trainer.config import LrScheduler, OptimConfig
from fusedit.trainer.ema import Ema
from fusedit.trainer.encoders import Samples
from fusedit.trainer.errors import UsageError
from fusedit.trainer.optim import AdamW, OnePass, make_optimizer, schedule
from fusedit.trainer.power_ema import PowerEma
from fusedit.trainer.step import (
    GROWTH_STEPS,
    KNOWN_STEPS,
    LossScale,
    Rates,
    SpikeGuard,
    train_step,
)
from fusedit.trainer.world import World

INF = float("inf")


def _samples(target, weights=None):
    n = len(target)
    return Samples(
        target_mean=target,
        target_std=torch.zeros_like(target),
        condition=torch.zeros_like(target),
        text=torch.zeros(n, 1, 1),
        pooled=torch.zeros(n, 0),
        size_ids=torch.zeros(n, 6),
        positions=torch.arange(n),
        weights=torch.ones(n) if weights is None else torch.tensor(weights),
    )


def _errors(model, samples):
    return (model(samples.target_mean) - 1).square().mean(dim=1)


def _loss(model, samples, by_group=None):
    return (samples.weights * _errors(model, samples)).sum()


class _Job:
    """A small regression and everything a step needs."""

    fused = False

    def __init__(self, lr=0.1, fp16=False, **section):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))
        named = dict(self.model.named_parameters())
        self.ema = Ema(named, 0.999)
        self.optimizer = make_optimizer(named, OptimConfig(**section), self.ema, fused=self.fused)
        self.scale = LossScale(fp16, torch.device("cpu"))
        self.guard: SpikeGuard | None = None
        self.loss = _loss
        self.number, self.lr = 0, lr

    def step(self, *micro_batches, max_grad_norm=INF):
        self.number += 1
        return train_step(
            self.model,
            self.loss,
            self.optimizer,
            self.scale,
            World(),
            micro_batches,
            Rates.on(torch.device("cpu"), self.lr, self.ema.weight(self.number)),
            slots=8,
            max_grad_norm=max_grad_norm,
            guard=self.guard,
        )

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.fixture(params=[False, True], ids=["pytorch", "one pass"], autouse=True)
def both_optimizers(request, monkeypatch):
    monkeypatch.setattr(_Job, "fused", request.param)


def _theirs(job, data, max_grad_norm):
    """The same update by PyTorch alone."""
    model = copy.deepcopy(job.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=1e-2)

    def update():
        optimizer.zero_grad()
        _errors(model, _samples(data)).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        return norm, torch.cat([p.detach().flatten() for p in model.parameters()])

    return update


@pytest.mark.parametrize("max_grad_norm", [INF, 0.1])
@pytest.mark.parametrize("fp16", [False, True])
def test_it_is_pytorchs_adamw_and_clipping(max_grad_norm, fp16):
    job, data = _Job(fp16=fp16), torch.randn(8, 3)
    theirs = _theirs(job, data, max_grad_norm)
    for _ in range(5):
        result = job.step(_samples(data[:4]), _samples(data[4:]), max_grad_norm=max_grad_norm)
        norm, weights = theirs()
        torch.testing.assert_close(result.grad_norm, norm)
        torch.testing.assert_close(job.weights(), weights)
        assert result.applied


def test_a_short_window_is_divided_by_its_own_count():
    """The reference halves loss and gradient of a short last window (defect 6)."""
    data = torch.randn(8, 3)
    whole, short = _Job(adam_epsilon=1.0), _Job(adam_epsilon=1.0)  # no hiding of scale by Adam
    expected = whole.step(_samples(data[:3]))
    padded = torch.cat((data[2:3], torch.full((3, 3), 5.0)))
    result = short.step(_samples(data[:2], [1.0, 1.0]), _samples(padded, [1.0, 0.0, 0.0, 0.0]))
    assert result.samples == 3
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.grad_norm, expected.grad_norm)
    torch.testing.assert_close(short.weights(), whole.weights())


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    job, data = _Job(), torch.randn(4, 3)
    job.step(_samples(data))
    before, averages = job.weights(), copy.deepcopy(job.ema.averages)
    moments = {name: value.clone() for name, value in job.optimizer.state().items()}
    data[0, 0] = bad
    assert not job.step(_samples(data)).applied
    assert torch.equal(job.weights(), before)
    for name, value in job.optimizer.state().items():
        assert torch.equal(value, moments[name]), name  # Adam's count among them
    for name, value in job.ema.averages.items():
        assert torch.equal(value, averages[name])
    data[0, 0] = 0.0
    assert job.step(_samples(data)).applied


def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradient_is():
    job, data = _Job(), torch.randn(4, 3)
    job.step(_samples(data))
    before = job.weights()
    job.loss = lambda model, samples, by_group: _loss(model, samples) + INF
    assert not job.step(_samples(data)).applied
    assert torch.equal(job.weights(), before)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e18, 1e30])
def test_huge_gradients_leave_every_number_finite(size, moments):
    """Squares that overflow make the norm infinite; below that nothing of the moments overflows."""
    job = _Job(adam_moments_dtype=moments)
    for _ in range(3):
        job.step(_samples(torch.full((4, 3), size)))
    everything = [job.weights(), *job.optimizer.state().values(), *job.ema.averages.values()]
    assert all(value.isfinite().all() for value in everything)


@pytest.mark.parametrize("skips", [False, True])
def test_a_spike_is_seen_and_skipped_if_asked_to(skips):
    job = _Job(lr=0.0)
    job.guard = SpikeGuard(5.0, skips, torch.device("cpu"))
    quiet, loud = torch.zeros(4, 3), torch.full((4, 3), 50.0)
    assert not job.step(_samples(loud)).spike  # nothing is usual yet
    for _ in range(KNOWN_STEPS * 10):
        job.step(_samples(quiet))
    before, job.lr = job.weights(), 0.1
    result = job.step(_samples(loud))
    assert result.spike
    assert bool(result.applied) is not skips
    assert torch.equal(job.weights(), before) is skips
    assert not job.step(_samples(quiet, [0.0] * 4)).spike  # no loss at all


def test_the_usual_loss_is_a_mean_that_a_spike_moves_little():
    guard = SpikeGuard(10.0, False, torch.device("cpu"))
    yes, no = torch.tensor(True), torch.tensor(False)
    losses = torch.rand(50)
    for loss in losses:
        assert not guard.look(loss, yes)
    torch.testing.assert_close(guard.usual, losses.mean())
    usual = guard.usual.item()
    guard.look(torch.tensor(float("nan")), no)
    assert guard.usual == usual
    assert guard.look(torch.tensor(1e30), yes)
    assert guard.usual.item() == pytest.approx(usual * (1 + 9 / 51))
    spikes = [bool(guard.look(torch.tensor(40 * usual), yes)) for _ in range(100)]
    assert spikes[0]
    assert not spikes[-1]  # what stays high is the usual one by now


def test_a_window_without_a_sample_moves_nothing():
    job = _Job()
    job.step(_samples(torch.randn(4, 3)))
    before = job.weights()
    assert not job.step(_samples(torch.zeros(4, 3), [0.0] * 4)).applied
    assert torch.equal(job.weights(), before)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_good_steps():
    scale = LossScale(True, torch.device("cpu"))
    scale.update(torch.tensor(False))
    assert scale.scale == 2.0**15
    for _ in range(GROWTH_STEPS):
        scale.update(torch.tensor(True))
    assert scale.scale == 2.0**16
    assert scale.good_steps == 0
    fixed = LossScale(False, torch.device("cpu"))
    fixed.update(torch.tensor(False))
    assert fixed.scale == 1.0


def test_the_ema_warms_up_as_the_papers():
    job = _Job()
    average = job.weights()
    for n in (1, 2, 3):
        job.step(_samples(torch.randn(4, 3)))
        average = average + (1 - (1 + n) / (10 + n)) * (job.weights() - average)
    ours = torch.cat([value.flatten() for value in job.ema.averages.values()])
    torch.testing.assert_close(ours, average)


def test_the_ema_takes_the_parameters_place_and_gives_it_back():
    job = _Job()
    job.step(_samples(torch.randn(4, 3)))
    raw = job.weights()
    averages = torch.cat([value.flatten() for value in job.ema.averages.values()])
    with job.ema.in_place():
        assert torch.equal(job.weights(), averages)
    assert torch.equal(job.weights(), raw)
    assert not torch.equal(raw, averages)


def test_optimizer_state_goes_on_where_it_was():
    data = torch.randn(3, 4, 3)
    whole, resumed = _Job(), _Job()
    for batch in data[:2]:
        whole.step(_samples(batch))
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state({k: v.clone() for k, v in whole.optimizer.state().items()})
    assert "0.weight.exp_avg" in whole.optimizer.state()
    for job in (whole, resumed):
        job.step(_samples(data[2]))
    assert torch.equal(resumed.weights(), whole.weights())


def test_either_optimizer_goes_on_from_the_others_state():
    data, jobs = torch.randn(3, 4, 3), []
    for fused in (False, True):
        _Job.fused = not fused
        first = _Job()
        for batch in data[:2]:
            first.step(_samples(batch))
        _Job.fused = fused
        second = _Job()
        assert isinstance(second.optimizer, OnePass) == fused
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state({k: v.clone() for k, v in first.optimizer.state().items()})
        second.step(_samples(data[2]))
        jobs.append(second)
    torch.testing.assert_close(jobs[0].weights(), jobs[1].weights())


def test_optimizer_state_of_channels_last_weights_goes_on_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    images = torch.randn(2, 4, 5, 5)
    ends = []
    for stops in (False, True):
        trained = copy.deepcopy(model)
        optimizer = make_optimizer(
            dict(trained.named_parameters()), OptimConfig(), None, fused=_Job.fused
        )
        for step in range(4):
            if stops and step == 2:
                state = {name: v.contiguous() for name, v in optimizer.state().items()}
                save_file(state, tmp_path / "optimizer.safetensors")
                optimizer = make_optimizer(
                    dict(trained.named_parameters()), OptimConfig(), None, fused=_Job.fused
                )
                optimizer.load_state(load_file(tmp_path / "optimizer.safetensors"))
                moment = optimizer.state()["weight.exp_avg"]
                assert moment.is_contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            trained(images * (step + 1)).square().mean().backward()
            rates = Rates.on(torch.device("cpu"), 0.1)
            optimizer.update(*rates, torch.ones(()), torch.tensor(True))
        ends.append(trained.weight.detach())
    assert torch.equal(*ends)


def test_schedules_are_diffusers_and_counted_in_optimizer_steps():
    linear = schedule("linear", 2.0, 10, 110)
    assert [linear(step) for step in (0, 5, 10, 60, 110)] == [0.0, 1.0, 2.0, 1.0, 0.0]
    assert schedule("constant", 1.0, 500, 1000)(0) == 1.0


@pytest.mark.parametrize("name", get_args(LrScheduler))
def test_each_schedule_is_diffusers_at_its_own_peak(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1e-4)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    ours = schedule(name, 1e-4, 10, 100)
    for step in range(101):
        assert ours(step) == theirs.get_last_lr()[0], step
        optimizer.step()
        theirs.step()


def test_restarts_and_powers_are_by_their_formulas():
    """Loshchilov and Hutter 2017 with a warm-up, and a polynomial that ends at 1e-7."""
    waves = schedule("cosine_with_restarts", 2.0, 10, 110, num_cycles=4)
    falls = schedule("polynomial", 2.0, 10, 110, power=2.5)
    for step in range(110):
        if step < 10:
            expected = 2.0 * step / 10, 2.0 * step / 10
        else:
            way = (step - 10) / 100
            expected = (
                1.0 + math.cos(math.pi * (4 * way - math.floor(4 * way))),
                1e-7 + (2.0 - 1e-7) * (1 - way) ** 2.5,
            )
        assert (waves(step), falls(step)) == pytest.approx(expected, abs=1e-12), step


def test_each_average_moves_by_its_own_weight():
    """With more than one, in the same pass, and not where a step does not apply."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    named = dict(model.named_parameters())
    averages = [Ema(named, 0.999), PowerEma(named, 0.05), PowerEma(named, 0.2)]
    section = OptimConfig()
    optimizer = make_optimizer(named, section, averages[0], fused=_Job.fused, kept=averages[1:])
    expected = [{n: p.detach().double() for n, p in named.items()} for _ in averages]
    for step in range(1, 6):
        for p in named.values():
            p.grad = torch.randn_like(p)
        weights = [one.weight(step) for one in averages]
        rates = Rates.on(torch.device("cpu"), 0.1, *weights)
        applies = step != 3
        optimizer.update(*rates, torch.ones(()), torch.tensor(applies))
        for kept, weight in zip(expected, weights if applies else [0.0] * 3, strict=True):
            for name, p in named.items():
                kept[name] += weight * (p.detach().double() - kept[name])
    for one, kept in zip(averages, expected, strict=True):
        for name, value in kept.items():
            torch.testing.assert_close(one.averages[name].double(), value, rtol=1e-5, atol=1e-6)
    assert len({float(one.averages["weight"].sum()) for one in averages}) == 3


def test_8bit_state_can_be_saved_though_bitsandbytes_shares_its_maps(tmp_path):
    job = _Job()
    job.optimizer = AdamW(job.model.named_parameters(), OptimConfig())
    job.optimizer.eight_bit = True
    shared = torch.arange(4.0)
    for parameter in job.model.parameters():
        job.optimizer.optimizer.state[parameter] = {"step": 3, "qmap1": shared}
    save_file(job.optimizer.state(), tmp_path / "optimizer.safetensors")
    job.optimizer.load_state(load_file(tmp_path / "optimizer.safetensors"))
    state = job.optimizer.optimizer.state[next(job.model.parameters())]
    assert state["step"] == 3
    assert torch.equal(state["qmap1"], shared)


def test_8bit_moments_are_refused_on_a_cpu():
    with pytest.raises(UsageError, match="--use_8bit_adam needs a GPU"):
        _Job(use_8bit_adam=True)
