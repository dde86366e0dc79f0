"""Both images of a pair take the same resize, crop and mirror, and neither is squashed."""

import numpy as np
import pytest
import torch
from PIL import Image

from fusedit.trainer import data
from fusedit.trainer.buckets import Size
from fusedit.trainer.config import DataConfig
from fusedit.trainer.data import CENTRE

SIZES = [(61, 40), (40, 61), (33, 33), (20, 27)]  # width, height; the last must grow


def transform(original, edited, section, draws):
    """To the square."""
    size = Size(section.resolution, section.resolution)
    return data.transform(original, edited, section, draws, size)


def settings(**given):
    return DataConfig(**{"resolution": 24, "interpolation": "bilinear", **given})


def random_image(size):
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def coordinates(size):
    """Red grows by 2 a pixel to the right, green by 2 a pixel down."""
    width, height = size
    down, right = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([2 * right, 2 * down, 0 * down], axis=-1).astype(np.uint8))


def inverted(image):
    return image.point(lambda value: 255 - value)


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.rand(4, generator=generator).tolist()) for _ in range(40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_a_pair_stays_a_pair(size, interpolation, draws):
    section = settings(interpolation=interpolation, max_resize=31, random_flip=True)
    image = random_image(size)
    seen = set()
    for own in draws:
        original, edited, _ = transform(image, inverted(image), section, own)
        assert original.dtype == torch.uint8
        assert original.shape == edited.shape == (3, 24, 24)
        torch.testing.assert_close(
            255 - edited.int(), original.int(), rtol=0, atol=2
        )  # two roundings
        seen.add(original.numpy().tobytes())
    assert len(seen) > 30  # of 40; a few draws meet in one place


@pytest.mark.parametrize("size", SIZES)
def test_equals_resize_then_crop(size, draws):
    section = settings(max_resize=31)
    image = random_image(size)
    for own in draws:
        size_draw, row_draw, column_draw, _ = own
        short = 24 + int(size_draw * 8)
        scale = short / min(size)
        whole = image.resize([round(side * scale) for side in size], Image.Resampling.BILINEAR)
        left, top = int(column_draw * (whole.width - 23)), int(row_draw * (whole.height - 23))
        expected = np.asarray(whole.crop((left, top, left + 24, top + 24)), dtype=int)
        original, *_ = transform(image, image, section, own)
        np.testing.assert_allclose(original.permute(1, 2, 0).numpy(), expected, atol=2)


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("center_crop", [False, True])
def test_nothing_is_squashed(size, center_crop, draws):
    """In a crop, a pixel right and a pixel down are the same distance in the image."""
    for own in draws[:8]:
        pixels, *_ = transform(*[coordinates(size)] * 2, settings(center_crop=center_crop), own)
        red, green = pixels[0, 12].float(), pixels[1, :, 12].float()
        right, down = red[4:20].diff().mean(), green[4:20].diff().mean()
        torch.testing.assert_close(right, torch.tensor(2 * min(size) / 24), rtol=0, atol=0.1)
        torch.testing.assert_close(down, right, rtol=0, atol=0.1)


def test_the_crop_reaches_every_place():
    image, section = coordinates((40, 24)), settings()
    draws = [(0.0, 0.0, place / 1000, 0.5) for place in range(1000)]
    left = [transform(image, image, section, own)[0][0, 0, 0].item() // 2 for own in draws]
    counts = np.bincount(left, minlength=17)
    assert len(counts) == 17  # 40 - 24 + 1
    assert counts.min() >= 58


def test_the_crop_of_a_tall_image_moves_down_by_its_own_draw():
    image, section = coordinates((24, 40)), settings()
    top = transform(image, image, section, (0.0, 0.0, 0.9, 0.5))[0]
    low = transform(image, image, section, (0.0, 0.999, 0.0, 0.5))[0]
    assert (top[1, 0, 0].item(), low[1, 0, 0].item()) == (0, 2 * 16)


@pytest.mark.parametrize("own", [(0.0, 0.0, 0.0, 0.5), (0.0, 0.99, 0.99, 0.5)])
def test_center_crop_is_the_middle(own):
    image = coordinates((40, 24))
    pixels, *_ = transform(image, image, settings(center_crop=True), own)
    assert pixels[0, 0, 0].item() == 2 * 8
    torch.testing.assert_close(pixels, transform(image, image, settings(), CENTRE)[0])


def test_the_size_is_drawn_from_the_whole_range():
    """Both ends included: nearest shows how often a source pixel repeats."""
    image, section = random_image((24, 24)), settings(max_resize=26, interpolation="nearest")
    for draw, side in [(0.0, 24), (0.32, 24), (0.34, 25), (0.65, 25), (0.67, 26), (0.9999, 26)]:
        pixels, *_ = transform(image, image, section, (draw, 0.0, 0.0, 0.5))
        whole = image.resize((side, side), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(
            pixels.permute(1, 2, 0).numpy(), np.asarray(whole)[:24, :24], err_msg=f"draw {draw}"
        )


def test_mirror_only_when_asked_and_drawn():
    image = random_image((24, 24))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for random_flip, draw, mirrored in [
        (True, 0.49, True),
        (True, 0.5, False),
        (False, 0.1, False),
    ]:
        own = (0.0, 0.0, 0.0, draw)
        got, *_ = transform(image, image, settings(random_flip=random_flip), own)
        torch.testing.assert_close(got, pixels.flip(2) if mirrored else pixels)


@pytest.mark.parametrize("scale", [2, 0.5])
def test_an_edited_image_of_another_size_shows_the_same_part(scale, draws):
    section = settings(resolution=16, random_flip=True, max_resize=20)
    original = coordinates((60, 40))
    edited = original.resize((int(60 * scale), int(40 * scale)), Image.Resampling.BILINEAR)
    for own in draws:
        first, second, _ = transform(original, edited, section, own)
        torch.testing.assert_close(
            first[:, 2:-2, 2:-2].int(), second[:, 2:-2, 2:-2].int(), rtol=0, atol=2
        )


def test_a_very_long_image_costs_no_more_than_its_crop():
    image = Image.new("RGB", (60_000, 1))
    pixels, *_ = transform(image, image, settings(resolution=512), (0.0, 0.5, 0.9, 0.5))
    assert pixels.shape == (3, 512, 512)
