"""The run's log: log.jsonl always, the trackers asked for, and a progress line."""

import errno
import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from .callbacks import Callbacks
from .files import cannot_write, write_text
from .trackers import Tracker, open_tracker

LOG_FILE = "log.jsonl"
HISTORY_FILE = "history.jsonl"  # when the run was started, stopped and done, and with what
AUDIT_FILE = "audit.jsonl"  # see audit.py
PICTURES = "validation"  # folder of the sheets of edits, by step
QUARANTINE = "quarantine.jsonl"  # see quarantine.py
PART_BYTES = 2**24  # of a log, then it begins another file
IDENTITIES_FILE = "trackers.json"  # what each tracker calls this run, to go on with it


class RunLog:
    """Rank 0's log. Other ranks take `RunLog.silent()`, which has the same methods."""

    def __init__(
        self,
        folder: Path,
        logging_dir: str,
        trackers: tuple[str, ...],
        settings: dict[str, Any],
        run_name: str,
        total_steps: int,
        first_step: int,
        callbacks: Callbacks,
    ):
        """Starts the log, or goes on with one.

        Args:
            folder: the run's output folder; made if missing.
            logging_dir: folder inside it for the trackers' files.
            trackers: names, checked before by `check_trackers`.
            settings: shown by trackers as the configuration; holds no secret.
            first_step: optimizer steps done before. Lines of later steps are dropped: they were
                written by a run that was killed after its last checkpoint.
            callbacks: told all that trackers are told.
        """
        self._lines = Lines(folder / LOG_FILE, first_step)
        self._history = Lines(folder / HISTORY_FILE, first_step)
        identities = folder / IDENTITIES_FILE
        known = json.loads(identities.read_text()) if first_step and identities.exists() else {}
        self._trackers: dict[str, Tracker] = {
            name: open_tracker(
                name,
                folder=folder / logging_dir,
                settings=settings,
                run_name=run_name,
                first_step=first_step,
                identity=known.get(name),
            )
            for name in trackers
        }
        known.update({name: tracker.identity for name, tracker in self._trackers.items()})
        write_text(identities, json.dumps(known))
        self._trackers["callbacks"] = callbacks
        self._progress = Progress(total_steps, first_step)

    @staticmethod
    def silent() -> "RunLog":
        """A log that writes nothing."""
        return _SilentLog()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of log.jsonl and sends the values to the trackers.

        In log.jsonl a value that is not finite is null, for JSON has no other.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write({"step": step, "time": round(time.time(), 3), **finite})
        for tracker in self._trackers.values():
            tracker.scalars(step, values)

    def event(self, step: int, name: str, text: str) -> None:
        """Prints a line and keeps it in log.jsonl, under `event` and `told`."""
        self.note(text)
        self._write({"step": step, "time": round(time.time(), 3), "event": name, "told": text})

    def history(self, step: int, what: str, facts: dict[str, Any]) -> None:
        """Keeps a start or an end of the run: started, stopped or done."""
        line = {"step": step, "time": round(time.time(), 3), "what": what, **facts}
        if reason := self._history.add(line):
            self.note(f"WARNING: {reason}")

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Shows how far the run is, with these values, in the terminal or as a line of text."""
        self._progress.show(step, values)

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        """Sends a picture to the trackers; files on disk are the caller's."""
        for tracker in self._trackers.values():
            tracker.image(step, name, image, caption)

    def note(self, text: str) -> None:
        """Prints a line above the progress line."""
        tqdm.write(text, file=sys.stderr)

    def _write(self, line: dict[str, Any]) -> None:
        reason = self._lines.add(line)
        if reason:
            self.note(f"WARNING: {reason}")

    def close(self) -> None:
        """Ends the progress line, the trackers' runs and the file."""
        self._progress.close()
        for tracker in self._trackers.values():
            tracker.close()
        self._lines.close()
        self._history.close()


class _SilentLog(RunLog):
    def __init__(self):
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        pass

    def event(self, step: int, name: str, text: str) -> None:
        pass

    def history(self, step: int, what: str, facts: dict[str, Any]) -> None:
        pass

    def progress(self, step: int, values: dict[str, float]) -> None:
        pass

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


