"""The draws' own bar is in test_philox.py: NORMAL_ULPS between kernel and definition."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import DTYPES, GPU, PRESETS
from torch.library import opcheck

from fusedit.benchmarks.accuracy import poisoned
from fusedit.benchmarks.shapes import shapes
from fusedit.kernels.edit_input import PREDICTIONS, edit_input, edit_input_reference
from fusedit.trainer.draws import Purpose, draw_normal

NORMAL_ULPS = 8
STEPS = 1000
OPTIONS = {
    "seed": 2**63 + 12345,
    "posterior_purpose": Purpose.POSTERIOR.value,
    "noise_purpose": Purpose.NOISE.value,
    "latent_scale": 0.18215,
    "prediction_type": "v_prediction",
    "dtype": torch.float32,
}
MORE_NOISE = {  # amounts that no other term hides
    "noise_offset": 0.7,
    "noise_offset_purpose": Purpose.NOISE_OFFSET.value,
    "input_perturbation": 0.4,
    "input_perturbation_purpose": Purpose.INPUT_PERTURBATION.value,
}
OFFSET, PERTURBATION = dict([*MORE_NOISE.items()][:2]), dict([*MORE_NOISE.items()][2:])
ODD = [(3, 5, 7), (2, 1, 1), (1, 3, 2), (2, 6, 6), (1, 1, 4), (2, 17, 16), (1, 11, 27)]


def latent_shapes():
    """[n, size, size] of each preset's latents."""
    sizes = sorted({shapes(preset).group_norms[0].size for preset in PRESETS})
    return [(2 if GPU or size <= 32 else 1, size, size) for size in sizes]


def inputs(shape, dtype=torch.float32, device="cpu"):
    samples, height, width = shape
    latents = (samples, 4, height, width)
    alpha_bar = torch.linspace(0.9999, 0.0, STEPS, device=device)
    return {
        "target_mean": (torch.randn(latents, device=device) * 5).to(dtype),
        "target_std": torch.rand(latents, device=device).to(dtype),
        "condition": (torch.randn(latents, device=device) * 5).to(dtype),
        "positions": torch.randint(0, 2**40, (samples,), device=device),
        "timesteps": torch.randint(0, STEPS, (samples,), device=device),
        "drop_image": torch.arange(samples, device=device) % 2 == 1,
        "signal": alpha_bar.sqrt(),
        "noise": (1 - alpha_bar).sqrt(),
    }


def rows(batch, at):
    """The samples at an index, of all inputs but the tables."""
    tables = ("signal", "noise")
    return {name: value if name in tables else value[at] for name, value in batch.items()}


def truth(
    batch,
    *,
    seed,
    posterior_purpose,
    noise_purpose,
    latent_scale,
    prediction_type,
    dtype,
    noise_offset=0.0,
    noise_offset_purpose=0,
    input_perturbation=0.0,
    input_perturbation_purpose=0,
):
    """Latents and target in fp64, each with the error it may have, of the definition's normals.

    Normals may be NORMAL_ULPS off, and each product and sum rounds once in fp32.
    """

    def draw(purpose, *shape):
        return draw_normal(seed, purpose, batch["positions"], shape).double()

    shape = batch["target_mean"].shape[1:]
    posterior, epsilon = draw(posterior_purpose, *shape), draw(noise_purpose, *shape)
    offset = noise_offset * draw(noise_offset_purpose, 4, 1, 1)
    more = input_perturbation * draw(input_perturbation_purpose, *shape)
    mean, std, condition = (
        batch[name].double() for name in ("target_mean", "target_std", "condition")
    )
    alpha, sigma = (
        batch[name][batch["timesteps"]].double()[:, None, None, None]
        for name in ("signal", "noise")
    )
    clean = (mean + std * posterior) * latent_scale
    eps = torch.finfo(torch.float32).eps
    drawn = NORMAL_ULPS * eps
    slack = latent_scale * (2 * eps * mean.abs() + (drawn + 2 * eps) * (std * posterior).abs())
    # Each amount is rounded to fp32, multiplied, and added.
    noise_slack = (drawn + 3 * eps) * epsilon.abs() + (drawn + 4 * eps) * offset.abs()
    epsilon = epsilon + offset
    mixed_slack = noise_slack + (drawn + 4 * eps) * more.abs() + eps * epsilon.abs()
    noisy = alpha * clean + sigma * (epsilon + more)
    noisy_slack = alpha * (slack + 2 * eps * clean.abs()) + sigma * mixed_slack
    shown = condition.masked_fill(batch["drop_image"][:, None, None, None], 0.0)
    latents = torch.cat((noisy, shown), dim=1)
    rounding = latents.abs() * (torch.finfo(dtype).eps / 2) + torch.finfo(dtype).tiny
    bar = torch.cat((noisy_slack, torch.zeros_like(shown)), dim=1) * (1 + eps) + rounding
    if prediction_type == "epsilon":
        return (latents, bar), (epsilon, noise_slack)
    target_slack = alpha * noise_slack + sigma * (slack + 2 * eps * clean.abs())
    return (latents, bar), (alpha * epsilon - sigma * clean, target_slack)


