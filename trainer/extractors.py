"""The networks that metrics see by: CLIP, DINO, and LPIPS's, from local folders or the hub.

Each has a hash of its weights and of how it prepares images and texts: a score means little without
knowing by what it was seen. Images are prepared by Pillow, whatever else is installed, so that a
score does not change with it. Weights are safetensors alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from .errors import UsageError

LPIPS_FILE = "lpips.safetensors"


def sha256_of(tensors: Mapping[str, Tensor], *told: Any) -> str:
    """Of names, dtypes, shapes and bytes, in the order of names; then of what JSON can hold."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    for one in told:
        digest.update(json.dumps(one, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class Clip:
    """CLIP's embeddings of images and texts, not normalized.

    Args:
        place: folder or hub name of a CLIPModel, its image processor and its tokenizer.

    Raises: UsageError: it cannot be had, or is something else.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        self._model, weights = _load_model(CLIPModel, place, "clip", device)
        with _loading(place, "clip"):
            self._prepare = AutoImageProcessor.from_pretrained(place, backend="pil")
            self._tokenizer = CLIPTokenizer.from_pretrained(place)
        vocabulary = self._tokenizer.get_vocab()
        self.sha256 = sha256_of(weights, _told(self._prepare), vocabulary)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """[n, width] fp32 on the CPU."""
        pixels = _pixels(self._prepare, images, self._model.device)
        seen = self._model.vision_model(pixel_values=pixels).pooler_output
        return self._model.visual_projection(seen).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[n, width] fp32 on the CPU; what is too long is cut."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        ).to(self._model.device)
        read = self._model.text_model(**tokens).pooler_output
        return self._model.text_projection(read).float().cpu()


class Dino:
    """The class token of a vision transformer, after its last norm: of DINO, DINOv2, or another.

    Args:
        place: folder or hub name of the model and its image processor.

    Raises: UsageError: it cannot be had, or is something else.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        self._model, weights = _load_model(AutoModel, place, "dino", device)
        with _loading(place, "dino"):
            self._prepare = AutoImageProcessor.from_pretrained(place, backend="pil")
        self.sha256 = sha256_of(weights, _told(self._prepare))

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """[n, width] fp32 on the CPU."""
        pixels = _pixels(self._prepare, images, self._model.device)
        return self._model(pixel_values=pixels).last_hidden_state[:, 0].float().cpu()


class Backbone(NamedTuple):
    """Convolutions of LPIPS's slices, each (index, stride, padding) in torchvision's `features`."""

    last: str  # by which a file is known to be of this one
    slices: tuple[tuple[tuple[int, int, int], ...], ...]
    pooled: tuple[int, ...]  # slices that begin with a maximum over `pool` pixels, every second one
    pool: int


BACKBONES = (
    Backbone(
        last="net.slice5.10.weight",  # AlexNet
        slices=(((0, 4, 2),), ((3, 1, 2),), ((6, 1, 1),), ((8, 1, 1),), ((10, 1, 1),)),
        pooled=(1, 2),
        pool=3,
    ),
    Backbone(
        last="net.slice5.28.weight",  # VGG16
        slices=tuple(
            tuple((index, 1, 1) for index in indices)
            for indices in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
        ),
        pooled=(1, 2, 3, 4),
        pool=2,
    ),
)


class Lpips:
    """The learned perceptual distance, from the weights that the `lpips` package keeps.

    torchmetrics has the metric, but only with torchvision's networks and weights that are pickled.

    Args:
        place: folder or hub name with lpips.safetensors, what
            `safetensors.torch.save_model(lpips.LPIPS(net="alex"), "lpips.safetensors")` writes; by
            its names it is known to be of AlexNet or VGG16.

    Raises: UsageError: it cannot be had, or is something else.
    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1 of their code.
    """

    SHIFT = (-0.030, -0.088, -0.188)  # of what is seen as -1 to 1
    SCALE = (0.458, 0.448, 0.450)

    def __init__(self, place: str, device: torch.device) -> None:
        try:
            folder = place if Path(place).is_dir() else snapshot_download(place)
            weights = load_file(Path(folder) / LPIPS_FILE)
        except (OSError, ValueError, HTTPError, SafetensorError) as error:
            raise _cannot_load("lpips", place, error) from None
        found = [backbone for backbone in BACKBONES if backbone.last in weights]
        if not found:
            raise UsageError(f"--lpips {place}: {LPIPS_FILE} is of neither AlexNet nor VGG16")
        [self._backbone] = found
        self._weights = {
            name: tensor.to(device).float()
            for name, tensor in weights.items()
            if name.startswith(("net.", "lin")) and not name.startswith("lins.")
        }
        self._device = device
        self.sha256 = sha256_of(self._weights)

    @torch.no_grad()
    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """[n] of two [n, 3, height, width], both 0 to 1."""
        total = torch.zeros(len(one))
        pairs = zip(self._maps(one), self._maps(other), strict=True)
        for level, (own, its) in enumerate(pairs):
            apart = (_unit(own) - _unit(its)) ** 2
            head = self._weights[f"lin{level}.model.1.weight"]
            total += F.conv2d(apart, head).mean(dim=(1, 2, 3)).cpu()
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        """What the backbone sees after each of its slices."""
        shift, scale = (
            torch.tensor(values, device=self._device).view(1, 3, 1, 1)
            for values in (self.SHIFT, self.SCALE)
        )
        seen, maps = (2 * images.to(self._device) - 1 - shift) / scale, []
        for number, layers in enumerate(self._backbone.slices):
            if number in self._backbone.pooled:
                seen = F.max_pool2d(seen, self._backbone.pool, stride=2)
            for index, stride, padding in layers:
                name = f"net.slice{number + 1}.{index}"
                weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
                seen = F.relu(F.conv2d(seen, weight, bias, stride, padding))
            maps.append(seen)
        return maps


def _unit(seen: Tensor) -> Tensor:
    """Each pixel's channels with norm 1."""
    return seen / (1e-8 + seen.square().sum(dim=1, keepdim=True)).sqrt()


def _pixels(prepare: Any, images: Sequence[Image.Image], device: torch.device) -> Tensor:
    prepared = prepare(images=[image.convert("RGB") for image in images], return_tensors="pt")
    return prepared["pixel_values"].to(device)


def _told(prepare: Any) -> dict[str, Any]:
    """How images are prepared, without the name of the class that does it."""
    skipped = ("image_processor_type", "processor_class")
    return {name: value for name, value in prepare.to_dict().items() if name not in skipped}


def _load_model(
    cls: Any, place: str, kind: str, device: torch.device
) -> tuple[Any, dict[str, Tensor]]:
    """The model in fp32, and those of its weights that the files held: a pooler may be wanting."""
    with _loading(place, kind):
        model, report = cls.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    missing = {*report["missing_keys"]}
    lacks = sorted(name for name in missing if not name.startswith("pooler."))
    if lacks:
        raise UsageError(f"--{kind} {place}: it is no {kind} model, its files lack {lacks[0]}")
    weights = {name: value for name, value in model.state_dict().items() if name not in missing}
    return model.to(device).eval(), weights


@contextmanager
def _loading(place: str, kind: str) -> Iterator[None]:
    """Raises: UsageError: it is not there, or not readable."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, HTTPError) as error:
        raise _cannot_load(kind, place, error) from None


def _cannot_load(kind: str, place: str, error: Exception) -> UsageError:
    where = "" if Path(place).is_dir() else "no folder here, and not to be had from the hub: "
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return UsageError(f"--{kind} {place}: {where}{reason}")


class Extractors(NamedTuple):
    """Those that there are."""

    clip: Clip | None = None
    dino: Dino | None = None
    lpips: Lpips | None = None

    def sha256(self) -> dict[str, str]:
        return {name: one.sha256 for name, one in self._asdict().items() if one is not None}


KINDS: dict[str, Any] = {"clip": Clip, "dino": Dino, "lpips": Lpips}
