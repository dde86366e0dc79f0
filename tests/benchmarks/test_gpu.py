import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from records import refusal

from fusedit.benchmarks import (
    checkpoint,
    choose,
    data,
    gpu,
    harness,
    kernels,
    optimizer,
    parity,
    reference,
    stand_in,
    step,
    step_cases,
)
from fusedit.benchmarks.ops import OPS

ROOT = Path(__file__).parents[2]
PARTS = ["ceilings", "tests", "checks", "kernels", "optimizer", "tune"]
OF_ATTENTION = ["attention", "attention-4", "attention-choices"]
STUB = """#!/usr/bin/env bash
# python -m fusedit.benchmarks.MODULE [PART] ... --out DIR ..., or --out FILE of choose
module=${2##*.} part=${2##*.}
[[ $module == gpu ]] && part=$3
[[ " $* " == *" --tune "* ]] && part=tune
[[ $3 == --name ]] && part=$4
[[ $module == choose ]] && part=attention-choices
[[ $module == parity ]] && part=parity-$4
echo "$part $*" >>"$CALLS"
[[ $part == "${BREAKS:-}" ]] && exit 7
[[ $part == "${HANGS:-}" ]] && sleep 60
while [[ $1 != --out ]]; do shift; done
[[ $module == choose ]] && file=$2 || file=$2/$part.json
printf '{\\n "schema": 1,\\n "complete": true\\n}\\n' >"$file"
"""
XML = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_geglu" name="test_a" time="1.5"/>
<testcase classname="tests.kernels.test_geglu" name="test_b" time="0.5">
<failure message="gradient is off&#10;more">long</failure></testcase>
<testcase classname="tests.kernels.test_geglu" name="test_c" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def script(tmp_path):
    """gpu.sh with a Python that only says what it was asked for."""
    stub, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    calls.touch()

    def run(**variables):
        calls.write_text("")
        given = {"PYTHON": stub, "CALLS": calls} | variables
        words = [str(given.pop("OUT", out)), *given.pop("PARTS", "").split()]
        kept = {"PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["bash", str(ROOT / "benchmarks/gpu.sh"), *words],
            env=kept | {name: str(value) for name, value in given.items()},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        asked = calls.read_text().splitlines()
        return done, [line.split()[0] for line in asked], asked

    run.out = out
    return run


def test_every_part_runs_once_and_leaves_its_file(script):
    done, parts, asked = script(COMMIT="abc", FLAGS="--op geglu")
    assert done.returncode == 0, done.stdout
    assert parts == PARTS
    assert {path.name for path in script.out.iterdir()} == {
        "log.txt",
        *(f"{p}.json" for p in PARTS),
    }
    assert all("--commit abc" in line for line in asked)
    assert [line.count("--op geglu") for line in asked] == [p in ("kernels", "tune") for p in PARTS]
    assert done.stdout.index("== summary") > done.stdout.index("== tune")
    assert (script.out / "log.txt").read_text() == done.stdout


def flags_of(line):
    """What is asked of the kernel benchmark, as it reads it."""
    return kernels.parse(line.split(" -m fusedit.benchmarks.kernels ")[1].split())


def test_attention_is_a_part_of_its_own(script, fake_gpu):
    said = {"COMMIT": "abc", "FLAGS": "--op geglu", "LIMIT_S": "900"}
    done, parts, asked = script(PARTS="attention", **said)
    assert done.returncode == 0, done.stdout
    assert parts == OF_ATTENTION
    files = {path.name for path in script.out.iterdir()}
    assert files == {"log.txt", *(f"{part}.json" for part in OF_ATTENTION)}
    every, few = map(flags_of, asked[:2])
    presets = ["sd15-256", "sd15-512", "sd15-1024", "sdxl-512", "sdxl-1024"]
    for flags in (every, few):
        assert (flags.op, flags.shapes, flags.modes) == (["attention"], presets, ["graph"])
        assert (flags.out, flags.commit, flags.only_json) == (script.out, "abc", True)
    assert (every.batch, few.batch) == (None, 4)
    assert every.without == ["compile"]
    rivals = {"eager", "compile", *OPS["attention"].rivals}
    assert rivals - {*few.without} == {*choose.BACKENDS, choose.OWN_CHOICE} - {"ours"}
    assert (every.limit_s, few.limit_s) == (420, 120)  # at most
    read = f"{script.out}/attention.json {script.out}/attention-4.json"
    assert asked[2].endswith(f"choose {read} --out {script.out}/attention-choices.json")


def test_data_and_checkpoint_are_parts_of_their_own(script):
    done, parts, asked = script(PARTS="data checkpoint", COMMIT="abc", FLAGS="--op geglu")
    assert done.returncode == 0, done.stdout
    assert parts == ["data", "checkpoint"]
    for module, line in zip((data, checkpoint), asked, strict=True):
        words = line.split(f" -m {module.__name__} ")[1].split()
        folder = words[words.index("--folder") + 1]
        assert not Path(folder).exists()  # it went with what the script worked in
        words[words.index("--folder") + 1] = str(script.out)
        flags = module.parse(words)
        assert (flags.out, flags.commit, flags.folder) == (script.out, "abc", script.out)


def test_parity_and_steps_are_parts_with_the_script(script, monkeypatch):
    done, parts, asked = script(PARTS="parity step sdxl", COMMIT="abc", REFERENCE="diffusers")
    assert done.returncode == 0, done.stdout
    monkeypatch.setattr(reference, "found_script", str)
    monkeypatch.setattr(step_cases, "script_named", lambda given, name: given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    first, *rest = (line.split(" -m fusedit.benchmarks.")[1].split() for line in asked)
    flags = parity.parse(first[1:])
    assert (first[0], flags.preset, flags.reference) == ("parity", "sd15", "diffusers")
    assert parts[0] == "parity-sd15"  # the file that it writes
    steps = [step.parse(words[1:]) for words in rest]
    found = [(flags.preset, flags.pixels) for flags in steps]
    assert found[:3] == [(["tuned"], [256]), (["tuned"], [512]), (["as-shipped"], [256])]
    assert found[3:] == [(["sdxl-tuned"], [512]), (["sdxl-tuned"], [1024]), (["sdxl"], [512])]
    assert [flags.name for flags in steps] == parts[1:]


def test_other_parts_leave_attention_out(script, fake_gpu):
    _, parts, asked = script(PARTS="kernels tune")
    assert parts == ["kernels", "tune"]
    for line in asked:
        assert sorted(flags_of(line).op) == sorted({*OPS} - {"attention"})
    _, _, (tuned,) = script(PARTS="tune", OUT=f"{script.out}2", FLAGS="--op attention")
    assert flags_of(tuned).op == ["attention"]


def test_attention_goes_on_where_it_stopped(script):
    script.out.mkdir()
    (script.out / "attention.json").write_text('{\n "complete": true\n}\n')
    done, parts, _ = script(PARTS="attention")
    assert parts == OF_ATTENTION[1:]
    assert "attention: done before" in done.stdout


@pytest.mark.parametrize("complete", [True, False])
def test_scaling_takes_the_speed_of_a_complete_update(script, complete):
    script.out.mkdir()
    told = json.dumps({"schema": 1, "complete": complete}, indent=1)
    (script.out / "update.json").write_text(told)
    done, parts, (asked,) = script(PARTS="scaling", COMMIT="abc")
    assert (done.returncode, parts) == (0, ["scaling"])
    assert "--commit abc" in asked
    assert (f"--update {script.out}/update.json" in asked) == complete


def test_parts_that_are_done_are_skipped_and_others_go_on(script):
    assert script(PARTS="ceilings checks")[1] == ["ceilings", "checks"]
    (script.out / "checks.json").write_text('{\n "complete": false\n}\n')
    done, parts, _ = script(PARTS="ceilings checks kernels")
    assert parts == ["checks", "kernels"]
    assert "ceilings: done before" in done.stdout


def test_an_earlier_folder_is_gone_on_with(script, tmp_path):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "tests.json").write_text('{\n "complete": true\n}\n')
    assert script(PARTS="ceilings tests", FROM=earlier)[1] == ["ceilings"]


def test_a_part_that_fails_does_not_stop_the_rest(script):
    done, parts, _ = script(PARTS="ceilings checks kernels", BREAKS="checks")
    assert (done.returncode, parts) == (1, ["ceilings", "checks", "kernels"])
    assert "checks: exit code 7" in done.stdout


def test_a_part_that_hangs_is_stopped_and_what_has_no_time_is_told(script):
    done, parts, _ = script(PARTS="ceilings checks", HANGS="ceilings", LIMIT_S="6")
    assert (done.returncode, parts) == (1, ["ceilings"])
    assert "ceilings: stopped at its limit" in done.stdout
    assert "checks: no time left" in done.stdout


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"PARTS": "kernel"}, "there is no part kernel; give some of: ceilings"),
        ({"OUT": ""}, "no OUT: give a folder, then parts: ceilings"),
        ({"PARTS": "ceilings step"}, "step needs REFERENCE, a checkout of huggingface/diffusers"),
        ({"LIMIT_S": "10m"}, "LIMIT_S is 10m; give seconds"),
        ({"FROM": "/nowhere"}, "FROM is /nowhere, which is no folder"),
        ({"PYTHON": "nopython"}, "PYTHON is nopython, which is not there"),
    ],
)
def test_a_wrong_variable_is_one_line_and_2(script, variables, told):
    done, parts, _ = script(**variables)
    assert (done.returncode, parts) == (2, [])
    assert done.stderr.count("\n") == 1
    assert told in done.stderr


