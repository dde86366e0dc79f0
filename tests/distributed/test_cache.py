"""Ranks fill a cache together, each its own shards; killed, it goes on with what is wanting."""

import time

import pytest
from ranks import Ranks, run
from safetensors.torch import load_file
from tiny import save_tiny_dataset, save_tiny_inputs

COUNT = 200  # two rounds of shards for two ranks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), COUNT)


def _flags(inputs, cache, output):
    return [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=16",
        "--center_crop",
        "--random_flip",
        "--train_batch_size=4",
        "--max_train_steps=4",
        "--report_to=none",
        f"--cache_latents={cache}",
        f"--output_dir={output}",
    ]


def test_killed_it_goes_on_and_no_pair_is_encoded_twice(inputs, tmp_path):
    flags = _flags(inputs, tmp_path / "cache", tmp_path / "out")
    victims = Ranks(2, flags, tmp_path / "killed.log")
    while not list(tmp_path.glob("cache/*/pairs-*.json")):
        assert all(process.is_alive() for process in victims.processes), victims.output()
        time.sleep(0.002)
    victims.kill(victims.processes)
    [folder] = (tmp_path / "cache").iterdir()
    made = {path: path.stat().st_mtime_ns for path in folder.glob("pairs-*.json")}
    assert not (folder / "manifest.json").exists()

    told = run(2, flags, tmp_path / "again.log")
    assert f" of {COUNT} pairs are there" in told
    assert " 0 of 200" not in told
    shards = {path: load_file(path) for path in folder.glob("pairs-*.safetensors")}
    rows = sorted(row for shard in shards.values() for row in shard["unit"][:, 0].tolist())
    assert rows == list(range(COUNT))
    assert {path.with_suffix(".safetensors") for path in made} <= shards.keys()
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_all_ranks_end_alike_at_an_unreadable_image(inputs, tmp_path):
    data = tmp_path / "data"
    save_tiny_dataset(data, count=9)
    image = sorted(data.glob("*_edited.png"))[4]
    image.write_bytes(image.read_bytes()[:-40])
    flags = [*_flags(inputs, tmp_path / "cache", tmp_path / "out"), f"--train_data_dir={data}"]
    ranks = Ranks(2, flags, tmp_path / "log")
    assert ranks.wait() == [2, 2], ranks.output()
    told = [line for line in ranks.output().splitlines() if image.name in line]
    assert len(told) == 1
    assert told[0].startswith("fusedit: row 4")
