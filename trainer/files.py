"""Files that are whole or not there: written beside, synced to disk, then renamed."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import UsageError


def write_text(path: Path, text: str) -> None:
    """Replaces a small file, or leaves the old one: never half of the new one."""
    partial = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file; returns its fingerprint. Raises: UsageError: no space is left."""
    partial = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read
        found = fingerprint(partial)
        put_in_place(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None
    return found


def beside(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Renames a file that was written beside, once it is on the disk."""
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def differs(path: Path, expected: dict[str, Any]) -> str | None:
    """How a file differs from its fingerprint, or None. Raises: OSError: it is missing."""
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes, not {expected['bytes']}"
    if fingerprint(path)["sha256"] != expected["sha256"]:
        return f"{path.name} does not have the hash it was written with"
    return None


def cannot_write(path: Path, error: Exception) -> UsageError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    reason = "no space is left on the disk" if full else str(error)
    return UsageError(f"cannot write {path}: {reason}; what was written before still stands")
