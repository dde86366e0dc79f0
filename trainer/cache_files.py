"""A cache of encodings on disk: shards that are whole, what each holds, and their hashes.

    DIR/0123456789abcdef/         the first digits of the key's hash
      manifest.json               the key in the clear, shapes, size and SHA-256 of each shard
      pairs-....safetensors       latents [pairs, mirrors, crops, 3, 4, h, w]: mean, std, condition;
                                  pairs of one bucket
                                  unit [pairs, 2] int64: row, and which of its pairs
                                  size_ids [pairs, mirrors, crops, 6] fp32
                                  tokens [pairs, length] int32, digest [pairs, 16] uint8: its text
      texts-....safetensors       text [n, tokens, width], pooled [n, pooled], digest [n, 16] uint8
      pairs-....json              the same of a shard that the manifest does not list yet

A shard counts once its line in a JSON file says so, which is written after it. So a kill at any
moment leaves what was there, and the next build makes what is wanting. A shard holds any rows: one
cache serves every choice of rows, and grows by those that it lacks.
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .buckets import Size
from .config import DataConfig
from .errors import UsageError
from .families import SIZE_IDS, text_widths
from .files import cannot_write, differs, write_tensors, write_text
from .pretrained import Described

MANIFEST = "manifest.json"
SHARD = re.compile(r"(pairs|texts)-[0-9a-f]{16}\.safetensors")
BAD_PAIR = re.compile(r"\d{1,12} \d{1,7}")  # row and pair
Kind = Literal["pairs", "texts"]


class Shape(NamedTuple):
    """What a cache keeps of each pair and text."""

    mirrors: int  # 1, or 2: as it is, then mirrored
    crops: int
    latents: tuple[tuple[int, ...], ...]  # [channels, height, width] of each bucket
    text: tuple[int, ...]  # [tokens, width]
    pooled: int  # width; 0 where the UNet takes none
    dtype: torch.dtype

    @property
    def variants(self) -> int:
        return self.mirrors * self.crops

    def latents_shape(self, bucket: int) -> tuple[int, ...]:
        """Of one pair: [mirrors, crops, 3, channels, height, width]."""
        return self.mirrors, self.crops, 3, *self.latents[bucket]

    @property
    def pair_bytes(self) -> int:
        """At most."""
        largest = max(torch.Size(latent).numel() for latent in self.latents)
        return self.variants * (3 * largest * self.dtype.itemsize + SIZE_IDS * 4)

    @property
    def text_bytes(self) -> int:
        return (torch.Size(self.text).numel() + self.pooled) * self.dtype.itemsize


def shape_of(
    section: DataConfig, sizes: Sequence[Size], described: Described, dtype: torch.dtype
) -> Shape:
    """What a run's cache keeps of pairs of these sizes."""
    factor, channels = described.vae_factor, described.vae.get("latent_channels", 4)
    states, pooled = text_widths(described.unet)
    return Shape(
        mirrors=2 if section.random_flip else 1,
        crops=section.cache_crops or 1,
        latents=tuple((channels, at.height // factor, at.width // factor) for at in sizes),
        text=(described.tokens, states),
        pooled=pooled,
        dtype=dtype,
    )


class CacheFolder:
    """The files of one cache.

    Args:
        folder: of this key alone; need not exist.
        parts: the key's parts, for the manifest.
    """

    def __init__(self, folder: Path, parts: dict[str, Any], shape: Shape) -> None:
        self.folder, self.parts, self.shape = folder, parts, shape
        self._lock: TextIO | None = None

    def shards(self, kind: Kind | None = None) -> dict[str, dict[str, Any]]:
        """{name: its fingerprint and bad pairs} of the shards that count, in order of names.

        Raises: UsageError: the manifest cannot be read, or is of another key.
        """
        own = {}  # read before the manifest, for another process may be moving them there
        for path in self._own_lines():
            with suppress(FileNotFoundError):
                own |= shards_of({f"{path.stem}.safetensors": _json_in(path)}, path)
        found = self._in_manifest() | own
        return {
            name: facts
            for name, facts in sorted(found.items())
            if name.startswith(kind or "") and (self.folder / name).is_file()
        }

    def write(self, kind: Kind, tensors: dict[str, Tensor], bad: dict[str, str]) -> str:
        """Adds a shard and returns its name.

        Args:
            bad: {"row pair": why it could not be read}.
        """
        of_what = tensors["unit" if kind == "pairs" else "digest"]
        name = f"{kind}-{hashlib.sha256(of_what.numpy().tobytes()).hexdigest()[:16]}.safetensors"
        line = self.line_of(name)
        line.unlink(missing_ok=True)  # of a shard of this name that was damaged
        facts = write_tensors(self.folder / name, tensors)
        write_text(line, json.dumps({**facts, "bad": bad}))
        return name

    def line_of(self, name: str) -> Path:
        """The file that says a shard counts, until the manifest does."""
        return self.folder / f"{Path(name).stem}.json"

    def seal(self) -> None:
        """Writes the manifest of all shards; they need no files of their own then."""
        shards, shape = self.shards(), self.shape
        manifest = {
            "key": self.parts,
            "latents": shape.latents,
            "text": shape.text,
            "pooled": shape.pooled,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "shards": shards,
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        for path in self._own_lines():
            path.unlink()

    def clean(self) -> None:
        """Removes what a killed build left. For who has the lock."""
        counted = self.shards()
        for path in self.folder.glob("*.safetensors"):
            if path.name not in counted:
                path.unlink()
        for path in self.folder.glob(".*.partial"):
            path.unlink()

    def lock(self) -> bool:
        """Whether this process may write now; until it ends, or `unlock`. Others read meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        return True

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check(self, names: Iterable[str]) -> None:
        """Raises UsageError unless these shards are as they were written: reads all of them."""
        shards = self.shards()
        for name in names:
            try:
                reason = differs(self.folder / name, shards[name])
            except OSError as error:
                reason = str(error)
            if reason is not None:
                raise UsageError(
                    f"the cache {self.folder} is damaged: {reason}; delete that file, and the same "
                    "command makes it anew"
                )

    def open(self, name: str, *tensors: str) -> list[Tensor]:
        """Tensors of a shard, memory-mapped."""
        try:
            with safe_open(self.folder / name, "pt") as file:
                return [file.get_tensor(tensor) for tensor in tensors]
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"the cache {self.folder} is damaged: {name}: {error}; delete that file"
            ) from None

    def _in_manifest(self) -> dict[str, dict[str, Any]]:
        path = self.folder / MANIFEST
        if not path.exists():
            return {}
        manifest = _json_in(path)
        try:
            key, shards = manifest["key"], manifest["shards"]
        except (LookupError, TypeError) as error:
            raise UsageError(f"{path} cannot be read ({error}); delete {self.folder}") from None
        if key != self.parts:
            raise UsageError(f"{path} is of another cache; delete {self.folder}")
        return shards_of(shards, path)

    def _own_lines(self) -> list[Path]:
        files = self.folder.glob("*.json")
        return [path for path in files if SHARD.fullmatch(f"{path.stem}.safetensors")]


def shards_of(said: Any, where: Path | str) -> dict[str, dict[str, Any]]:
    """{name: facts} as a file has them, once they are known to be that.

    Args:
        where: the file.

    Raises: UsageError: they are not, or a name is none of a shard's.
    """
    if isinstance(said, dict) and all(map(_is_shard, said, said.values())):
        return said
    raise UsageError(f"{where} does not hold the names and hashes of shards; delete it")


def _is_shard(name: str, facts: Any) -> bool:
    if not (SHARD.fullmatch(name) and isinstance(facts, dict) and type(facts.get("bytes")) is int):
        return False
    bad = facts.get("bad")
    return (
        isinstance(facts.get("sha256"), str)
        and isinstance(bad, dict)
        and all(BAD_PAIR.fullmatch(k) and isinstance(v, str) for k, v in bad.items())
    )


def _json_in(path: Path) -> Any:
    """Raises: FileNotFoundError; UsageError: it holds something else."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete it") from None
