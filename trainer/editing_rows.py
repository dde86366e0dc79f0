"""Which edits a folder or a list asks for; all that can be known of them before a model loads."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from .editing import Settings
from .errors import UsageError
from .images import image_size

WRITTEN = (".png", ".jpg", ".jpeg", ".webp")  # other kinds of images become .png
KEYS = ("image", "instruction", "output", *(field.name for field in fields(Settings)))
MOST_LETTERS = 2400  # of a text, 12 bytes each at most: Exif holds two of them in 64 KiB
MOST_NAME_BYTES = 240  # of 255, with what it is called while it is written
CLIMBS = re.compile(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)")


@dataclass(frozen=True, slots=True)
class Row:
    """An edit that is wanted."""

    place: str  # for messages: the file, or the list's file and line
    image: str  # path or http(s) URL
    instruction: str
    settings: Settings
    output: Path

    def made_by(self, model: str, resolution: int) -> dict[str, Any]:
        """All that decides the edit; neither its batch nor the machine."""
        source = self.image if "://" in self.image else state(Path(self.image))
        own = {"instruction": self.instruction, **asdict(self.settings), "resolution": resolution}
        return {**own, "model": model, "image": source}


class Bad:
    """What is done with a bad row: it stops the command, or is told and left out."""

    def __init__(self, skip: bool, tell: Callable[[str], None]) -> None:
        self.skip, self.tell, self.count = skip, tell, 0

    def __call__(self, message: str) -> None:
        """Raises: UsageError, unless bad rows are skipped."""
        if not self.skip:
            raise UsageError(f"{message}; --on_bad_image skip leaves it out")
        self.count += 1
        self.tell(f"left out: {message}")


# Which rows there are.


def rows_of_folder(
    folder: Path, instruction: str, settings: Settings, out: Path, bad: Bad
) -> list[Row]:
    """All images of a folder and its subfolders, whose names the edits keep; none that is hidden.

    Raises: UsageError: there are none; the edits would lie among the images; one is bad.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"-o {out}: lies in {folder}, whose images are edited; give another")
    kinds = Image.registered_extensions()
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in kinds
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise UsageError(f"{folder}: there is no image in it")
    try:
        check_text("the instruction", instruction)
    except ValueError as error:
        raise UsageError(str(error)) from None
    rows = []
    for path in found:
        output = out / path.relative_to(folder)
        if output.suffix.lower() not in WRITTEN:
            output = output.with_suffix(".png")
        rows.append(Row(str(path), str(path), instruction, settings, output))
    return _sound(rows, bad)


def rows_of_list(path: Path, settings: Settings, out: Path, bad: Bad) -> list[Row]:
    """The lines of a JSONL file; what one of them does not say is as in `settings`.

    Raises: UsageError: there are none; it cannot be read; one is bad.
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            rows.append(_row(place, line, path.parent, settings, out))
        except ValueError as error:
            bad(f"{place}: {error}")
    rows = _sound(rows, bad)
    if not rows:
        raise UsageError(f"{path}: there is no line in it that can be edited")
    return rows


def _row(place: str, line: bytes, folder: Path, settings: Settings, out: Path) -> Row:
    """Raises: ValueError: the line is not as it must be."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is of them
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"it must be an object with {', '.join(KEYS)}")
    unknown = [key for key in told if key not in KEYS]
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r}; there are {', '.join(KEYS)}")
    image, instruction = (_text(told, key) for key in ("image", "instruction"))
    is_url = "://" in image
    name = unquote(urlsplit(image).path) if is_url else image
    output = _text(told, "output") if "output" in told else Path(name).stem + ".png"
    own: dict[str, Any] = {}
    for field in fields(Settings):
        if field.name in told:
            own[field.name] = _number(told, field.name, whole=field.type is int)
    return Row(
        place,
        image if is_url else str(folder / image),
        instruction,
        replace(settings, **own),
        _inside(out, output),
    )


def _text(told: Mapping[str, Any], key: str) -> str:
    return check_text(key, told.get(key))


def check_text(name: str, value: object) -> str:
    """The text itself. Raises: ValueError: it is none, empty, too long, or has half a letter."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text, got {value!r}")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} holds what is no letter: {value[:100]!r}")
    if len(value) > MOST_LETTERS:
        raise ValueError(f"{name} has {len(value)} letters, more than {MOST_LETTERS}")
    return value


def _number(told: Mapping[str, Any], key: str, whole: bool) -> float:
    value = told[key]
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{key} must be a {'whole ' if whole else ''}number, got {value!r}")
    try:
        return value if whole else float(value)
    except OverflowError:
        raise ValueError(f"{key} is too large") from None


def _inside(out: Path, name: str) -> Path:
    """The file of this name in the folder. Raises: ValueError: it is elsewhere, or no image's."""
    path = out / name
    if CLIMBS.search(name) or not path.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"output {name!r} leaves the folder of -o")
    if path.suffix.lower() not in WRITTEN:
        raise ValueError(f'"output" must end in {", ".join(WRITTEN)}, got {name!r}')
    if any(len(part.encode()) > MOST_NAME_BYTES for part in path.parts):
        raise ValueError(f"output {name[:40]!r}... is too long a name")
    return path


def _sound(rows: Iterable[Row], bad: Bad) -> list[Row]:
    """The rows whose image is there, by its header, and whose output no other has."""
    sound, places = [], {}
    for row in rows:
        try:
            if "://" not in row.image:
                image_size(Path(row.image))
        except ValueError as error:
            bad(f"{_told(row)}: {error}")
            continue
        other = places.setdefault(row.output.resolve(), row.place)
        if other != row.place:
            bad(f"{row.place}: its edit would be {row.output}, as that of {other}: rename it")
            continue
        sound.append(row)
    inputs = {Path(row.image).resolve() for row in sound if "://" not in row.image}
    for row in sound:
        if row.output.resolve() in inputs:
            raise UsageError(f"{row.place}: its edit would replace the image {row.output}")
    return sound


def _told(row: Row) -> str:
    return row.place if row.place == row.image else f"{row.place}: {row.image}"


def state(path: Path) -> str:
    """What a file was when it was last changed."""
    try:
        found = path.stat()
    except OSError as error:
        return str(error.strerror)
    return f"{found.st_size} bytes of {found.st_mtime_ns}"
