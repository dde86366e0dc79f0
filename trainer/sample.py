"""Edits made with two-scale guidance, and the sheets that show them.

Source of the guidance: Brooks et al. 2023, equation 3, as diffusers' pipeline computes it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from http.client import HTTPException
from inspect import signature
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .errors import UsageError
from .families import Family, family_of
from .images import TILES, load_image

DOWNLOAD_SECONDS = 30.0  # all of it
HTTP = ("http://", "https://")
DOWNLOAD_BYTES = 64 * 2**20  # the largest image fetched


def build_pipeline(family: Family, zero_null: bool = False, **parts: Any) -> Any:
    """The editing pipeline over modules in memory; none is copied or cast. No safety checker.

    Args:
        zero_null: a negative prompt that is not given is zeros (XL alone).
        parts: by their names in the pipeline.
    """
    pipeline = family.make_pipeline(zero_null=zero_null, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def edit_images(
    pipeline: Any,
    images: Sequence[Image.Image],
    instructions: Sequence[str],
    latents_noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    shows: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Edits each image by its instruction: a function of the arguments, no generator is touched.

    Modules of several dtypes (in training an fp32 UNet with half-precision encoders) run under
    autocast, but a VAE of wider numbers: it is so for its range.

    Args:
        images: of any size; scaled to cover the size of the noise, the overhang cut off.
        latents_noise: [n, 4, height / f, width / f] standard normals, f the VAE's factor.
        guidance_scale: of the instruction; at 1 or less there is no guidance of either kind.
        pipeline: one of a family's.
        image_guidance_scale: of the image; 1 or more.
        shows: told how many of the sampler's steps are done.
    Returns: n images of height x width.
    Raises: UsageError: an image guidance below 1, at which the pipeline would drop all guidance.
    """
    if guidance_scale > 1 and image_guidance_scale < 1:
        raise UsageError(f"image_guidance_scale must be 1 or more, got {image_guidance_scale}")
    height, width = (side * pipeline.vae_scale_factor for side in latents_noise.shape[-2:])
    fitted = [
        ImageOps.fit(i.convert("RGB"), (width, height), Image.Resampling.LANCZOS) for i in images
    ]
    # Samplers that draw noise on the way (DDPM, Euler ancestral) get it from the picture's own.
    seeds = latents_noise.to(torch.float32).cpu().flatten(1)[:, 0].view(torch.int32).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    narrowest = min((module.dtype for module in modules), key=lambda dtype: dtype.itemsize)
    mixed = any(module.dtype != narrowest for module in modules)
    device = pipeline.unet.device
    size = {"height": height, "width": width} if family_of(pipeline).told_sizes else {}
    with (
        torch.autocast(device.type, narrowest) if mixed else nullcontext(),
        _in_its_own_dtype(pipeline.vae) if pipeline.vae.dtype != narrowest else nullcontext(),
    ):
        return pipeline(
            list(instructions),
            image=fitted,
            latents=latents_noise.to(device, pipeline.unet.dtype),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            return_dict=False,
            **size,
            **({} if shows is None else _showing(pipeline, shows)),
        )[0]


def _showing(pipeline: Any, shows: Callable[[int], None]) -> dict[str, Any]:
    """What has a pipeline tell its steps: XL's has only what the other has given up."""

    def stepped(pipeline: Any, step: int, timestep: Any, changed: dict) -> dict:
        shows(step + 1)
        return changed

    if "callback_on_step_end" in signature(pipeline.__call__).parameters:
        return {"callback_on_step_end": stepped}
    return {"callback": lambda step, timestep, latents: shows(step + 1)}


