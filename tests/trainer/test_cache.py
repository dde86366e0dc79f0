"""The cache gives the samples of a run without it, never others; what is damaged or old is seen."""

import json
import os
import pickle
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import INSTRUCTIONS, save_tiny_dataset, save_tiny_pipeline

from fusedit.trainer import cache_build, caching
from fusedit.trainer.cache import CachedBatch
from fusedit.trainer.cache_build import Visits
from fusedit.trainer.caching import Filling, in_bytes, open_cache
from fusedit.trainer.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OutputConfig,
    PrecisionConfig,
    RunConfig,
)
from fusedit.trainer.data import EditPairs, collate, make_tokenize
from fusedit.trainer.diffusion import Diffusion
from fusedit.trainer.encoders import Encoders
from fusedit.trainer.errors import UsageError
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.plan import make_plan
from fusedit.trainer.pretrained import load_encoders
from fusedit.trainer.unet import prepare_unet
from fusedit.trainer.windows import Verdict, Windows
from fusedit.trainer.world import World

COUNT, BATCH = 7, 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_pipeline(folder / "base")
    save_tiny_dataset(folder / "data", count=COUNT)
    _save_paper_dataset(folder / "paper")
    return folder


@pytest.fixture
def here(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)  # with times: they are part of the key
    return tmp_path


def _save_paper_dataset(folder: Path) -> None:
    seeds = [["a", ["1", "22", "3"]], ["b", ["4"]], ["c", ["5", "6"]]]
    for name, its_seeds in seeds:
        (folder / name).mkdir(parents=True)
        (folder / name / "prompt.json").write_text(json.dumps({"edit": f"change {name}"}))
        for seed in its_seeds:
            for end in (0, 1):
                drawn = np.random.default_rng([int(seed), end]).integers(0, 256, (20, 26, 3))
                path = folder / name / f"{seed}_{end}.jpg"
                Image.fromarray(drawn.astype(np.uint8)).save(path)
    (folder / "seeds.json").write_text(json.dumps(seeds))


def _config(here, *, loop=None, precision=None, output="out", **data):
    section = {
        "train_data_dir": str(here / "data"),
        "resolution": 16,
        "center_crop": True,
        "random_flip": True,
        "cache_latents": str(here / "cache"),
        **data,
    }
    return RunConfig(
        model=ModelConfig(pretrained_model_name_or_path=str(here / "base")),
        data=DataConfig(**section),
        loop=LoopConfig(**{"train_batch_size": BATCH, **(loop or {})}),
        precision=PrecisionConfig(**(precision or {})),
        output=OutputConfig(output_dir=str(here / output), report_to="none"),
    )


def _open(config, stop_requested=lambda: False):
    return open_cache(make_plan(config, World()), World(), stop_requested)


def _live(config):
    """The samples of a run without the cache: the pairs, and their encoders."""
    plan = make_plan(config, World())
    tokenize = make_tokenize(plan.described.tokenizers)
    encoders = Encoders(
        *load_encoders(config.model), tokenize("")[None], World().device, plan.dtype
    )
    pairs = EditPairs(
        plan.rows, plan.train_rows, config.data, config.loop.seed, plan.global_batch, tokenize
    )
    return pairs, encoders


def _samples(source, encoders, positions):
    batch = source.collate(source.__getitems__(list(positions)))
    if isinstance(batch, CachedBatch):
        return batch.to_samples(torch.device("cpu"))
    return encoders.encode(batch)


def _counted(monkeypatch):
    """How many images of each kind have been encoded since, and how many texts."""
    counts = {"images": 0, "texts": 0}
    images, texts = Encoders.encode_images, Encoders.encode_text

    def count_images(self, edited, original):
        counts["images"] += len(edited)
        return images(self, edited, original)

    def count_texts(self, tokens):
        counts["texts"] += len(tokens)
        return texts(self, tokens)

    monkeypatch.setattr(Encoders, "encode_images", count_images)
    monkeypatch.setattr(Encoders, "encode_text", count_texts)
    return counts


def _folders(here):
    return {path.name for path in (here / "cache").iterdir()}


# The same samples.


