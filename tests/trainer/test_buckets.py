"""Aspect-ratio buckets: shapes that stay, one in a step, in the same order whoever asks."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from ranks import Ranks, run
from safetensors.torch import load_file
from tiny import save_tiny_pipeline

from fusedit.trainer import data
from fusedit.trainer.buckets import Size, bucket_sizes, find_buckets, nearest
from fusedit.trainer.config import DataConfig
from fusedit.trainer.data import Order
from fusedit.trainer.draws import Purpose, permutation
from fusedit.trainer.errors import UsageError
from fusedit.trainer.rows import open_rows

SHAPES = [(32, 16), (30, 10), (20, 20), (16, 33), (24, 21)]  # of the dataset, in turn
ROWS, STEPS = 18, 12


def save_pairs(folder):
    """Pairs of SHAPES; the edited image is the other's negative."""
    folder.mkdir()
    rows = []
    for index in range(ROWS):
        width, height = SHAPES[index % len(SHAPES)]
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        names = f"{index:02}_a.png", f"{index:02}_b.png"
        for name, own in zip(names, (pixels, 255 - pixels), strict=True):
            Image.fromarray(own).save(folder / name)
        columns = dict(zip(("input_image", "edited_image"), names, strict=True))
        rows.append(json.dumps({**columns, "edit_prompt": f"edit {index % 3}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_pipeline(folder / "base")
    save_pairs(folder / "data")
    return folder


# Sizes.


@pytest.mark.parametrize(("resolution", "unit"), [(256, 64), (512, 64), (1024, 32), (16, 4)])
def test_sizes_are_of_about_the_squares_area(resolution, unit):
    sizes = bucket_sizes(resolution, unit)
    assert Size(resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes) > 4
    for width, height in sizes:
        assert 0.85 * resolution**2 <= width * height <= resolution**2
        assert width % unit == height % unit == 0
        assert Size(height, width) in sizes
    ratios = [width / height for width, height in sizes]
    assert ratios == sorted(ratios, reverse=True)
    assert max(ratios) == pytest.approx(4.0)


def test_xl_has_the_sizes_it_was_trained_with():
    """Those of appendix I of its paper that are widest for their height."""
    named = {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (2048, 512)}
    assert named <= {tuple(size) for size in bucket_sizes(1024, 32)}


def test_a_row_takes_the_nearest_shape():
    sizes = [Size(32, 8), Size(20, 12), Size(16, 16), Size(12, 20)]
    images = [Size(400, 100), Size(4000, 900), Size(300, 200), Size(100, 99), Size(9, 16)]
    assert nearest(sizes, images).tolist() == [0, 0, 1, 2, 3]


def test_a_turned_photograph_is_taken_upright(tmp_path):
    folder = save_pairs(tmp_path / "data")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 16)).save(folder / "00_a.png", exif=exif)
    (folder / "02_a.png").write_bytes(b"no image")  # told when it is read
    rows = open_rows(DataConfig(train_data_dir=str(folder)))
    assert rows.size(0) == (16, 64)
    buckets = find_buckets(16, 4, rows)
    tall, unread = (buckets.sizes[int(buckets.of_row[row])] for row in (0, 2))
    assert tall == (8, 32)
    assert unread == (16, 16)


def test_a_resolution_that_is_no_bucket_is_refused():
    with pytest.raises(UsageError, match=r"--resolution 500 must be a multiple of 64.*448 or 512"):
        bucket_sizes(500, 64)


def test_a_pair_keeps_its_shape():
    """Columns and rows count up in an image twice as wide: all of it is seen."""
    ramp = np.zeros((40, 80, 3), np.uint8)
    ramp[..., 0] = np.arange(80)[None] * 3
    ramp[..., 1] = np.arange(40)[:, None] * 3
    image, section = Image.fromarray(ramp), DataConfig(resolution=16, interpolation="nearest")
    seen = data.transform(image, image, section, data.CENTRE, Size(24, 12)).original
    assert seen.shape == (3, 12, 24)
    assert seen[0].min() < 3 * 4 and seen[0].max() > 3 * 75  # noqa: PT018
    assert seen[1].min() < 3 * 4 and seen[1].max() > 3 * 35  # noqa: PT018


# Order.


def order_of(counts, global_batch, seed=3):
    bucket_of = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    mixed = bucket_of[torch.randperm(len(bucket_of), generator=torch.Generator().manual_seed(0))]
    return Order(torch.arange(len(mixed)), seed, global_batch, mixed), mixed


@pytest.mark.parametrize("counts", [(13, 7, 1, 8), (5,), (3, 3, 3)])
def test_an_epoch_has_each_row_once_and_a_step_one_bucket(counts):
    order, bucket_of = order_of(counts, 4)
    assert order.steps_per_epoch == sum(-(-count // 4) for count in counts)
    for epoch in range(3):
        at = torch.arange(order.slots) + epoch * order.slots
        rows = order.rows(at)
        seen = rows[rows >= 0]
        assert sorted(seen.tolist()) == list(range(sum(counts)))
        for step, own in enumerate(rows.unflatten(0, (-1, 4))):
            bucket = order.bucket(int(at[4 * step]))
            assert set(bucket_of[own[own >= 0]].tolist()) == {bucket}
            assert (own[:1] >= 0).all()  # padding comes behind
    first, second = (order.rows(torch.arange(order.slots) + e * order.slots) for e in (0, 1))
    assert sum(counts) < 8 or not torch.equal(first, second)


def test_with_one_bucket_the_order_is_the_permutation():
    order, _ = order_of((10,), 4)
    drawn = permutation(3, Purpose.ORDER, 1, 10).tolist()
    assert order.rows(torch.arange(12, 24)).tolist() == [*drawn, -1, -1]


def test_the_buckets_steps_are_mixed():
    order, _ = order_of((40, 40), 4)
    kinds = [order.bucket(4 * step) for step in range(order.steps_per_epoch)]
    assert sum(a != b for a, b in pairwise(kinds)) > 3


# Runs.


def flags(inputs, output, *more):
    return [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        f"--output_dir={output}",
        *("--resolution=16", "--buckets", "--random_flip", "--center_crop"),
        *("--train_batch_size=4", f"--max_train_steps={STEPS}", "--checkpointing_steps=4"),
        *("--conditioning_dropout_prob=0.1", "--use_ema", "--held_out=3", "--log_every=1"),
        *("--validation_inference_steps=2", "--validation_steps=6", "--report_to=none", *more),
    ]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return run(1, flags(inputs, folder / "run"), folder / "log"), folder / "run"


def weights(output):
    return load_file(output / f"checkpoint-{STEPS}" / "unet.safetensors")


def test_a_run_says_its_buckets_and_pads_each(trained):
    told, output = trained
    (line,) = [line for line in told.splitlines() if line.startswith("buckets ")]
    assert line.split(":")[0] == "buckets    4"
    assert "16x16" in line
    assert (output / "model_index.json").is_file()


def test_killed_and_resumed_it_ends_in_the_same_bits(trained, inputs, tmp_path):
    _, whole = trained
    run(1, flags(inputs, tmp_path / "run", "--max_train_steps=4"), tmp_path / "log")
    run(1, flags(inputs, tmp_path / "run"), tmp_path / "log")
    for name in ("unet", "ema", "optimizer"):
        file = f"checkpoint-{STEPS}/{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ["--train_batch_size=2"]),
        (1, ["--train_batch_size=2", "--gradient_accumulation_steps=2"]),
        (1, ["--cache_latents=CACHE"]),
        (2, ["--train_batch_size=2", "--cache_latents=CACHE"]),
        pytest.param(  # workers that encode take long to start
            2,
            ["--train_batch_size=2", "--cache_latents=CACHE", "--dataloader_num_workers=1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_micro_steps_and_a_cache_learn_the_same(trained, inputs, tmp_path, ranks, more):
    more = [word.replace("CACHE", str(tmp_path / "cache")) for word in more]
    run(ranks, flags(inputs, tmp_path / "run", *more), tmp_path / "log")
    expected, found = weights(trained[1]), weights(tmp_path / "run")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_it_is_another_run_without_buckets(trained, inputs):
    words = [word for word in flags(inputs, trained[1]) if word != "--buckets"]
    refused = Ranks(1, words, trained[1] / "refused.log")
    assert refused.wait() == [2]
    assert "--buckets was True, now False" in refused.output()


def test_every_shape_is_compiled_and_compared(inputs, tmp_path):
    """By AOT autograd: Inductor would take minutes."""
    from fusedit.trainer import job as job_module
    from fusedit.trainer.compiled import check_gradients, compile_unet

    compared = []

    def compare(unet, loss_fn, samples, *given):
        compared.append(tuple(samples.target_mean.shape[-2:]))
        check_gradients(unet, loss_fn, samples, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            job_module,
            "compile_unet",
            lambda unet, parts: compile_unet(unet, parts, backend="aot_eager"),
        )
        patch.setattr(job_module, "check_gradients", compare)
        from fusedit.launch import train

        words = flags(inputs, tmp_path / "run", "--compile=blocks", "--held_out=0")
        assert train.main([*words, "--max_train_steps=6"]) == 0
    assert Counter(compared) == dict.fromkeys(compared, 1)
    assert len(compared) == 4