def assert_right(batch, **changed):
    options = OPTIONS | changed
    with poisoned():
        results = edit_input(**batch, **options)
    for ours, (expected, bar) in zip(results, truth(batch, **options), strict=True):
        assert ours.shape == expected.shape
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert not ours.requires_grad
        error = (ours.double() - expected).abs()
        assert (error <= bar).all(), f"largest error of its bar: {(error / bar).max():.3g}"
    assert results[0].dtype == options["dtype"]
    assert results[1].dtype == torch.float32


@pytest.mark.parametrize("shape", latent_shapes(), ids=str)
def test_right_on_the_latents_of_the_unets(shape, device, launches):
    assert_right(inputs(shape, torch.bfloat16, device), dtype=torch.bfloat16)
    assert launches == ["_forward_kernel"]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_right_on_any_size(shape, prediction_type, device):
    assert_right(inputs(shape, device=device), prediction_type=prediction_type)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_in_any_dtype(dtype, out, device):
    for shape in ((2, 8, 8), (2, 3, 3)):
        assert_right(inputs(shape, dtype, device), dtype=out)


@pytest.mark.parametrize("more", [OFFSET, PERTURBATION, MORE_NOISE], ids=["offset", "more", "all"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("shape", [*ODD, (2, 8, 8)], ids=str)
def test_more_noise_is_right_on_any_size(shape, prediction_type, more, device, launches):
    batch = inputs(shape, device=device)
    assert_right(batch, prediction_type=prediction_type, **more)
    assert launches == ["_forward_kernel"]  # one pass, as without it


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_noise_is_right_in_any_dtype(dtype, out, device):
    for shape in ((2, 8, 8), (2, 3, 3)):
        assert_right(inputs(shape, dtype, device), dtype=out, **MORE_NOISE)


@pytest.mark.parametrize("op", [edit_input, edit_input_reference])
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5, 3)], ids=str)
def test_the_offset_is_one_number_a_channel_and_is_predicted(op, shape, device):
    """Of latents that are 0: the input is sigma times all of the noise, the target epsilon's."""
    batch = inputs(shape, device=device) | {"timesteps": torch.full((3,), 500, device=device)}
    for name in ("target_mean", "target_std"):
        batch[name] = torch.zeros_like(batch[name])
    options = OPTIONS | {"prediction_type": "epsilon"}
    latents, target = op(**batch, **options)
    shifted, shifted_target = op(**batch, **options, **OFFSET)
    added = shifted_target - target
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), atol=2e-6, rtol=0)
    assert added[:, :, 0, 0].unique().numel() == 12  # samples times channels
    sigma = batch["noise"][500]
    torch.testing.assert_close(shifted[:, :4] - latents[:, :4], sigma * added, atol=2e-6, rtol=0)
    perturbed, perturbed_target = op(**batch, **options, **PERTURBATION)
    assert torch.equal(perturbed_target, target)
    difference = (perturbed - latents)[:, :4] / sigma
    assert 0.2 < difference.std() < 0.6  # of 0.4
    assert torch.equal(perturbed[:, 4:], latents[:, 4:])


