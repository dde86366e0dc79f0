"""Script and ours by turns: their flags, clocks, ratios, the tables and the picture."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from records import refusal
from test_reference import SCRIPT, inputs  # noqa: F401

from fusedit.benchmarks import (
    harness,
    reference,
    reference_run,
    rooflines,
    step,
    step_cases,
    step_report,
)
from fusedit.benchmarks.demo_steps import RunFailed
from fusedit.benchmarks.rooflines import Ceilings
from fusedit.benchmarks.rounds import Run
from fusedit.benchmarks.step_cases import RECOMMENDED, SAME, UNCACHED, Case
from fusedit.benchmarks.step_cases import SCRIPT as THE_SCRIPT
from fusedit.launch.flags import parse
from fusedit.trainer.counting import KINDS, Work

SD15 = ("as-shipped", "tuned")
CEILINGS = Ceilings(1e11, 1e10)


@pytest.fixture
def case(tmp_path):
    return step_cases.case_of("as-shipped", 64, tmp_path, tiny=True)


def flags(case, way, tmp_path):
    return parse([*step.flags_of(case, way, tmp_path, 60), "--output_dir=x"]).run


def test_ours_takes_the_very_flags_of_the_script(case, tmp_path, monkeypatch):
    script = step.flags_of(case, THE_SCRIPT, tmp_path, 60)
    same = step.flags_of(case, SAME, tmp_path, 60)
    assert same == [*script, "--overwrite", "--log_every=5"]
    run = parse([*script, "--output_dir=x"]).run
    assert (run.loop.train_batch_size, run.loop.gradient_accumulation_steps) == (4, 4)
    assert run.precision.gradient_checkpointing
    assert run.data.random_flip
    assert run.data.cache_latents is None


def test_as_recommended_an_update_has_as_many_images(case, tmp_path):
    run = flags(case, RECOMMENDED, tmp_path)
    assert (run.loop.train_batch_size, run.loop.gradient_accumulation_steps) == (16, 1)
    assert not run.precision.gradient_checkpointing
    assert run.data.cache_latents is not None
    same = flags(case, SAME, tmp_path)
    for section in ("optim", "conditioning"):
        assert getattr(run, section) == getattr(same, section)
    uncached = flags(case, UNCACHED, tmp_path)
    assert uncached.data.cache_latents is None
    assert uncached.loop == run.loop


def test_on_a_gpu_the_script_has_its_best(tmp_path, monkeypatch):
    for name in ("make_sd15", "make_pairs"):
        monkeypatch.setattr(step_cases, name, lambda work, *_: work)
    case = step_cases.case_of("tuned", 512, tmp_path, tiny=False)
    words = step.flags_of(case, THE_SCRIPT, tmp_path, 60)
    best = {"--mixed_precision=bf16", "--allow_tf32", "--train_batch_size=32"}
    assert best | {"--dataloader_num_workers=8", "--gradient_accumulation_steps=1"} <= {*words}
    assert "--gradient_checkpointing" not in words
    assert case.images == 32
    run = flags(case, RECOMMENDED, tmp_path)
    assert (run.precision.param_dtype, run.loop.train_batch_size) == ("bf16", 32)


def test_xls_script_is_tuned_by_what_it_takes(tmp_path, monkeypatch):
    for name in ("make_sdxl", "make_pairs"):
        monkeypatch.setattr(step_cases, name, lambda work, *_: work)
    case = step_cases.case_of("sdxl-tuned", 1024, tmp_path, tiny=False)
    words = {*step.flags_of(case, THE_SCRIPT, tmp_path, 60)}
    assert {f"--pretrained_vae_model_name_or_path={tmp_path / 'vae'}", "--use_ema"} <= words
    assert {"--mixed_precision=bf16", "--dataloader_num_workers=0", "--seed=42"} <= words
    assert "--gradient_checkpointing" not in words
    shipped = step_cases.case_of("sdxl", 512, tmp_path, tiny=False)
    assert "--mixed_precision=no" in step.flags_of(shipped, THE_SCRIPT, tmp_path, 60)
    ours = step.flags_of(shipped, RECOMMENDED, tmp_path, 60)
    assert {"--train_batch_size=4", "--gradient_accumulation_steps=4"} <= {*ours}
    assert "--gradient_checkpointing" not in ours
    large = step_cases.case_of("sdxl", 1024, tmp_path, tiny=False)
    assert "--gradient_checkpointing" in step.flags_of(large, RECOMMENDED, tmp_path, 60)
    for preset in step_cases.XL:  # a ragged last batch ends its script
        for pixels in step_cases.XL_BATCHES:
            batch, _ = step_cases.sizes(
                step_cases.case_of(preset, pixels, tmp_path, tiny=False).values
            )
            assert step_cases.PAIRS % batch == 0


def row_of(case, tmp_path, **runs):
    made = {THE_SCRIPT: [Run([100.0, 100.0], 100.0, 2.0), Run([120.0, 120.0], 120.0, 2.5)]}
    made |= dict.fromkeys((SAME, UNCACHED, RECOMMENDED), made[THE_SCRIPT]) | runs
    (way,) = runs or {SAME: 0}
    flops = case.images * step.flops_of_image(case, tmp_path)
    return step.row_of(case, way, made, CEILINGS, flops)


def test_the_ratio_is_that_of_rounds_beside_each_other(case, tmp_path):
    ours = [Run([50.0, 50.0], 50.0, 1.0), Run([40.0, 40.0], 40.0, 1.5)]
    row = row_of(case, tmp_path, **{RECOMMENDED: ours})
    values = row["values"]
    assert (values["ratio_low"], values["ratio"], values["ratio_high"]) == (2.0, 2.5, 3.0)
    assert values["images_per_s"] == pytest.approx(16e3 / 45)
    assert values["memory_gib"] == 1.5
    assert row["labels"]["by"] == "ours"
    per_image = values["model_flops_share"] * CEILINGS.flops_per_s * 0.045 / 16
    assert row["flops"] == pytest.approx(16 * per_image)


def test_clocks_that_differ_are_told_and_give_no_time(case, tmp_path):
    row = row_of(case, tmp_path, **{SAME: [Run([100.0, 100.0], 107.0, 2.0)] * 2})
    assert (row["verdict"], row["timings"]) == ("wrong", None)
    assert row["note"] == "two clocks differ by 7.0%"


@pytest.fixture
def small(inputs, tmp_path, monkeypatch):  # noqa: F811
    """A case of the small script, run in this process."""
    values = {
        "resolution": 16,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "conditioning_dropout_prob": 0.05,
        "seed": 0,
    }
    better = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "center_crop": True}
    better |= {"cache_latents": tmp_path / "cache"}
    more: list[str] = []

    def run(watch, script, words, folder):
        folder.mkdir(parents=True)
        words = [watch, str(folder), str(SCRIPT), *words, *more, f"--output_dir={folder / 'run'}"]
        assert reference_run.main(words) == 0

    monkeypatch.setattr(step, "run_script", run)
    return Case("small", 16, inputs / "base", inputs / "data", values, better), more


def test_a_run_of_the_script_is_timed_by_its_log(small, tmp_path):
    case, more = small
    script = reference.Script(SCRIPT, None, "0")
    found = step.run_of(case, THE_SCRIPT, script, tmp_path, 20, 5)
    assert len(found.update_ms) == 3
    assert sum(found.update_ms) / 3 == pytest.approx(found.other_clock_ms, rel=0.2)
    more.append("--mistake=slow_log")  # each update's log comes later than the one before
    found = step.run_of(case, THE_SCRIPT, script, tmp_path, 20, 5)
    assert min(found.update_ms) > 100


def test_runs_of_ours_are_timed_and_traced(small, tmp_path):
    case, _ = small
    script = reference.Script(SCRIPT, None, "0")
    found = step.run_of(case, RECOMMENDED, script, tmp_path, 20, 5)
    assert len(found.update_ms) == 3
    assert sum(found.update_ms) / 3 == pytest.approx(found.other_clock_ms, rel=0.3)
    phases, reached = step.traces(case, RECOMMENDED, script, tmp_path, 1000.0, CEILINGS)
    taken = {name: value for name, value in phases["values"].items() if name != "traced"}
    assert sum(taken.values()) == pytest.approx(1000.0)
    assert taken["forward"] > 0 < taken["backward"]
    assert taken["encode"] == 0  # from the cache
    assert reached["values"]["convolution"] > 0
    assert {*reached["values"]} <= {*KINDS}


def test_a_run_that_fails_ends_it(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RunFailed("exit code 1: no room")

    monkeypatch.setattr(step, "run_of", fails)
    (tmp_path / reference.NAME).write_bytes(SCRIPT.read_bytes())
    words = [f"--reference={tmp_path}", "--tiny", f"--out={tmp_path}", f"--work={tmp_path}"]
    assert step.main(words) == 1
    assert "fusedit.benchmarks.step: exit code 1: no room" in capsys.readouterr().err


@pytest.fixture
def made_up(case, tmp_path, monkeypatch):
    """The command's runs are made up; its words, what was run and traced, and when that fails."""

    words = [f"--reference={tmp_path}", "--tiny", f"--out={tmp_path}", f"--work={tmp_path}"]
    made = SimpleNamespace(runs=[], traced=[], fails_at=0, words=words)

    def run_of(case, way, *_):
        made.runs.append((case.preset, way))
        if len(made.runs) == made.fails_at:
            raise RunFailed("exit code 1: time is up")
        taken = {THE_SCRIPT: 300.0, SAME: 200.0, UNCACHED: 150.0, RECOMMENDED: 75.0}[way]
        return Run([taken, taken * 1.01], taken, 1.0)

    def traces(case, way, script, work, update_ms, ceilings):
        made.traced.append((case.preset, way))
        values = dict.fromkeys((*step.PHASES, "idle"), update_ms / 8)
        rows = [harness.row({"op": "phases", **case.labels(way)}, values=values)]
        shares = dict.fromkeys(KINDS, 0.5)
        roofline = harness.row({"op": "roofline", **case.labels(way)}, values=shares)
        return rows if way == THE_SCRIPT else [*rows, roofline]

    monkeypatch.setattr(step, "run_of", run_of)
    monkeypatch.setattr(step, "traces", traces)
    monkeypatch.setattr(step, "find_ceilings", lambda record: CEILINGS)
    monkeypatch.setattr(harness, "_git_state", lambda: ("abc", False))
    (tmp_path / reference.NAME).write_bytes(SCRIPT.read_bytes())
    return made


