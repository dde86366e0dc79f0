"""Stable Diffusion XL: what it is told is what its pipeline will tell it. Of the reference's
defect 11, each part."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from ranks import run
from tiny import POOLED_WIDTH, TEXT_WIDTH, save_tiny_inputs, save_tiny_pipeline
from transformers import CLIPTextConfig

from fusedit.launch.edit import main as edit
from fusedit.launch.export import main as export
from fusedit.launch.flags import parse
from fusedit.trainer import sharded_checkpoint
from fusedit.trainer.buckets import Size
from fusedit.trainer.config import DataConfig, ModelConfig
from fusedit.trainer.data import make_tokenize, transform
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.encoders import Encoders, Samples
from fusedit.trainer.errors import UsageError
from fusedit.trainer.families import Text, text_widths, told_beside
from fusedit.trainer.gpus import gpu_named
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.prediction import Prediction
from fusedit.trainer.pretrained import describe, load_encoders
from fusedit.trainer.unet import grow_conv_in

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 15, xl=True)


@pytest.fixture(scope="module")
def editing(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("models") / "edit", in_channels=8, xl=True)
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(folder)
    return folder, pipeline


def encoders_of(folder, **options):
    section = ModelConfig(pretrained_model_name_or_path=str(folder))
    described = describe(section)
    tokenize = make_tokenize(described.tokenizers)
    vae, text_encoder = load_encoders(section)
    null_tokens = tokenize("")[None]
    made = Encoders(vae, text_encoder, null_tokens, CPU, torch.float32, **options)
    return described, tokenize, made


# What encodes the text.


@pytest.mark.parametrize("words", ["make it red", ""])
def test_an_instruction_is_encoded_as_the_pipeline_does(editing, words):
    folder, pipeline = editing
    _, tokenize, encoders = encoders_of(folder)
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(words, device=CPU)
    found = encoders.encode_text(tokenize(words)[None])
    assert found.states.shape == (1, 16, 2 * TEXT_WIDTH)
    assert found.pooled.shape == (1, POOLED_WIDTH)
    torch.testing.assert_close(found.states, states)
    torch.testing.assert_close(found.pooled, pooled)


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_instruction_is_what_the_pipeline_takes_for_none(editing, tmp_path, zeros):
    folder = shutil.copytree(editing[0], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = zeros
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(folder)
    with torch.no_grad():
        _, states, _, pooled = pipeline.encode_prompt("red", device=CPU)
    described, _, encoders = encoders_of(folder)
    found = described.null_text(encoders.null_text)
    torch.testing.assert_close(found.states, states)
    torch.testing.assert_close(found.pooled, pooled)
    assert (found.pooled.count_nonzero() == 0) == zeros


def test_dropping_the_text_drops_the_pooled_embedding_too():
    class Unet(torch.nn.Module):
        def forward(self, latents, timesteps, text, added_cond_kwargs, return_dict):
            self.text, self.beside = text, added_cond_kwargs
            return (torch.zeros_like(latents[:, :4]),)

    count, latents = 64, torch.zeros(64, 4, 3, 3)
    samples = Samples(
        target_mean=latents,
        target_std=latents,
        condition=latents,
        text=torch.randn(count, 5, 7),
        pooled=torch.randn(count, 3),
        size_ids=torch.rand(count, 6),
        positions=torch.arange(count),
        weights=torch.ones(count),
    )
    schedule = Diffusion.from_scheduler({"beta_schedule": "scaled_linear"}, 0.13025, CPU)
    null = Text(torch.full((1, 5, 7), 9.0), torch.full((1, 3), 7.0))
    unet, loss = Unet(), EditLoss(schedule, (0.3, 0.2, 0.1), null, 3, torch.float32)
    loss(unet, samples)
    dropped = (unet.text == 9.0).all(dim=(1, 2))
    assert 0 < dropped.sum() < count
    assert torch.equal((unet.beside["text_embeds"] == 7.0).all(dim=1), dropped)
    kept = unet.beside["text_embeds"][~dropped]
    assert torch.equal(kept, samples.pooled[~dropped])
    assert torch.equal(unet.beside["time_ids"], samples.size_ids)


def test_sizes_are_told_in_full():
    """bf16 would make 1024 of 1021."""
    ids = torch.tensor([[1021.0, 767.0, 13.0, 257.0, 1024.0, 1024.0]])
    beside = told_beside(torch.zeros(1, 3, dtype=torch.bfloat16), ids)
    assert beside is not None
    assert torch.equal(beside["time_ids"], ids)
    assert beside["time_ids"].dtype is torch.float32


# What it is told of the image.


def picture(width, height) -> Image.Image:
    return Image.new("RGB", (width, height))


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        # 90 x 60, its short side to 20: 30 x 20, so that the crop has 11 places in a row.
        ((0.0, 0.0, 0.0, 0.9), (60, 90, 0, 0, 20, 20)),
        ((0.0, 0.0, 0.5, 0.9), (60, 90, 0, 5, 20, 20)),
        ((0.0, 0.0, 0.2, 0.9), (60, 90, 0, 2, 20, 20)),
        ((0.0, 0.0, 0.2, 0.1), (60, 90, 0, 8, 20, 20)),  # mirrored, 2 from the right
    ],
)
def test_the_sizes_of_a_sample_are_its_own(draws, expected):
    section = DataConfig(resolution=20, random_flip=True)
    found = transform(picture(90, 60), picture(90, 60), section, draws, Size(20, 20))
    assert tuple(found.size_ids.tolist()) == expected


def test_flags_override_the_corner_of_the_crop():
    section = DataConfig(resolution=20, crops_coords_top_left_h=0, crops_coords_top_left_w=7)
    draws = (0.0, 0.5, 0.5, 0.9)
    found = transform(picture(60, 90), picture(60, 90), section, draws, Size(20, 20))
    assert found.size_ids.tolist() == [90, 60, 0, 7, 20, 20]


@pytest.mark.parametrize("vae_dtype", [torch.float32, torch.bfloat16])
def test_the_condition_is_the_mode_in_any_precision_of_the_vae(editing, vae_dtype):
    folder, pipeline = editing
    _, _, encoders = encoders_of(folder, vae_dtype=vae_dtype)
    edited, original = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    mean, std, condition = encoders.encode_images(edited, original)
    with torch.no_grad():
        truth = pipeline.vae.encode(2 * (original / 255) - 1).latent_dist.mode()
        target = pipeline.vae.encode(2 * (edited / 255) - 1).latent_dist
    near = {"rtol": 1e-4, "atol": 1e-5} if vae_dtype is torch.float32 else {"rtol": 0, "atol": 0.05}
    for found, expected in ((condition, truth), (mean, target.mean), (std, target.std)):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected, **near)


# The reference's command.

FLAGS = """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path vae_precision revision variant
    dataset_name dataset_config_name train_data_dir original_image_column edited_image_column
    edit_prompt_column val_image_url_or_path validation_prompt num_validation_images
    validation_steps max_train_samples output_dir cache_dir seed resolution
    crops_coords_top_left_h crops_coords_top_left_w center_crop random_flip train_batch_size
    num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing
    learning_rate scale_lr lr_scheduler lr_warmup_steps conditioning_dropout_prob use_8bit_adam
    allow_tf32 use_ema non_ema_revision dataloader_num_workers adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir
    mixed_precision report_to local_rank checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint enable_xformers_memory_efficient_attention
