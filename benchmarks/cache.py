"""The cache of encodings, for `data.py`: how fast one is built, and how fast one is read.

What is read is synthetic: what the VAE of Stable Diffusion 1.5 gives in size, both mirrors, in
random order, by one process. What is built is made as `fusedit cache` makes it, decoded, encoded,
hashed and synced to disk shard by shard: of the demo's pairs by the demo's encoders; and on a GPU
of JPEGs by encoders of Stable Diffusion 1.5's architecture with random weights, both mirrors.
Time is taken from the end of one shard to the end of the next, so what starts up is not in it.
"""

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..launch.demo.run import BASE, RESOLUTION, save_pairs
from ..trainer.cache import CachedPairs
from ..trainer.cache_build import SHARD_PAIRS, Build, text_digest, wanted_units
from ..trainer.cache_files import CacheFolder, Shape
from ..trainer.config import DataConfig, ModelConfig, PrecisionConfig
from ..trainer.data import EditPairs, Order, StepSampler, make_loader, make_tokenize
from ..trainer.encoders import Encoders
from ..trainer.families import SIZE_IDS, STABLE_DIFFUSION, TextEncoder
from ..trainer.plan import set_numerics
from ..trainer.pretrained import load_encoders
from ..trainer.rows import open_rows
from ..trainer.world import World
from . import harness
from .harness import Record, say
from .jpegs import PAIRS_A_TEXT, photographs
from .shapes import TEXT_TOKENS
from .timing import timing

# Of the cache that is read.
PAIRS, PAIRS_A_SHARD = 4096, 512
RESOLUTIONS = (256, 512)
WIDTH = 768  # of CLIP's text encoder
EPOCHS = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case(NamedTuple):
    """A cache that is built."""

    preset: str
    resolution: int
    dtype: str
    shards: int
    workers: int = 0
    sd15: bool = False  # with encoders of its architecture, which want a GPU; else the demo's


BUILDS = (
    Case(f"demo {RESOLUTION}px", RESOLUTION, "fp32", shards=16),
    Case("sd15 256px", 256, "bf16", shards=5, workers=12, sd15=True),
    Case("sd15 512px", 512, "bf16", shards=4, workers=12, sd15=True),
)
FILES = 64  # pairs of JPEGs; the rows of a build go round them
CLOSE = {"fp32": 1e-4, "bf16": 5e-2}  # of the largest value: a batch of another size rounds anew


def measure_read(record: Record, folder: Path | None, batch: int) -> None:
    for resolution in RESOLUTIONS:
        for name, dtype in DTYPES.items():
            say(f"{resolution} px {name}")
            shape = shape_of(resolution, dtype)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                milliseconds, wrong = read(written(Path(place), shape), batch)
            sample_bytes = shape.pair_bytes // shape.variants + shape.text_bytes
            per_second = 1e3 * batch * len(milliseconds) / sum(milliseconds)
            labels = {"op": "cache", "preset": f"{resolution}px", "shape": str(batch)}
            labels |= {"dtype": name, "direction": "read", "by": "ours"}
            record["rows"].append(
                harness.row(
                    labels,
                    verdict="wrong" if wrong else "right",
                    timings=None if wrong else {"warm": timing(milliseconds)},
                    least_bytes=batch * sample_bytes,
                    values={} if wrong else {"samples_per_s": round(per_second)},
                    note=wrong,
                )
            )


def shape_of(resolution: int, dtype: torch.dtype) -> Shape:
    side = resolution // 8
    text = TEXT_TOKENS, WIDTH
    return Shape(mirrors=2, crops=1, latents=((4, side, side),), text=text, pooled=0, dtype=dtype)


