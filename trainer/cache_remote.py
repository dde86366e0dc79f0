"""A cache at a URL: built to, and mirrored from, shard by shard, by anything that fsspec opens."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from .cache_files import MANIFEST, CacheFolder, shards_of
from .errors import UsageError
from .files import beside, differs, put_in_place, write_text


def is_url(where: str) -> bool:
    return "://" in where


class Remote:
    """The folder of one key at a URL, and its mirror here.

    Args:
        url: of --cache_latents, for instance s3://bucket/caches.
        mirror: the files of this key here; its folder has the key's name.
    """

    def __init__(self, url: str, mirror: CacheFolder) -> None:
        self.url, self.mirror = url, mirror
        with self._blamed():
            self._files, root = fsspec.core.url_to_fs(url)
            self._folder = f"{root.rstrip('/')}/{mirror.folder.name}"

    def shards(self) -> dict[str, dict[str, Any]]:
        """{name: its facts} of the shards that count there."""
        with self._blamed():
            if not self._files.isdir(self._folder):
                return {}
            self._files.invalidate_cache(self._folder)
            names = [Path(path).name for path in self._files.ls(self._folder, detail=False)]
            found: dict[str, dict[str, Any]] = {}
            for name in sorted(name for name in names if name.endswith(".json")):
                said = json.loads(self._files.cat_file(self._at(name)))
                if name == MANIFEST:
                    said = said["shards"]
                else:
                    said = {f"{Path(name).stem}.safetensors": said}
                found |= shards_of(said, self._at(name))
            return {name: facts for name, facts in found.items() if name in names}

    def fetch(self, names: Sequence[str], shards: dict[str, dict[str, Any]]) -> None:
        """Mirrors shards that are not here.

        Raises: UsageError: one does not come as it was written.
        """
        folder = self.mirror.folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            partial = beside(folder / name)
            with self._blamed():
                self._files.get_file(self._at(name), str(partial))
            if differs(partial, shards[name]):
                partial.unlink()
                raise UsageError(
                    f"the cache {self.url} is damaged: {self._at(name)} does not have the size and "
                    "hash it was written with; delete that file, and the same command makes it anew"
                )
            put_in_place(partial, folder / name)
            write_text(self.mirror.line_of(name), json.dumps(shards[name]))

    def send(self, names: Sequence[str]) -> None:
        """Copies shards there, each before the line that makes it count."""
        shards = self.mirror.shards()
        with self._blamed():
            self._files.makedirs(self._folder, exist_ok=True)
            for name in names:
                line = self.mirror.line_of(name).name
                self._files.put_file(str(self.mirror.folder / name), self._at(name))
                self._files.pipe_file(self._at(line), json.dumps(shards[name]).encode())

    def seal(self) -> None:
        """Sends the manifest, and takes back the lines that it now has."""
        with self._blamed():
            self._files.put_file(str(self.mirror.folder / MANIFEST), self._at(MANIFEST))
            for path in self._files.ls(self._folder, detail=False):
                if path.endswith(".json") and Path(path).name != MANIFEST:
                    self._files.rm_file(path)

    def _at(self, name: str) -> str:
        return f"{self._folder}/{name}"

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            if isinstance(error, UsageError):
                raise
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--cache_latents {self.url}: {reason}") from error
