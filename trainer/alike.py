"""What all ranks must have alike to train as one: code, settings and data."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

from .config import RunConfig
from .plan import Plan
from .rows import BadSample, Rows
from .settings import flat
from .world import World

# Of these a run is made; Pillow decodes the images.
LIBRARIES = ("torch", "diffusers", "transformers", "datasets", "safetensors", "pillow")
FOLDERS = ("trainer", "kernels")
ROWS_READ = 8
# Where a machine keeps things, and how it reads them, is its own affair.
OF_THE_MACHINE = {
    "data.train_data_dir",
    "data.dataset_name",
    "data.cache_latents",
    "data.dataloader_num_workers",
    "data.dataloader_prefetch",
    "model.cache_dir",
    "model.pretrained_model_name_or_path",
    "model.pretrained_vae_model_name_or_path",
    "model.unet",
    "output.output_dir",
}


def check_alike(plan: Plan, world: World) -> None:
    """Raises UsageError on all ranks, naming one that would train another run."""
    world.check_alike(settings_of(plan.config), "give the same flags on all machines")
    world.check_same(plan.facts(), "all machines must see the same --output_dir and dataset")
    rows = {"rows": glance(plan.rows)}
    world.check_alike(rows, "all machines must see the same dataset: these are hashes of some rows")


def code() -> dict[str, str]:
    """Versions, and a hash of our own files, which an edited checkout does not share."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    ours = f"{version('fusedit')} with code {digest.hexdigest()[:12]}"
    python = {"Python": ".".join(platform.python_version_tuple()[:2])}
    return {"fusedit": ours, **{name: version(name) for name in LIBRARIES}, **python}


def settings_of(config: RunConfig) -> dict[str, str]:
    """The flags that decide what is computed, as texts."""
    return {
        f"--{name.split('.')[1]}": str(value)
        for name, value in flat(config).items()
        if name not in OF_THE_MACHINE
    }


def glance(rows: Rows) -> str:
    """A hash of a few rows, spread over all: pixels and texts, not times and paths of files."""
    digest = hashlib.sha256()
    for row in sorted({index * (len(rows) - 1) // (ROWS_READ - 1) for index in range(ROWS_READ)}):
        try:
            original, edited, prompt = rows.read(row, 0.0)
        except BadSample:
            digest.update(f"{row} cannot be read".encode())
            continue
        for image in (original, edited):
            digest.update(f"{image.size}".encode() + image.tobytes())
        digest.update(prompt.encode())
    return digest.hexdigest()[:12]
