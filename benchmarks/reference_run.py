"""diffusers' script in this process, unmodified, watched from outside.

    python -m fusedit.benchmarks.reference_run WATCH OUT SCRIPT FLAGS OF THE SCRIPT

WATCH says what is written into the folder OUT: `stamps`, when each optimizer step ended and the
most memory; `trace`, what the operations of some updates took (tracing.py); `record`, the draws,
losses, gradients and weights of the first updates (recording.py). parity.py and step.py call it.
"""

import importlib
import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..trainer.log import memory_gib
from .recording import UPDATES, recorded
from .tracing import traced

STAMPS = "stamps.json"
LOOKS = ("accelerate", "datasets", "diffusers", "transformers")  # for torchvision, when imported


@contextmanager
def stamped(folder: Path) -> Iterator[None]:
    """Writes STAMPS: seconds since the epoch at the end of each step, GiB of memory at most."""
    times: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(time.time()))
    try:
        yield
    finally:
        hook.remove()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        (folder / STAMPS).write_text(json.dumps({"steps": times, "memory_gib": memory_gib(device)}))


class RandomHorizontalFlip:
    """Draws as torchvision's does."""

    def __call__(self, images: Tensor) -> Tensor:
        return images.flip(-1) if torch.rand(1) < 0.5 else images


class WholeCrop:
    """The crop of a square of its own size, which is all that the script asks for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(f"only a crop of everything, {self.size} px, got {images.shape}")
        return images


class Lambda:
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(images)


class Compose:
    def __init__(self, parts: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.parts = parts

    def __call__(self, images: Tensor) -> Tensor:
        for part in self.parts:
            images = part(images)
        return images


@contextmanager
def torchvision_there() -> Iterator[None]:
    """Inside, `from torchvision import transforms` works, by a stand-in where it is not installed.

    Its wheels want the build of PyTorch that they were made for: a CPU's may have none.
    """
    if find_spec("torchvision") is not None:
        yield
        return
    for name in LOOKS:  # before the stand-in is there, or they would take it for torchvision
        importlib.import_module(name)
    transforms = ModuleType("torchvision.transforms")
    kinds = (Compose, Lambda, RandomHorizontalFlip)
    transforms.__dict__.update({kind.__name__: kind for kind in kinds})
    transforms.__dict__.update({"CenterCrop": WholeCrop, "RandomCrop": WholeCrop})
    package = ModuleType("torchvision")
    package.__spec__ = ModuleSpec("torchvision", None)
    package.__dict__["transforms"] = transforms
    with patch.dict(sys.modules, {"torchvision": package, "torchvision.transforms": transforms}):
        yield


WATCHES: dict[str, Callable[[Path], AbstractContextManager[None]]] = {
    "stamps": stamped,
    "trace": traced,
    "record": recorded,
    "record-ends": partial(recorded, whole=(1, UPDATES)),
}


def main(argv: Sequence[str] | None = None) -> int:
    watch, folder, script, *flags = sys.argv[1:] if argv is None else argv
    with (
        torchvision_there(),
        WATCHES[watch](Path(folder)),
        patch.object(sys, "argv", [script, *flags]),
    ):
        runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
