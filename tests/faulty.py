"""Small folders of pairs, of images as they are given."""

import io
import json

from PIL import Image

from fusedit.trainer.config import DataConfig
from fusedit.trainer.rows import open_rows

RED = (255, 0, 0)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(side):
    """A whole PNG of this many black pixels a side, some kB long."""
    return encoded(Image.new("1", (side, side)), optimize=True)


def save_set(folder, images, prompts=None):
    """A folder of pairs of each of these images, original and edited alike."""
    folder.mkdir(exist_ok=True)
    lines = []
    for row, data in enumerate(images):
        (folder / f"{row}.png").write_bytes(data)
        prompt = "make it red" if prompts is None else prompts[row]
        line = {"input_image": f"{row}.png", "edited_image": f"{row}.png", "edit_prompt": prompt}
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def opened(folder, **settings):
    section = DataConfig(train_data_dir=str(folder), resolution=16, **settings)
    return open_rows(section, cache_dir=str(folder.parent / "cache"))
