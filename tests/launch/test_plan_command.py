"""`fusedit plan` as its users meet it: what it says, and that what it advises helps."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny import save_tiny_inputs, save_tiny_pipeline

from fusedit.launch import cli, plan
from fusedit.trainer import estimate, gpus, prediction
from fusedit.trainer.gpus import Gpu

MIB = 2**20
IMAGES = 64


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("plan"), 20)


@pytest.fixture(scope="module")
def counts():
    return {}


@pytest.fixture(autouse=True)
def here(inputs, counts, monkeypatch):
    """Beside the inputs; what was counted once is not counted again, for it takes a second."""

    def count_once(config, described):
        key = config.model, config.data, config.precision, config.adapter
        if key not in counts:
            counts[key] = estimate.count_run(config, described)
        return counts[key]

    monkeypatch.chdir(inputs)
    monkeypatch.setattr(prediction, "count_run", count_once)


def _flags(*switches, **changes):
    named = {
        "pretrained_model_name_or_path": "base",
        "train_data_dir": "data",
        "resolution": 16,
        "train_batch_size": IMAGES,
        "num_train_epochs": 3,
        "gpu": "h100",
        **changes,
    }
    given = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return ["plan", *given, *switches]


def _facts(capsys, *switches, **changes):
    assert cli.main(_flags("--json", *switches, **changes)) == 0
    return json.loads(capsys.readouterr().out)


def _mistake(capsys, *switches, **changes):
    assert cli.main(_flags(*switches, **changes)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_what_it_tells_a_person(capsys):
    assert cli.main(_flags()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "plan        1 x H100 SXM, 16 px, 64 x 1 micro-steps x 1 ranks; times are estimated, not "
        "measured"
    )
    starts = "micro-batch", "speed", "length", "cache", "checkpoint", "pipeline"
    assert [line.split()[0] for line in lines[-7:-1]] == list(starts)
    assert "3 steps, " in lines[-5]
    assert "31.2 kB of pairs, at most 10.8 kB of instructions, with --cache_latents" in lines[-4]
    assert "1 kept" in lines[-3]
    assert lines[-1] == "it fits as it is"
    assert any(line.split()[:1] == ["total"] and "of 79.65: fits" in line for line in lines)


def test_averages_for_later_take_memory_time_and_disk(capsys):
    plain = _facts(capsys, max_train_steps=1200)
    lengths = "--post_hoc_ema", "0.05", "0.1"
    facts = _facts(capsys, *lengths, max_train_steps=1200)
    each = facts["memory_bytes"]["averages (EMA)"] / 2
    assert each == plain["memory_bytes"]["parameters"]
    assert facts["snapshot_bytes"] == 2 * each
    assert facts["checkpoint_bytes"] == plain["checkpoint_bytes"] + 2 * each
    assert facts["step_ms"]["optimizer"] > 1.3 * plain["step_ms"]["optimizer"]
    assert plain["snapshot_bytes"] == 0
    assert cli.main(_flags(*lengths, max_train_steps=1200, ema_snapshot_steps=100)) == 0
    (line,) = [at for at in capsys.readouterr().out.splitlines() if at.startswith("snapshots")]
    assert "each, 12 kept: " in line


def test_a_plan_refuses_what_the_pipelines_schedule_does_not_serve(capsys):
    assert "which needs v-prediction" in _mistake(capsys, "--rescale_betas_zero_snr")
    assert "--max_timestep 2000 must be at most 1000" in _mistake(capsys, max_timestep=2000)
    assert "--lr_power 2.0 is for" in _mistake(capsys, lr_power=2.0)


def test_what_it_tells_a_machine(capsys):
    facts = _facts(capsys, nproc_per_node=2, gradient_accumulation_steps=3)
    assert facts["estimated_not_measured"] is True
    assert facts["global_batch"] == IMAGES * 3 * 2
    assert facts["steps"] == 3  # an epoch of 20 rows is one step
    step_s = sum(facts["step_ms"].values()) / 1000
    assert facts["hours"] == pytest.approx(3 * step_s / 3600)
    assert facts["images_per_second"] == pytest.approx(facts["global_batch"] / step_s)
    assert sum(facts["memory_bytes"].values()) == pytest.approx(facts["memory_total_bytes"], abs=9)
    # Of 20 pairs 3 latents of 4 x 8 x 8, and of as many texts and the empty one 16 x 16, in bf16.
    assert facts["cache_bytes"] == 20 * (3 * 4 * 8 * 8 * 2 + 24) + 21 * 16 * 16 * 2


def test_fewer_rows_are_trained_on(capsys):
    facts = _facts(capsys, train_batch_size=4, max_train_samples=9, held_out=5)
    assert facts["steps"] == 3 * 3
    assert facts["cache_bytes"] == 9 * (3 * 4 * 8 * 8 * 2 + 24) + 10 * 16 * 16 * 2


def test_an_adapter_is_counted_and_its_flags_are_checked(capsys):
    whole, adapter = _facts(capsys), _facts(capsys, "--use_ema", lora_rank=2)
    assert adapter["checkpoint_bytes"] < 0.3 * whole["checkpoint_bytes"]
    trained = adapter["memory_bytes"]["moments"] // 8
    assert adapter["checkpoint_bytes"] == 16 * trained
    assert adapter["pipeline_bytes"] == 8 * trained
    for data in ("data", None):
        told = _mistake(capsys, lora_alpha=3, train_data_dir=data, max_train_steps=2)
        assert told == "fusedit: --lora_alpha 3.0 needs --lora_rank; or leave it out\n"


def test_its_help_tells_its_own_flags_too(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("fusedit plan [--gpu TYPE]")
    assert "--train_batch_size" in out


def test_no_data_is_needed(capsys):
    facts = _facts(capsys, train_data_dir=None, max_train_steps=7)
    assert (facts["steps"], facts["cache_bytes"]) == (7, None)
    facts = _facts(capsys, train_data_dir=None)
    assert (facts["steps"], facts["hours"]) == (None, None)
    assert cli.main(_flags(train_data_dir=None)) == 0
    assert "not known: give the dataset or --max_train_steps" in capsys.readouterr().out


def test_a_dataset_on_the_hub_is_not_downloaded(capsys, monkeypatch):
    def builder(source, configuration, cache_dir):
        assert (source, configuration) == ("owner/pairs", "small")
        splits = {"train": SimpleNamespace(num_examples=640)}
        return SimpleNamespace(info=SimpleNamespace(splits=splits))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    hub = {"train_data_dir": None, "dataset_name": "owner/pairs", "dataset_config_name": "small"}
    assert _facts(capsys, **hub)["steps"] == 3 * 10
    assert _facts(capsys, dataset_split="test", **hub)["steps"] is None


def test_a_dataset_that_is_nowhere(capsys):
    error = _mistake(capsys, train_data_dir=None, dataset_name="owner/pairs")
    assert error.startswith("fusedit: --dataset_name owner/pairs (not a folder here): ")
    assert "--max_train_steps" in error


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gpu": "h10"}, "--gpu h10 is not known (did you mean h100?); there are b200, h200, h100"),
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"pretrained_model_name_or_path": "data"}, "data has no folder unet"),
        ({"resolution": 17}, "--resolution 17 must be a multiple of 2"),
        ({"cache_latents": "there"}, "--cache_crops 4"),
        ({"gpu": "t4", "mixed_precision": "bf16"}, "a T4 has no bf16 products; take fp16"),
        ({"gpu": "t4", "param_dtype": "bf16"}, "needs --mixed_precision bf16, got no"),
        ({"train_data_dir": "nowhere"}, "--train_data_dir nowhere is not a folder"),
        ({"max_train_samples": 21}, "--max_train_samples 21 is above the 20 rows"),
        ({"held_out": 20}, "--held_out 20 leaves none of the dataset's 20 rows"),
    ],
)
def test_mistakes(changes, told, capsys):
    assert told in _mistake(capsys, **changes)


def test_a_base_without_its_text_encoder(capsys, tmp_path):
    save_tiny_pipeline(tmp_path / "base")
    (tmp_path / "base" / "text_encoder" / "config.json").unlink()
    error = _mistake(capsys, pretrained_model_name_or_path=tmp_path / "base")
    assert "text_encoder/config.json cannot be read" in error


@pytest.fixture
def card(capsys, monkeypatch):
    """Makes a GPU type of so many MiB, in which the allowance takes a part."""

    def make(mib):
        monkeypatch.setitem(gpus.GPUS, "small", Gpu("small card", mib, 100, 50, 25, 500))

    return make


def test_advice_that_is_taken_fits(card, capsys):
    whole = _facts(capsys)["memory_total_bytes"]
    half = _facts(capsys, train_batch_size=IMAGES // 2)["memory_total_bytes"]
    card(half * 1.002 / MIB)
    facts = _facts(capsys, gpu="small")
    assert not facts["fits"]
    assert IMAGES // 2 <= facts["largest_micro_batch"] < IMAGES
    assert facts["memory_total_bytes"] == whole
    told, options = facts["advice"].split(": ")
    assert told == "it does not fit; any of these makes it fit"
    first, *others = options.split("; or ")
    assert first == f"--train_batch_size {IMAGES // 2} --gradient_accumulation_steps 2"
    assert "--gradient_checkpointing" in others
    taken = _facts(capsys, *first.split(), gpu="small", train_batch_size=None)
    assert taken["fits"]
    assert taken["global_batch"] == IMAGES
    for option in others:
        assert _facts(capsys, *option.split(), gpu="small")["fits"]


def test_advice_when_one_flag_is_not_enough(card, capsys):
    least = _facts(capsys, train_batch_size=1)["memory_total_bytes"]
    card((least - 300e3) / MIB)
    facts = _facts(capsys, gpu="small", train_batch_size=256)
    assert facts["largest_micro_batch"] == 0
    told, _, options = facts["advice"].removesuffix(" does").partition("; ")
    assert told == "it does not fit"
    assert "--use_8bit_adam" in options
    assert "--adam_moments_dtype" not in options  # the trainer takes one of them
    taken = _facts(capsys, *options.split(), gpu="small", train_batch_size=None)
    assert taken["fits"]
    assert taken["global_batch"] == 256


def test_several_gpus_are_told_to_share(card, capsys):
    two, shares = "--nproc_per_node=2", "--sharding=fsdp"
    whole, shared = _facts(capsys, two), _facts(capsys, two, shares)
    parts = shared["memory_bytes"]
    for name in ("parameters", "gradients", "moments"):
        assert 2 * parts[name] == whole["memory_bytes"][name]
    assert 0 < parts["gathered blocks"] < whole["memory_bytes"]["parameters"] * 2
    card((whole["memory_total_bytes"] + shared["memory_total_bytes"]) / 2 / MIB)
    options = _facts(capsys, two, gpu="small")["advice"].split(": ")[1].split("; or ")
    assert "--sharding fsdp" in options
    assert "--use_8bit_adam" not in options  # not beside it
    assert _facts(capsys, two, shares, gpu="small")["fits"]
    assert "--sharding" not in _facts(capsys, gpu="small")["advice"]  # with whom?


def test_no_advice_helps_a_card_of_no_size(card, capsys):
    card(100)
    assert _facts(capsys, gpu="small")["advice"].endswith("take a GPU with more memory")


def test_on_a_gpu_it_tries(capsys, monkeypatch):
    tried = []
    card = SimpleNamespace(name="NVIDIA L4", total_memory=22565 * MIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(plan, "set_numerics", lambda section: None)  # it is the whole process's
    monkeypatch.setattr(plan, "largest_tried", lambda make: tried.append(make) or 77)
    facts = _facts(capsys, gpu=None)
    assert (facts["gpu"], facts["ranks"], facts["largest_micro_batch_tried"]) == ("L4", 4, 77)
    assert cli.main(_flags(gpu=None)) == 0
    assert "by this count; 77 at most, tried on this GPU" in capsys.readouterr().out
    assert "largest_micro_batch_tried" not in _facts(capsys, gpu="h100")
    assert len(tried) == 2
    card.name = "NVIDIA GTX 1080"
    assert "a NVIDIA GTX 1080 is not known: give its nearest as --gpu" in _mistake(capsys, gpu=None)