@pytest.mark.parametrize("settings", [
    {},
    {"random_flip": False},
    {"train_data_dir": "paper"},
    {"max_train_samples": 4, "held_out": 2},
])  # fmt: skip
def test_a_position_has_the_sample_of_a_run_without_the_cache(here, settings):
    if "train_data_dir" in settings:
        settings = {"train_data_dir": str(here / settings["train_data_dir"])}
    config = _config(here, loop={"seed": 5}, **settings)
    pairs, encoders = _live(config)
    cached = _open(config)
    for epoch in (0, 1, 2, 7):
        positions = range(epoch * pairs.order.slots, (epoch + 1) * pairs.order.slots)
        expected = _samples(pairs, encoders, positions)
        found = _samples(cached, None, positions)
        assert torch.equal(found.positions, expected.positions)
        assert torch.equal(found.weights, expected.weights)
        used = expected.weights > 0
        assert used.any()
        assert torch.equal(
            found.text[~used], cached.null_text().states.expand_as(found.text[~used])
        )
        for name in ("target_mean", "target_std", "condition", "text", "pooled", "size_ids"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype
            assert ours.is_contiguous()
            torch.testing.assert_close(ours[used], theirs[used], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        cached.null_text().states, encoders.null_text.states, rtol=1e-5, atol=1e-5
    )


def test_losses_are_those_of_a_run_without_the_cache(here):
    config = _config(here)
    plan = make_plan(config, World())
    pairs, encoders = _live(config)
    cached = _open(config)
    diffusion = Diffusion.from_scheduler(plan.described.scheduler, 0.18215, torch.device("cpu"))
    unet = _unet(config)
    for start in range(0, 4 * BATCH, BATCH):
        losses = []
        for source, null_text in ((pairs, encoders.null_text), (cached, cached.null_text())):
            loss_fn = EditLoss(diffusion, (0.3, 0.1, 0.1), null_text, 0, torch.float32)
            samples = _samples(source, encoders, range(start, start + BATCH))
            losses.append(loss_fn(unet, samples).item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def _unet(config):
    from fusedit.trainer.pretrained import load_unet

    return prepare_unet(load_unet(config.model), torch.device("cpu"), fused=False).unet


def test_in_bf16_too(here):
    config = _config(here, precision={"mixed_precision": "bf16"})
    pairs, encoders = _live(config)
    found = _samples(_open(config), None, range(BATCH))
    expected = _samples(pairs, encoders, range(BATCH))
    assert found.target_mean.dtype == found.text.dtype == torch.bfloat16
    for name in ("target_mean", "condition", "text"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0.05, atol=0.05
        )


def test_a_worker_gets_the_files_and_not_their_content(here):
    cached = _open(_config(here))
    sent = pickle.dumps(cached)
    assert len(sent) < 20_000
    expected, found = (c.__getitems__([4, 1, 6]) for c in (cached, pickle.loads(sent)))
    assert all(torch.equal(a, b) for a, b in zip(expected[:4], found[:4], strict=True))


# Random crops.


def test_crops_have_the_moments_of_those_that_are_drawn_each_time(here):
    """One row, so that only the crop and the mirror vary."""
    save_tiny_dataset(here / "large", count=1, size=(48, 40))
    settings = {"train_data_dir": str(here / "large"), "center_crop": False, "max_resize": 40}
    config = _config(here, cache_crops=128, loop={"train_batch_size": 1}, **settings)
    positions = range(1500)
    pairs, encoders = _live(config)
    drawn = _samples(pairs, encoders, positions)
    kept = _samples(_open(config), None, positions)
    distinct = kept.target_mean.flatten(1).unique(dim=0)
    assert 200 < len(distinct) <= 256  # 128 for each mirror, drawn apart, nearly all of them seen
    for name in ("target_mean", "target_std", "condition"):
        ours, theirs = getattr(kept, name).double(), getattr(drawn, name).double()
        error = (ours.mean(0) - theirs.mean(0)) / (theirs.std(0) / 256**0.5)
        assert error.square().mean() < 2.0, name  # 1 + 2 x 256 / 1500 is to be expected
        assert error.abs().max() < 6.0, name
        spread = ours.std(0) / theirs.std(0)
        assert spread.mean() == pytest.approx(1.0, abs=0.1), name


def test_a_crop_that_is_taken_is_one_that_is_kept_and_pairs_stay_pairs(here):
    settings = {"center_crop": False, "max_resize": 19, "max_train_samples": 2}
    config = _config(here, cache_crops=3, loop={"train_batch_size": 1}, **settings)
    plan, (_, encoders) = make_plan(config, World()), _live(config)
    cached = _open(config)
    visits = Visits(
        plan.rows,
        caching.wanted_units(plan.rows, plan.train_rows),
        config.data,
        cached._cache.shape,
        make_tokenize(plan.described.tokenizers),
        plan.buckets,
    )
    visits = pickle.loads(pickle.dumps(visits))  # as workers get them
    every = visits.collate(visits.__getitems__([0, 1]))
    means, _, conditions = encoders.encode_images(
        every.edited.flatten(0, 1), every.original.flatten(0, 1)
    )
    found = _samples(cached, None, range(200))
    taken = []
    for mean, condition in zip(found.target_mean, found.condition, strict=True):
        distance = (means - mean).flatten(1).norm(dim=1) + (conditions - condition).flatten(1).norm(
            dim=1
        )
        assert distance.min() < 1e-4
        taken.append(int(distance.argmin()))
    counts = np.bincount(taken, minlength=12)
    assert counts.min() > 4  # 2 rows x 2 mirrors x 3 crops, 17 times each on average


def test_the_crops_are_the_caches_and_not_the_seeds(here):
    settings = {"center_crop": False, "cache_crops": 2}
    _open(_config(here, loop={"seed": 0}, **settings))
    _open(_config(here, loop={"seed": 1}, **settings))
    assert len(_folders(here)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"center_crop": False}, "--cache_crops 4 keeps 4 of each pair, --center_crop"),
        ({"max_resize": 19}, "--cache_crops 4 keeps 4 of each pair, --center_crop"),
        ({"cache_crops": 2}, "with --center_crop there is one crop"),
        (
            {"center_crop": False, "cache_crops": 2, "cache_latents": None},
            "--cache_crops 2 needs --cache_latents",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        make_plan(_config(tmp_path, **settings), World())


# What a cache is of.


def _edit_weight(here, file):
    [path] = (here / "base").glob(file)
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1.0
    save_file(weights, path, metadata={"format": "pt"})


def _new_time(path):
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda here: _edit_weight(here, "vae/*.safetensors"),
        lambda here: _edit_weight(here, "text_encoder/*.safetensors"),
        lambda here: _new_time(here / "data" / "003_edited.png"),
        lambda here: _new_time(here / "data" / "003_input.png"),
        lambda here: (here / "data" / "metadata.jsonl").write_text(
            (here / "data" / "metadata.jsonl").read_text().replace("add snow", "add rain")
        ),
        {"resolution": 18},
        {"interpolation": "lanczos"},
        {"random_flip": False},
        {"center_crop": False, "cache_crops": 2},
        {"precision": {"mixed_precision": "bf16"}},
    ],
)
def test_a_change_of_what_is_encoded_makes_a_new_cache(here, change):
    def folder(**settings):
        filling = Filling(make_plan(_config(here, **settings), World()), World())
        filling.find()
        return filling.cache.folder

    before = folder()
    assert folder() == before
    if callable(change):
        change(here)
        assert folder() != before
    else:
        assert folder(**change) != before


