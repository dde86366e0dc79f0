"""Runs of first steps, on a tiny model: how many, by which loop, and what is read of them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_inputs
from torch import nn

from fusedit.benchmarks import demo_steps
from fusedit.launch.demo import run as demo
from fusedit.trainer import job
from fusedit.trainer.config import OptimConfig
from fusedit.trainer.world import World

STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 16)


@pytest.fixture
def take(inputs, tmp_path, monkeypatch):
    """What a run's own process does, here: its steps, and its checkpoint."""
    monkeypatch.setattr(demo_steps, "make_world", World)

    def run(loop, steps=STEPS):
        output = tmp_path / loop
        flags = [
            f"--pretrained_model_name_or_path={inputs / 'base'}",
            f"--train_data_dir={inputs / 'data'}",
            f"--output_dir={output}",
            "--resolution=16",
            "--train_batch_size=4",
            "--learning_rate=1e-3",
            "--max_train_steps=20",
            "--use_ema",
            "--max_grad_norm=0.05",  # clips each step of this model
            "--adam_weight_decay=0.1",
            "--log_every=1",
            "--report_to=none",
        ]
        assert demo_steps.main([str(steps), loop, *flags]) == 0
        return demo_steps.read_steps(output / "log.jsonl", steps), output

    return run


def test_a_run_takes_its_first_steps_and_is_not_exported(take):
    found, output = take("ours")
    assert len(found.losses) == STEPS
    assert len(found.images_per_s) == STEPS - int(demo_steps.WARM_UP * STEPS)
    assert found.memory_gib > 0
    assert not (output / "model_index.json").exists()


def test_the_references_loop_does_what_ours_does(take):
    (ours, output), (theirs, other) = take("ours"), take("reference")
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-6)
    assert job.make_optimizer.__module__ == "fusedit.trainer.optim"  # put back
    for part in ("unet", "ema"):
        own, found = (
            load_file(at / f"checkpoint-{STEPS}/{part}.safetensors") for at in (output, other)
        )
        for name, value in own.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_the_references_loop_is_pytorchs_default():
    optimizer = demo_steps.Reference({"x": nn.Parameter(torch.ones(2))}, OptimConfig())
    assert not any(group["fused"] for group in optimizer.optimizer.param_groups)


def distance(output, other):
    """Of the UNets two runs came to, as a share of their norm."""
    own, found = (
        torch.cat([value.flatten() for value in load_file(unet).values()])
        for unet in (at / f"checkpoint-{STEPS}/unet.safetensors" for at in (output, other))
    )
    return float((found - own).norm() / own.norm())


def test_a_rounded_run_differs_by_its_rounding(take):
    ours, output = take("ours")
    apart, weights_apart = {}, {}
    for loop in ("rounded_once_more", "gradients_to_bf16", "rounded_to_bf16"):
        steps, other = take(loop)
        pairs = zip(steps.losses, ours.losses, strict=True)
        apart[loop] = [abs(found - own) / own for found, own in pairs]
        weights_apart[loop] = distance(output, other)
    assert max(apart["rounded_once_more"]) < 1e-6  # of three, perhaps none is another number
    assert 1e-9 < weights_apart["rounded_once_more"] < 1e-5
    assert 1e-5 < max(apart["rounded_to_bf16"]) < 1e-2
    first, *later = apart["gradients_to_bf16"]  # what moves the weights shows a step later
    assert first == 0
    assert max(later) < 1e-3
    assert 1e-7 < weights_apart["gradients_to_bf16"] < 1e-3
    assert not nn.modules.module._global_forward_hooks


def test_a_layer_is_rounded_both_ways():
    def rounded(value):
        return value.bfloat16().float()

    layer, grad = nn.Linear(64, 64), torch.randn(8, 64)
    parameters = dict(layer.named_parameters())
    x = torch.randn(8, 64, requires_grad=True)
    with demo_steps.with_loop("rounded_to_bf16"):
        y = nn.Sequential(nn.Identity(), layer)(x)
    y.backward(grad)
    weight, bias = rounded(layer.weight), rounded(layer.bias)
    assert torch.equal(y, rounded(nn.functional.linear(rounded(x), weight, bias)))
    assert torch.equal(x.grad, rounded(rounded(grad) @ weight))
    torch.testing.assert_close(layer.bias.grad, rounded(rounded(grad).sum(0)))
    assert dict(layer.named_parameters()) == parameters


def test_there_is_no_other_loop():
    with pytest.raises(ValueError, match="got ourselves"):
        demo_steps.with_loop("ourselves")


def test_the_flags_are_the_demos(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(demo, "torchrun", lambda *told: asked.append(told))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    demo._train(demo.FULL, tmp_path / "out", tmp_path / "data", from_scratch=False)
    demos = set(asked[0][-1])
    ours = set(demo_steps.demo_flags(tmp_path / "data"))
    assert ours <= demos
    left = {flag.partition("=")[0].removeprefix("--") for flag in demos - ours}
    assert {name for name in left if not name.startswith(("validation_", "checkpoint"))} == {
        "output_dir", "log_every"
    }  # fmt: skip


def log(tmp_path, losses):
    lines = [
        {"step": at, "loss": loss, "images_per_second": 10.0 * at, "memory_gib": 0.1 * at}
        for at, loss in enumerate(losses, start=1)
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_a_run_wrote_is_read(tmp_path):
    found = demo_steps.read_steps(log(tmp_path, [0.5, 0.4, 0.3, 0.2, 0.1]), 5)
    assert found.losses == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert found.images_per_s == [20.0, 30.0, 40.0, 50.0]  # the first fifth is the warm-up
    assert found.memory_gib == pytest.approx(0.5)
    assert found.step_ms(40) == [2000.0, pytest.approx(1333.3, abs=0.1), 1000.0, 800.0]


@pytest.mark.parametrize(
    ("losses", "told"),
    [([0.5], "1 of 2 steps"), ([0.5, None], "step 2 is not finite"), ([], "0 of")],
)
def test_a_run_that_lacks_something_is_refused(tmp_path, losses, told):
    with pytest.raises(demo_steps.RunFailed, match=told):
        demo_steps.read_steps(log(tmp_path, losses), 2)


def test_what_was_run_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_steps, "run_module", lambda *told: pytest.fail("ran again"))
    log(tmp_path, [0.5, 0.4])
    assert demo_steps.run_steps(2, [], tmp_path).losses == [0.5, 0.4]


def test_a_run_from_a_cache_is_filled_first(tmp_path, monkeypatch):
    called = []

    def run(name, words, output, ranks=1):
        called.append(name)
        log(tmp_path, [0.5, 0.4])

    monkeypatch.setattr(demo_steps, "run_module", run)
    demo_steps.run_steps(2, ["--cache_latents=x"], tmp_path)
    assert called == ["launch.cache", "benchmarks.demo_steps"]


def test_the_last_line_of_a_run_that_failed_is_told(tmp_path):
    with pytest.raises(demo_steps.RunFailed, match=r"exit code 1: .*no_such_module"):
        demo_steps.run_module("no_such_module", [], tmp_path)
