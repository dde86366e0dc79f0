import copy

import torch
from torch import nn

from fusedit.trainer.config import OptimConfig
from fusedit.trainer.ema import Ema
from fusedit.trainer.masters import Masters
from fusedit.trainer.optim import make_optimizer

LR, WEIGHT = (torch.tensor(value, dtype=torch.float64) for value in (0.1, 0.25))
ONE, YES = torch.ones(()), torch.tensor(True)


def _model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Conv2d(6, 3, 1))
    return layers.to(memory_format=torch.channels_last)


def _backward(model, images):
    model(images.bfloat16()).float().square().sum().backward()


def test_micro_steps_add_up_in_fp32():
    model = _model()
    masters = Masters(model)
    images = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    expected = {name: torch.zeros_like(p.data) for name, p in masters.named.items()}
    for some in images:
        alone = copy.deepcopy(model)
        _backward(alone, some)
        for name, p in alone.named_parameters():
            assert p.grad.dtype is torch.bfloat16
            expected[name] += p.grad.float()
    for index, some in enumerate(images):
        _backward(model, some)
        masters.take_gradients(last=index == 2)
    for name, master in masters.named.items():
        assert torch.equal(master.grad, expected[name]), name


def test_masters_lie_as_the_weights_do_and_keep_what_rounding_loses():
    before = {name: p.detach().clone() for name, p in _model().named_parameters()}
    model = _model()
    masters = Masters(model)
    for name, p in model.named_parameters():
        assert p.dtype is torch.bfloat16
        assert torch.equal(masters.named[name], before[name])
        assert torch.equal(p, before[name].bfloat16())
        assert masters.named[name].stride() == p.stride()


def test_an_update_moves_masters_copies_and_averages():
    for fused in (False, True):
        model, plain = _model(), _model()
        masters = Masters(model)
        averages = [Ema(masters.named, 0.999, masters.publish), Ema(_named(plain), 0.999)]
        sides = [
            make_optimizer(masters.named, OptimConfig(), averages[0], masters, fused=fused),
            make_optimizer(_named(plain), OptimConfig(), averages[1], fused=fused),
        ]
        for _ in range(3):
            _backward(model, torch.randn(2, 4, 5, 5))
            sides[0].take_gradients(last=True)
            for name, p in plain.named_parameters():  # the same gradients
                p.grad = masters.named[name].grad.clone()
            for side in sides:
                side.update(LR, WEIGHT[None], ONE, YES)
                side.zero_grad()
        for name, p in plain.named_parameters():
            assert torch.equal(masters.named[name], p), name
            assert torch.equal(model.get_parameter(name), p.bfloat16()), name
            assert torch.equal(averages[0].averages[name], averages[1].averages[name]), name
            assert not masters.named[name].grad.any()


def test_a_gradient_that_is_alone_needs_no_sum():
    sides = []
    for sums in (False, True):
        model = _model()
        masters = Masters(model, sums=sums)
        optimizer = make_optimizer(masters.named, OptimConfig(), None, masters, fused=True)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            _backward(model, torch.randn(2, 4, 5, 5))
            optimizer.take_gradients(last=True)
            assert optimizer.grad_norm() > 0
            optimizer.update(LR, WEIGHT[None][:0], ONE, YES)
        grads = {master.grad.dtype for master in masters.named.values()}
        assert grads == {torch.float32 if sums else torch.bfloat16}
        sides.append(masters)
    for name, master in sides[0].named.items():
        assert torch.equal(master, sides[1].named[name]), name


def test_inside_averages_and_masters_take_the_place_of_the_weights():
    model = _model()
    masters = Masters(model)
    ema = Ema(masters.named, 0.999, masters.publish)
    for average in ema.averages.values():
        average.add_(0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = {name: average.clone() for name, average in ema.averages.items()}
    with ema.in_place():
        for name, p in model.named_parameters():
            assert torch.equal(p, wanted[name].bfloat16())
        with masters.in_place():
            for name, p in model.named_parameters():
                assert torch.equal(p, wanted[name])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_state_is_taken_in_fp32():
    model = _model()
    masters = Masters(model)
    state = {name: p.detach() + 0.01 for name, p in masters.named.items()}
    masters.load_state_dict(state)
    for name, value in state.items():
        assert torch.equal(masters.named[name], value)
        assert torch.equal(model.get_parameter(name), value.bfloat16())


def _named(model):
    return dict(model.named_parameters())