"""
SWITCHES = {
    *("center_crop", "random_flip", "gradient_checkpointing", "scale_lr", "use_8bit_adam"),
    *("allow_tf32", "use_ema", "push_to_hub", "enable_xformers_memory_efficient_attention"),
}
VALUES = {
    "vae_precision": "bf16",
    "lr_scheduler": "cosine",
    "mixed_precision": "bf16",
    "report_to": "tensorboard",
    "learning_rate": "1e-5",
    "adam_beta1": "0.8",
    "adam_beta2": "0.99",
    "adam_weight_decay": "0.1",
    "adam_epsilon": "1e-6",
    "conditioning_dropout_prob": "0.05",
    "max_grad_norm": "2.0",
}


def test_all_flags_of_its_script_are_taken():
    names = FLAGS.split()
    assert len(names) == 55
    words = []
    for name in names:
        words += [f"--{name}"] if name in SWITCHES else [f"--{name}={VALUES.get(name, '64')}"]
    config = parse(words).run
    assert config.validation.val_image_url == "64"
    assert config.validation.validation_steps == 64
    assert config.precision.vae_precision == "bf16"
    assert config.data.crops_coords_top_left_w == 64


def flags(inputs, output, *more):
    return [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        f"--output_dir={output}",
        f"--max_train_steps={STEPS}",
        *("--resolution=16", "--random_flip", "--train_batch_size=5", "--center_crop"),
        *("--gradient_accumulation_steps=2", "--conditioning_dropout_prob=0.1", "--use_ema"),
        *("--held_out=2", "--validation_inference_steps=2", "--validation_steps=3"),
        *("--checkpointing_steps=3", "--log_every=1", "--report_to=none", *more),
    ]


def state(output):
    folder = output / f"checkpoint-{STEPS}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """13 rows, 10 a step: the last batch of an epoch is ragged."""
    folder = tmp_path_factory.mktemp("trained")
    run(1, flags(inputs, folder / "run"), folder / "log")
    return folder / "run"


def test_it_trains_exports_and_edits(trained, inputs, capsys):
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(trained)
    assert pipeline.config["force_zeros_for_empty_prompt"]
    assert pipeline.unet.config["in_channels"] == 8
    base = StableDiffusionXLPipeline.from_pretrained(inputs / "base")
    for part in ("vae", "text_encoder", "text_encoder_2"):
        for name, value in getattr(base, part).state_dict().items():
            assert torch.equal(getattr(pipeline, part).state_dict()[name], value)
    card = (trained / "README.md").read_text()
    assert "StableDiffusionXLInstructPix2PixPipeline.from_pretrained" in card
    assert "stable-diffusion-xl" in card
    source, out = inputs / "data" / "000_input.png", trained / "out.png"
    assert edit([str(trained), str(source), "make it red", "-o", str(out), "--steps=2"]) == 0
    with Image.open(out) as image:
        assert image.size == (24, 20)
    assert (trained / "validation" / "step-000006.png").is_file()


def test_the_new_channels_start_at_zero_and_the_bias_stays(inputs):
    unet = UNet2DConditionModel.from_pretrained(inputs / "base" / "unet")
    bias = unet.conv_in.bias.clone()
    grow_conv_in(unet, "base")
    assert torch.equal(unet.conv_in.bias, bias)
    assert unet.conv_in.weight[:, 4:].count_nonzero() == 0


def test_resumed_it_ends_in_the_same_bits(trained, inputs, tmp_path):
    run(1, flags(inputs, tmp_path / "run", "--max_train_steps=3"), tmp_path / "log")
    run(1, flags(inputs, tmp_path / "run"), tmp_path / "log")
    assert state(tmp_path / "run") == state(trained)


def close(expected, found):
    """Whether the weights of two runs agree, in whatever form they are kept."""
    expected, found = (
        sharded_checkpoint.read(output / f"checkpoint-{STEPS}", None)["unet"]
        for output in (expected, found)
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def test_from_a_cache_it_learns_the_same(trained, inputs, tmp_path):
    more = f"--cache_latents={tmp_path / 'cache'}"
    run(1, flags(inputs, tmp_path / "run", more), tmp_path / "log")
    close(trained, tmp_path / "run")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_learn_the_same(trained, inputs, tmp_path, sharding):
    more = "--train_batch_size=5", "--gradient_accumulation_steps=1", f"--sharding={sharding}"
    run(2, flags(inputs, tmp_path / "run", *more), tmp_path / "log")
    close(trained, tmp_path / "run")
    expected, found = (
        StableDiffusionXLInstructPix2PixPipeline.from_pretrained(output).unet.state_dict()
        for output in (trained, tmp_path / "run")
    )
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def test_an_adapter_of_it_loads_by_the_cards_lines_and_merges(inputs, tmp_path):
    output = tmp_path / "run"
    more = "--lora_rank=2", "--learning_rate=1e-2", "--checkpointing_steps=6"
    run(1, flags(inputs, output, *more), tmp_path / "log")
    assert export([str(output), "--merge"]) == 0
    card = (output / "README.md").read_text().split("```python\n")[1]
    lines = card.split('pipeline.to("cuda")')[0]
    lines = lines.replace('"base"', repr(str(inputs / "base")))
    lines = lines.replace('adapter = "run"', f"adapter = {str(output)!r}")
    names: dict = {}
    exec(compile(lines, "README.md", "exec"), names)
    adapted, base = names["pipeline"], StableDiffusionXLPipeline.from_pretrained(inputs / "base")
    assert isinstance(adapted, StableDiffusionXLInstructPix2PixPipeline)
    merged = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(output / "merged")
    given = torch.randn(1, 8, 8, 8), torch.tensor([500]), torch.randn(1, 16, 2 * TEXT_WIDTH)
    beside = told_beside(torch.randn(1, POOLED_WIDTH), torch.tensor([[16.0, 16, 0, 0, 16, 16]]))
    with torch.no_grad():
        ours, theirs = (p.unet(*given, added_cond_kwargs=beside).sample for p in (adapted, merged))
        grow_conv_in(base.unet, "base")
        before = base.unet(*given, added_cond_kwargs=beside).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - before).norm() > 1e-2 * before.norm()


# The architecture.

XL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize("pixels", [512, 1024])
def test_every_shape_of_a_step(pixels):
    """On the meta device: no memory, no arithmetic, all shapes and all gradients."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**XL).train()
        grow_conv_in(unet, "XL")
    assert sum(p.numel() for p in unet.parameters()) == 2_567_475_204  # counted, shapes.md
    assert len(list(unet.parameters())) == 1680
    assert text_widths(unet.config) == (2048, 1280)
    side, count = pixels // 8, 2
    options = {"device": "meta"}
    latents = torch.empty(count, 8, side, side, **options)
    beside = told_beside(torch.empty(count, 1280, **options), torch.empty(count, 6, **options))
    timesteps = torch.empty(count, dtype=torch.int64, **options)
    text = torch.empty(count, 77, 2048, **options)
    out = unet(latents, timesteps, text, added_cond_kwargs=beside).sample
    assert out.shape == (count, 4, side, side)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in unet.parameters())


VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """XL by its small files; no weights."""
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("xl") / "base", xl=True)
    with torch.device("meta"):
        UNet2DConditionModel(**XL).save_config(folder / "unet")
        AutoencoderKL(**VAE).save_config(folder / "vae")
    for part, width, layers in (("text_encoder", 768, 12), ("text_encoder_2", 1280, 32)):
        settings = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        text = CLIPTextConfig(num_hidden_layers=layers, num_attention_heads=width // 64, **settings)
        text.save_pretrained(folder / part)
    return folder, describe(ModelConfig(pretrained_model_name_or_path=str(folder)))


@pytest.mark.parametrize(
    ("pixels", "ranks", "more", "least"),
    [
        (512, 1, (), 16),
        pytest.param(1024, 1, ("--gradient_checkpointing",), 32, marks=pytest.mark.slow),
        pytest.param(
            1024, 2, ("--sharding=fsdp", "--gradient_checkpointing"), 64, marks=pytest.mark.slow
        ),
    ],
)
def test_the_plan_fits_a_card_of_80_gb(described, pixels, ranks, more, least):
    """All of it trained, with averages, from a cache; reckoned, no GPU was at hand."""
    folder, about = described
    words = [f"--pretrained_model_name_or_path={folder}", f"--resolution={pixels}", *more]
    words += ["--mixed_precision=bf16", "--param_dtype=bf16", "--adam_moments_dtype=bf16"]
    words += ["--use_ema", "--cache_latents=cache", "--train_batch_size=1"]
    made = Prediction(parse(words).run, about, gpu_named("h100"), ranks, None)
    assert made.counted.parameters == 2_567_475_204
    assert made.largest >= least


# Mistakes.


def test_a_unet_of_another_family_is_refused(inputs, tmp_path):
    other = save_tiny_pipeline(tmp_path / "other")
    section = ModelConfig(
        pretrained_model_name_or_path=str(inputs / "base"), unet=str(other / "unet")
    )
    with pytest.raises(UsageError, match="take --unet and pipeline of one family"):
        describe(section)
