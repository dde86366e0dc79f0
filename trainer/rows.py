"""Where edit pairs come from: a folder in one of four layouts, or a dataset on the hub.

A row is one pair and its instruction. Images are decoded here and not by `datasets`, so that one
unreadable image is one bad row, told by its name.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import datasets
import huggingface_hub
import numpy as np
from datasets import config
from datasets.exceptions import DatasetGenerationError, DatasetsError
from PIL import Image

from .config import DataConfig
from .errors import UsageError, one_line
from .images import Files

Found = TypeVar("Found")

METADATA_READERS: dict[str, tuple[str, dict[str, Any]]] = {  # builder of `datasets`, its options
    "metadata.jsonl": ("json", {}),
    "metadata.csv": ("csv", {"keep_default_na": False}),  # "None" or "" is an instruction too
    "metadata.parquet": ("parquet", {}),
}
LEAVES_FOLDER = r"^/|(^|/)\.\.(/|$)"  # a path that is absolute or climbs
PAPER_CAPTIONS = {"original_prompt": "input", "edited_prompt": "output"}  # of prompt.json
HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?"  # name or owner/name
BAD_SAMPLE = re.compile(r"row (\d+)(?: \((.*?)\))?: (.*)")  # as its str(): row, file, reason


class BadSample(Exception):
    """A row that cannot be trained on: its name, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)

    def __str__(self) -> str:
        return one_line(": ".join(self.args))


def parts_of(error: str) -> tuple[int, str | None, str]:
    """Row, file and reason of what BadSample said. Raises: ValueError: it is none of it."""
    found = BAD_SAMPLE.fullmatch(error)
    if found is None:
        raise ValueError(f"{error!r} does not begin with a row")
    return int(found[1]), found[2], found[3]