def written(folder: Path, shape: Shape) -> CacheFolder:
    """A cache of noise; the first number of each pair and text is its own, modulo 128."""
    cache = CacheFolder(folder, {"synthetic": True}, shape)
    count = PAIRS // PAIRS_A_TEXT
    tokens = torch.arange(count + 1, dtype=torch.int32)[:, None].expand(-1, TEXT_TOKENS)
    digest = torch.from_numpy(np.stack([text_digest(one) for one in tokens.contiguous()]))
    for start in range(0, PAIRS, PAIRS_A_SHARD):
        row = torch.arange(start, start + PAIRS_A_SHARD)
        latents = torch.randn(PAIRS_A_SHARD, *shape.latents_shape(0), dtype=shape.dtype)
        latents[..., 0, 0, 0] = (row % 128).to(shape.dtype)[:, None, None, None]
        number = row // PAIRS_A_TEXT
        cache.write(
            "pairs",
            {
                "latents": latents,
                "size_ids": torch.zeros(PAIRS_A_SHARD, shape.mirrors, shape.crops, SIZE_IDS),
                "unit": torch.stack((row, torch.zeros_like(row)), dim=1),
                "tokens": tokens[number].contiguous(),
                "digest": digest[number],
            },
            {},
        )
    text = torch.randn(count + 1, *shape.text, dtype=shape.dtype)
    text[:, 0, 0] = (torch.arange(count + 1) % 128).to(shape.dtype)
    pooled = torch.empty(count + 1, shape.pooled, dtype=shape.dtype)
    cache.write("texts", {"text": text, "pooled": pooled, "digest": digest}, {})
    cache.seal()
    return cache


