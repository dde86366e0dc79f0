import json

import pytest
import torch

from fusedit.trainer import checkpoint
from fusedit.trainer.checkpoint import Checkpoint
from fusedit.trainer.errors import UsageError
from fusedit.trainer.files import write_text


def _save(root, step, keep=None, value=None):
    tensors = {"unet": {"w": torch.full((3, 2), float(value or step))}}
    return checkpoint.save(root, step, Checkpoint(tensors, {"step": step}), keep)


def _names(root):
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_reads_back_bit_for_bit(tmp_path):
    tensors = {
        "unet": {"a": torch.randn(3, 4).t(), "b": torch.randn(1, 2, 3, 4).contiguous()},
        "optimizer": {"a.step": torch.tensor(3.0), "a.exp_avg": torch.randn(4).double()},
    }
    folder = checkpoint.save(tmp_path, 3, Checkpoint(tensors, {"step": 3, "x": [1, None]}), None)
    read = checkpoint.read(folder)
    assert read.state == {"step": 3, "x": [1, None]}
    for stem, named in tensors.items():
        assert read.tensors[stem].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(read.tensors[stem][name], tensor)


def test_the_newest_whole_one_is_found_and_the_others_named(tmp_path):
    for step in (1, 20, 100):
        _save(tmp_path, step)
    (tmp_path / "checkpoint-100" / "unet.safetensors").unlink()
    found, passed_over = checkpoint.newest(tmp_path)
    assert found == tmp_path / "checkpoint-20"
    assert passed_over == ["checkpoint-100 is passed over: unet.safetensors is missing"]


def test_names_that_only_look_like_checkpoints_are_left_alone(tmp_path):
    """A folder called checkpoint_x crashes the reference (defect 3)."""
    for name in ("checkpoint_x", "checkpoint-", "checkpoint-12b", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoint.newest(tmp_path) == (None, [])
    _save(tmp_path, 5, keep=1)
    checkpoint.delete_all(tmp_path)
    assert len(_names(tmp_path)) == 5


def test_all_broken_ones_are_named_and_none_is_deleted(tmp_path):
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step)
    folder = {step: tmp_path / f"checkpoint-{step}" for step in range(1, 8)}
    data = bytearray((folder[1] / "unet.safetensors").read_bytes())
    (folder[1] / "unet.safetensors").write_bytes(data[:-3])
    data[len(data) // 2] ^= 4
    (folder[2] / "unet.safetensors").write_bytes(data)
    (folder[3] / "manifest.json").unlink()
    (folder[4] / "state.json").rename(folder[4] / ".state.json.partial")
    folder[5].rename(folder[6])  # of another step
    folder[7].mkdir()  # empty
    before = sorted(path for path in tmp_path.rglob("*"))
    found, passed_over = checkpoint.newest(tmp_path)
    assert found is None
    assert passed_over == [
        "checkpoint-7 is passed over: manifest.json is missing",
        "checkpoint-6 is passed over: it is of step 5",
        "checkpoint-4 is passed over: state.json is missing",
        "checkpoint-3 is passed over: manifest.json is missing",
        "checkpoint-2 is passed over: unet.safetensors does not have the hash it was written with",
        f"checkpoint-1 is passed over: unet.safetensors has {len(data) - 3} bytes, not {len(data)}",
    ]
    assert sorted(path for path in tmp_path.rglob("*")) == before
    checkpoint.set_aside_later(tmp_path, 0)
    assert len(list(tmp_path.rglob("*"))) == len(before)


@pytest.mark.parametrize("what", ["file", "empty folder", "link to nothing", "link to a folder"])
def test_what_only_looks_like_the_new_one_is_set_aside(tmp_path, what):
    root, other = tmp_path / "run", tmp_path / "other"
    _save(root, 5)
    other.mkdir()
    (other / "theirs").write_text("kept")
    final = root / "checkpoint-7"
    if what == "file":
        final.write_text("kept")
    elif what == "empty folder":
        final.mkdir()
    else:
        final.symlink_to(other if what == "link to a folder" else tmp_path / "nowhere")
    assert checkpoint.newest(root)[0] == root / "checkpoint-5"
    assert _save(root, 7, keep=1) == final
    assert checkpoint.newest(root)[0] == final
    assert _names(root) == ["checkpoint-7", "checkpoint-7.aside-1"]
    assert (other / "theirs").read_text() == "kept"


def test_a_checkpoint_on_another_disk_is_used_and_only_its_link_goes(tmp_path):
    root, other = tmp_path / "run", tmp_path / "other"
    _save(other, 5)
    root.mkdir()
    (root / "checkpoint-5").symlink_to(other / "checkpoint-5")
    assert checkpoint.newest(root)[0] == root / "checkpoint-5"
    _save(root, 6, keep=1)
    assert _names(root) == ["checkpoint-6"]
    assert checkpoint.broken(other / "checkpoint-5") is None


@pytest.mark.parametrize("name", ["checkpoint-007", "checkpoint-٣", "checkpoint--1"])
def test_a_number_is_written_in_one_way(tmp_path, name):
    _save(tmp_path, 5)
    (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-5", [])
    checkpoint.set_aside_later(tmp_path, 0)
    assert (tmp_path / name).is_dir()


def test_a_manifest_that_lists_nothing_is_no_checkpoint(tmp_path):
    folder = _save(tmp_path, 1)
    (folder / "manifest.json").write_text('{"format": 1, "step": 1, "files": {}}')
    (folder / "state.json").unlink()
    assert checkpoint.broken(folder) == "manifest.json does not list state.json"


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "state"])
def test_damage_is_found(tmp_path, damage):
    folder = _save(tmp_path, 1)
    weights = folder / "unet.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-1])
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "state.json").write_text(json.dumps({"step": 2}))
    assert checkpoint.broken(folder) is not None
    with pytest.raises(UsageError, match="is not whole"):
        checkpoint.check(folder)


