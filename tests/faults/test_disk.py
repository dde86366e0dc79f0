"""A disk that is full, or read-only, at each file that a run writes: one line, older things stand.

The disk refuses by an audit hook of Python's, which sees each file that is opened to be written.
What safetensors writes by itself is refused in its place.
"""

import errno
import os
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from tiny import save_tiny_inputs

from fusedit.launch import train
from fusedit.trainer import checkpoint, files

ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}


class Disk:
    """Refuses to open files whose path ends in a text, while `refusing`."""

    def __init__(self) -> None:
        self.ending, self.error = "", 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.ending or event not in ("open", "os.mkdir"):
            return
        path = arguments[0]
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if isinstance(path, (str, os.PathLike)) and str(path).endswith(self.ending):
            raise OSError(self.error, os.strerror(self.error), str(path))

    @contextmanager
    def refusing(self, ending, error):
        self.ending, self.error = ending, error
        yield
        self.ending = ""


DISK = Disk()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


@pytest.fixture(scope="module")
def begun(inputs, tmp_path_factory):
    """The output folder of a run of 2 steps."""
    output = tmp_path_factory.mktemp("begun") / "out"
    assert train.main(_flags(inputs, output, 2)) == 0
    return output


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def _flags(inputs, output, steps, *more):
    return [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=16",
        "--train_batch_size=2",
        f"--max_train_steps={steps}",
        "--checkpointing_steps=2",
        "--held_out=1",
        "--validation_steps=2",
        "--validation_inference_steps=1",
        "--log_every=1",
        "--report_to=none",
        f"--output_dir={output}",
        *more,
    ]


def _told(capfd):
    """The one line that says what went wrong."""
    said = capfd.readouterr().err
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("fusedit: ")]
    return line


def _half_written(output):
    return [
        path
        for path in output.rglob("*")
        if path.name.endswith((".partial", ".deleted")) and ".export" not in path.name
    ]


WRITES = {  # what is written: how its path ends
    "checkpoint": ".checkpoint-4.partial",
    "state": ".checkpoint-4.partial/state.json",
    "manifest": ".checkpoint-4.partial/manifest.json",
    "log": "log.jsonl",
    "audit": "audit.jsonl",
    "configuration": ".run.toml.partial",
    "trackers": ".trackers.json.partial",
    "validation image": ".step-000004.png.partial",
    "pipeline": "model_index.json",
    "card": ".README.md.partial",
    "lock": ".lock",
}


@pytest.mark.parametrize("kind", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
@pytest.mark.parametrize("written", WRITES)
def test_one_line_and_the_older_checkpoint_stands(inputs, begun, tmp_path, capfd, written, kind):
    output = tmp_path / "out"
    shutil.copytree(begun, output)
    flags = _flags(inputs, output, 4)
    with DISK.refusing(WRITES[written], ERRORS[kind]):
        assert train.main(flags) == train.MISTAKE
    line = _told(capfd)
    reason = "no space is left" if kind == "full" else "Read-only file system"
    assert reason in line or os.strerror(ERRORS[kind]) in line
    assert checkpoint.broken(output / "checkpoint-2") is None
    assert not _half_written(output)
    whole = written in ("validation image", "pipeline", "card") and "checkpoint" not in line
    assert (output / "checkpoint-4").exists() is (whole and written != "validation image")
    if written in ("manifest", "pipeline") or kind == "read-only":  # when it can be written again
        assert train.main(flags) == 0
        assert checkpoint.broken(output / "checkpoint-4") is None


def test_the_pipeline_is_written_though_the_last_checkpoint_is_not(inputs, begun, tmp_path, capfd):
    output = tmp_path / "out"
    shutil.copytree(begun, output)
    (output / "model_index.json").unlink()
    with DISK.refusing(WRITES["state"], errno.ENOSPC):
        assert train.main(_flags(inputs, output, 4)) == train.MISTAKE
    assert (output / "model_index.json").exists()
    assert "checkpoint-4: no space is left on the disk" in _told(capfd)


def test_a_failed_save_on_the_way_does_not_end_the_run(inputs, tmp_path, capfd):
    output = tmp_path / "out"
    with DISK.refusing(".checkpoint-2.partial/state.json", errno.ENOSPC):
        assert train.main(_flags(inputs, output, 4)) == 0
    said = capfd.readouterr().err
    assert "WARNING: not saved: cannot write" in said
    assert said.splitlines()[-2].startswith("not saved on the way: cannot write")
    assert checkpoint.steps(output) == [4]
    assert '"event": "save failed"' in (output / "log.jsonl").read_text()


@pytest.mark.parametrize("ending", [".json.partial", ".manifest.json.partial"])
def test_the_cache(inputs, tmp_path, capfd, ending):
    flags = _flags(inputs, tmp_path / "out", 2, "--center_crop", f"--cache_latents={tmp_path}/c")
    with DISK.refusing(ending, errno.ENOSPC):
        assert train.main(flags) == train.MISTAKE
    assert "no space is left on the disk" in _told(capfd)
    assert not _half_written(tmp_path)
    assert train.main(flags) == 0


def test_a_shard_of_the_cache(inputs, tmp_path, capfd, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: (os error 28)")

    flags = _flags(inputs, tmp_path / "out", 2, "--center_crop", f"--cache_latents={tmp_path}/c")
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        assert train.main(flags) == train.MISTAKE
    assert "no space is left on the disk" in _told(capfd)
    assert not _half_written(tmp_path)
    assert train.main(flags) == 0
