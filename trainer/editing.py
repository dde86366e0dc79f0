"""Edits as `fusedit edit` makes them: of one image, of a folder's, of its page's.

An edit is a function of model, image, instruction and settings, whatever else is edited beside it:
the noise it starts from is drawn by the seed and the size alone. So one image edited by itself, in
a batch or in the page comes out the same, to the rounding of sums in another order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..kernels.unet import fuse
from .compiled import Parts, allow_forms, compile_unet
from .draws import Purpose, draw_normal
from .errors import UsageError
from .files import beside, cannot_write
from .sample import edit_images, nearest_size

MOST_SIZES = 64  # that are compiled, each anew
Compiled = Literal["off"] | Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides an edit beside model, image and instruction."""

    seed: int = 0  # another seed, another edit
    steps: int = 20  # of denoising
    guidance_scale: float = 7.5  # of the instruction; at 1 or less none of either kind
    image_guidance_scale: float = 1.5  # 1 or more

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be from 0 to 2**64 - 1, got {self.seed}")
        if self.steps < 1:
            raise UsageError(f"steps must be 1 or more, got {self.steps}")
        for name in ("guidance_scale", "image_guidance_scale"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} must be a number, got {getattr(self, name)}")
        if self.guidance_scale > 1 and self.image_guidance_scale < 1:
            raise UsageError(
                f"image_guidance_scale must be 1 or more, got {self.image_guidance_scale}"
            )


class Editor:
    """A model, ready to edit on a device.

    Args:
        pipeline: of `load_pipeline`; it is moved, and its UNet changed in place.
        dtype: default: fp16 on a GPU, as the pipeline is elsewhere.
        resolution: pixels, limit of the long side; smaller images keep their size.
        plain: no kernels of ours; PyTorch's own layout too.
        compiled: what torch.compile makes of the UNet. Shapes are static: batches are filled up.
        batch_size: of which `edit` takes no more.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        resolution: int = 512,
        plain: bool = False,
        compiled: Compiled = "off",
        batch_size: int = 1,
    ) -> None:
        dtype = torch.float16 if dtype is None and device.type == "cuda" else dtype
        pipeline = pipeline.to(device) if dtype is None else pipeline.to(device, dtype)
        if not plain:
            pipeline.unet.to(memory_format=torch.channels_last)
        if not plain and device.type == "cuda":
            fuse(pipeline.unet)
        if compiled != "off":
            allow_forms(MOST_SIZES)
            compile_unet(pipeline.unet, compiled)
        self.pipeline, self.resolution, self.batch_size = pipeline, resolution, batch_size
        self.filled = compiled != "off"

    def fitted(self, image: Image.Image) -> Image.Image:
        """The image in the size that its edit has: of the VAE's factor, within the resolution."""
        size = nearest_size(image.size, self.pipeline.vae_scale_factor, self.resolution)
        return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)

    def edit(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        settings: Settings,
        seeds: Sequence[int] | None = None,
        shows: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Edits images of one size, as `fitted` gives them.

        Args:
            seeds: one an image; default: all of them that of the settings.
            shows: told how many steps are done.

        Raises: UsageError: the GPU's memory does not hold them.
        """
        count, (width, height) = len(images), images[0].size
        seeds = [settings.seed] * count if seeds is None else seeds
        rows = [*range(count), *[count - 1] * (self.batch_size - count if self.filled else 0)]
        noise = self._noise([seeds[row] for row in rows], width, height)
        try:
            edits = edit_images(
                self.pipeline,
                [images[row] for row in rows],
                [instructions[row] for row in rows],
                noise,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                image_guidance_scale=settings.image_guidance_scale,
                shows=shows,
            )
        except torch.OutOfMemoryError:
            several = "--batch_size or " if count > 1 else ""
            raise UsageError(
                f"the GPU's memory does not hold {len(rows)} x {width} x {height} pixels: lower "
                f"{several}--resolution"
            ) from None
        return edits[:count]

    def one(
        self,
        image: Image.Image,
        instruction: str,
        settings: Settings,
        shows: Callable[[int], None] | None = None,
    ) -> Image.Image:
        """The edit of one image, of any size."""
        return self.edit([self.fitted(image)], [instruction], settings, shows=shows)[0]

    def _noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        shape = (self.pipeline.vae.config["latent_channels"], height // factor, width // factor)
        place = torch.tensor([0])
        drawn = [draw_normal(seed, Purpose.VALIDATION_NOISE, place, shape) for seed in seeds]
        return torch.cat(drawn)


def without_seed(settings: Settings) -> Settings:
    """What edits of one batch share."""
    return replace(settings, seed=0)


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Writes an image whole or not at all, in the format of the name's end.

    Raises: UsageError: the disk does not take it.
    """
    partial = beside(path)
    try:
        image.save(partial, Image.registered_extensions()[path.suffix.lower()], **options)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None
