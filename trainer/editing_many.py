"""The edits of a folder or a list: in batches, each written once, and what made it remembered.

An edit carries what made it in its Exif description, so no second file can disagree with it: one
that is there is kept if all of that is the same, and refused if anything differs.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image
from tqdm import tqdm

from .editing import Editor, save_image, without_seed
from .editing_rows import Bad, Row, state
from .errors import UsageError
from .export import PARTS, RAW_UNET
from .files import cannot_write
from .images import DECODE_ERRORS
from .sample import open_image

QUALITY = {"quality": 95}  # of JPEG and WebP; PNG has none
WAIT = 8  # batches' worth of images that may wait for others of their size and settings
READERS = 4  # threads that read and write images, which let go of the interpreter


class Done(NamedTuple):
    """What became of the rows."""

    written: int
    kept: int
    skipped: int


# Which edits are there.


def identity(model: str) -> str:
    """A model's name, and of a folder what its files were when they were last changed."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    parts = [part for part in PARTS if part != RAW_UNET]
    files = [path for part in parts for path in sorted((folder / part).glob("*"))]
    states = "".join(f"{path.relative_to(folder)} {state(path)}\n" for path in files)
    return f"{folder.resolve().name}@{hashlib.sha256(states.encode()).hexdigest()[:16]}"


def still_to_do(rows: Iterable[Row], model: str, resolution: int, overwrite: bool) -> list[Row]:
    """The rows without an edit. Raises: UsageError: one is there that was made otherwise."""
    missing = []
    for row in rows:
        if overwrite or not row.output.exists():
            missing.append(row)
            continue
        differs = _differs(row.output, row.made_by(model, resolution))
        if differs:
            raise UsageError(
                f"-o: {row.output} is there already, {differs}; give another folder, or --overwrite"
            )
    return missing


def _differs(path: Path, made_by: Mapping[str, Any]) -> str:
    """In what an edit was made otherwise; empty: in nothing."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.getexif().get(ExifTags.Base.ImageDescription, ""))
    except (*DECODE_ERRORS, RecursionError):
        found = None
    if not isinstance(found, dict):
        return "and `fusedit edit` did not write it"
    names = [name for name in made_by if found.get(name) != made_by[name]]
    return f"made with another {' and '.join(names)}" if names else ""


def _described(made_by: Mapping[str, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(made_by)  # ASCII, as Exif has it
    exif[ExifTags.Base.Software] = "fusedit"
    return exif


# The edits.


def edit_rows(editor: Editor, rows: list[Row], kept: int, model: str, bad: Bad) -> Done:
    """Edits the rows, images of one size and settings together, and writes each when it is made.

    Args:
        kept: edits that are there already.

    Raises: UsageError: an image cannot be read, and bad ones are not skipped; memory or disk end.
    """
    written = 0
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(rows) + kept, initial=kept, unit="edit", disable=None) as bar,
    ):
        writing: list[Future[None]] = []
        read = _read_ahead(pool, editor, rows, bad, bar)
        for batch in _batches(read, editor.batch_size):
            first = batch[0][0].settings
            edits = editor.edit(
                [image for _, image in batch],
                [row.instruction for row, _ in batch],
                first,
                [row.settings.seed for row, _ in batch],
            )
            for done in writing:
                done.result()
            writing = [
                pool.submit(_write, edit, row, row.made_by(model, editor.resolution))
                for edit, (row, _) in zip(edits, batch, strict=True)
            ]
            written += len(batch)
            bar.update(len(batch))
        for done in writing:
            done.result()
    return Done(written, kept, bad.count)


def _write(edit: Image.Image, row: Row, made_by: Mapping[str, Any]) -> None:
    try:
        row.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(row.output, error) from None
    quality = {} if row.output.suffix.lower() == ".png" else QUALITY
    save_image(edit, row.output, exif=_described(made_by), **quality)


def _read_ahead(
    pool: ThreadPoolExecutor, editor: Editor, rows: Iterable[Row], bad: Bad, bar: Any
) -> Iterator[tuple[Row, Image.Image]]:
    """Rows and their images, as they are edited; a batch more is read while one is edited."""
    waiting: deque[tuple[Row, Future[Image.Image]]] = deque()
    todo = iter(rows)
    while True:
        while len(waiting) < 2 * editor.batch_size and (row := next(todo, None)) is not None:
            waiting.append((row, pool.submit(lambda at: editor.fitted(open_image(at)), row.image)))
        if not waiting:
            return
        row, image = waiting.popleft()
        try:
            found = image.result()
        except UsageError as error:
            bar.update()
            bad(str(error) if row.place == row.image else f"{row.place}: {error}")
        else:
            yield row, found


def _batches(
    read: Iterable[tuple[Row, Image.Image]], most: int
) -> Iterator[list[tuple[Row, Image.Image]]]:
    """Of one size, and of settings that differ in the seed alone; in the order they fill in.

    What waits for its like is bounded: the first to have waited goes with fewer then.
    """
    filling: dict[Any, list[tuple[Row, Image.Image]]] = {}
    for row, image in read:
        key = image.size, without_seed(row.settings)
        batch = filling.setdefault(key, [])
        batch.append((row, image))
        if len(batch) == most:
            yield filling.pop(key)
        elif sum(map(len, filling.values())) >= WAIT * most:
            yield filling.pop(next(iter(filling)))
    yield from filling.values()
