"""gpu.sh --rehearse: every part goes through on a CPU, and passes for no measurement."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from records import record, refusal

from fusedit.benchmarks import choose, harness, rehearsal
from fusedit.benchmarks.rehearsal import REHEARSAL
from fusedit.benchmarks.stand_in import standing_in

ROOT = Path(__file__).parents[2]
GPU_SH = (ROOT / "benchmarks/gpu.sh").read_text()
# As long as each other; on two cores at once.
HALVES = (
    "ceilings checks kernels optimizer tune attention data checkpoint edit",
    "tests update ledger scaling parity step sdxl",
)


def gpu_sh(*words, **variables):
    own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LIMIT_S": "1700"}
    return subprocess.Popen(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), *map(str, words)],
        env=os.environ | own | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(1800)  # 200 seconds of a core: some 100 of two
def test_every_part_goes_through_and_says_what_it_is(tmp_path):
    running = [
        gpu_sh("--rehearse", tmp_path / str(half), *parts.split())
        for half, parts in enumerate(HALVES)
    ]
    said = [one.communicate()[0] for one in running]
    assert [one.returncode for one in running] == [0, 0], "\n".join(said)
    known = "".join(line.split('"')[1] for line in GPU_SH.splitlines() if "KNOWN" in line[:6])
    assert {*" ".join(HALVES).split()} == {*known.split()}
    records = sorted(tmp_path.glob("*/*.json"))
    assert len(records) == 21  # 19 records, and what was tuned and chosen
    for path in records:
        assert REHEARSAL in path.read_text(), path.name
    made = {path.stem: json.loads(path.read_text()) for path in records}
    assert made["sm_90"]["measured"]["device"] == REHEARSAL
    timed = {name for name, one in made.items() for row in one.get("rows", []) if row["timings"]}
    untimed = {"ceilings", "tests", "checks", "parity-sd15", "sm_90", "attention-choices"}
    assert timed == {*made} - untimed
    by = {row["labels"]["by"] for row in made["attention"]["rows"] if row["timings"]}
    assert {"ours", "eager", "sdpa-flash"} <= by


@pytest.fixture
def measured(tmp_path):
    folder = tmp_path / "measured"
    harness.write(record(), folder / "checks.json")
    return folder


@pytest.fixture
def rehearsed(tmp_path):
    folder = tmp_path / "rehearsed"
    harness.write(record(gpu=REHEARSAL), folder / "checks.json")
    return folder


def test_rehearsals_and_measurements_have_a_folder_each(measured, rehearsed, tmp_path):
    tried = [
        gpu_sh("--rehearse", measured, "checks"),
        gpu_sh("--rehearse", tmp_path / "new", "checks", FROM=str(measured)),
        gpu_sh(rehearsed, "checks"),
        gpu_sh(tmp_path / "new", "checks", FROM=str(rehearsed)),
    ]
    for one in tried:
        said = one.communicate()[0]
        assert (one.returncode, said.count("\n")) == (2, 1), said
        assert "checks.json is there: rehearsals and measurements need a folder each" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["kernel"], "there is no rehearsal of 'kernel'; give one of gpu, kernels"),
        (["kernels", "--tune"], "--out is missing: give a folder of rehearsals"),
        (["gpu", "checks", "--out", "{measured}"], "checks.json was measured; give a folder"),
        (["choose", "--out", "{measured}/checks.json"], "checks.json was measured"),
    ],
)
def test_what_was_measured_is_not_written_over(words, told, measured, capsys):
    before = (measured / "checks.json").read_bytes()
    assert rehearsal.main([word.format(measured=measured) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fusedit.benchmarks.rehearsal: ")
    assert (said.count("\n"), told in said) == (1, True)
    assert (measured / "checks.json").read_bytes() == before


def test_a_rehearsals_record_is_not_read_as_a_measurement(rehearsed, capsys):
    said = refusal(choose.main, [str(rehearsed / "checks.json")], capsys)
    assert "made in a rehearsal; give what was measured" in said


def test_a_stand_ins_graph_runs_again_on_what_its_inputs_hold_then():
    with standing_in("none"):
        x = torch.arange(6.0, device="cuda").view(2, 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            y = (x.t() * 2).contiguous()
            y += 1
        x.fill_(3.0)
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        end.record()
        assert start.elapsed_time(end) > 0
    assert y.tolist() == [[7.0, 7.0]] * 3
    assert y.device.type == "cpu"
