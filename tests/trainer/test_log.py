import json
import subprocess
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fusedit.trainer.callbacks import Callbacks
from fusedit.trainer.errors import UsageError
from fusedit.trainer.log import (
    LOG_FILE,
    Lines,
    RunLog,
    drop_lines_after,
    memory_gib,
    parts_of,
    read_lines,
)
from fusedit.trainer.trackers import check_trackers, open_tracker

VALUES = {"loss": 0.5, "lr": 1e-4, "grad_norm": 0.25, "images_per_second": 8.0, "memory_gib": 1.5}
SETTINGS = {"loop.seed": 3, "data.dataset_name": None}
RED = Image.new("RGB", (6, 4), (255, 0, 0))


def start(folder, *, first_step=0, trackers=(), total_steps=100) -> RunLog:
    return RunLog(
        folder, "logs", trackers, SETTINGS, "my-run", total_steps, first_step, Callbacks(())
    )


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_each_log_is_one_line_on_disk_at_once(tmp_path):
    log = start(tmp_path)
    log.scalars(10, VALUES)
    log.scalars(20, VALUES | {"loss": float("nan"), "grad_norm": float("inf")})
    first, second = lines(tmp_path)  # before close: a killed run loses nothing
    assert first.pop("time") > 1.7e9
    assert first == {"step": 10, **VALUES}
    assert second["loss"] is None
    assert second["grad_norm"] is None
    log.close()


def test_a_resumed_log_reads_as_one_run(tmp_path):
    log = start(tmp_path)
    for step in (10, 20, 30):
        log.scalars(step, VALUES)
    log.close()
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 40, "los')
    log = start(tmp_path, first_step=20)
    log.scalars(30, VALUES)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_a_run_from_the_start_begins_an_empty_log(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 0}\n{"step": 10}\n')
    drop_lines_after(tmp_path / LOG_FILE, 0)
    assert (tmp_path / LOG_FILE).read_text() == ""


def test_a_long_log_goes_on_in_another_file_and_reads_as_one(tmp_path):
    path = tmp_path / LOG_FILE
    (tmp_path / "log-book.jsonl").write_text("mine")
    log = Lines(path, 0, part_bytes=100)
    for step in range(1, 41):
        assert not log.add({"step": step, "loss": 0.5})
    log.close()
    parts = [part.name for part in parts_of(path)]
    assert parts[:2] == ["log-1.jsonl", "log-2.jsonl"]
    assert len(parts) >= 11  # in the order of numbers, not of letters
    assert parts[-1] == LOG_FILE
    assert all(part.stat().st_size <= 130 for part in parts_of(path))
    assert [line["step"] for line in read_lines(path)] == [*range(1, 41)]
    log = Lines(path, 17, part_bytes=100)  # a run that goes on from step 17
    log.add({"step": 18})
    log.close()
    assert [line["step"] for line in read_lines(path)] == [*range(1, 19)]
    Lines(path, 0).close()
    assert parts_of(path) == [path]
    assert read_lines(path) == []
    assert (tmp_path / "log-book.jsonl").read_text() == "mine"


@pytest.mark.parametrize("taken", [0, 7])
def test_a_full_disk_leaves_no_half_line_and_its_lines_wait(tmp_path, taken):
    log = Lines(tmp_path / LOG_FILE, 0)
    log.add({"step": 1})
    file = log._file

    class Full:
        fileno = staticmethod(file.fileno)

        def write(self, data):
            if not taken:
                raise OSError(28, "No space left on device")
            return file.write(data[:taken])

    log._file = Full()
    for step in (2, 3):
        assert "cannot be written: No space left" in log.add({"step": step})
    assert [line["step"] for line in read_lines(tmp_path / LOG_FILE)] == [1]
    assert (tmp_path / LOG_FILE).read_text().endswith("}\n")
    log._file = file
    assert not log.add({"step": 4})
    log.close()
    assert [line["step"] for line in read_lines(tmp_path / LOG_FILE)] == [1, 2, 3, 4]


