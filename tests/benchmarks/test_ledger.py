"""The ledger's judgement of runs that are made up; and that each of its runs can be asked for."""

from pathlib import Path

import pytest
from records import refusal

from fusedit.benchmarks import harness, ledger
from fusedit.benchmarks.demo_steps import RunFailed, Steps
from fusedit.benchmarks.ledger import CACHE, PLAIN, REFERENCE, SWITCHES, Difference
from fusedit.launch.flags import parse

STEPS = 10
LOSSES = [0.5 - 0.01 * step for step in range(STEPS)]
# What each made-up run is off by, at one step; the yardsticks of fp32, of gradients in bf16
# and of bf16 are 1e-7, 1e-6 and 1e-4.
OFF = {
    "2-micro-steps-of-16": 5e-8,
    "4-micro-steps-of-8": 1e-7,
    "each-layer-rounded-once-more": 2e-8,
    "gradients-rounded-to-bf16": 1e-6,
    "each-layer-rounded-to-bf16": 1e-4,
    "--mixed_precision-bf16": 2.9e-4,
    "--cache_latents": 2.9e-7,
}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The names of the runs so far; `off` and `fails` say what becomes of one."""

    class Runs(list):
        def __init__(self):
            self.off, self.fails = dict(OFF), ""

    made = Runs()

    def run(steps, words, output, *, loop, ranks):
        made.append(output.name)
        if output.name == made.fails:
            raise RunFailed("exit code 1: out of luck")
        own = made.off.get(output.name, 0.0)
        speed = 10.0 if loop == "reference" else 25.0
        return Steps([*LOSSES[:-1], LOSSES[-1] + own], [speed] * 8, 0.5)

    monkeypatch.setattr(ledger, "run_steps", run)
    monkeypatch.setattr(ledger, "demo_data", lambda folder: folder)
    monkeypatch.setattr(harness, "_git_state", lambda: ("abc", False))
    return made


@pytest.fixture
def fill(tmp_path):
    def main(*more):
        words = [f"--out={tmp_path}", f"--work={tmp_path}", f"--steps={STEPS}", *more]
        code = ledger.main(words)
        record = harness.read(tmp_path / "ledger.json")
        return code, {row["labels"]["switch"]: row for row in record["rows"]}

    return main


def test_every_switch_has_its_row(runs, fill, tmp_path):
    code, rows = fill()
    assert code == 0
    assert list(rows) == [switch.name for switch in ledger.switches(devices=0)]
    for switch in ledger.switches(devices=0):
        expected = "unchecked" if switch.kernels else "right"
        assert (switch.name, rows[switch.name]["verdict"]) == (switch.name, expected)
    row = rows["--cache_latents"]
    assert row["values"]["largest_difference"] == pytest.approx(2.9e-7, rel=1e-6)
    assert row["values"]["mean_difference"] == pytest.approx(2.9e-8, rel=1e-6)
    assert row["error"] == pytest.approx(2.9e-7 / (ledger.ALLOWED * 1e-7), rel=1e-6)
    assert (row["values"]["images_per_s"], row["values"]["memory_gib"]) == (25.0, 0.5)
    assert row["timings"]["warm"]["median_ms"] == 1e3 * 32 / 25
    assert "25.0 images/s against 10.0, 2.50 times" in (tmp_path / "ledger.md").read_text()


@pytest.mark.parametrize(
    ("run", "off"),
    [
        ("--cache_latents", 3.1e-7),  # 1e-7 is the widest yardstick's of fp32, and 3 are allowed
        ("2-ranks", -3.1e-7),
        ("2-ranks---all_reduce_dtype-bf16", 3.1e-6),
        ("--param_dtype-bf16", 3.1e-4),
        ("--dataloader_num_workers-2", 1e-15),  # nothing is rounded there
    ],
)
def test_a_switch_beyond_its_bound_is_told(runs, fill, capsys, run, off):
    runs.off[run] = off
    code, rows = fill()
    wrong = [row for row in rows.values() if row["verdict"] == "wrong"]
    assert (code, len(wrong)) == (1, 1)
    assert wrong[0]["error"] > 1
    assert wrong[0]["timings"] is None
    assert "wrong: more than" in capsys.readouterr().out


def test_on_a_gpu_no_run_is_exact_and_kernels_run(runs, tmp_path):
    made = ledger.Ledger(harness.new_record("ledger", []), STEPS, tmp_path / "gpu.json", tmp_path)
    made.devices = 1
    runs.off["--dataloader_num_workers-2"] = 2.9e-7
    runs.off["kernels-instead-of---plain"] = 3.1e-7
    made.fill()
    verdicts = {row["labels"]["switch"]: row["verdict"] for row in made.record["rows"]}
    assert len(runs) == len(verdicts) == len(ledger.switches(1))
    assert verdicts.pop("kernels, instead of --plain") == "wrong"
    assert set(verdicts.values()) == {"right"}


def test_a_drift_is_seen_where_no_step_is_far_off():
    yardstick = Difference(largest=1.0, mean=0.1)
    assert ledger.difference([1.0] * 9 + [2.0], [1.0] * 10).of(yardstick) == 1.0
    assert ledger.difference([1.5] * 10, [1.0] * 10).of(yardstick) == pytest.approx(5.0)


def test_a_switch_that_fails_leaves_the_others(runs, fill):
    runs.fails = "2-ranks"
    code, rows = fill()
    assert code == 1
    assert [row["note"] for row in rows.values() if row["verdict"] == "failed"] == [
        "exit code 1: out of luck"
    ]
    assert rows["--compile blocks"]["verdict"] == "right"


@pytest.mark.parametrize("run", ["plain", "4-micro-steps-of-8"])
def test_nothing_is_judged_without_what_it_is_judged_by(runs, tmp_path, capsys, run):
    runs.fails = run
    assert ledger.main([f"--out={tmp_path}", f"--work={tmp_path}", f"--steps={STEPS}"]) == 1
    assert "out of luck" in capsys.readouterr().err
    assert not (tmp_path / "ledger.md").exists()


def test_what_was_stopped_goes_on(runs, fill, tmp_path, monkeypatch):
    whole = fill()[1]
    record = harness.read(tmp_path / "ledger.json")
    record["complete"], record["rows"] = False, record["rows"][:8]
    harness.write(record, tmp_path / "ledger.json")
    runs.clear()
    code, rows = fill()
    assert (code, rows) == (0, whole)
    judging = [switch for switch in SWITCHES if switch == PLAIN or switch.yardstick]
    assert len(runs) == len(ledger.switches(0)) - len(ledger.ON_GPU) - 8 + len(judging)
    # What another commit ran is run again.
    record["provenance"]["commit"] = "def"
    harness.write(record, tmp_path / "ledger.json")
    left = tmp_path / "steps" / "plain"
    left.mkdir(parents=True)
    fill()
    assert not left.exists()


@pytest.mark.parametrize("devices", [0, 1, 2])
def test_the_switches_are_of_one_batch_and_can_be_asked_for(devices):
    found = ledger.switches(devices)
    assert len({switch.name for switch in found}) == len(found)
    assert all(switch.ranks <= max(devices, 1) or not devices for switch in found)
    for switch in found:
        if switch.kernels and not devices:
            continue
        words = switch.words(Path("data"), Path("cache"), on_gpu=bool(devices))
        run = parse(words).run
        run.check_complete()
        assert run.loop.global_batch(switch.ranks) == 32
        precision = run.precision
        assert precision.plain == (devices > 0 and not switch.kernels)
        changed = precision.mixed_precision != "no" or switch.explained_by == "bf16"
        assert (switch.explained_by == "bf16") == changed


def test_judged_by_the_run_that_comes_first():
    assert SWITCHES[0] == PLAIN
    yardsticks = [switch.yardstick for switch in SWITCHES[1:]]
    assert yardsticks == sorted(yardsticks, reverse=True)
    kinds = {switch.explained_by for switch in SWITCHES if switch.yardstick}
    assert kinds | {"exact"} >= {switch.explained_by for switch in ledger.switches(2)}
    assert {CACHE, REFERENCE} <= set(SWITCHES)


@pytest.mark.parametrize("steps", [2, 1201])
def test_too_few_steps_or_too_many_are_refused(steps, tmp_path, capsys):
    assert "--steps must be from" in refusal(
        ledger.main, [f"--out={tmp_path}", f"--steps={steps}"], capsys
    )