@contextmanager
def _in_its_own_dtype(vae: Any) -> Iterator[None]:
    """Inside, the VAE takes anything and computes as its weights are, autocast or not."""
    encode, decode = vae.encode, vae.decode

    def own(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(given: Tensor, *args: Any, **options: Any) -> Any:
            with torch.autocast(given.device.type, enabled=False):
                return call(given.to(vae.dtype), *args, **options)

        return called

    vae.encode, vae.decode = own(encode), own(decode)
    try:
        yield
    finally:
        del vae.encode, vae.decode


def nearest_size(
    size: tuple[int, int], factor: int, long_side: int | None = None
) -> tuple[int, int]:
    """Width and height as multiples of the VAE's factor, no side above `long_side` pixels."""
    longest = max(size)
    limit = longest if long_side is None else max(long_side // factor, 1) * factor
    scale = min(1.0, limit / longest)
    width, height = (max(round(side * scale / factor), 1) * factor for side in size)
    return width, height


def open_image(source: str) -> Image.Image:
    """The RGB image at a path or an http(s) URL.

    Raises: UsageError: nothing there, not an image, another protocol, more than DOWNLOAD_BYTES.
    """
    try:
        return load_image(_fetched(source) if "://" in source else Path(source))
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None


def _fetched(address: str) -> bytes:
    if not address.lower().startswith(HTTP):
        raise ValueError("only http and https addresses are fetched")
    # Beside: a socket's own timeout begins anew with every byte that comes. Ends with the process.
    fetch = _Fetch(address)
    fetch.start()
    fetch.join(DOWNLOAD_SECONDS)
    if fetch.is_alive():
        raise ValueError(f"not here after {DOWNLOAD_SECONDS:g} seconds")
    if fetch.error is not None:
        reason = str(fetch.error).partition("\n")[0]
        raise ValueError(f"cannot be fetched: {reason}")
    if len(fetch.data) > DOWNLOAD_BYTES:
        raise ValueError(f"larger than {DOWNLOAD_BYTES >> 20} MiB")
    return fetch.data


class _Fetch(Thread):
    """Reads what is at an address, and a byte more than is taken."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        # Some servers, Wikipedia's among them, answer no client without a name.
        self._request = Request(address, headers={"User-Agent": "fusedit"})
        self.data, self.error = b"", None

    def run(self) -> None:
        opener = build_opener(_HttpAlone)
        try:
            with opener.open(self._request, timeout=DOWNLOAD_SECONDS) as response:
                self.data = response.read(DOWNLOAD_BYTES + 1)
        except (OSError, HTTPException, ValueError) as error:
            self.error = error


class _HttpAlone(HTTPRedirectHandler):
    """Follows no redirect to a file or to FTP, which urllib would open."""

    def redirect_request(self, req: Request, fp, code: int, msg: str, headers, newurl: str):
        if not newurl.lower().startswith(HTTP):
            raise ValueError(f"it redirects to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


TILE_LEAST = 128  # pixels of a tile's short side; smaller images are scaled up
TILE_MOST = 512  # pixels of a tile's long side
GAP = 8
MARGIN = 24
TEXT_SIZE = 15
LINE_HEIGHT = 20
CAPTION_LINES = 3
TOLD_CAPTION = 1000  # characters of an instruction that the file tells
INK, FAINT, PAPER = "#1c1c1c", "#6b6b6b", "#ffffff"


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    captions: Sequence[str],
    headings: Sequence[str],
) -> Image.Image:
    """A sheet of pictures: one column a heading, under each row its caption.

    Many rows stand in several groups of columns side by side, so that the sheet is no tower. Its
    info tells where they are, for whoever cuts it up again: save it by `save_grid`.

    Args:
        rows: as many images each as there are headings; None leaves its place empty.
    """
    tiles = [[image and _tile(image) for image in row] for row in rows]
    present = [tile for row in tiles for tile in row if tile]
    tile_width = max(tile.width for tile in present)
    tile_height = max(tile.height for tile in present)
    font = ImageFont.load_default(TEXT_SIZE)
    group_width = len(headings) * (tile_width + GAP) - GAP
    texts = [_wrapped(caption, font, group_width) for caption in captions]
    row_height = tile_height + max(map(len, texts)) * LINE_HEIGHT + MARGIN
    groups = 1
    while -(-len(rows) // groups) * row_height > groups * (group_width + MARGIN) * 1.5:
        groups += 1
    rows_each = -(-len(rows) // groups)
    groups = -(-len(rows) // rows_each)

    size = (
        groups * (group_width + MARGIN) + MARGIN,
        LINE_HEIGHT + rows_each * row_height + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for group in range(groups):
        for column, heading in enumerate(headings):
            left = MARGIN + group * (group_width + MARGIN) + column * (tile_width + GAP)
            centre = left + tile_width // 2, MARGIN // 2 + LINE_HEIGHT // 2
            draw.text(centre, heading, FAINT, font, anchor="mm")
    places: list[list[tuple[int, int, int, int] | None]] = []  # left, top, right, bottom
    for index, (row, lines) in enumerate(zip(tiles, texts, strict=True)):
        group, place = divmod(index, rows_each)
        left = MARGIN + group * (group_width + MARGIN)
        top = MARGIN // 2 + LINE_HEIGHT + GAP // 2 + place * row_height
        places.append([None] * len(row))
        for column, tile in enumerate(row):
            if tile:
                corner = left + column * (tile_width + GAP), top
                sheet.paste(tile, corner)
                places[-1][column] = (*corner, corner[0] + tile.width, top + tile.height)
        for line, text in enumerate(lines):
            draw.text((left, top + tile_height + GAP // 2 + line * LINE_HEIGHT), text, INK, font)
    sheet.info[TILES] = json.dumps(
        [
            {"caption": caption[:TOLD_CAPTION], "boxes": dict(zip(headings, boxes, strict=True))}
            for caption, boxes in zip(captions, places, strict=True)
        ]
    )
    return sheet


def save_grid(sheet: Image.Image, path: Path) -> None:
    """As a PNG that says where its tiles are. Raises: OSError."""
    told = PngInfo()
    told.add_text(TILES, sheet.info[TILES])
    sheet.save(path, "PNG", pnginfo=told)


def _tile(image: Image.Image) -> Image.Image:
    scale = max(1.0, TILE_LEAST / min(image.size))
    scale = min(scale, TILE_MOST / max(image.size))
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _wrapped(text: str, font, width: int) -> list[str]:
    """The text in at most CAPTION_LINES lines of `width` pixels; the rest becomes dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = lines[:CAPTION_LINES]
        lines[-1] += " ..."
    for index, line in enumerate(lines):
        while font.getlength(line) > width:  # a word wider than the sheet, or the ellipsis
            line = line.removesuffix(" ...")[:-1] + " ..."
        lines[index] = line
    return lines
