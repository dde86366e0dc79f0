"""What a run will take, held against counts made by hand, real tensors and real files."""

import gc
import weakref

import pytest
import torch
from tiny import save_tiny_dataset, save_tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from fusedit.trainer import counting, estimate
from fusedit.trainer.blank import blank_encoders, blank_unet, bytes_of
from fusedit.trainer.config import (
    AdapterConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
)
from fusedit.trainer.estimate import (
    GIB,
    checkpoint_bytes,
    count_run,
    fits_in,
    largest,
    memory_bytes,
    pipeline_bytes,
    rates,
    step_ms,
)
from fusedit.trainer.families import STABLE_DIFFUSION
from fusedit.trainer.gpus import GPUS, gpu_named, gpu_of_device
from fusedit.trainer.pretrained import Described, describe, load_encoders, load_unet
from fusedit.trainer.trial import TrialRun, largest_tried

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}


def _config(
    folder=None, *, cached=True, adapter=None, optim=None, loop=None, data=None, **precision
):
    return RunConfig(
        model=ModelConfig(pretrained_model_name_or_path=str(folder)),
        data=DataConfig(
            **{"center_crop": True, "cache_latents": "cache" if cached else None} | (data or {})
        ),
        adapter=AdapterConfig(**adapter or {}),
        optim=OptimConfig(**optim or {}),
        loop=LoopConfig(**loop or {}),
        precision=PrecisionConfig(**{"mixed_precision": "bf16"} | precision),
    )


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """SD 1.5 by its configurations: described, and the base folder of its text encoder."""
    folder = tmp_path_factory.mktemp("sd15")
    CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ).save_pretrained(folder / "text_encoder")

    class Tokenizer:
        model_max_length = 77

    return folder, Described(SD15, SD15_VAE, {}, [Tokenizer()], STABLE_DIFFUSION, False)


@pytest.fixture(scope="module")
def sd15_256(sd15):
    """Without a cache, and so with the encoders."""
    folder, described = sd15
    return count_run(_config(folder, cached=False), described)


@pytest.fixture(scope="module")
def sd15_512(sd15):
    folder, described = sd15
    return count_run(_config(folder, data={"resolution": 512}), described)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    save_tiny_dataset(folder / "data")
    return save_tiny_pipeline(folder / "base")


def _tiny(base, **settings):
    settings["data"] = {"resolution": 32} | settings.get("data", {})
    config = _config(base, **settings)
    return config, count_run(config, describe(config.model))


def _gflops(work):
    kinds = torch.tensor([counting.KINDS.index(kind) for kind in work.kinds])
    return [work.flops[1][kinds == n].sum().item() / 1e9 for n in range(len(counting.KINDS))]


# The work, GFLOP: counted apart from this by hooks on modules, forward times three. Less the
# gradient of the text, which nobody asks for: the keys' and values' share of the linear layers.
@pytest.mark.parametrize(
    ("size", "convolution", "linear", "attention"),
    [("sd15_256", 333.0, 181.7, 26.8 + 3.1), ("sd15_512", 1332, 700, 429 + 13)],
)
def test_the_flops_of_sd15(size, convolution, linear, attention, request):
    counted = request.getfixturevalue(size)
    text = 2 * 77 * 768 * 2 * (5 * 320 + 5 * 640 + 6 * 1280) / 1e9
    assert _gflops(counted.unet) == pytest.approx(
        [convolution, linear - text, attention, 0], rel=2e-3
    )
    assert counted.parameters == 859_532_484
    assert not counted.attention_fits


def test_the_work_of_sd15s_encoders(sd15_256):
    assert sum(_gflops(sd15_256.encoders)) == pytest.approx(546 + 13.3, rel=2e-3)
    parameters = 83_653_863 + 123_060_480  # of those that were published
    assert sd15_256.encoder_bytes == 2 * parameters


def test_pytorchs_own_counter_agrees(base):
    """In fp32 without our ops; its attention on the meta device is made of products."""
    config, counted = _tiny(base, mixed_precision="no", plain=True)
    unet = blank_unet(describe(config.model))
    with FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, 8, 16, 16, device="meta")
        steps = torch.zeros(1, dtype=torch.int64, device="meta")
        unet(latents, steps, torch.empty(1, 16, 16, device="meta")).sample.sum().backward()
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = by_op.pop("aten.bmm")
    convolution, linear, own_attention, _ = (1e9 * g for g in _gflops(counted.unet))
    assert convolution + linear == sum(by_op.values())
    assert own_attention == attention * 7 / 6  # flash computes the scores twice


# Memory.