class Rows(Protocol):
    """The pairs of a dataset, by row number. Picklable, for the workers of a loader."""

    def __len__(self) -> int: ...

    def pairs(self, row: int) -> int:
        """How many pairs `read` chooses from: the one of number int(draw x pairs)."""
        ...

    def fingerprint(self) -> str:
        """Changes with the rows, their order, their texts and, by size and time, image files."""
        ...

    def column(self, name: str) -> list[Any] | None:
        """What a column that is no image says of each row; None where there is none."""
        ...

    def name(self, row: int) -> str:
        """The row in messages, for instance "row 17 (images/0017.png)"."""
        ...

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of the original, upright; of the first where a row has several.

        Raises: BadSample: it is missing or not an image.
        """
        ...

    def read(self, row: int, draw: float) -> tuple[Image.Image, Image.Image, str]:
        """Original, edited, instruction; both images RGB and upright.

        Args:
            draw: uniform in [0, 1), chooses where a row has several pairs.

        Raises: BadSample: an image is missing, truncated or unreadable, or the instruction is.
        """
        ...


class TableRows:
    """Rows of a `datasets` table, whose images are bytes or files, or paths inside a folder."""

    def __init__(
        self,
        table: datasets.Dataset,
        section: DataConfig,
        where: str,
        folder: Path | None,
        cache_dir: str | None = None,
    ) -> None:
        if len(table) == 0:
            raise UsageError(f"{where} has no rows in --dataset_split {section.dataset_split}")
        self._folder = folder or Path()  # of what came from the hub, paths are absolute
        self._files = Files(section, [folder] if folder else _downloads(cache_dir))
        self._original = _image_column(table, section, "original_image_column", where, folder)
        self._edited = _image_column(table, section, "edited_image_column", where, folder)
        self._prompt = _column(table, section, "edit_prompt_column", where)
        table = self._whole = table.with_format(None)
        # Each once, in an order that is not a set's: it is part of the table's fingerprint.
        columns = dict.fromkeys((self._original, self._edited, self._prompt))
        table = table.select_columns([*columns])
        for column in (self._original, self._edited):
            if not _holds_text(table, column):
                table = table.cast_column(column, datasets.Image(decode=False))
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def pairs(self, row: int) -> int:
        return 1

    def fingerprint(self) -> str:
        columns = [self._original, self._edited, self._prompt]
        files = [column for column in columns[:2] if _holds_text(self._table, column)]
        facts: list[Any] = [columns, len(self)]
        if len(files) < 2:
            # Images that `datasets` holds are known by its own hash, of files or the hub's commit.
            facts.append(self._table._fingerprint)
        for column in files:
            paths = self._table.data.column(column).to_pylist()
            facts += [(path, path and _state(self._folder / path)) for path in paths]
        facts += self._table.data.column(self._prompt).to_pylist()
        return _hash(facts)

    def column(self, name: str) -> list[Any] | None:
        if not isinstance(self._whole.features.get(name), datasets.Value):
            return None
        return [*self._whole[name]]

    def name(self, row: int) -> str:
        _, path = _bytes_and_path(self._table[row][self._original])
        return self._name(row, path)

    def read(self, row: int, draw: float) -> tuple[Image.Image, Image.Image, str]:
        record = self._record(row)
        original = self._opened(row, record, self._original, self._files.load)
        edited = self._opened(row, record, self._edited, self._files.load)
        try:
            return original, edited, _text(record[self._prompt])
        except ValueError as error:
            raise BadSample(self.name(row), f"{self._prompt} {error}") from None

    def _record(self, row: int) -> dict[str, Any]:
        try:
            return self._table[row]
        except (OSError, ValueError) as error:  # pyarrow's too are of these
            raise BadSample(f"row {row}", f"it cannot be read from its table: {error}") from None

    def _name(self, row: int, path: str | None) -> str:
        if path is None:
            return f"row {row}"
        inside = Path(path).is_relative_to(self._folder)
        return f"row {row} ({Path(path).relative_to(self._folder) if inside else path})"

    def size(self, row: int) -> tuple[int, int]:
        return self._opened(row, self._record(row), self._original, self._files.size)

    def _opened(
        self,
        row: int,
        record: dict[str, Any],
        column: str,
        open_it: Callable[[bytes | Path], Found],
    ) -> Found:
        encoded, path = _bytes_and_path(record[column])
        if encoded is None and path is None:
            raise BadSample(self.name(row), f"{column} is empty")
        try:
            return open_it(self._folder / cast(str, path) if encoded is None else encoded)
        except ValueError as error:
            raise BadSample(self._name(row, path), f"{column}: {error}") from error


def _bytes_and_path(value: str | dict[str, Any] | None) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        return value["bytes"], value["path"]
    return None, value


def _column(table: datasets.Dataset, section: DataConfig, flag: str, where: str) -> str:
    column = getattr(section, flag)
    if column not in table.column_names:
        there = ", ".join(table.column_names)
        raise UsageError(f"{where} has no column {column}, set --{flag}; there: {there}")
    return column


def _image_column(
    table: datasets.Dataset, section: DataConfig, flag: str, where: str, folder: Path | None
) -> str:
    """The column that the flag names, or of its file names, once it is known to hold images."""
    named = getattr(section, flag)
    # `datasets` makes image of file_name, and x of x_file_name.
    column = "file_name" if named == "image" else f"{named}_file_name"
    if column not in table.column_names or named in table.column_names:
        column = _column(table, section, flag, where)
    kind = table.features[column]
    if _holds_text(table, column) and folder is not None:
        for row, path in enumerate(table.data.column(column).to_pylist()):
            if path is not None and re.search(LEAVES_FOLDER, path):
                raise UsageError(
                    f"{where}: {column} of row {row} leaves the folder: {path}; "
                    f"make its paths relative to {folder}"
                )
    elif not isinstance(kind, datasets.Image) and not (isinstance(kind, dict) and "bytes" in kind):
        raise UsageError(f"{where}: column {column} (--{flag}) holds {kind}, not images")
    return column


def _holds_text(table: datasets.Dataset, column: str) -> bool:
    return getattr(table.features[column], "dtype", None) in ("string", "large_string")


class PaperRows:
    """The paper's layout: a row is a prompt, and each visit takes one of its seeds.

    seeds.json is [[name, [seed, ...]], ...]; {name}/{seed}_0.jpg is the image before the edit and
    {seed}_1.jpg after it; {name}/prompt.json has the instruction under "edit".

    Source: timothybrooks/instruct-pix2pix, edit_dataset.py.
    """

    def __init__(self, folder: Path, where: str, section: DataConfig) -> None:
        self._folder, self._files = folder, Files(section, [folder])
        try:
            entries = json.loads((folder / "seeds.json").read_bytes())
            names = [name for name, _ in entries]
            seeds = [[str(seed) for seed in its_seeds] for _, its_seeds in entries]
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{where}: seeds.json must be [[name, [seed, ...]], ...]: {error}"
            ) from None
        if not entries:
            raise UsageError(f"{where} has no rows in seeds.json")
        for row, (name, its_seeds) in enumerate(zip(names, seeds, strict=True)):
            if not isinstance(name, str) or not its_seeds:
                raise UsageError(f"{where}: seeds.json: row {row} lacks a name or its seeds")
            if any(re.search(LEAVES_FOLDER, part) for part in (name, *its_seeds)):
                raise UsageError(f"{where}: seeds.json: row {row} leaves the folder: {name}")
        # Flat arrays: a million small Python strings would cost each worker 100 MB.
        self._names = np.array(names)
        self._seeds = np.array([seed for its_seeds in seeds for seed in its_seeds])
        self._starts = np.cumsum([0, *map(len, seeds)])  # row r: seeds[starts[r] : starts[r + 1]]

    def __len__(self) -> int:
        return len(self._names)

    def pairs(self, row: int) -> int:
        return int(self._starts[row + 1] - self._starts[row])

    def fingerprint(self) -> str:
        return _hash(self._facts(row) for row in range(len(self)))

    def _facts(self, row: int) -> list[Any]:
        folder, seeds = self._folder / self._names[row], self._seeds[slice(*self._starts[row:][:2])]
        files = ["prompt.json", *(f"{seed}_{end}.jpg" for seed in seeds for end in (0, 1))]
        return [str(self._names[row]), *([file, _state(folder / file)] for file in files)]

    def column(self, name: str) -> list[Any] | None:
        """An entry of each prompt.json, by its name or that in the dataset's copy on the hub."""
        key = PAPER_CAPTIONS.get(name, name)
        try:
            return [
                json.loads((self._folder / folder / "prompt.json").read_bytes())[key]
                for folder in self._names
            ]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def name(self, row: int) -> str:
        return f"row {row} ({self._names[row]})"

    def read(self, row: int, draw: float) -> tuple[Image.Image, Image.Image, str]:
        start, end = self._starts[row : row + 2]
        seed = self._seeds[start + int(draw * (end - start))]
        try:
            described = self._files.inside(self._folder / self._names[row] / "prompt.json")
            prompt = json.loads(described.read_bytes())["edit"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise BadSample(self.name(row), f'prompt.json gives no "edit": {error!r}') from error
        try:
            prompt = _text(prompt)
        except ValueError as error:
            raise BadSample(self.name(row), f'"edit" in prompt.json {error}') from None
        original, edited = (
            self._opened(row, f"{seed}_{end}.jpg", self._files.load) for end in (0, 1)
        )
        return original, edited, prompt

    def size(self, row: int) -> tuple[int, int]:
        return self._opened(row, f"{self._seeds[self._starts[row]]}_0.jpg", self._files.size)

    def _opened(self, row: int, file: str, open_it: Callable[[Path], Found]) -> Found:
        path = f"{self._names[row]}/{file}"
        try:
            return open_it(self._folder / path)
        except ValueError as error:
            raise BadSample(f"row {row} ({path})", str(error)) from error


def _downloads(cache_dir: str | None) -> list[Path]:
    """Where the files of a dataset from the hub lie."""
    own = [config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH]
    hub = huggingface_hub.constants.HF_HUB_CACHE
    return [Path(at) for at in (*own, hub, cache_dir) if at is not None]


def _text(value: Any) -> str:
    """An instruction as it was found, if that is what it is. Raises: ValueError: it is none."""
    if not isinstance(value, str):
        raise ValueError(f"is {value!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"is {value[:100]!r}, which holds half a character") from None
    return value


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file; None where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name may hold what none can
        return None
    return found.st_size, found.st_mtime_ns


def _hash(facts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact, default=str).encode() + b"\n")
    return digest.hexdigest()


def open_rows(section: DataConfig, cache_dir: str | None = None) -> Rows:
    """The rows of --dataset_name, else of --train_data_dir. No image is read yet.

    A folder is, by what is in it: the paper's layout, `save_to_disk`, images with a metadata file,
    or anything else that `datasets.load_dataset` takes (parquet, arrow). A name is one on the hub.

    Args:
        cache_dir: where `datasets` keeps downloads and its Arrow files.

    Raises: UsageError: no such dataset, split or column; no rows; a broken index; a path that
        leaves the folder.
    """
    source = section.train_data_dir if section.dataset_name is None else section.dataset_name
    if source is None:
        raise UsageError("--dataset_name or --train_data_dir is missing")
    flag = "train_data_dir" if section.dataset_name is None else "dataset_name"
    where = f"--{flag} {source}"
    folder = Path(source).expanduser()
    whole = {"name": section.dataset_config_name, "split": section.dataset_split}

    if not folder.is_dir():
        if flag == "train_data_dir" or folder.exists() or not re.fullmatch(HUB_NAME, source):
            raise UsageError(f"{where} is not a folder")
        where += " (not a folder here)"
        table = _load(where, cache_dir, source, **whole)
        return TableRows(table, section, where, None, cache_dir)

    if (folder / "seeds.json").is_file():
        return PaperRows(_split({"train": folder}, section, where), where, section)

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with _blamed_on(where):
            saved = datasets.load_from_disk(str(folder))
        splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return TableRows(_split(splits, section, where), section, where, folder)

    if indexes := _indexes(folder):
        index = _split(indexes, section, where)
        reader, options = METADATA_READERS[index.name]
        options = {"data_files": str(index), "split": "train", **options}
        table = _load(f"{where}, {index.name}", cache_dir, reader, **options)
        return TableRows(table, section, where, index.parent)

    return TableRows(_load(where, cache_dir, str(folder), **whole), section, where, folder)


def _split(splits: Mapping[Any, Found], section: DataConfig, where: str) -> Found:
    if section.dataset_split not in splits:
        there = ", ".join(map(str, splits))
        raise UsageError(f"{where} has no --dataset_split {section.dataset_split}; there: {there}")
    return splits[section.dataset_split]


def _indexes(folder: Path) -> dict[str, Path]:
    """{split: metadata file}: the folder's own is "train", otherwise subfolders are splits."""
    places = {"train": folder} if _index(folder) else {at.name: at for at in folder.iterdir()}
    return {split: index for split, place in places.items() if (index := _index(place))}


def _index(folder: Path) -> Path | None:
    files = (folder / name for name in METADATA_READERS)
    return next((file for file in files if file.is_file()), None)


def _load(where: str, cache_dir: str | None, path: str, **options: Any) -> datasets.Dataset:
    with _blamed_on(where):
        table = datasets.load_dataset(path, cache_dir=cache_dir, **options)
    return cast(datasets.Dataset, table)


@contextmanager
def _blamed_on(where: str) -> Iterator[None]:
    """What `datasets` raises for a network, a split or a broken file is told as the user's."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        reason = str(cause or error).strip().partition("\n")[0]
        raise UsageError(f"{where}: {reason}") from error
    except (IndexError, StopIteration) as error:  # an empty saved table, an empty metadata.jsonl
        raise UsageError(f"{where} has no rows") from error
