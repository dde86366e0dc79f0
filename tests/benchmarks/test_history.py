"""Histories that are made up, committed in a repository of their own."""

import subprocess

import pytest
from records import record, refusal, row

from fusedit.benchmarks import harness, history
from fusedit.benchmarks.history import Point


class Repository:
    """Commits records as results of a CPU, named by a commit of their own each."""

    def __init__(self, root):
        self.root, self.count = root, 0
        self.path = root / "cpu" / "kernels.json"
        self.git("init", "--quiet", ".")

    def git(self, *words):
        own = ("-c", "user.name=nobody", "-c", "user.email=nobody")
        subprocess.run(("git", *own, *words), cwd=self.root, check=True, capture_output=True)

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=a result")

    def add(self, *rows, path=None, gpu=None):
        made = record(*rows, gpu=gpu)
        commit = f"{self.count:07d}ffff"
        made["provenance"] |= {"commit": commit, "dirty": False, "time": "2026-11-23T00:00:00Z"}
        harness.write(made, path or self.path)
        self.count += 1
        self.commit()


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def medians(records):
    return [
        {name: at.value for name, at in history.points(record).items()}.popitem()[1]
        for record in records
    ]


def test_versions_are_read_through_a_move_oldest_first(repository):
    former = repository.root / "kernels-cpu.json"
    repository.add(row(median_ms=1.0), path=former)
    repository.add(row(median_ms=2.0), path=former)
    repository.path.parent.mkdir()
    repository.git("mv", former.name, "cpu/kernels.json")
    repository.commit()
    repository.add(row(median_ms=3.0))
    found = history.versions(repository.path)
    assert medians(found) == [1.0, 2.0, 3.0]
    assert [history.commit_of(one) for one in found] == ["0000000", "0000001", "0000002"]


def test_what_is_no_record_is_told_and_passed_over(repository, capsys):
    repository.path.parent.mkdir()
    for text in ("{}", "no JSON"):
        repository.path.write_text(text)
        repository.commit()
    repository.add(row())
    assert len(history.versions(repository.path)) == 1
    told = capsys.readouterr().err
    assert told.count("kernels.json is passed over as of ") == 2
    assert "a record has schema, benchmark" in told


def test_a_row_has_its_time_or_its_speed():
    timed, other = row(median_ms=2.0), row("eager")
    assert history.point(timed) == Point(2.0, 1.98, 2.02, "ms")  # of the graph, not cold
    speed = harness.row({"op": "run", "by": "ours"}, values={"images_per_s": 30.0})
    assert history.point(speed) == Point(30.0, 30.0, 30.0, "images/s")
    nothing = harness.row({"op": "curve", "by": "ours"}, values={"loss": 1.0})
    assert set(history.points(record(timed, other, speed, nothing))) == {timed["name"], "run/ours"}


def test_a_line_is_of_the_versions_that_have_the_row_in_one_unit():
    speed, first, second = (
        Point(value, value, value, unit)
        for value, unit in ((30.0, "images/s"), (1.0, "ms"), (2.0, "ms"))
    )
    every = [{"a": speed}, {"a": first}, {}, {"a": second, "b": speed}]
    assert history.line(every, "a") == {1: first, 3: second}
    assert history.line(every, "b") == {3: speed}


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [(1.0, 1.2, "+20.0% | 5% | slower"), (1.0, 0.8, "-20.0% | 5% | faster"), (1, 1.04, "5% |  |")],
)
def test_the_two_newest_versions_are_compared(was, now, told):
    old, middle, new = (record(row(median_ms=ms)) for ms in (9.0, was, now))
    new["rows"].append(row(shape="other"))
    text = history.changes([old, middle, new], "cpu/kernels")
    assert text.startswith("## cpu/kernels\n")
    assert f"| {was:.4g} | {now:.4g} ms | " in text
    assert told in text
    assert "/other/bf16/forward/ours | - | 1 ms | | | new |" in text


def test_a_higher_speed_is_faster():
    was, now = (Point(speed, speed, speed, "images/s") for speed in (30.0, 40.0))
    assert now.since(was)[-1] == "faster"
    assert was.since(now)[-1] == "slower"


def test_versions_of_two_machines_are_not_compared():
    text = history.changes([record(row()), record(row(), gpu="Other")], "h100/kernels")
    assert "Not compared: " in text
    assert " on Other" in text
    assert "nothing to compare with" in history.changes([record(row())], "h100/kernels")


def test_each_file_has_its_figure(repository, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(history, "MOST_PANELS", 4)
    several = [row(shape=f"{n}x1") for n in range(5)]
    repository.add(*several[:1], gpu="Other")
    repository.add(*several)
    repository.add(*several, path=repository.root / "h100" / "update.json")
    out = tmp_path / "figures"
    assert history.main([str(repository.root), f"--out={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {"cpu-kernels.png", "h100-update.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())
    found = capsys.readouterr()
    assert "cpu/kernels: 4 rows are drawn" in found.err
    assert f"  {several[4]['name']}\n" in found.err
    assert "## h100/update\n" in found.out
    words = [str(repository.path), f"--out={out}", "--rows", "4x1", "geglu"]
    assert history.main(words) == 0
    assert "left out" not in capsys.readouterr().err


def test_where_nothing_was_committed_there_is_nothing_to_draw(tmp_path, capsys):
    harness.write(record(row()), tmp_path / "cpu" / "kernels.json")
    assert history.main([str(tmp_path), f"--out={tmp_path / 'out'}"]) == 1
    assert "kernels.json: no version in git" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    words = [str(tmp_path / "no.json"), f"--out={tmp_path}"]
    assert "there is no such file" in refusal(history.main, words, capsys)