def test_an_event_is_printed_and_kept(tmp_path, capsys):
    log = start(tmp_path)
    log.event(3, "save failed", "WARNING: not saved")
    log.close()
    assert capsys.readouterr().err == "WARNING: not saved\n"
    [line] = lines(tmp_path)
    assert (line["step"], line["event"], line["told"]) == (3, "save failed", "WARNING: not saved")


def test_lines_of_progress_without_a_terminal(tmp_path, capsys):
    log = start(tmp_path)
    log.note("hello")
    log.progress(10, {"loss": 0.123456, "lr": 5e-5})
    log.progress(20, {"loss": 0.1})
    log.close()
    shown = capsys.readouterr().err
    assert "\r" not in shown
    note, first, second = shown.splitlines()
    assert note == "hello"
    assert first == "step 10/100  loss 0.1235  lr 5.00e-05"
    assert second.startswith("step 20/100  loss 0.1000  left 00:0")


def test_a_bar_in_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = start(tmp_path, first_step=40)
    log.progress(50, {"loss": 0.5})
    log.note("above the bar")
    log.close()
    shown = capsys.readouterr().err
    assert "50/100" in shown
    assert "loss 0.5" in shown
    assert "above the bar\n" in shown


def test_other_ranks_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog.silent()
    log.scalars(1, VALUES)
    log.progress(1, VALUES)
    log.image(1, "edits", RED, "make it red")
    log.note("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_memory_of_this_process():
    held = np.ones(2**24)  # an eighth of a GiB, touched
    assert 0.125 < memory_gib(torch.device("cpu")) < 64
    del held


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "logs"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_every_value_pictures_and_settings(tmp_path):
    log = start(tmp_path, trackers=("tensorboard",))
    log.scalars(10, VALUES)
    log.image(10, "edits", RED, "make it red")
    log.close()
    found = events(tmp_path)
    for name, value in VALUES.items():
        [event] = found.Scalars(name)
        assert (event.step, event.value) == (10, pytest.approx(value))
    [picture] = found.Images("edits")
    assert (picture.step, picture.width, picture.height) == (10, 6, 4)
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0] for tag in found.Tags()["tensors"]
    }
    assert texts["edits/caption/text_summary"] == b"make it red"
    assert b"|loop.seed|3|" in texts["settings/text_summary"]


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    log = start(tmp_path, trackers=("tensorboard",))
    for step in (10, 20, 30):
        log.scalars(step, {"loss": 1.0})
    log.close()
    time.sleep(1.1)  # TensorBoard reads files in the order of the second they were begun in
    log = start(tmp_path, first_step=20, trackers=("tensorboard",))
    log.scalars(30, {"loss": 2.0})
    log.close()
    loss = events(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in loss] == [(10, 1), (20, 1), (30, 2)]


class Calls(ModuleType):
    """A package of which every call is written down; what `answers` names is returned."""

    def __init__(self, name, answers):
        super().__init__(name)
        self.calls, self.answers = [], answers

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self.answers.get(name)

        return call


class Record:
    def __init__(self, **values):
        self.__dict__.update(values)


def opened(monkeypatch, name, answers, tmp_path, identity=None):
    package = Calls(name, answers)
    monkeypatch.setitem(sys.modules, name, package)
    tracker = open_tracker(
        name,
        folder=tmp_path,
        settings=SETTINGS,
        run_name="my-run",
        first_step=0,
        identity=identity,
    )
    tracker.scalars(10, {"loss": 0.5})
    tracker.image(10, "edits", RED, "make it red")
    tracker.close()
    return tracker, package.calls