@pytest.mark.parametrize("plain", [False, True])
def test_counts_of_two_sizes_tell_all_others(base, plain, monkeypatch):
    _, by_few = _tiny(base, plain=plain, cached=False)
    monkeypatch.setattr(counting, "COUNTED", (6, 9))
    _, by_many = _tiny(base, plain=plain, cached=False)
    for few, many in zip(by_few[:2], by_many[:2], strict=True):
        assert few.kinds == many.kinds
        for one, other in zip(few[1:], many[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1.0)


def test_the_peak_is_what_a_real_backward_keeps(base):
    """In fp32 without our ops, the mode that runs on a CPU."""
    config, counted = _tiny(base, mixed_precision="no", plain=True)
    unet = load_unet(config.model).train()
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    images = 8
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        latents, text = torch.randn(images, 8, 16, 16), torch.randn(images, 16, 16)
        unet(latents, torch.zeros(images), text)
    saved = sum(storage.nbytes() for at, storage in kept.items() if at not in own)
    peak = sum(counted.unet.peak(images))
    assert saved <= peak < 1.1 * saved  # beside it, what one op makes


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({}, 1, 4 + 4 + 8),
        ({"optim": {"use_ema": True}}, 1, 4 + 4 + 8 + 4),
        ({"optim": {"use_ema": True, "post_hoc_ema": (0.05, 0.1)}}, 1, 4 + 4 + 8 + 3 * 4),
        ({"optim": {"use_8bit_adam": True}}, 1, 4 + 4 + 2 * (1 + 4 / 256)),
        ({"optim": {"adam_moments_dtype": "bf16"}}, 1, 4 + 4 + 4),
        ({"param_dtype": "bf16"}, 1, 2 + 4 + 2 + 8),
        ({"param_dtype": "bf16", "loop": {"gradient_accumulation_steps": 2}}, 1, 2 + 4 + 6 + 8),
        ({"param_dtype": "bf16"}, 2, 2 + 4 + 4 + 8 + 2),
        ({"sharding": "fsdp", "optim": {"use_ema": True}}, 4, (4 + 4 + 8 + 4) / 4),
        ({"sharding": "hsdp", "param_dtype": "bf16"}, 2, (4 + 4 + 8) / 2),
    ],
)
def test_bytes_of_a_parameter(base, settings, ranks, expected):
    config, counted = _tiny(base, **settings)
    parts = memory_bytes(counted, config, 1, ranks)
    states = ("parameters", "fp32 masters", "gradients", "moments", "averages (EMA)")
    total = sum(parts.get(name, 0) for name in states)
    assert total == pytest.approx(expected * counted.parameters)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": {"use_ema": True}},
        {"optim": {"use_ema": True, "post_hoc_ema": (0.05, 0.1)}},
        {"optim": {"adam_moments_dtype": "bf16"}},
        {"param_dtype": "bf16", "loop": {"gradient_accumulation_steps": 2}},
        {"adapter": {"lora_rank": 4, "lora_dropout": 0.1}, "optim": {"use_ema": True}},
        {"adapter": {"lora_rank": 4, "use_dora": True}},
        {"adapter": {"lora_rank": 4}, "mixed_precision": "no"},
    ],
)
def test_a_real_run_holds_those_bytes(base, settings):
    """And its checkpoint: the trial's own tensors, on a CPU."""
    config, counted = _tiny(base, cached=False, **settings)
    trial = TrialRun(config, describe(config.model), torch.device("cpu"))
    trial.update(2)
    prepared, optimizer = trial.prepared, trial.optimizer
    moved = prepared.parameters.values()
    moments = [t for name, t in optimizer.state().items() if not name.endswith(".step")]
    averages = [t for kept in optimizer.averages for t in kept.averages.values()]
    masters = [] if prepared.masters is None else list(moved)
    real = {
        "parameters": bytes_of(prepared.unet),
        "fp32 masters": sum(t.nbytes for t in masters),
        "gradients": sum(
            p.grad.nbytes for p in {*moved, *prepared.unet.parameters()} if p.grad is not None
        ),
        "moments": sum(t.nbytes for t in moments),
        "averages (EMA)": sum(t.nbytes for t in averages),
        "VAE and text encoder": bytes_of(trial.encoders.vae, trial.encoders.text_encoder),
    }
    parts = memory_bytes(counted, config, 2, 1)
    assert {name: parts.get(name, 0) for name in real} == real
    saved = sum(t.nbytes for t in [*moved, *moments, *averages])
    assert checkpoint_bytes(counted, config.optim) == saved


def test_what_saves_memory_is_seen(base):
    _, fused = _tiny(base)
    _, plain = _tiny(base, plain=True)
    _, again = _tiny(base, gradient_checkpointing=True)
    _, full = _tiny(base, mixed_precision="no")
    most, least = sum(fused.unet.peak(64)), sum(again.unet.peak(64))
    assert sum(plain.unet.peak(64)) > 1.2 * most
    assert sum(full.unet.peak(64)) > 1.8 * most
    assert least < 0.8 * most
    assert again.unet.flops[1].sum() > 1.2 * fused.unet.flops[1].sum()


