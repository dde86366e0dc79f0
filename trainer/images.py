"""Image files as they come: whole or refused, upright, 8-bit RGB."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .config import WARNED_PIXELS, DataConfig

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
TILES = "tiles"  # of a sheet's info (sample.py): where its tiles lie, as JSON
PROGRAMS = ("EPS",)  # formats that Pillow hands to a program of the machine, here Ghostscript

# Said anew, with the file's name, by the limit below.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class _Refused(ValueError):
    """Not a fault of the file's, and told as it is."""


def image_size(source: bytes | Path, most_pixels: int = WARNED_PIXELS) -> tuple[int, int]:
    """Width and height of an image, upright, by its header alone.

    Raises: ValueError: missing, not an image, or of more pixels than these.
    """
    with _opened(source, most_pixels) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    return (height, width) if turned else (width, height)


def load_image(source: bytes | Path, most_pixels: int = WARNED_PIXELS) -> Image.Image:
    """A whole image as 8-bit RGB, turned upright as its EXIF says; transparency is dropped.

    Of an animation it is the first frame. Grey of 16 bits is scaled, not clipped; grey of floats is
    taken as 0 to 1.

    Raises: ValueError: missing, not an image, truncated, of more pixels than these, which nothing
        is decoded to find out, or its values are out of range.
    """
    with _opened(source, most_pixels) as image:
        upright = _eight_bits(ImageOps.exif_transpose(image))
        upright.info.pop("transparency", None)  # else Pillow warns that it is dropped
        return upright.convert("RGB")


@contextmanager
def _opened(source: bytes | Path, most_pixels: int) -> Iterator[Image.Image]:
    """An image whose header has been read; what Pillow raises inside is a ValueError."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format in PROGRAMS:
                raise _Refused(f"it is {image.format}, a program that would be run")
            if image.width * image.height > most_pixels:
                raise _Refused(
                    f"its {image.width} x {image.height} pixels are more than --max_image_pixels "
                    f"{most_pixels}"
                )
            yield image
    except _Refused:
        raise
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


class Files:
    """The image files of a dataset, none of which lies outside its folder. Picklable.

    Args:
        homes: folders that files may lie in.
    """

    def __init__(self, section: DataConfig, homes: Sequence[Path]) -> None:
        self._homes = None if section.allow_outside_files else [home.resolve() for home in homes]
        self._most_pixels = section.max_image_pixels

    def load(self, source: bytes | Path) -> Image.Image:
        """As `load_image`. Raises: ValueError."""
        return load_image(self._checked(source), self._most_pixels)

    def size(self, source: bytes | Path) -> tuple[int, int]:
        """As `image_size`. Raises: ValueError."""
        return image_size(self._checked(source), self._most_pixels)

    def inside(self, path: Path) -> Path:
        """The path, once it is known not to lead out of the folder, as a link may.

        Raises: ValueError: it does.
        """
        if self._homes is not None:
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in self._homes):
                raise ValueError(
                    "it leads out of the dataset's folder; --allow_outside_files takes it"
                )
        return path

    def _checked(self, source: bytes | Path) -> bytes | Path:
        return source if isinstance(source, bytes) else self.inside(source)
