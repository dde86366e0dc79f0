"""fusedit edit MODEL IMAGE "instruction" -o OUT: one picture edited by a trained pipeline."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image
from tyro.conf import Positional, arg

from ..trainer.adapter_files import LORA_FILE, MERGED
from ..trainer.draws import Purpose, draw_normal
from ..trainer.errors import UsageError
from ..trainer.families import family_by_parts
from ..trainer.sample import edit_images, nearest_size, open_image
from .train import quiet_libraries

MISTAKE = 2

Model = Annotated[str, Positional, arg(metavar="MODEL")]
Source = Annotated[str, Positional, arg(metavar="IMAGE")]
Instruction = Annotated[str, Positional, arg(metavar="INSTRUCTION")]


@dataclass(frozen=True, slots=True)
class EditFlags:
    """Edits an image by an instruction."""

    model: Model  # folder of an InstructPix2Pix pipeline, or its name on the hub
    image: Source  # path or http(s) URL
    instruction: Instruction  # for instance "make it snowy"
    output: Annotated[Path, arg(aliases=["-o"])]  # image file to write
    guidance_scale: float = 7.5  # how closely to follow the instruction; 1: without any guidance
    image_guidance_scale: float = 1.5  # how closely to keep to the image; 1 or more
    steps: int = 20  # denoising steps
    seed: int = 0  # another seed, another edit
    resolution: int = 512  # pixels, limit of the long side; smaller images keep their size
    device: str | None = None  # default: the GPU if there is one

    def __post_init__(self) -> None:
        if self.steps < 1 or self.resolution < 1:
            raise UsageError("--steps and --resolution must be 1 or more")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed must be from 0 to 2**64 - 1, got {self.seed}")
        if self.output.suffix.lower() not in Image.registered_extensions():
            raise UsageError(f"-o {self.output}: end the name in .png, .jpg or .webp")
        if self.output.is_dir() or not self.output.parent.is_dir():
            raise UsageError(f"-o {self.output}: is a folder, or lies in one that does not exist")


def main(argv: list[str]) -> int:
    """Edits and returns the exit code: 0, or 2 for a mistake, told in one line."""
    quiet_libraries()
    try:
        flags = tyro.cli(EditFlags, prog="fusedit edit", args=argv, use_underscores=True)
        edited = _edit(flags)
        _write(edited, flags.output)
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    print(f"{flags.output}: {edited.width} x {edited.height}")
    return 0


def _edit(flags: EditFlags) -> Image.Image:
    image = open_image(flags.image)
    pipeline = _load(flags.model, _device(flags.device))
    factor = pipeline.vae_scale_factor
    width, height = nearest_size(image.size, factor, flags.resolution)
    noise = draw_normal(
        flags.seed,
        Purpose.VALIDATION_NOISE,
        torch.tensor([0]),
        (pipeline.vae.config["latent_channels"], height // factor, width // factor),
    )
    try:
        [edited] = edit_images(
            pipeline,
            [image],
            [flags.instruction],
            noise,
            steps=flags.steps,
            guidance_scale=flags.guidance_scale,
            image_guidance_scale=flags.image_guidance_scale,
        )
    except torch.OutOfMemoryError:
        raise UsageError(
            f"the GPU's memory does not hold {width} x {height} pixels: lower --resolution"
        ) from None
    return edited


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by build
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _load(model: str, device: torch.device) -> Any:
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
            use_safetensors=True,
            low_cpu_mem_usage=False,  # else a warning where accelerate is not installed
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
    pipeline.set_progress_bar_config(disable=None)  # shown in a terminal alone
    return pipeline.to(device, torch.float16) if device.type == "cuda" else pipeline.to(device)


def _write(image: Image.Image, output: Path) -> None:
    beside = output.with_name(f".partial-{output.name}")
    try:
        image.save(beside)
        os.replace(beside, output)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"-o {output}: cannot be written: {error}") from None