@pytest.fixture
def record(made_up, tmp_path):
    assert step.main(made_up.words) == 0
    return tmp_path


def test_what_was_stopped_goes_on_after_its_last_run(made_up, tmp_path):
    made_up.fails_at = 6
    assert step.main(made_up.words) == 1
    assert not made_up.traced
    before = harness.read(tmp_path / "step.json")
    assert len(before["rows"]) == 5  # a round, and the first way of the second
    made_up.runs.clear()
    made_up.fails_at = 0
    assert step.main(made_up.words) == 0
    every = [(preset, way) for preset in SD15 for _ in range(3) for way in step.WAYS]
    assert made_up.runs == every[5:]
    assert made_up.traced == [(preset, way) for preset in SD15 for way in step.WAYS]
    after = harness.read(tmp_path / "step.json")
    assert after["rows"][:5] == before["rows"]
    speeds = step_report.of_op(after, "step")
    assert [row["timings"]["warm"]["runs"] for row in speeds] == [6] * 8
    made_up.runs.clear()
    assert step.main([*made_up.words, "--updates=40"]) == 0  # complete: begun anew
    assert len(made_up.runs) == 24


def test_runs_of_another_length_are_not_taken(made_up, tmp_path):
    made_up.fails_at = 6
    assert step.main(made_up.words) == 1
    made_up.fails_at = 0
    made_up.runs.clear()
    assert step.main([*made_up.words, "--updates=40"]) == 0
    assert len(made_up.runs) == 24


