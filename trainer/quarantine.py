"""Rows that could not be trained on: each once in quarantine.jsonl, and not too many of them.

    {"row": 17, "file": "images/0017.png", "reason": "edited_image: there is no such file"}

The file is the run's, also when it goes on; rows that are mended since then still count.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import UsageError
from .files import cannot_write
from .log import QUARANTINE
from .rows import parts_of
from .world import World


class Quarantine:
    """Rank 0 has the file; all ranks make it, and call each method, alike.

    Args:
        folder: --output_dir.
        rows: how many are trained on.
        most: --max_bad_fraction of them may be here.

    Raises: UsageError, on all ranks: the file of before cannot be read.
    """

    def __init__(self, folder: Path, rows: int, most: float, world: World) -> None:
        self._path, self._total, self._most, self._world = folder / QUARANTINE, rows, most, world
        with world.together():
            self._rows = _rows_in(self._path) if world.is_main else set()

    def add(self, errors: Iterable[str]) -> list[str]:
        """Takes what was wrong with samples of any rank; returns what was not known, on rank 0.

        Args:
            errors: as of BadSample.

        Raises: UsageError, on all ranks: the file cannot be written.
        """
        news = []
        with self._world.together():
            for error in errors if self._world.is_main else ():
                row, file, reason = parts_of(error)
                if row not in self._rows:
                    self._rows.add(row)
                    news.append(error)
                    self._append({"row": row, "file": file, "reason": reason})
        return news

    def complaint(self) -> str | None:
        """Why the run must stop, on all ranks alike; None while few rows are bad."""
        if not self._world.highest(len(self._rows) > self._most * self._total):
            return None
        return (
            f"{len(self._rows)} of {self._total} rows cannot be trained on, more than "
            f"--max_bad_fraction {self._most:g}: {self._path} names them; mend the data, or allow "
            "more"
        )

    def _append(self, line: dict) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                end = file.tell()
                file.seek(max(end - 1, 0))
                torn = end > 0 and file.read(1) != b"\n"  # by a kill
                file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise cannot_write(self._path, error) from None


def _rows_in(path: Path) -> set[int]:
    """A last line that a kill has torn is none, and its row is told again."""
    if not path.exists():
        return set()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    rows = set()
    for line in lines:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            rows.add(int(json.loads(line)["row"]))
    return rows
