"""The page of `fusedit check-data`: one HTML file with everything in it, thumbnails too."""

import base64
import io
from html import escape
from typing import Any

from PIL import Image

from .check_data import HINT, KINDS, Found, Survey, read_pair
from .rows import BadSample, Rows

SHOWN = 12  # of each finding, the worst
THUMBNAIL = (192, 192)  # pixels at most
INSTRUCTION_SHOWN = 300  # characters


def page(report: dict[str, Any], found: Survey, rows: Rows) -> str:
    """HTML of a `Survey.report`, that asks nothing of the network and runs nothing."""
    sizes = report["sizes"]
    facts = {
        "rows": report["rows"],
        "pairs": report["pairs"],
        "smallest original": _size(sizes["smallest"]),
        "largest original": _size(sizes["largest"]),
        "instruction lengths": report["instruction_lengths"],
        "verdict": "nothing that stops or spoils training"
        if report["clean"]
        else "some of it would stop or spoil training",
    }
    table = "".join(f"<tr><th>{escape(k)}<td>{escape(str(v))}" for k, v in facts.items())
    parts = [_section(kind, found, rows) for kind in KINDS]
    return PAGE.format(title=escape(report["dataset"]), facts=table, findings="".join(parts))


def _section(kind: str, found: Survey, rows: Rows) -> str:
    does, means = KINDS[kind]
    count = len(found.found[kind])
    note = "a hint, not a verdict; " if does == HINT else ""
    shown = "".join(_figure(one, rows) for one in found.worst(kind, SHOWN))
    more = f"<p>and {count - SHOWN} more, in the JSON file" if count > SHOWN else ""
    return (
        f"<section><h2>{escape(kind)}: {count}</h2><p>{escape(note + means)}"
        f'<div class="pairs">{shown}</div>{more}</section>'
    )


def _figure(one: Found, rows: Rows) -> str:
    text, pictures = "", ""
    try:
        *images, instruction = read_pair(rows, one.row, one.pair)
    except BadSample:  # it is here for that
        pass
    else:
        pictures = "".join(f'<img alt="" src="{_embedded(image)}">' for image in images)
        cut = instruction[:INSTRUCTION_SHOWN]
        text = cut + (" ..." if len(cut) < len(instruction) else "")
    return (
        f"<figure>{pictures}<figcaption><b>{escape(one.name)}</b> {escape(one.detail)}"
        f'<br><q dir="auto">{escape(text)}</q></figcaption></figure>'
    )


def _embedded(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _size(size: list[int] | None) -> str:
    return "none could be read" if size is None else f"{size[0]} x {size[1]}"


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
th {{ text-align: left; padding-right: 2em; font-weight: normal; color: #666 }}
h2 {{ margin: 2em 0 0 }}
p {{ margin: 0.3em 0; color: #666 }}
.pairs {{ display: flex; flex-wrap: wrap; gap: 1em }}
figure {{ margin: 0; max-width: 24.5em }}
img {{ margin-right: 4px; vertical-align: top }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>{facts}</table>
{findings}
</body>
</html>
"""
