"""The cache, built and read at small sizes: rows, and that a wrong sample is seen."""

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from fusedit.benchmarks import cache, harness
from fusedit.benchmarks.cache import Building, Case, Found
from fusedit.trainer import cache_build
from fusedit.trainer.families import STABLE_DIFFUSION, TextEncoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"PAIRS": 24, "PAIRS_A_SHARD": 8, "RESOLUTIONS": (16,), "TEXT_TOKENS": 3, "WIDTH": 4}
    sizes |= {"FILES": 3, "BUILDS": (cache.BUILDS[0]._replace(shards=3), cache.BUILDS[1])}
    for name, value in sizes.items():
        monkeypatch.setattr(cache, name, value)
    monkeypatch.setitem(cache_build.SHARD_PAIRS, "cpu", 4)


@pytest.fixture
def rows(tmp_path):
    def measured(measure):
        record = harness.new_record("data", [])
        measure(record, tmp_path, 2)
        assert not list(tmp_path.iterdir())
        return harness.check(record)["rows"]

    return measured


def test_a_build_is_timed_by_the_shard(rows):
    demo, sd15 = rows(cache.measure_build)
    assert (demo["name"], demo["verdict"]) == ("cache/demo 64px/4/fp32/build/ours", "right")
    assert demo["timings"]["warm"]["runs"] == 2  # of three shards the first starts everything up
    latents = 3 * 4 * 16 * 16 * 4
    assert latents < demo["values"]["bytes_a_sample"] < 2 * latents
    assert demo["least_bytes"] == pytest.approx(4 * demo["values"]["bytes_a_sample"], abs=4)
    assert demo["values"]["texts_per_s"] > 0
    assert (sd15["verdict"], sd15["note"]) == ("unchecked", "needs a GPU")


def test_speed_is_pairs_over_the_time_of_their_shards():
    row = cache.build_row({"op": "cache", "shape": 64}, Found([100.0, 300.0], 50.0, 1000.4, ""))
    assert row["values"] == {"samples_per_s": 320.0, "texts_per_s": 50.0, "bytes_a_sample": 1000}
    assert row["least_bytes"] == 64026
    assert row["timings"]["warm"]["median_ms"] == 200.0


@pytest.mark.parametrize("name", ["_encode", "texts"])
def test_a_wrong_encoding_has_no_speed(rows, monkeypatch, name):
    if name == "texts":
        encode = cache.Encoders.encode_text
        monkeypatch.setattr(
            cache.Encoders,
            "encode_text",
            lambda self, tokens: encode(self, tokens.flip(0) if len(tokens) > 1 else tokens),
        )
    else:
        encode = cache.Build._encode
        monkeypatch.setattr(cache.Build, "_encode", lambda self, batch: 1.001 * encode(self, batch))
    row = rows(cache.measure_build)[0]
    assert (row["verdict"], row["timings"]) == ("wrong", None)
    assert "a sample of the cache is off by" in row["note"]


def tiny_encoders():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    vae = AutoencoderKL(norm_num_groups=4, **blocks)
    return vae, TextEncoder(STABLE_DIFFUSION, {"text_encoder": CLIPTextModel(text)})


def test_what_a_gpu_builds_has_mirrors_and_comes_from_jpegs(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "sd15_encoders", tiny_encoders)
    building = Building(Case("tiny", 32, "bf16", shards=2, sd15=True), tmp_path, CPU, 3)
    found = building.run()
    assert found.wrong == ""
    assert len(found.shard_ms) == 1
    assert building.cache.shape.latents_shape(0) == (2, 1, 3, 4, 16, 16)
    assert building.cache.shape.text == (77, 8)
    texts = [building.cache.open(name, "digest")[0] for name in building.cache.shards("texts")]
    assert sum(map(len, texts)) == 8 // 2 + 1  # two pairs to a text, and the empty one
    assert len(list((tmp_path / "data").glob("*.jpg"))) == 2 * 3


def test_the_encoders_are_of_the_true_architecture(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        vae, text_encoder = cache.sd15_encoders()
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in text_encoder.parameters()) == 123_060_480


def test_a_wrong_sample_has_no_speed(rows, monkeypatch):
    assert {row["verdict"] for row in rows(cache.measure_read)} == {"right"}
    right = cache.CachedPairs.__getitems__

    def shifted(self, positions):
        found = right(self, positions)
        return found._replace(positions=torch.tensor(positions) + 1)

    monkeypatch.setattr(cache.CachedPairs, "__getitems__", shifted)
    found = rows(cache.measure_read)
    assert {(row["verdict"], row["timings"]) for row in found} == {("wrong", None)}
