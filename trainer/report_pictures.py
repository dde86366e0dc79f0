"""The edits of a run's validations, one by one, small enough to lie inside a page.

Validation leaves sheets, each of which says where its tiles are. What does not change from sheet to
sheet, inputs and truths, is kept once.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from .images import DECODE_ERRORS, TILES
from .series import spread

MOST_SHEETS, MOST_PICTURES = 20, 12  # with one truth and input each: 264 images
MOST_SIDE = 320  # pixels
QUALITY = 82  # of WebP
CAPTION = "caption"


class Pictures:
    """Sheets cut into their pictures; one that was cut before is not read again."""

    def __init__(self) -> None:
        self.cut: dict[tuple[str, int], list[dict[str, str | None]]] = {}  # by name and time

    def read(self, folder: Path) -> dict[str, Any]:
        """Sheets of a folder, the newest and others evenly before it.

        Returns: images: data URIs, each once; sheets: by step, their pictures, which name images
            by index; left_out: how many sheets are not here; damaged: files that cannot be read.
        """
        paths = sorted(folder.glob("step-*.png"))
        places: dict[str, int] = {}
        sheets, damaged = [], []
        chosen = [paths[index] for index in spread(len(paths), MOST_SHEETS)]
        names = {path.name for path in chosen}
        for path in chosen:
            try:
                step, pictures = int(path.stem.split("-")[1]), self._pictures(path)
            except (*DECODE_ERRORS, LookupError, TypeError) as error:
                damaged.append(f"{path.name}: {error}")
                continue
            named = [{name: _place(one, name, places) for name in one} for one in pictures]
            sheets.append({"step": step, "pictures": named})
        self.cut = {key: found for key, found in self.cut.items() if key[0] in names}
        return {
            "images": [*places],
            "sheets": sheets,
            "left_out": len(paths) - len(chosen),
            "damaged": damaged,
        }

    def _pictures(self, path: Path) -> list[dict[str, str | None]]:
        key = (path.name, path.stat().st_mtime_ns)
        if key not in self.cut:
            self.cut[key] = cut(path)
        return self.cut[key]


def _place(picture: dict[str, str | None], name: str, places: dict[str, int]) -> str | int | None:
    """The caption as it is; of an image its index, the next one for a new image."""
    value = picture[name]
    if name == CAPTION or value is None:
        return value
    return places.setdefault(value, len(places))


def cut(path: Path) -> list[dict[str, str | None]]:
    """The pictures of a sheet: caption and, by heading, images as data URIs.

    Raises: what Pillow raises, and what a missing or wrong description does.
    """
    with Image.open(path) as sheet:
        sheet.load()
        return [
            {
                **{name: box and _encoded(sheet.crop(box)) for name, box in one["boxes"].items()},
                CAPTION: str(one["caption"]),
            }
            for one in json.loads(_description(sheet))[:MOST_PICTURES]
        ]


def _description(sheet: Image.Image) -> str:
    """Of where its pictures are."""
    if TILES not in sheet.info:
        raise ValueError("it does not say where its pictures are; an older version made it")
    return sheet.info[TILES]


def _encoded(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