def test_an_adapter_needs_little_beside_its_frozen_base(sd15):
    """Of SD 1.5 at rank 4: 797,184 numbers on the attentions, and conv_in's 23,360."""
    folder, described = sd15
    config = _config(folder, adapter={"lora_rank": 4})
    counted = count_run(config, described)
    assert counted.parameters == 797_184 + 23_360
    parts = memory_bytes(counted, config, 1, 1)
    assert parts["parameters"] < 2.01 * 860e6
    assert parts["gradients"] + parts["moments"] == 12 * counted.parameters
    assert parts["low-precision copies"] < 4 * counted.parameters
    assert checkpoint_bytes(counted, config.optim) == 12 * counted.parameters


def test_a_dropped_input_is_kept_for_the_backward(base):
    _, whole = _tiny(base, adapter={"lora_rank": 2})
    _, dropped = _tiny(base, adapter={"lora_rank": 2, "lora_dropout": 0.5})
    assert sum(dropped.unet.peak(64)) > 1.02 * sum(whole.unet.peak(64))


def test_autocast_keeps_a_bf16_copy_of_each_weight(sd15_256, base):
    copies, _ = sd15_256.unet.peak(64)
    assert 1.9 < copies / sd15_256.parameters < 2.0  # not of the norms' weights
    _, halves = _tiny(base, param_dtype="bf16")
    assert halves.unet.peak(64)[0] < 0.1 * halves.parameters


@pytest.mark.parametrize(
    ("cached", "held_out", "there"), [(False, 0, True), (True, 0, False), (True, 2, True)]
)
def test_a_cached_run_has_encoders_only_to_validate(base, cached, held_out, there):
    config, counted = _tiny(base, cached=cached, data={"held_out": held_out})
    parts = memory_bytes(counted, config, 4, 1)
    assert ("VAE and text encoder" in parts) == there
    assert ("encoding of images" in parts) == (not cached)
    assert ("encoders" in step_ms(counted, config, GPUS["h100"], 1)) == (not cached)


def test_24_gb_are_enough_for_512_px_and_16_gb_for_256(sd15, sd15_256, sd15_512):
    def most(gpu, counted, **optim):
        return largest(fits_in(GPUS[gpu], counted, _config(optim=optim), 1))

    for gpu in ("l4", "a10", "rtx3090", "rtx4090"):
        assert 4 <= most(gpu, sd15_512, use_ema=True) < most(gpu, sd15_512) < 32
    cached = sd15_256._replace(encoders=None, encoder_bytes=0)
    for settings in ({"adam_moments_dtype": "bf16"}, {"use_8bit_adam": True}):
        assert most("rtx4080", cached, **settings) >= 16
        assert most("rtx4080", sd15_256, **settings) >= 4
    assert most("h100", sd15_512) > 8 * most("l4", sd15_512)


# Speed.


@pytest.mark.parametrize(
    ("size", "batch", "images_per_second"), [("sd15_256", 64, 668), ("sd15_512", 32, 143)]
)
def test_the_speed_of_an_h100(size, batch, images_per_second, request):
    """Of the step-time model: "target: custom kernels", with averages and bf16 weights."""
    counted = request.getfixturevalue(size)._replace(encoders=None)
    config = _config(loop={"train_batch_size": batch}, optim={"use_ema": True})
    step_s = sum(step_ms(counted, config, GPUS["h100"], 1).values()) / 1000
    assert batch / step_s == pytest.approx(images_per_second, rel=0.15)


def test_bf16_weights_are_closer_to_it(sd15, sd15_256):
    folder, described = sd15
    settings = {"loop": {"train_batch_size": 64}, "optim": {"use_ema": True}}
    halves = _config(folder, param_dtype="bf16", **settings)
    step_s = sum(step_ms(count_run(halves, described), halves, GPUS["h100"], 1).values()) / 1000
    cached = sd15_256._replace(encoders=None)
    full_s = sum(step_ms(cached, _config(**settings), GPUS["h100"], 1).values()) / 1000
    assert 64 / full_s < 64 / step_s < 668


def test_micro_steps_share_an_optimizer_step(sd15_256):
    once = step_ms(sd15_256, _config(loop={"train_batch_size": 8}), GPUS["h100"], 1)
    loop = {"train_batch_size": 8, "gradient_accumulation_steps": 3}
    thrice = step_ms(sd15_256, _config(loop=loop), GPUS["h100"], 1)
    assert thrice == pytest.approx(
        {name: ms * (1 if name == "optimizer" else 3) for name, ms in once.items()}
    )
    assert once["encoders"] > once["attention"]


