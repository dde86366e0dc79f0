import getpass
import json
import platform
from pathlib import Path

import pytest
from records import record, row, timing

from fusedit.benchmarks import harness
from fusedit.benchmarks.harness import Timing, check, compare, provenance
from fusedit.benchmarks.timing import timing as timing_of


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    made = record(row(), row("eager", 2.0))
    harness.write(made, tmp_path / "new" / "kernels.json")
    assert harness.read(tmp_path / "new" / "kernels.json") == made
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kernels.json"]


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("schema",), 2, "schema must be 1, got 2"),
        (("complete",), None, "complete must be true or false"),
        (("provenance",), {}, "provenance has no commit"),
        (("ceilings", "noise"), "1%", "ceilings.noise must be a number"),
        (("rows", 0, "verdict"), "fine", r"rows\[0\].verdict must be one of"),
        (("rows", 0, "verdict"), "wrong", r"rows\[0\] is wrong and has timings"),
        (("rows", 0, "verdict"), "failed", r"rows\[0\] is failed and has timings"),
        (("rows", 0, "error"), float("nan"), r"rows\[0\].error must be a number"),
        (("rows", 0, "values"), {"times": "5"}, r"rows\[0\].values.times must be a number"),
        (
            ("rows", 0, "timings", "graph", "median_ms"),
            0.0,
            r"rows\[0\].timings.graph must have 0 <",
        ),
        (("rows", 0, "timings", "graph"), {"median_ms": 1}, r"rows\[0\].timings.graph has"),
        (("rows", 1, "name"), row()["name"], "two rows are named"),
    ],
)
def test_what_the_schema_does_not_allow_is_named(where, value, told):
    broken = record(row(), row("eager"))
    target = broken
    for part in where[:-1]:
        target = target[part]
    target[where[-1]] = value
    with pytest.raises(ValueError, match=told):
        check(broken)


def test_a_missing_or_unknown_field_is_told():
    for change in ({"extra": 1}, {}):
        broken = record(row()) | change
        if not change:
            del broken["rows"]
        with pytest.raises(ValueError, match="a record has schema, benchmark"):
            check(broken)


def test_a_file_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("{not json")
    with pytest.raises(ValueError, match=r"notes\.json is no record of a benchmark"):
        harness.read(path)


def test_provenance_says_versions_and_command():
    told = provenance(["python -m fusedit.benchmarks.kernels", "--batch", "4"])
    assert told["command"] == "python -m fusedit.benchmarks.kernels --batch 4"
    assert told["versions"]["torch"]
    assert told["versions"]["triton"]
    assert told["machine"]["cpu"]


def test_provenance_holds_no_path_host_or_user(tmp_path):
    words = ["--out", str(tmp_path), f"--compare={tmp_path}/old.json", "~/results", "../up/x.json"]
    told = provenance(["python", *words, "--shapes", "sd15-256,sd15-512", "out/here"])
    text = json.dumps(told)
    assert str(tmp_path.parent) not in text
    assert platform.node() not in text
    assert str(Path.home()) + "/" not in text
    assert getpass.getuser() not in told["command"].split()
    expected = f"--out {tmp_path.name} --compare=old.json results x.json --shapes"
    assert told["command"] == f"python {expected} sd15-256,sd15-512 out/here"


def test_a_commit_that_is_handed_in_serves_where_there_is_no_git(monkeypatch):
    monkeypatch.setattr(harness, "ROOT", Path("/nowhere"))
    told = provenance("bench", commit="abc123")
    assert (told["commit"], told["dirty"]) == ("abc123", None)


def test_median_and_percentiles():
    assert timing_of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Timing(3.5, 2.0, 5.0, 6)
    assert timing(2.0, 0.1).spread == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("was", "now", "found"),
    [
        (timing(1.0), timing(1.049), False),  # less than 5%
        (timing(1.0), timing(1.06), True),
        (timing(1.0, 0.1), timing(1.25, 0.1), False),  # within three spreads of 10%
        (timing(1.0, 0.1), timing(1.35, 0.1), True),
        (timing(1.0, 0.001), timing(1.25, 0.1), False),  # the wider spread counts
        (timing(1.0), timing(0.5), False),
    ],
)
def test_slower_than_the_noise_is_a_finding(was, now, found):
    old, new = row(), row()
    old["timings"], new["timings"] = {"graph": was._asdict()}, {"graph": now._asdict()}
    findings = compare(record(old), record(new))
    assert bool(findings) == found
    assert all(finding.startswith(new["name"]) for finding in findings)


def test_only_our_rows_are_compared():
    old, new = record(row(), row("eager", 1.0)), record(row(), row("eager", 9.0))
    assert not compare(old, new)


def test_an_answer_that_became_wrong_is_a_finding():
    assert compare(record(row()), record(row(verdict="wrong"))) == [f"{row()['name']}: wrong"]
    assert not compare(record(row(verdict="wrong")), record(row(verdict="wrong")))


def test_records_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="measured on another machine: Other, this is Fake H100"):
        compare(record(row(), gpu="Other"), record(row()))
    with pytest.raises(ValueError, match="no row of 'ours' is in both"):
        compare(record(row(shape="1x1")), record(row()))
