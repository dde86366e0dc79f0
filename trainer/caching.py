"""The cache of a run: found by its key, filled with what is wanting, checked, and opened."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .alike import check_alike
from .cache import CachedPairs
from .cache_build import Build, missing_texts, missing_units, wanted_units
from .cache_files import CacheFolder, shape_of
from .cache_key import key_of, key_parts
from .cache_remote import Remote, is_url
from .config import RunConfig
from .data import Order, make_tokenize
from .encoders import Encoders
from .errors import UsageError
from .log import Progress
from .plan import Plan, make_plan, set_numerics
from .pretrained import load_encoders
from .world import World

TOLD_EVERY_S = 10.0  # between two lines of progress
LOCK_EVERY_S = 1.0  # between two looks whether another run has ended its build
UNITS = ("B", "kB", "MB", "GB", "TB")


def build_cache(
    config: RunConfig,
    world: World,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> bool:
    """Encodes what --cache_latents lacks for a run of these settings; trains nothing.

    Args:
        dry_run: says what is wanting, and writes nothing.

    Returns: whether it came to its end, not stopped before.

    Raises: UsageError, on all ranks alike.
    """
    config.check_complete()
    # What another run left in --output_dir does not matter, and is not touched.
    output = dataclasses.replace(config.output, overwrite=True, resume_from_checkpoint=None)
    with world.together():
        plan = make_plan(dataclasses.replace(config, output=output), world)
        if plan.config.data.cache_latents is None:
            raise UsageError("--cache_latents is missing: the folder or URL to write the cache to")
    check_alike(plan, world)
    set_numerics(plan.config.precision)
    return open_cache(plan, world, stop_requested, dry_run=dry_run) is not None or dry_run


def open_cache(
    plan: Plan,
    world: World,
    stop_requested: Callable[[], bool],
    *,
    dry_run: bool = False,
) -> CachedPairs | None:
    """The samples of a run from --cache_latents, once what is wanting there has been encoded.

    Args:
        stop_requested: asked after each round of shards.
        dry_run: says what is wanting, and writes nothing.

    Returns: None, if it was stopped before the end, or for a dry run.

    Raises: UsageError, on all ranks alike.
    """
    filling = Filling(plan, world)
    filling.find()
    if filling.remote is not None:
        filling.mirror(filling.remote, dry_run)
    filling.check()
    whole = filling.look()
    if dry_run or not (whole or filling.fill(stop_requested)):
        return None
    filling.free_encoders()
    with world.together():
        seed, mirrors = plan.config.loop.seed, plan.config.data.random_flip
        order = Order(plan.train_rows, seed, plan.global_batch, plan.buckets.of_row)
        pairs = CachedPairs(filling.cache, order, seed, mirrors, filling.null_tokens)
    return pairs


class Filling:
    """What is done with a cache before it is trained from; all ranks call each method.

    Raises: UsageError, on all ranks alike.
    """

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan, self.world, self.data = plan, world, plan.config.data
        self.tokenize = make_tokenize(plan.described.tokenizers)
        self.null_tokens = self.tokenize("")[None]
        self.wanted = wanted_units(plan.rows, plan.train_rows)
        self.missing = self.wanted
        self.sound: set[str] = set()  # shards whose hash this run has seen to
        self.remote: Remote | None = None

    def find(self) -> None:
        """The cache's folder, by its key. Rank 0 alone looks at the size and time of each image."""
        plan, where = self.plan, str(self.data.cache_latents)
        with self.world.together():
            dataset = plan.rows.fingerprint() if self.world.is_main else ""
        dataset = self.world.texts(dataset)[0]
        with self.world.together():
            self.vae, self.text_encoder = load_encoders(plan.config.model)
            parts = key_parts(
                dataset,
                len(plan.rows),
                self.data,
                plan.buckets.sizes,
                self.vae,
                self.text_encoder,
                plan.described.tokenizers,
                plan.dtype,
                plan.vae_dtype,
            )
            shape = shape_of(self.data, plan.buckets.sizes, plan.described, plan.dtype)
            root = plan.output / "cache" if is_url(where) else Path(where).expanduser()
            if root.exists() and not root.is_dir():
                raise UsageError(f"--cache_latents {root} is a file; give a folder")
            self.cache = CacheFolder(root / key_of(parts), parts, shape)
            self.remote = Remote(where, self.cache) if is_url(where) else None
        same = {"encoders": int(key_of(parts)[:15], 16)}
        self.world.check_same(same, "all machines must see the same model and versions")

    def mirror(self, remote: Remote, dry_run: bool) -> None:
        """Fetches what is at the URL and not here, and sends what is here and not there."""
        with self.world.together():
            there, here = remote.shards(), self.cache.shards()
        fetched = [name for name in there if name not in here]
        if fetched and self.world.is_main:
            total = sum(there[name]["bytes"] for name in fetched)
            _say(f"cache      {remote.url}: {len(fetched)} shards to fetch, {in_bytes(total)}")
        if dry_run:
            return
        with self.world.together():
            remote.fetch(self._share(fetched), there)
        self.sound |= set(fetched)
        with self.world.together():
            remote.send(self._share([name for name in here if name not in there]))

    def check(self) -> None:
        """Reads the shards that are there against their hashes; the ranks share them."""
        with self.world.together():
            self.cache.check(self._share(set(self.cache.shards()) - self.sound))

    def look(self) -> bool:
        """Whether all is there; says what is not, and its size."""
        with self.world.together():
            self.missing = missing_units(self.cache, self.wanted)
            texts = missing_texts(self.cache, self.null_tokens, self.wanted)
        whole = not len(self.missing) and not len(texts)
        if self.world.is_main:
            there = len(self.wanted) - len(self.missing)
            _say(f"cache      {self.cache.folder}: {there} of {len(self.wanted)} pairs are there")
            if not whole:
                shape, count = self.cache.shape, len(self.missing)
                _say(
                    f"           {count} to encode, {shape.variants} forms each: "
                    f"{in_bytes(count * shape.pair_bytes)}, and their distinct instructions: at "
                    f"most {in_bytes((count + len(texts)) * shape.text_bytes)}"
                )
        return whole

    def fill(self, stop_requested: Callable[[], bool]) -> bool:
        """Encodes what is wanting; False when it was stopped before the end."""
        if not self._lock(stop_requested):
            return False
        try:
            return self._fill(stop_requested)
        finally:
            self.cache.unlock()

    def _fill(self, stop_requested: Callable[[], bool]) -> bool:
        self.world.doing("encoding a shard of the cache")
        with self.world.together():
            if self.world.is_main:
                self.cache.clean()
        with self.world.together():  # another run may have made some while this one waited
            self.missing = missing_units(self.cache, self.wanted)
            self._check_space()
        build = Build(
            self.cache,
            Encoders(
                self.vae,
                self.text_encoder,
                self.null_tokens,
                self.world.device,
                self.plan.dtype,
                vae_dtype=self.plan.vae_dtype,
                fused=self.world.device.type == "cuda" and not self.plan.config.precision.plain,
            ),
            self.data,
            self.world,
            encode_at_once=self.plan.config.loop.train_batch_size,
            done=Told(len(self.missing), self.world).add,
            written=self._written,
        )
        given = self.plan.rows, self.missing, self.tokenize, stop_requested, self.plan.buckets
        if not build.pairs(*given):
            if self.world.is_main:
                _say("stopped: the same command goes on with the cache from here")
            return False
        build.texts(self.null_tokens)
        with self.world.together():
            if self.world.is_main:
                self.cache.seal()
                if self.remote is not None:
                    self.remote.seal()
        if self.world.is_main:
            total = sum(facts["bytes"] for facts in self.cache.shards().values())
            _say(f"cache      {self.cache.folder} is whole: {in_bytes(total)}")
        return True

    def free_encoders(self) -> None:
        """Gives their memory back to what is trained."""
        del self.vae, self.text_encoder
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _share(self, names: Iterable[str]) -> list[str]:
        """This rank's, by name: what another run adds meanwhile does not change whose they are."""
        digits = {name: int(Path(name).stem.split("-")[1], 16) for name in names}
        return sorted(n for n in names if digits[n] % self.world.size == self.world.rank)

    def _written(self, name: str) -> None:
        if self.remote is not None:
            self.remote.send([name])

    def _lock(self, stop_requested: Callable[[], bool]) -> bool:
        """Waits for another run that is building the same cache; False when asked to stop."""
        told = False
        while True:
            with self.world.together():
                got = self.world.is_main and self.cache.lock()
            if self.world.highest(got):
                return True
            if self.world.highest(stop_requested()):
                return False
            if self.world.is_main and not told:
                _say(f"cache      waiting for another run, which is building {self.cache.folder}")
            told = True
            time.sleep(LOCK_EVERY_S)

    def _check_space(self) -> None:
        needed = len(self.missing) * self.cache.shape.pair_bytes
        free = shutil.disk_usage(self.cache.folder).free
        if needed > free:
            raise UsageError(
                f"--cache_latents {self.data.cache_latents}: {in_bytes(needed)} are to be written "
                f"to {self.cache.folder}, where {in_bytes(free)} are free"
            )


class Told:
    """Progress of all ranks, from that of rank 0: their shares are even."""

    def __init__(self, total: int, world: World) -> None:
        self.total, self.world, self.count = total, world, 0
        self.progress = Progress(total, 0, unit="pair") if world.is_main and total else None
        self.started = self.last = time.monotonic()

    def add(self, count: int) -> None:
        """Counts pairs that this rank has encoded."""
        self.count = min(self.total, self.count + count * self.world.size)
        now = time.monotonic()
        end = self.count == self.total
        if self.progress is None or not (end or now - self.last > TOLD_EVERY_S):
            return
        self.last = now
        speed = self.count / max(now - self.started, 1e-9)
        self.progress.show(self.count, {"pairs_per_second": speed})
        if end:
            self.progress.close()


def in_bytes(count: float) -> str:
    """1234567 -> "1.23 MB"."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