def read(cache: CacheFolder, batch: int) -> tuple[list[float], str]:
    """Milliseconds of each micro-batch, and what was wrong with one."""
    order = Order(torch.arange(PAIRS), 0, batch)
    null_tokens = torch.full((1, TEXT_TOKENS), PAIRS // PAIRS_A_TEXT)
    pairs = CachedPairs(cache, order, 0, True, null_tokens)
    sampler = StepSampler(0, EPOCHS * order.steps_per_epoch, 0, 1, batch, 1)
    milliseconds, wrong = [], ""
    since = time.perf_counter()
    for found in make_loader(pairs, sampler, workers=0, prefetch=1, pin_memory=False):
        milliseconds.append(1e3 * (time.perf_counter() - since))
        rows = order.rows(found.positions)
        own, texts = found.latents[..., 0, 0, 0], found.text[:, 0, 0]
        if not (own == rows % 128).all() or not (texts == rows // PAIRS_A_TEXT % 128).all():
            wrong = "a sample is not that of its position"
        since = time.perf_counter()
    return milliseconds, wrong


def measure_build(record: Record, folder: Path | None, batch: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_numerics(PrecisionConfig())  # as a run has them
    for case in BUILDS:
        pairs = SHARD_PAIRS[device.type]
        labels: dict[str, str | int] = {"op": "cache", "preset": case.preset, "shape": pairs}
        labels |= {"dtype": case.dtype, "direction": "build", "by": "ours"}
        if case.sd15 and device.type == "cpu":
            record["rows"].append(harness.row(labels, note="needs a GPU"))
            continue
        say(f"build of {case.preset}")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = Building(case, Path(place), device, batch).run()
        record["rows"].append(build_row(labels, found))


class Found(NamedTuple):
    """What a build came to."""

    shard_ms: list[float]  # of each shard of pairs but the first
    texts_per_s: float
    sample_bytes: float  # on disk, with its share of the texts
    wrong: str


def build_row(labels: dict[str, str | int], found: Found) -> Record:
    if found.wrong:
        return harness.row(labels, verdict="wrong", note=found.wrong)
    pairs, shards = int(labels["shape"]), len(found.shard_ms)
    return harness.row(
        labels,
        verdict="right",
        timings={"warm": timing(found.shard_ms)},
        least_bytes=round(pairs * found.sample_bytes),
        values={
            "samples_per_s": round(1e3 * pairs * shards / sum(found.shard_ms), 1),
            "texts_per_s": round(found.texts_per_s, 1),
            "bytes_a_sample": round(found.sample_bytes),
        },
    )


class Building:
    """A build and what it takes.

    Args:
        place: an empty folder, for images and cache.
        batch: images of each kind that the VAE takes at once.
    """

    def __init__(self, case: Case, place: Path, device: torch.device, batch: int) -> None:
        self.case, self.world, self.batch = case, World(device=device), batch
        count, data = case.shards * SHARD_PAIRS[device.type], place / "data"
        if case.sd15:
            data.mkdir()
            photographs(data, case.resolution, FILES, count)
            vae, text_encoder = sd15_encoders()
        else:
            save_pairs(data, count)
            vae, text_encoder = load_encoders(ModelConfig(pretrained_model_name_or_path=str(BASE)))
        clip: Any = text_encoder.parts["text_encoder"]
        text = clip.config.max_position_embeddings, clip.config.hidden_size
        tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=text[0])
        self.tokenize = make_tokenize([tokenizer])
        self.null_tokens = self.tokenize("")[None]
        self.section = DataConfig(
            train_data_dir=str(data),
            resolution=case.resolution,
            center_crop=True,
            random_flip=case.sd15,
            dataloader_num_workers=case.workers,
        )
        self.rows = open_rows(self.section, f"{place}/tables")
        self.selection = torch.arange(count)
        dtype = DTYPES[case.dtype]
        self.encoders = Encoders(
            vae, text_encoder, self.null_tokens, device, dtype, fused=device.type == "cuda"
        )
        config: Any = vae.config
        side = case.resolution // 2 ** (len(config.block_out_channels) - 1)
        mirrors = 2 if self.section.random_flip else 1
        shape = Shape(
            mirrors, crops=1, latents=((4, side, side),), text=text, pooled=0, dtype=dtype
        )
        self.cache = CacheFolder(place / "cache", {"benchmark": case.preset}, shape)

    def run(self) -> Found:
        ends: list[float] = []
        build = Build(
            self.cache,
            self.encoders,
            self.section,
            self.world,
            encode_at_once=self.batch,
            done=lambda count: None,
            written=lambda name: ends.append(time.perf_counter()),
        )
        missing = wanted_units(self.rows, self.selection)
        build.pairs(self.rows, missing, self.tokenize, stop_requested=lambda: False)
        shard_ms = [1e3 * (end - start) for start, end in itertools.pairwise(ends)]
        since = time.perf_counter()
        build.texts(self.null_tokens)
        seconds = time.perf_counter() - since
        texts = sum(len(self.cache.open(name, "digest")[0]) for name in self.cache.shards("texts"))
        self.cache.seal()
        total = sum(path.stat().st_size for path in self.cache.folder.iterdir())
        return Found(shard_ms, texts / seconds, total / len(missing), self.wrong())

    def wrong(self) -> str:
        """How samples of the cache differ from those that are encoded anew."""
        order = Order(self.selection, 0, self.batch)
        flips, at = self.section.random_flip, list(range(self.batch))
        cached = CachedPairs(self.cache, order, 0, flips, self.null_tokens).__getitems__(at)
        pairs = EditPairs(self.rows, self.selection, self.section, 0, self.batch, self.tokenize)
        fresh = self.encoders.encode(pairs.collate(pairs.__getitems__(at)))
        expected = (fresh.target_mean, fresh.target_std, fresh.condition, fresh.text)
        for own, other in zip((*cached.latents, cached.text), expected, strict=True):
            apart = (own - other.cpu()).abs().max()
            if not apart <= CLOSE[self.case.dtype] * other.abs().max().cpu():
                return f"a sample of the cache is off by {float(apart):.3g}"
        return ""


def sd15_encoders() -> tuple[AutoencoderKL, TextEncoder]:
    """Stable Diffusion 1.5's VAE and text encoder, random."""
    blocks: dict[str, Any] = {  # diffusers declares tuples of one
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(layers_per_block=2, **blocks)
    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=12, num_attention_heads=12
    )
    return vae, TextEncoder(STABLE_DIFFUSION, {"text_encoder": CLIPTextModel(config)})
