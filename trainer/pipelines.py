"""A saved editing pipeline, from a folder or the hub."""

import re
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from .adapter_files import LORA_FILE, MERGED
from .errors import UsageError
from .families import family_by_parts


def load_pipeline(model: str) -> Any:
    """A saved editing pipeline, in fp32 on the CPU. Raises: UsageError: it is none."""
    if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UsageError(f"{model}: there is no such model folder")
    if (Path(model) / LORA_FILE).is_file():
        raise UsageError(
            f"{model} holds an adapter without its base: `fusedit export {model} --merge` writes "
            f"{Path(model) / MERGED}, which is whole"
        )
    try:
        index: Any = DiffusionPipeline.load_config(model)
        pipeline = family_by_parts(index).pipeline.from_pretrained(
            model,
            low_cpu_mem_usage=False,  # else a warning where accelerate is not installed
            use_safetensors=True,
        )
    except (HTTPError, OSError, ValueError, TypeError) as error:
        where = "" if Path(model).is_dir() else "no folder here, and not to be had from the hub: "
        raise UsageError(f"{model}: {where}{str(error).strip().splitlines()[0]}") from None
    channels = pipeline.unet.config["in_channels"]
    if channels != 8:
        raise UsageError(
            f"{model} is not an InstructPix2Pix pipeline: its UNet takes {channels} channels, not "
            "8; train it with `fusedit train` first"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
