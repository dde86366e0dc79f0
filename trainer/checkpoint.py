"""Checkpoints that are whole or not there: written beside, hashed, synced to disk, then renamed.

    checkpoint-500/
      unet.safetensors  optimizer.safetensors  ema.safetensors   {name: tensor}, fp32
      state.json        step, global batch, loss scale, settings, versions
      manifest.json     size and SHA-256 of each file above

Those of a sharded run hold files of each rank instead: see sharded_checkpoint.py. A kill at any
moment leaves the older checkpoints as they were and at most a hidden folder, which the next start
removes. Nothing is pickled.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UsageError
from .files import cannot_write, differs, fingerprint, sync

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
HIDDEN = re.compile(r"\.checkpoint-[0-9]+\.(partial|deleted)")
BEST_FILE = "best.json"  # beside the checkpoints; {"step": the one that is never deleted}
ACCELERATE_FILES = ("random_states_0.pkl", "optimizer.bin", "scheduler.bin")


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, dict[str, Tensor]]  # file stem -> name -> tensor, on the CPU
    state: dict[str, Any]


def save(root: Path, step: int, checkpoint: Checkpoint, keep: int | None) -> Path:
    """Writes `checkpoint-{step}` under root, then deletes all but the newest `keep`.

    Raises: UsageError: no space is left, or root cannot be written; older checkpoints still stand.
    """
    final = root / f"checkpoint-{step}"
    if is_there(final):
        return final
    with removed_if_it_fails(final) as partial, disk_errors(final):
        begin(partial)
        for stem, tensors in checkpoint.tensors.items():
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, partial / f"{stem}.safetensors")
        finish(final, step, checkpoint.state, fingerprints(partial, "*.safetensors"))
    delete_older(root, step, keep)
    return final


def is_there(final: Path) -> bool:
    """Whether a checkpoint of this name is there and whole; a broken one is set aside."""
    if not final.exists() and not final.is_symlink():  # which may lead nowhere
        return False
    whole = broken(final) is None
    if not whole:
        final.rename(_free_name(final.with_name(f"{final.name}.aside")))  # for who wants to look
    return whole


@contextmanager
def removed_if_it_fails(final: Path, *, removes: bool = True) -> Iterator[Path]:
    """Gives the hidden folder that becomes `final`."""
    partial = final.with_name(f".{final.name}.partial")
    try:
        yield partial
    except UsageError:
        if removes:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def disk_errors(final: Path) -> Iterator[None]:
    """Raises UsageError: for what a disk refuses inside."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(final, error) from None


def begin(partial: Path) -> None:
    """Makes the hidden folder, empty."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()


def fingerprints(partial: Path, pattern: str) -> dict[str, Any]:
    """Of the files just written, which are on the disk when this returns; all may read them."""
    found = {}
    for path in sorted(partial.glob(pattern)):
        path.chmod(partial.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read
        found[path.name] = fingerprint(path)
        sync(path)
    return found


def finish(final: Path, step: int, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Adds state and manifest to what was written, and gives the folder its name."""
    partial = final.with_name(f".{final.name}.partial")
    (partial / STATE).write_text(json.dumps(state, indent=1))
    files = files | fingerprints(partial, STATE)
    manifest = {"format": FORMAT, "step": step, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (partial / MANIFEST, partial):
        sync(path)
    partial.rename(final)
    sync(final.parent)


def check(folder: Path) -> None:
    """Raises UsageError unless the folder is a checkpoint whose files are as they were written."""
    if not folder.is_dir():
        raise UsageError(f"--resume_from_checkpoint {folder}: there is no such folder")
    if is_accelerate(folder):
        raise UsageError(_accelerate_message(folder))
    reason = broken(folder)
    if reason is not None:
        raise UsageError(f"checkpoint {folder} is not whole: {reason}; resume from another one")


def read(folder: Path) -> Checkpoint:
    """Reads a checkpoint that has been checked."""
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(tensors, read_state(folder))


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what a checkpoint says beside its tensors.

    Raises: UsageError: it does not say its step.
    """
    try:
        state = json.loads((folder / STATE).read_bytes())
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"its step is {state['step']!r}")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder / STATE} cannot be read: {error!r}") from None
    return state


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint under root, and why newer ones were passed over.

    Raises: UsageError: root holds checkpoints of the reference's (Accelerate's) making.
    """
    passed_over = []
    for step in sorted(steps(root), reverse=True):
        folder = root / f"checkpoint-{step}"
        if is_accelerate(folder):
            raise UsageError(_accelerate_message(folder))
        reason = broken(folder) or _misnamed(folder, step)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} is passed over: {reason}")
    return None, passed_over


def broken(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version reads {FORMAT}"
        if STATE not in manifest["files"]:
            return f"{MANIFEST} does not list {STATE}"
        for name, expected in manifest["files"].items():
            difference = differs(folder / name, expected)
            if difference:
                return difference
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def _misnamed(folder: Path, step: int) -> str | None:
    """Why a whole checkpoint is not that of its name."""
    found = read_state(folder)["step"]
    return None if found == step else f"it is of step {found}"


def steps(root: Path) -> list[int]:
    """Steps of the checkpoint folders under root; other names are none of our business."""
    if not root.is_dir():
        return []
    matches = [NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir()]
    return [int(match[1]) for match in matches if match]


def clean(root: Path) -> None:
    """Removes what a killed save or deletion left behind."""
    for path in root.iterdir() if root.is_dir() else ():
        if HIDDEN.fullmatch(path.name):
            _remove(path)


def set_aside_later(root: Path, step: int) -> None:
    """Renames checkpoints of later steps: they are broken, or of a course that is now left."""
    for other in steps(root):
        if other > step:
            folder = root / f"checkpoint-{other}"
            folder.rename(_free_name(root / f"{folder.name}.aside"))


def delete_all(root: Path) -> None:
    """Removes every checkpoint of ours under root, for a run that starts anew."""
    for step in steps(root):
        _delete(root / f"checkpoint-{step}")
    clean(root)


def is_accelerate(folder: Path) -> bool:
    """Whether a folder is a checkpoint of the reference script."""
    return not (folder / MANIFEST).exists() and any(
        (folder / name).exists() for name in ACCELERATE_FILES
    )


def _accelerate_message(folder: Path) -> str:
    return (
        f"{folder} was written by Accelerate, whose state cannot be gone on from: start from its "
        f"weights with --unet {folder / 'unet'} and another --output_dir"
    )


def delete_older(root: Path, step: int, keep: int | None) -> None:
    """Runs only after the new checkpoint is whole; later ones, which are broken, do not count.

    The best one, which --keep_best has named, stays beside them.
    """
    if keep is not None:
        best = best_step(root)
        older = sorted((s for s in steps(root) if s < step and s != best), reverse=True)
        for other in older[keep - 1 :]:
            with suppress(OSError):  # one that cannot be deleted costs space, not the run
                _delete(root / f"checkpoint-{other}")


def best_step(root: Path) -> int | None:
    """What BEST_FILE names; None where there is none."""
    try:
        return json.loads((root / BEST_FILE).read_text())["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _delete(folder: Path) -> None:
    """Renamed first, so that a kill in the middle does not leave a broken checkpoint."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()  # what it leads to is not of this folder
    else:
        shutil.rmtree(path)


def _free_name(path: Path) -> Path:
    number = 1
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")