def test_the_number_of_crops_and_the_tokenizer_count_too(here):
    def folder(crops):
        config = _config(here, center_crop=False, cache_crops=crops)
        filling = Filling(make_plan(config, World()), World())
        filling.find()
        return filling.cache.folder

    before = folder(2)
    assert folder(3) != before
    path = here / "base" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 15}))
    assert folder(2) != before


def test_images_inside_a_table_and_the_papers_are_known_too(here):
    paper = _config(here, train_data_dir=str(here / "paper"))
    names = []
    for change in (lambda: None, lambda: _new_time(here / "paper" / "a" / "22_1.jpg")):
        change()
        names.append(make_plan(paper, World()).rows.fingerprint())
    assert len(set(names)) == 2

    import datasets

    def saved(text):
        table = datasets.Dataset.from_dict(
            {
                "input_image": [str(here / "data" / "000_input.png")],
                "edited_image": [str(here / "data" / "000_edited.png")],
                "edit_prompt": [text],
            }
        )
        for column in ("input_image", "edited_image"):
            table = table.cast_column(column, datasets.Image())
        shutil.rmtree(here / "saved", ignore_errors=True)
        table.save_to_disk(here / "saved")
        config = _config(here, train_data_dir=str(here / "saved"))
        return [make_plan(config, World()).rows.fingerprint() for _ in range(2)]

    first, again = saved("add snow")
    assert first == again
    assert saved("add rain")[0] != first


def test_what_is_not_encoded_does_not_count(here, monkeypatch):
    _open(_config(here))
    counts = _counted(monkeypatch)
    for loop in ({"seed": 9}, {"train_batch_size": 2}, {"gradient_accumulation_steps": 2}):
        _open(_config(here, loop=loop, output="other"))
    assert counts == {"images": 0, "texts": 0}
    assert len(_folders(here)) == 1


def test_it_grows_by_the_rows_that_it_lacks_and_no_others(here, monkeypatch):
    counts = _counted(monkeypatch)
    _open(_config(here, max_train_samples=3))
    assert counts["images"] == 3 * 2
    cached = _open(_config(here, max_train_samples=5))
    assert counts["images"] == 5 * 2
    assert counts["texts"] <= len(INSTRUCTIONS) + 3  # each once; the empty one with each build
    assert sorted(len(unit) for unit in _tensors(cached, "pairs", "unit")) == [2, 3]