def test_old_ones_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    """The reference deletes first (defect 8): with a limit of 1 there is a window with none."""
    _save(tmp_path, 1, keep=1)
    seen_at_deletion = []
    rmtree = checkpoint.shutil.rmtree

    def watching(path, **options):
        if path.name.endswith(".deleted") and path.exists():
            seen_at_deletion.append(checkpoint.newest(tmp_path)[0])
        rmtree(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watching)
    _save(tmp_path, 2, keep=1)
    assert seen_at_deletion == [tmp_path / "checkpoint-2"]
    assert _names(tmp_path) == ["checkpoint-2"]


def test_a_failed_save_leaves_the_older_one_and_says_so(tmp_path, monkeypatch):
    _save(tmp_path, 1, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UsageError, match="no space is left on the disk"):
        _save(tmp_path, 2, keep=1)
    assert _names(tmp_path) == ["checkpoint-1"]
    assert checkpoint.broken(tmp_path / "checkpoint-1") is None


def test_a_broken_later_one_does_not_push_out_what_is_whole(tmp_path):
    _save(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    _save(tmp_path, 5, keep=1)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-5"
    _save(tmp_path, 10, keep=1)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-10"
    assert (tmp_path / "checkpoint-10.aside-1").is_dir()


def test_later_ones_are_set_aside_when_a_run_turns_back(tmp_path):
    for step in (2, 4, 6):
        _save(tmp_path, step)
    checkpoint.set_aside_later(tmp_path, 2)
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-4.aside-1", "checkpoint-6.aside-1"]
    _save(tmp_path, 4, value=9)
    assert checkpoint.read(tmp_path / "checkpoint-4").tensors["unet"]["w"][0, 0] == 9


def test_a_deletion_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    _save(tmp_path, 1)

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(checkpoint, "_delete", refuse)
    _save(tmp_path, 2, keep=1)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_another_format_is_not_read(tmp_path):
    folder = _save(tmp_path, 1)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    assert checkpoint.broken(folder) == "it has format 2, this version reads 1"


def test_what_a_kill_leaves_is_cleaned(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / ".checkpoint-2.partial").mkdir()
    (tmp_path / ".checkpoint-1.deleted").mkdir()
    (tmp_path / ".git").mkdir()
    checkpoint.clean(tmp_path)
    assert _names(tmp_path) == [".git", "checkpoint-1"]


def test_accelerates_checkpoints_get_a_way_on(tmp_path):
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    (folder / "random_states_0.pkl").touch()
    for call in (lambda: checkpoint.newest(tmp_path), lambda: checkpoint.check(folder)):
        with pytest.raises(
            UsageError, match=r"written by Accelerate.*--unet .*checkpoint-500/unet"
        ):
            call()


def test_a_small_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "run.toml"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert _names(path.parent) == ["run.toml"]
