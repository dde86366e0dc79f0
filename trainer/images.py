"""Image files as they come: whole or refused, upright, 8-bit RGB."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

DECODE_ERRORS = (  # what Pillow raises for broken files
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose width is seen as height


def image_size(source: bytes | Path) -> tuple[int, int]:
    """Width and height of an image, upright, by its header alone.

    Raises: ValueError: missing, or not an image.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    except DECODE_ERRORS as error:
        raise ValueError(f"it cannot be decoded: {error}") from error
    return (height, width) if turned else (width, height)


def load_image(source: bytes | Path) -> Image.Image:
    """A whole image as 8-bit RGB, turned upright as its EXIF says; transparency is dropped.

    Grey of 16 bits is scaled, not clipped; grey of floats is taken as 0 to 1.

    Raises: ValueError: missing, not an image, truncated, or its values are out of range.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except UnidentifiedImageError:
        raise ValueError("it is no image, or of a kind that Pillow does not read") from None
    except DECODE_ERRORS as error:
        raise ValueError(f"it cannot be decoded: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes I and I;16) or of floats (F) as mode L; other modes as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    white = 1.0 if image.mode == "F" else 65535.0
    values = np.asarray(image, dtype=np.float64) / white
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"grey of mode {image.mode} with values outside 0 to {white:g}")
    return Image.fromarray((values * 255).round().astype(np.uint8))