def test_the_table_has_each_preset_and_way(record):
    text = (record / "step.md").read_text()
    assert "| as-shipped, 64 px, the script | 53.1 | 302 | 1.00 (1.00 to 1.00) |" in text
    assert "| tuned, 64 px, recommended | 212.3 | 75 | 4.00 (4.00 to 4.00) |" in text
    assert "PyTorch's own attention, for xformers is left out" in text
    assert text.count("50%") == 2 * 3 * len(KINDS)
    found = json.loads((record / "step.json").read_text())["provenance"]["reference"]
    assert len(found["sha256"]) == 64


def test_the_picture_has_a_bar_for_each(record):
    with Image.open(record / "step.png") as picture:
        assert picture.width > 800
    made = harness.read(record / "step.json")
    assert len(step_report.of_op(made, "phases")) == 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--updates=61"], "--updates 61: must be a multiple of 5"),
        (["--updates=20"], "--updates 20: give at least 30"),
        (["--pixels=300"], "--pixels: invalid choice: 300"),
        (["--pixels=1024"], "--pixels 1024: --preset as-shipped tuned takes 256, 512"),
        (["--preset", "sdxl", "--pixels=256"], "--pixels 256: --preset sdxl takes 512, 1024"),
        (["--preset", "sdxl", "tuned"], "--preset sdxl tuned: XL has a script of its own"),
        (["--preset", "sdxl"], "train_instruct_pix2pix_sdxl.py beside it; give a checkout"),
    ],
)
def test_a_mistake_is_told(tmp_path, capsys, words, told):
    (tmp_path / reference.NAME).write_bytes(SCRIPT.read_bytes())
    words = [f"--reference={tmp_path}", "--tiny", f"--out={tmp_path}", *words]
    assert told in refusal(step.main, words, capsys)


def test_without_a_gpu_there_is_only_the_tiny_model(tmp_path, capsys):
    (tmp_path / reference.NAME).write_bytes(SCRIPT.read_bytes())
    said = refusal(step.main, [f"--reference={tmp_path}", f"--out={tmp_path}"], capsys)
    assert "give --tiny" in said


def test_an_operation_takes_the_longer_of_its_flops_and_its_bytes():
    numbers = torch.tensor([[0.0, 0.0, 0.0], [1e9, 1e8, 0.0]], dtype=torch.float64)
    moved = torch.tensor([[0.0, 0.0, 1e6], [1e6, 1e7, 1e6]], dtype=torch.float64)
    work = Work(["convolution", "convolution", "elementwise"], numbers, moved, moved)
    found = rooflines.ideal_ms(work, 3, CEILINGS)
    # 3e9 at 1e11 a second; 3e7 bytes at 1e10; 1e6 + 3e6 bytes
    assert found["convolution"] == pytest.approx(30 + 3)
    assert found["elementwise"] == pytest.approx(0.4)
    assert found["linear"] == 0


def test_the_ceilings_of_a_cpu_are_measured():
    found = rooflines.find_ceilings({"ceilings": None})
    assert 1e9 < found.flops_per_s < 1e13
    assert 1e8 < found.copy_bytes_per_s < 1e12