def test_the_settings_of_the_card_are_left_alone():
    for name in ("gpu.sh", "gpu.py", "harness.py", "timing.py"):
        text = (ROOT / "benchmarks" / name).read_text()
        for word in ("--lock-gpu", "-lgc", "-pl ", "-pm ", "--gpu-reset", "--power-limit"):
            assert word not in text


def test_results_of_pytest_become_rows():
    rows = gpu.test_rows(XML, "")
    assert rows[0]["values"] == {"passed": 1, "failed": 1, "skipped": 1, "seconds": 2.0}
    assert rows[0]["verdict"] == "failed"
    assert rows[1]["labels"]["failure"] == "tests.kernels.test_geglu::test_b"
    assert rows[1]["note"] == "gradient is off"


def test_pytest_that_left_no_results_is_a_failure():
    (row,) = gpu.test_rows(None, "stopped at --limit_s 9")
    assert (row["verdict"], row["note"]) == ("failed", "stopped at --limit_s 9")


def test_every_op_is_checked_and_a_graph_that_does_not_replay_is_wrong(
    fake_gpu, monkeypatch, tmp_path
):
    monkeypatch.setattr(stand_in.Graph, "replay", lambda self: None)
    assert gpu.main(["checks", "--out", str(tmp_path)]) == 1
    rows = harness.read(tmp_path / "checks.json")["rows"]
    verdicts = {(row["labels"]["op"], row["labels"]["check"]): row["verdict"] for row in rows}
    assert verdicts == {
        (op, check): "wrong" if check == "captured" else "right"
        for op in OPS
        for check in ("same_twice", "captured", "compiled")
    }