def test_dtypes_may_differ(device):
    batch = inputs((2, 8, 4), device=device)
    batch["target_mean"] = batch["target_mean"].half()
    batch["condition"] = batch["condition"].bfloat16()
    assert_right(batch)


@pytest.mark.parametrize("more", [{}, MORE_NOISE], ids=["", "more noise"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_definition_is_that_of_diffusers(prediction_type, zero_snr, more):
    """With more noise that of its train_text_to_image.py, in its words and order."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr)
    alpha_bar = scheduler.alphas_cumprod
    batch = inputs((5, 6, 4)) | {"signal": alpha_bar.sqrt(), "noise": (1 - alpha_bar).sqrt()}
    batch["timesteps"] = torch.tensor([0, 1, 500, 998, 999])
    options = OPTIONS | {"prediction_type": prediction_type} | more
    posterior, noise, perturbation, offset = (
        draw_normal(options["seed"], purpose, batch["positions"], shape)
        for purpose, shape in (
            (Purpose.POSTERIOR, (4, 6, 4)),
            (Purpose.NOISE, (4, 6, 4)),
            (Purpose.INPUT_PERTURBATION, (4, 6, 4)),
            (Purpose.NOISE_OFFSET, (4, 1, 1)),
        )
    )
    noise = noise + more.get("noise_offset", 0) * offset
    new_noise = noise + more.get("input_perturbation", 0) * perturbation
    clean = (batch["target_mean"] + batch["target_std"] * posterior) * options["latent_scale"]
    noisy = scheduler.add_noise(clean, new_noise, batch["timesteps"])
    shown = batch["condition"].masked_fill(batch["drop_image"][:, None, None, None], 0.0)
    velocity = scheduler.get_velocity(clean, noise, batch["timesteps"])
    latents, target = edit_input_reference(**batch, **options)
    torch.testing.assert_close(latents, torch.cat((noisy, shown), dim=1))
    torch.testing.assert_close(target, noise if prediction_type == "epsilon" else velocity)


@pytest.mark.parametrize("op", [edit_input, edit_input_reference])
@pytest.mark.parametrize("shape", [(6, 4, 4), (6, 5, 7)], ids=str)
def test_a_sample_is_the_same_alone_and_in_any_batch_and_order(op, shape, device):
    batch = inputs(shape, device=device)
    options = OPTIONS | MORE_NOISE
    whole = op(**batch, **options)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    halves = [op(**rows(batch, at), **options) for at in (slice(0, 2), slice(2, 6))]
    shuffled = op(**rows(batch, order), **options)
    for index, ours in enumerate(whole):
        assert torch.equal(ours, torch.cat([half[index] for half in halves]))
        assert torch.equal(ours[order], shuffled[index])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    purposes=st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
    position=st.integers(0, 2**63 - 1),
    height=st.integers(1, 4),
    width=st.integers(1, 6),
)
def test_right_for_any_seed_purpose_and_position(
    kernels_run, seed, purposes, position, height, width
):
    batch = inputs((2, height, width), device="cuda" if GPU else "cpu")
    batch["positions"][0] = position
    names = [name for name in (*OPTIONS, *MORE_NOISE) if name.endswith("_purpose")]
    amounts = {"noise_offset": 0.7, "input_perturbation": 0.4}
    assert_right(batch, seed=seed, **amounts, **dict(zip(names, purposes, strict=True)))


def test_each_half_of_a_position_and_seed_and_each_purpose_changes_every_draw(device):
    batch = inputs((1, 8, 8), device=device)
    batch["positions"][0] = 5
    changes = [{"seed": 6}, {"seed": 5 + 2**32}, {"noise_purpose": 8}]
    options = OPTIONS | {"seed": 5, "prediction_type": "epsilon"}
    _, base = edit_input(**batch, **options)
    others = [edit_input(**batch, **(options | change))[1] for change in changes]
    for position in (6, 5 + 2**32):
        moved = {"positions": torch.tensor([position], device=device)}
        others.append(edit_input(**(batch | moved), **options)[1])
    for other in others:
        assert (base == other).float().mean() < 0.02  # two normals meet about once in 2**20


@pytest.mark.parametrize("op", [edit_input, edit_input_reference])
@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 3, 3)], ids=str)
def test_a_dropped_condition_is_zero_whatever_it_is(op, shape, device):
    batch = inputs(shape, device=device)
    batch["condition"][0] = torch.nan
    batch["condition"][1] = torch.inf
    batch["condition"][2] = -torch.inf
    batch["drop_image"] = torch.tensor([True, True, False, False], device=device)
    latents, target = op(**batch, **OPTIONS)
    shown = latents[:, 4:]
    assert torch.equal(shown[:2], torch.zeros_like(shown[:2]))
    assert not torch.signbit(shown[:2]).any()
    assert torch.equal(shown[2:], batch["condition"][2:])
    assert torch.isfinite(latents[:, :4]).all()
    assert torch.isfinite(target).all()


def test_any_strides(device):
    whole = inputs((3, 4, 8), device=device)  # the last condition is shown
    expected = edit_input(**whole, **OPTIONS)
    moments = torch.randn(3, 12, 4, 8, device=device)
    for index, name in enumerate(("target_mean", "target_std", "condition")):
        moments[:, 4 * index : 4 * index + 4] = whole[name]
    halves = dict(zip(("target_mean", "target_std", "condition"), moments.chunk(3, 1), strict=True))
    last = {name: value.to(memory_format=torch.channels_last) for name, value in halves.items()}
    spread = {name: value.repeat_interleave(2, 0)[::2] for name, value in whole.items()}
    turned = {name: value.mT.contiguous().mT for name, value in halves.items()}
    each = [{name: value} for name, value in halves.items()]
    for strided in (halves, last, turned, spread, *each):
        ours = edit_input(**(whole | strided), **OPTIONS)
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_samples_of_one_memory(device):
    batch = inputs((1, 4, 4), device=device)
    batch = {
        n: v if n in ("signal", "noise") else v.expand(3, *v.shape[1:]) for n, v in batch.items()
    }
    assert_right(batch)


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (0, 3, 3)], ids=str)
def test_nothing_to_do(shape, device):
    batch = inputs(shape, device=device)
    for op in (edit_input, edit_input_reference):
        latents, target = op(**batch, **OPTIONS)
        assert latents.shape == (shape[0], 8, *shape[1:])
        assert target.shape == (shape[0], 4, *shape[1:])


def test_inputs_are_left_alone_and_two_runs_are_equal(device):
    batch = inputs((2, 8, 8), torch.bfloat16, device)
    before = {name: value.clone() for name, value in batch.items()}
    with poisoned():
        runs = [edit_input(**batch, **OPTIONS) for _ in range(2)]
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_first_and_last_timestep_and_none_beyond(device, launches):
    batch = inputs((4, 4, 4), device=device)
    batch["timesteps"] = torch.tensor([0, STEPS - 1, 0, STEPS - 1], device=device)
    assert_right(batch)
    batch["timesteps"] = torch.tensor([0, STEPS, -1, STEPS - 1], device=device)
    latents, target = edit_input(**batch, **OPTIONS)
    for drawn in (latents[:, :4], target):
        assert drawn.isnan().flatten(1).all(1).tolist() == [False, True, True, False]
        assert drawn.isfinite().flatten(1).all(1).tolist() == [True, False, False, True]


def test_gives_no_gradient(device):
    batch = inputs((1, 4, 4), device=device)
    batch["target_mean"].requires_grad_()
    for op in (edit_input, edit_input_reference):
        assert not any(value.requires_grad for value in op(**batch, **OPTIONS))


def test_opcheck(device):
    for shape in ((2, 4, 4), (1, 3, 5)):
        for dtype in DTYPES:
            tensors = tuple(inputs(shape, device=device).values())
            opcheck(
                torch.ops.fusedit.edit_input,
                (*tensors, 2**32 - 1, 7, 6, 7, 17, 18, 0.18215, 0.1, 0.2, True, dtype),
            )


def test_compiles_whole_and_its_fakes_have_the_strides(device):
    batch = inputs((2, 4, 4), device=device)

    def both(batch):
        latents, target = edit_input(**batch, **(OPTIONS | {"dtype": torch.bfloat16}))
        assert latents.stride() == (8 * 16, 1, 4 * 8, 8)
        assert target.stride() == (4 * 16, 1, 4 * 4, 4)
        return latents * 2, target + 1

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(batch), both(batch), strict=True):
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()


def test_fakes_have_the_strides_of_what_is_returned(device):
    batch = inputs((2, 3, 5), device=device)
    real = edit_input(**batch, **OPTIONS)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = edit_input(
            **{name: mode.from_tensor(value) for name, value in batch.items()}, **OPTIONS
        )
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction_type": "sample"}, ValueError, "prediction_type must be one of .*'sample'"),
        (
            {"dtype": torch.float64},
            TypeError,
            "dtype must be fp32, bf16 or fp16, got torch.float64",
        ),
        ({"seed": -1}, ValueError, r"seed must be 0 to 2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be"),
        ({"posterior_purpose": 2**32}, ValueError, "posterior_purpose must be 0 to"),
        ({"noise_purpose": -1}, ValueError, "noise_purpose must be 0 to"),
        ({"noise_offset_purpose": -1}, ValueError, "noise_offset_purpose must be 0 to"),
        ({"input_perturbation_purpose": 2**32}, ValueError, "input_perturbation_purpose must"),
        ({"noise_offset": -0.1}, ValueError, "noise_offset must be 0 or more, got -0.1"),
        ({"noise_offset": float("inf")}, ValueError, "noise_offset must be 0 or more, got inf"),
        ({"input_perturbation": float("nan")}, ValueError, "input_perturbation must be 0 or more"),
        ({"target_mean": torch.zeros(2, 3, 4, 4)}, ValueError, r"target_mean .*\[2, 3, 4, 4\]"),
        ({"target_mean": torch.zeros(4, 4, 4)}, ValueError, r"target_mean must be \[n, 4, h, w\]"),
        ({"target_std": torch.zeros(2, 4, 4, 3)}, ValueError, r"target_std must be \[2, 4, 4, 4\]"),
        ({"condition": torch.zeros(1, 4, 4, 4)}, ValueError, r"condition must be \[2, 4, 4, 4\]"),
        ({"condition": torch.zeros(2, 4, 4, 4).double()}, TypeError, "condition must be fp32"),
        ({"positions": torch.zeros(3).long()}, ValueError, r"positions must be \[2\], got \[3\]"),
        ({"positions": torch.zeros(2).int()}, TypeError, "positions must be torch.int64"),
        ({"timesteps": torch.zeros(2)}, TypeError, "timesteps must be torch.int64"),
        ({"timesteps": torch.zeros(2, 1).long()}, ValueError, r"timesteps must be \[2\]"),
        ({"drop_image": torch.zeros(2).long()}, TypeError, "drop_image must be torch.bool"),
        ({"signal": torch.ones(STEPS).double()}, TypeError, "signal must be torch.float32"),
        ({"noise": torch.ones(STEPS - 1)}, ValueError, r"noise must be \[1000\], got \[999\]"),
        ({"signal": torch.ones(0)}, ValueError, r"signal must be \[steps\], got \[0\]"),
    ],
)
def test_refuses_what_it_does_not_serve(change, error, message, device):
    batch = inputs((2, 4, 4), device=device) | OPTIONS
    with pytest.raises(error, match=f"^edit_input: {message}"):
        edit_input(**(batch | change))