@pytest.mark.parametrize("identity", [None, "abc"])
def test_wandb(monkeypatch, tmp_path, identity):
    run = Calls("run", {})
    run.id = "abc"
    answers = {"init": run, "Image": "the image"}
    tracker, calls = opened(monkeypatch, "wandb", answers, tmp_path, identity)
    assert [name for name, _, _ in calls] == ["init", "Image"]
    init = calls[0][2]
    assert (init["name"], init["config"], init["id"]) == ("my-run", SETTINGS, identity)
    assert (init["dir"], init["resume"]) == (str(tmp_path), "allow")
    assert calls[1] == ("Image", (RED,), {"caption": "make it red"})
    assert run.calls == [
        ("log", ({"loss": 0.5},), {"step": 10}),
        ("log", ({"edits": "the image"},), {"step": 10}),
        ("finish", (), {}),
    ]
    assert tracker.identity == "abc"


@pytest.mark.parametrize("identity", [None, "abc"])
def test_mlflow(monkeypatch, tmp_path, identity):
    answers = {"start_run": Record(info=Record(run_id="abc"))}
    tracker, calls = opened(monkeypatch, "mlflow", answers, tmp_path, identity)
    parameters = [("log_params", (SETTINGS,), {})] if identity is None else []
    assert calls == [
        ("set_experiment", ("instruct-pix2pix",), {}),
        ("start_run", (), {"run_id": identity, "run_name": "my-run"}),
        *parameters,
        ("log_metrics", ({"loss": 0.5},), {"step": 10}),
        ("log_image", (RED,), {"key": "edits", "step": 10}),
        ("log_text", ("make it red", "captions/edits/10.txt"), {}),
        ("end_run", (), {}),
    ]
    assert tracker.identity == "abc"


@pytest.mark.parametrize(("identity", "resume"), [(None, "never"), ("my-run-2", "allow")])
def test_trackio(monkeypatch, tmp_path, identity, resume):
    run = Calls("run", {})
    run.name = "my-run-2"  # what trackio makes of a name that is taken
    answers = {"init": run, "Image": "the image"}
    tracker, calls = opened(monkeypatch, "trackio", answers, tmp_path, identity)
    assert calls[0] == (
        "init",
        (),
        {
            "project": "instruct-pix2pix",
            "name": identity or "my-run",
            "config": SETTINGS,
            "resume": resume,
        },
    )
    assert calls[1] == ("Image", (RED,), {"caption": "make it red"})
    assert run.calls == [
        ("log", (), {"metrics": {"loss": 0.5}, "step": 10}),
        ("log", (), {"metrics": {"edits": "the image"}, "step": 10}),
        ("finish", (), {}),
    ]
    assert tracker.identity == "my-run-2"


def test_a_resumed_run_goes_on_in_the_trackers_run(monkeypatch, tmp_path):
    run = Calls("run", {})
    run.id = "abc"
    wandb = Calls("wandb", {"init": run})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    start(tmp_path, trackers=("wandb",)).close()
    start(tmp_path, trackers=("wandb",), first_step=10).close()
    start(tmp_path, trackers=("wandb",), first_step=0).close()
    assert [kwargs["id"] for _, _, kwargs in wandb.calls] == [None, "abc", None]


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").touch()
    (tmp_path / "wandb").mkdir()  # a folder of runs, not the package
    check_trackers(("tensorboard", "mlflow"))
    with pytest.raises(UsageError, match=r"--report_to wandb: .* pip install 'fusedit\[wandb\]'"):
        check_trackers(("mlflow", "wandb"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UsageError, match="trackio"):
        check_trackers(("trackio",))


def test_memory_is_not_that_of_the_process_that_started_it():
    held = bytearray(2**30)
    held[:: 2**12] = b"x" * (2**30 // 2**12)  # resident
    program = (
        "import torch; from fusedit.trainer.log import memory_gib;"
        "print(memory_gib(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert memory_gib(torch.device("cpu")) > 1
    assert 0.05 < float(done.stdout) < 1, done.stderr
    assert held[0] == ord("x")