def _tensors(cached, kind, name):
    folder = cached._cache
    return [folder.open(shard, name)[0] for shard in folder.shards(kind)]


def test_each_instruction_is_kept_once(here):
    cached = _open(_config(here))
    assert sum(map(len, _tensors(cached, "texts", "text"))) == len(INSTRUCTIONS) + 1


# Kills, damage, other processes.


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_build, "SHARD_PAIRS", {"cpu": 2})


def test_a_stopped_build_goes_on_where_it_was(here, monkeypatch, small_shards):
    config = _config(here)
    asked = iter([False, True])
    assert _open(config, lambda: next(asked)) is None
    [folder] = (here / "cache").iterdir()
    made = {path: path.stat().st_mtime_ns for path in folder.glob("pairs-*.safetensors")}
    assert len(made) == 2
    assert not (folder / "manifest.json").exists()
    # As a kill leaves them: half a file, and a shard that was written and not yet counted.
    (folder / ".pairs-00.safetensors.partial").write_bytes(b"half")
    (folder / "pairs-00.safetensors").write_bytes(b"whole?")
    counts = _counted(monkeypatch)
    cached = _open(config)
    assert counts["images"] == (COUNT - 4) * 2
    assert {path: path.stat().st_mtime_ns for path in made} == made
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {"manifest.json", *cached._cache.shards()}
    monkeypatch.undo()
    whole = _open(_config(here, cache_latents=str(here / "whole")))
    for got, expected in zip(
        cached.__getitems__(list(range(9))), whole.__getitems__(list(range(9))), strict=True
    ):
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_a_flipped_byte_is_named_and_its_shard_made_anew(here, monkeypatch, small_shards, kind):
    config = _config(here)
    _open(config)
    shard = sorted((here / "cache").rglob(f"{kind}-*.safetensors"))[0]
    lost = len(load_file(shard)["digest"])
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UsageError, match=rf"damaged: {shard.name} .*hash.*delete that file"):
        _open(config)
    shard.write_bytes(data[:-1])
    with pytest.raises(UsageError, match=rf"damaged: {shard.name} has \d+ bytes"):
        _open(config)
    shard.unlink()
    counts = _counted(monkeypatch)
    _open(config)
    expected = (
        {"images": 2 * lost, "texts": 1} if kind == "pairs" else {"images": 0, "texts": lost + 1}
    )
    assert counts == expected  # each build encodes the empty text too
    assert shard.exists()


def test_a_broken_or_foreign_manifest_is_refused(here):
    config = _config(here)
    _open(config)
    [manifest] = (here / "cache").rglob("manifest.json")
    text = manifest.read_text()
    manifest.write_text(text.replace('"resolution": 16', '"resolution": 32'))
    with pytest.raises(UsageError, match="is of another cache; delete"):
        _open(config)
    manifest.write_text(text[:-5])
    with pytest.raises(UsageError, match=r"manifest.json cannot be read .*delete"):
        _open(config)


def test_it_waits_for_another_run_that_builds_the_same(here, monkeypatch):
    config = _config(here)
    filling = Filling(make_plan(config, World()), World())
    filling.find()
    assert filling.cache.lock()
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            filling.cache.unlock()

    monkeypatch.setattr(caching.time, "sleep", nap)
    assert _open(config) is not None
    assert len(naps) == 2
    assert filling.cache.lock()  # given back


def test_it_needs_the_space_before_it_starts(here, monkeypatch):
    usage = shutil.disk_usage(here)._replace(free=1000)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: usage)
    size = in_bytes(COUNT * 2 * (3 * 4 * 8 * 8 * 4 + 6 * 4))
    with pytest.raises(UsageError, match=f"{size} are to be written to .* where 1 kB are free"):
        _open(_config(here))
    assert not list((here / "cache").rglob("*.safetensors"))


def test_a_pair_that_two_builds_have_made_counts_once(here, monkeypatch):
    """As where the disk has no locks between machines."""
    config = _config(here, train_data_dir=str(here / "paper"))
    whole = _open(config)._cache
    monkeypatch.setattr(cache_build, "SHARD_PAIRS", {"cpu": 2})
    other_place = {"cache_latents": str(here / "other"), "train_data_dir": str(here / "paper")}
    other = _open(_config(here, **other_place))._cache
    for name, facts in other.shards("pairs").items():
        if (other.open(name, "unit")[0] == torch.tensor([[0, 0], [0, 1]])).all():  # two of three
            shutil.copy(other.folder / name, whole.folder)
            whole.line_of(name).write_text(json.dumps(facts))
    pairs, encoders = _live(config)
    cached = _open(config)
    assert sorted(len(unit) for unit in _tensors(cached, "pairs", "unit")) == [2, 6]
    for start in range(0, 30, BATCH):
        positions = range(start, start + BATCH)
        expected, found = (_samples(source, encoders, positions) for source in (pairs, cached))
        torch.testing.assert_close(found.target_mean, expected.target_mean, rtol=1e-5, atol=1e-5)