def test_rates_follow_the_number_format():
    def of(gpu, **settings):
        flops, _ = rates(GPUS[gpu], PrecisionConfig(**settings), attention_fits=False)
        return flops["convolution"], flops["linear"], flops["attention"]

    half, full = of("h100", mixed_precision="bf16"), of("h100", mixed_precision="no")
    assert half == pytest.approx((0.7 * 790e12, 0.7 * 790e12, 0.28 * 790e12))
    assert full[0] / half[0] == pytest.approx(495 / 989)  # cuDNN takes TF32
    assert full[1] / half[1] == pytest.approx(67 / 989)
    assert of("h100", mixed_precision="no", allow_tf32=True)[1] == full[0]
    assert of("h100", mixed_precision="bf16", plain=True) < half
    wide, _ = rates(GPUS["h100"], PrecisionConfig(mixed_precision="bf16"), attention_fits=True)
    assert wide["attention"] > half[2]


# Sizes.


def test_the_pipeline_is_as_large_as_its_weights(base):
    config, counted = _tiny(base)
    others = bytes_of(*blank_encoders(config.model, describe(config.model)))
    assert others == bytes_of(*load_encoders(config.model))
    unet = bytes_of(load_unet(config.model))
    assert pipeline_bytes(counted, OptimConfig(), others) == unet + others
    assert pipeline_bytes(counted, OptimConfig(use_ema=True), others) == 2 * unet + others


# The search.


@pytest.mark.parametrize("most", [*range(20), 31, 32, 33, 100])
def test_the_largest_that_fits(most):
    asked = []
    assert largest(lambda images: asked.append(images) or images <= most) == most
    assert len(asked) == len(set(asked)) <= 16


@pytest.mark.parametrize(("bound", "most"), [(1, 1), (7, 7), (8, 8), (9, 9)])
def test_the_search_has_a_bound(bound, most):
    assert largest(lambda images: True, bound) == most


class Stub:
    """Holds memory as an update does, and runs out of it above a micro-batch."""

    def __init__(self, most):
        self.most, self.tried = most, []

    def update(self, images):
        self.tried.append(images)
        held = torch.zeros(images)
        self.last = weakref.ref(held.untyped_storage())
        if images > self.most:
            raise torch.cuda.OutOfMemoryError(f"{held.nbytes} bytes are too many")


@pytest.mark.parametrize("most", [0, 1, 5])
def test_the_largest_is_tried_and_nothing_stays(most):
    made = []

    def make():
        stub = Stub(most)
        made.append(weakref.ref(stub))
        return stub.update

    assert largest_tried(make) == most
    assert [stub() for stub in made] == [None]


def test_a_run_that_cannot_even_be_built_fits_nothing():
    def make():
        raise torch.cuda.OutOfMemoryError("parameters")

    assert largest_tried(make) == 0


def test_another_error_is_not_taken_for_memory():
    def make():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        largest_tried(make)


@pytest.mark.parametrize("cached", [False, True])
def test_a_trial_takes_real_updates(base, cached):
    config, _ = _tiny(base, cached=cached, plain=True)
    trials = []

    def make():
        trials.append(TrialRun(config, describe(config.model), torch.device("cpu")))
        return lambda images: trials[0].update(images) if images < 3 else Stub(0).update(images)

    assert largest_tried(make) == 2
    assert (trials[0].encoders is None) == cached
    counts = {v.item() for k, v in trials[0].optimizer.state().items() if k.endswith(".step")}
    assert counts <= {0.0, 4.0}  # what lay in memory may be no numbers; then no step is applied
    trials.clear()
    gc.collect()


# GPU types.


@pytest.mark.parametrize(
    ("name", "mib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 81008, "h100"),
        ("NVIDIA H200", 143167, "h200"),
        ("NVIDIA A100-SXM4-40GB", 40326, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 81154, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 24111, "rtx4090"),
        ("NVIDIA L4", 22565, "l4"),
        ("NVIDIA L40S", 45373, "l40s"),
        ("Tesla T4", 14913, "t4"),
        ("NVIDIA GeForce GTX 1080", 8000, None),
    ],
)
def test_a_card_is_known_by_name_and_memory(name, mib, key):
    assert gpu_of_device(name, mib * 2**20) == key


def test_the_h100_is_as_measured():
    gpu = gpu_named("H100")
    assert gpu.half_tflops * estimate.PRODUCTS_REACHED == pytest.approx(790)
    assert gpu.gb_per_s * estimate.COPIES_REACHED == pytest.approx(3000)
    assert gpu.memory_mib * 2**20 / GIB == pytest.approx(79.6, abs=0.1)