PHASES = {  # of the loop, whose seconds a line tells
    "update": "encoding, steps and the log",
    "data": "waiting for samples, and for the other ranks'",
    "validation": "validation and evaluation",
    "checkpoint": "holding for its copy",
    "export": "writing the pipeline, and sending it",
}
SHOWN = {  # what the progress line tells, and how
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "gradient norm {:.3f}",
    "images_per_second": "{:.3g} images/s",
    "pairs_per_second": "{:.3g} pairs/s",
    "memory_gib": "{:.2f} GiB",
}


class Progress:
    """A live bar where stderr is a terminal, else one plain line at each call."""

    def __init__(self, total_steps: int, first_step: int, unit: str = "step"):
        self._total_steps, self._unit = total_steps, unit
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit=unit, smoothing=0.1)
        self._timed_from: tuple[int, float] | None = None  # step, seconds

    def show(self, step: int, values: dict[str, float]) -> None:
        text = "  ".join(
            form.format(values[name]) for name, form in SHOWN.items() if name in values
        )
        if values.get("skipped_steps"):
            text += f"  skipped {values['skipped_steps']:.0f} steps"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        else:
            left = f"  {self._time_left(step)}"
            at = f"{self._unit} {step}/{self._total_steps}"
            print(f"{at}  {text}{left}".rstrip(), file=sys.stderr)

    def _time_left(self, step: int) -> str:
        """From the speed since the first call: what came before it was start-up and compiling."""
        now = time.monotonic()
        if self._timed_from is None or step <= self._timed_from[0]:
            self._timed_from = step, now
            return ""
        seconds_a_step = (now - self._timed_from[1]) / (step - self._timed_from[0])
        return f"left {tqdm.format_interval((self._total_steps - step) * seconds_a_step)}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Lines:
    """A file of JSON lines that grows, in parts: log-1.jsonl, log-2.jsonl, ..., and log.jsonl.

    A line is there whole or not at all. What a full disk refuses waits for the next line.
    """

    def __init__(self, path: Path, first_step: int, part_bytes: int = PART_BYTES) -> None:
        """Begins the file, or goes on with it after its lines of steps up to first_step.

        Raises: UsageError: it cannot be written.
        """
        self._path, self._part_bytes = path, part_bytes
        self._waiting = b""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_lines_after(path, first_step)
            self._open()
        except OSError as error:
            raise cannot_write(path, error) from None

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)
        self._bytes = self._path.stat().st_size

    def add(self, line: dict[str, Any]) -> str:
        """Writes a line; returns why it could not, or nothing."""
        self._waiting += json.dumps(line).encode() + b"\n"
        try:
            if self._file.write(self._waiting) < len(self._waiting):  # the disk is full now
                os.ftruncate(self._file.fileno(), self._bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._bytes += len(self._waiting)
            self._waiting = b""
            if self._bytes >= self._part_bytes:
                self._file.close()
                parts = parts_of(self._path)
                number = _number(parts[-2]) + 1 if len(parts) > 1 else 1
                self._path.rename(_part(self._path, number))
                self._open()
        except OSError as error:
            return f"{self._path} cannot be written: {error.strerror}; its lines wait"
        return ""

    def close(self) -> None:
        self._file.close()


def parts_of(path: Path) -> list[Path]:
    """All files of such a log, in order; the one that grows is the last."""
    found = [one for one in path.parent.glob(f"{path.stem}-*{path.suffix}") if _number(one)]
    return [*sorted(found, key=_number), path]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of such a log."""
    found = []
    for part in parts_of(path):
        found += [line for line in map(_parsed, _lines_of(part)) if line is not None]
    return found


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrites a log without the lines of later steps and without a torn last line.

    At step 0 nothing is kept: the run begins anew.
    """
    for part in parts_of(path):
        lines = [(line, _parsed(line)) for line in _lines_of(part)]
        kept = [f"{line}\n" for line, read in lines if step and read and read["step"] <= step]
        if part != path and not kept:
            part.unlink()
        elif part.exists():
            write_text(part, "".join(kept))


def _lines_of(part: Path) -> list[str]:
    """None where it is not there, or has just got another name."""
    try:
        return part.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _parsed(line: str) -> dict[str, Any] | None:
    """A line, or None for one that is torn."""
    try:
        read = json.loads(line)
    except json.JSONDecodeError:
        return None
    return read if isinstance(read, dict) and "step" in read else None


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _number(path: Path) -> int:
    """Of a part; 0 for another file."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: allocated on a GPU, resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak may be that of the process which started this one
        (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(peak) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS: bytes