# Unreadable rows.


def _break(here, file="002_edited.png"):
    path = here / "data" / file
    path.write_bytes(path.read_bytes()[:-40])


def test_an_unreadable_row_stops_the_build_by_its_name(here):
    _break(here)
    with pytest.raises(UsageError, match=r"row 2 \(002_edited.png\).*--on_bad_sample skip"):
        _open(_config(here))


def test_a_row_that_was_skipped_weighs_nothing_and_is_told_or_stops(here):
    _break(here)
    config = _config(here, on_bad_sample="skip", max_bad_fraction=0.2)
    pairs, _ = _live(config)
    cached = _open(config)
    positions = list(range(pairs.order.slots))
    expected, found = collate(pairs.__getitems__(positions)), cached.__getitems__(positions)
    assert torch.equal(found.weights, expected.weights)
    assert found.errors == expected.errors
    assert len(found.errors) == 1
    assert not found.latents[:, found.weights == 0].any()
    text = cached.null_text().states.expand_as(found.text[found.weights == 0])
    assert torch.equal(found.text[found.weights == 0], text)

    stopping = _config(here, on_bad_sample="stop")
    cached = _open(stopping)
    windows = Windows(cached, config.loop, stopping.data, World(), 0, 3)
    taken = [windows.take(False) for _ in range(3)]
    assert max(verdict for _, verdict, _ in taken) is Verdict.BAD_SAMPLE


# At a URL.


@pytest.fixture
def bucket():
    yield "memory://bucket/caches"
    fsspec.filesystem("memory").store.clear()


def test_a_cache_at_a_url_is_built_there_and_mirrored(here, monkeypatch, bucket, small_shards):
    built = _open(_config(here, cache_latents=bucket))
    files = fsspec.filesystem("memory")
    there = {Path(path).name for path in files.find("/bucket/caches")}
    assert there == {"manifest.json", *built._cache.shards()}
    counts = _counted(monkeypatch)
    mirrored = _open(_config(here, cache_latents=bucket, output="elsewhere"))
    assert counts == {"images": 0, "texts": 0}
    for a, b in zip(built.__getitems__([0, 1]), mirrored.__getitems__([0, 1]), strict=True):
        assert a == b if isinstance(a, tuple) else torch.equal(a, b)


def test_a_build_to_a_url_that_lost_its_machine_goes_on(here, monkeypatch, bucket, small_shards):
    asked = iter([False, True])
    config = _config(here, cache_latents=bucket)
    assert _open(config, lambda: next(asked)) is None
    shutil.rmtree(here / "out")
    counts = _counted(monkeypatch)
    assert _open(config) is not None
    assert counts["images"] == (COUNT - 4) * 2


def test_a_shard_that_is_gone_from_a_url_is_made_anew(here, monkeypatch, bucket, small_shards):
    _open(_config(here, cache_latents=bucket))
    files = fsspec.filesystem("memory")
    files.rm_file(next(path for path in files.find("/bucket/caches") if "pairs-" in path))
    counts = _counted(monkeypatch)
    assert _open(_config(here, cache_latents=bucket, output="elsewhere")) is not None
    assert 0 < counts["images"] <= 4


def test_what_comes_damaged_from_a_url_is_refused(here, bucket):
    _open(_config(here, cache_latents=bucket))
    files = fsspec.filesystem("memory")
    shard = next(path for path in files.find("/bucket/caches") if "pairs-" in path)
    data = bytearray(files.cat_file(shard))
    data[-1] ^= 1
    files.pipe_file(shard, bytes(data))
    config = _config(here, cache_latents=bucket, output="elsewhere")
    with pytest.raises(UsageError, match=f"{Path(shard).name} does not have the size and hash"):
        _open(config)
    assert not list((here / "elsewhere").rglob("*.safetensors*"))


def test_a_url_of_a_kind_that_is_not_installed_is_refused(here):
    with pytest.raises(UsageError, match=r"--cache_latents nowhere://bucket: .*nowhere"):
        _open(_config(here, cache_latents="nowhere://bucket"))
