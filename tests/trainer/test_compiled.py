import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import save_tiny_pipeline

from fusedit.trainer.compiled import check_gradients, compile_unet, differing, eager
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.encoders import Samples
from fusedit.trainer.errors import UsageError
from fusedit.trainer.families import Text
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.unet import grow_conv_in

CONFIG = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
FP32 = (1e-2, 1e-4)


def doubled(graph, inputs):
    """A compiler that is wrong."""
    return lambda *given: [
        2 * out if isinstance(out, torch.Tensor) and out.is_floating_point() else out
        for out in graph(*given)
    ]


def failing(graph, inputs):
    raise RuntimeError("no C++ compiler\nand more")


@pytest.fixture
def unet(tmp_path):
    made = UNet2DConditionModel.from_pretrained(save_tiny_pipeline(tmp_path / "base") / "unet")
    grow_conv_in(made, "base")
    torch._dynamo.reset()
    return made.train()


@pytest.fixture
def check(unet):
    """Of the UNet, in fp32, by samples of weight 0, as a blank batch has."""
    latents = torch.zeros(2, 4, 8, 8)
    width = unet.config["cross_attention_dim"]
    samples = Samples(
        target_mean=latents, target_std=latents, condition=latents,
        text=torch.randn(2, 5, width), pooled=torch.zeros(2, 0), size_ids=torch.zeros(2, 6),
        positions=torch.arange(2), weights=torch.zeros(2),
    )  # fmt: skip
    diffusion = Diffusion.from_scheduler(CONFIG, 0.18215, torch.device("cpu"))
    null_text = Text(torch.zeros(1, 5, width), torch.zeros(1, 0))
    loss_fn = EditLoss(diffusion, (0.0, 0.0, 0.0), null_text, 5, torch.float32)
    return lambda parts: check_gradients(unet, loss_fn, samples, torch.float32, parts)


@pytest.mark.parametrize("parts", ["blocks", "whole"])
def test_a_right_compiler_passes_and_leaves_no_gradient(parts, unet, check):
    names = list(unet.state_dict())
    compile_unet(unet, parts, backend="aot_eager")
    check(parts)
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert list(unet.state_dict()) == names
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    compiled = [module for module in unet.modules() if module._compiled_call_impl is not None]
    assert compiled == (blocks if parts == "blocks" else [unet])


def test_gradients_that_are_there_stay_where_they_lie(unet, check):
    own = {p: torch.full_like(p, 3.0) for p in unet.parameters()}  # as masters give them
    for parameter, grad in own.items():
        parameter.grad = grad
    check("blocks")
    assert all(parameter.grad is grad for parameter, grad in own.items())
    assert all(bool((grad == 3.0).all()) for grad in own.values())


@pytest.mark.parametrize("parts", ["blocks", "whole"])
def test_a_wrong_compiler_stops_the_run_and_names_parameters(parts, unet, check):
    compile_unet(unet, parts, backend=doubled)
    cure = "off" if parts == "blocks" else "blocks"
    with pytest.raises(UsageError, match=rf"wrong gradients for .* by .*take --compile {cure}$"):
        check(parts)


def test_a_compiler_that_fails_is_told_in_one_line(unet, check):
    compile_unet(unet, "blocks", backend=failing)
    with pytest.raises(UsageError, match=r"blocks: cannot be compiled: .*--compile off$"):
        check("blocks")


@pytest.mark.slow  # Inductor takes a minute
def test_inductors_blocks_are_right(unet, check):
    compile_unet(unet, "blocks")
    check("blocks")


def test_inside_eager_nothing_is_compiled(unet):
    compile_unet(unet, "whole", backend=failing)
    with eager(), torch.no_grad():
        unet(torch.zeros(1, 8, 8, 8), 3, torch.zeros(1, 5, unet.config["cross_attention_dim"]))


def test_which_gradients_differ():
    expected = {name: torch.randn(4, 5) for name in ("right", "zero", "tiny", "nan", "rounded")}
    expected["tiny"] *= 1e-9
    found = {name: value.clone() for name, value in expected.items()}
    found["zero"].zero_()
    found["tiny"] *= -1  # where all but nothing is expected, all but nothing is right
    found["nan"][0, 0] = torch.nan
    found["rounded"] *= 1 + 5e-3
    wrong = differing(found, expected, *FP32)
    assert set(wrong) == {"zero", "nan"}
    assert wrong["zero"] == pytest.approx(1.0)