def test_checked_are_the_kernels_of_long_and_of_short_attention():
    shapes = [case.labels["shape"] for case in gpu.checked() if case.op.name == "attention"]
    assert shapes == ["2x1024x8x40+1024keys", "2x1024x8x40+77keys"]
    assert len(list(gpu.checked())) == len(OPS) + 1


def test_a_difference_is_seen():
    one, other = torch.zeros(3), torch.tensor([0.0, 0.0, 1e-6])
    assert gpu.difference([one, one], [one, one]) == ""
    assert gpu.difference([one, one], [one, other]) == "tensor 1 differs"
    assert gpu.difference([torch.tensor(float("nan"))], [torch.tensor(float("nan"))])


def test_ceilings_are_written(fake_gpu, tmp_path):
    assert gpu.main(["ceilings", "--out", str(tmp_path)]) == 0
    assert harness.read(tmp_path / "ceilings.json")["ceilings"]["copy_bytes_per_s"] > 0


@pytest.mark.parametrize("command", [gpu.main, optimizer.main])
def test_without_a_gpu_there_is_one_line_and_2(command, tmp_path, capsys):
    words = ["checks"] if command is gpu.main else []
    told = refusal(command, [*words, "--out", str(tmp_path)], capsys)
    assert "there is no GPU here" in told


@pytest.mark.parametrize("dtype", optimizer.DTYPES.values())
def test_the_optimizer_is_checked_before_it_is_timed(dtype, monkeypatch):
    monkeypatch.setattr(optimizer, "CHECKED_SHAPES", [(32, 8, 3, 3), (320,), (64, 32)])
    assert optimizer.checked(dtype, "cpu").note == ""
    step = optimizer.AdamWEma.step

    def twice(self):
        step(self)
        step(self)

    monkeypatch.setattr(optimizer.AdamWEma, "step", twice)
    assert optimizer.checked(dtype, "cpu").note


def test_the_optimizer_is_timed_at_the_shapes_of_the_unet(fake_gpu, monkeypatch, tmp_path):
    shapes = optimizer.unet_shapes()
    assert sum(shape.numel() for shape in shapes) == 859_532_484
    monkeypatch.setattr(optimizer, "unet_shapes", lambda: [torch.Size((8, 8))])
    monkeypatch.setattr(optimizer, "checked", lambda *_: optimizer.accuracy.Verdict(0.5))
    made = optimizer.Torchs.__init__
    monkeypatch.setattr(
        optimizer.Torchs,
        "__init__",
        lambda self, shapes, dtype, _: made(self, shapes, dtype, "cpu"),
    )
    assert optimizer.main(["--out", str(tmp_path)]) == 0
    rows = harness.read(tmp_path / "optimizer.json")["rows"]
    assert [row["labels"]["by"] for row in rows] == ["ours", "eager"] * 2
    assert all({*row["timings"]} == {"graph", "warm"} for row in rows)
