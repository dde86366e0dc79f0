import copy
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
)
from PIL import Image
from tiny import save_tiny_pipeline

from fusedit.trainer import sample
from fusedit.trainer.errors import UsageError
from fusedit.trainer.families import SDXL, STABLE_DIFFUSION
from fusedit.trainer.pipelines import load_pipeline
from fusedit.trainer.sample import build_pipeline, edit_images, grid, nearest_size, open_image

GUIDED = {"steps": 3, "guidance_scale": 5.0, "image_guidance_scale": 1.5}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("models") / "edit", in_channels=8)
    loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return {name: getattr(loaded, name) for name in names}


@pytest.fixture
def pipeline(parts):
    return build_pipeline(STABLE_DIFFUSION, **parts)


def picture(seed: int, width=24, height=20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def noise(count: int, height=10, width=12) -> torch.Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(1))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_guidance_is_that_of_the_paper(pipeline):
    """One DDIM step by hand: equation 3 of Brooks et al. with the pipeline's own modules."""
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    image, start = picture(0), noise(1)
    [edited] = edit_images(
        pipeline, [image], ["red"], start, steps=1, guidance_scale=4.0, image_guidance_scale=1.5
    )

    with torch.no_grad():
        given = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        image_latents = pipeline.vae.encode(given).latent_dist.mode()  # not scaled
        tokens = pipeline.tokenizer(["red", ""], padding="max_length", return_tensors="pt")
        text, null = pipeline.text_encoder(tokens.input_ids)[0].split(1)
        blank = torch.zeros_like(image_latents)

        def predict(condition, states):
            return pipeline.unet(torch.cat([start, condition], 1), 999, states).sample

        neither, no_text = predict(blank, null), predict(image_latents, null)
        v = neither + 1.5 * (no_text - neither) + 4.0 * (predict(image_latents, text) - no_text)
        # At zero signal-to-noise the picture is -v alone, and DDIM's only step ends near it.
        alpha = pipeline.scheduler.final_alpha_cumprod
        latents = alpha.sqrt() * -v + (1 - alpha).sqrt() * start
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels([edited])[0] - expected).max() <= 1


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler]
)
def test_an_edit_does_not_depend_on_its_batch_or_on_generators(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    images, texts, start = [picture(0), picture(1)], ["make it red", "add snow"], noise(2)
    together = edit_images(pipeline, images, texts, start, **GUIDED)
    torch.rand(5)
    before = torch.random.get_rng_state()
    alone = [
        edit_images(pipeline, [images[i]], [texts[i]], start[i : i + 1], **GUIDED)[0]
        for i in range(2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.abs(pixels(together) - pixels(alone)).max() <= 1
    assert np.abs(pixels(together)[0] - pixels(together)[1]).mean() > 1


def test_the_instruction_the_image_and_the_noise_all_count(pipeline):
    def edit(seed=0, text="make it red", start=None):
        latents = noise(1) if start is None else start
        return pixels(edit_images(pipeline, [picture(seed)], [text], latents, **GUIDED))

    base = edit()
    for other in (edit(seed=1), edit(text="add snow"), edit(start=-noise(1))):
        assert np.abs(base - other).max() > 1


def test_without_guidance_the_scales_do_not_count(pipeline):
    def edit(scale, image_scale):
        scales = {"guidance_scale": scale, "image_guidance_scale": image_scale}
        return pixels(edit_images(pipeline, [picture(0)], ["red"], noise(1), steps=2, **scales))

    assert np.array_equal(edit(1.0, 1.5), edit(0.0, 3.0))


def test_an_image_scale_that_would_switch_guidance_off_is_refused(pipeline):
    with pytest.raises(UsageError, match=r"1 or more, got 0\.5"):
        edit_images(
            pipeline,
            [picture(0)],
            ["red"],
            noise(1),
            steps=1,
            guidance_scale=5.0,
            image_guidance_scale=0.5,
        )


def test_images_of_any_size_take_that_of_the_noise(pipeline):
    images = [picture(0, 61, 33), picture(1, 9, 90).convert("L")]
    edited = edit_images(pipeline, images, ["a", "b"], noise(2), **GUIDED)
    assert [image.size for image in edited] == [(24, 20)] * 2


@pytest.mark.parametrize("kind", [STABLE_DIFFUSION, SDXL], ids=lambda family: family.name)
def test_the_steps_are_told(kind, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "edit", in_channels=8, xl=kind is SDXL)
    pipeline = load_pipeline(str(folder))
    told = []
    [shown] = edit_images(pipeline, [picture(0)], ["red"], noise(1), **GUIDED, shows=told.append)
    [quiet] = edit_images(pipeline, [picture(0)], ["red"], noise(1), **GUIDED)
    assert told == [*range(1, len(pipeline.scheduler.timesteps) + 1)]  # PNDM adds one
    assert np.array_equal(shown, quiet)


def test_training_modules_of_two_dtypes(parts):
    """In training the UNet is fp32 and the frozen modules are bf16."""
    narrow = {name: copy.deepcopy(parts[name]).bfloat16() for name in ("vae", "text_encoder")}
    mixed = build_pipeline(STABLE_DIFFUSION, **parts | narrow)
    full = build_pipeline(STABLE_DIFFUSION, **parts)
    one, two = (
        pixels(edit_images(p, [picture(0)], ["red"], noise(1), **GUIDED)) for p in (mixed, full)
    )
    assert mixed.unet.dtype is torch.float32
    assert np.abs(one - two).mean() < 8  # bf16 keeps 8 bits


def test_building_and_editing_is_quiet(parts, capsys):
    pipeline = build_pipeline(STABLE_DIFFUSION, **parts)
    edit_images(pipeline, [picture(0)], ["red"], noise(1), **GUIDED)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("size", "factor", "long_side", "expected"),
    [
        ((24, 20), 8, None, (24, 16)),
        ((25, 23), 8, None, (24, 24)),
        ((3, 2), 8, None, (8, 8)),
        ((4000, 3000), 8, 512, (512, 384)),
        ((300, 400), 8, 205, (152, 200)),
        ((64, 64), 8, 512, (64, 64)),
        ((64, 64), 8, 5, (8, 8)),
    ],
)
def test_nearest_size(size, factor, long_side, expected):
    assert nearest_size(size, factor, long_side) == expected


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "image.png"
    picture(3).save(path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/image.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(path.read_bytes() if found else b"")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_open_image(tmp_path, address, monkeypatch):
    picture(3).save(tmp_path / "image.png")
    assert open_image(str(tmp_path / "image.png")) == picture(3)
    assert open_image(f"{address}/image.png") == picture(3)
    (tmp_path / "text.png").write_text("not an image")
    for source, reason in {
        str(tmp_path / "missing.png"): "no such file",
        str(tmp_path / "text.png"): "image",
        str(tmp_path): "cannot",
        f"{address}/other.png": "cannot be fetched: .*404",
        "file:///etc/hosts": "only http and https",
        "http://[": "http",
    }.items():
        with pytest.raises(UsageError, match=reason) as caught:
            open_image(source)
        assert str(caught.value).startswith(source)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(sample, "DOWNLOAD_BYTES", 10)
    with pytest.raises(UsageError, match="larger than"):
        open_image(f"{address}/image.png")


def test_grid_shows_every_tile_large_enough_and_its_caption():
    colors = ["red", "green", "blue", "orange", "purple", "brown"]
    tiles = [Image.new("RGB", (64, 64), color) for color in colors]
    sheet = grid([tiles[:3], [*tiles[3:5], None]], ["make it red", "add snow"], ["a", "b", "c"])
    counts = {color: count for count, color in sheet.getcolors(2**20)}
    for tile in tiles[:5]:
        assert counts[tile.getpixel((0, 0))] == 128 * 128
    without = grid([tiles[:3], [*tiles[3:5], None]], ["", ""], ["a", "b", "c"])
    assert np.array_equal(np.asarray(sheet)[:24], np.asarray(without)[:24])  # headings
    dark = (np.asarray(sheet).sum(axis=2) < 200).sum() - (
        np.asarray(without).sum(axis=2) < 200
    ).sum()
    assert dark > 50


def test_many_rows_make_no_tower_and_long_captions_stay_inside():
    rows = [[Image.new("RGB", (64, 64), "red")] * 2] * 30
    captions = ["word " * 200, "w" * 500, *["short"] * 28]
    sheet = grid(rows, captions, ["input", "edit"])
    assert 0.5 < sheet.width / sheet.height < 2
    edge = np.asarray(sheet)[:, -20:]
    assert (edge == 255).all()
