"""The trained pipeline as a folder that diffusers loads, its model card, and its way to the hub."""

import copy
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from .config import ModelConfig, OutputConfig
from .errors import UsageError
from .families import Family
from .files import beside, cannot_write, put_in_place, write_text
from .pretrained import INDEX_FILE

RAW_UNET = "unet_raw"
PARTS = (
    "unet",
    RAW_UNET,
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "safety_checker",
    "feature_extractor",
)
STAGING = ".export.partial"
CARD_FILE = "README.md"
PICTURE_FILE = "edits.png"
PUSHED = [  # all that ever leaves the machine: no checkpoint, log, run.toml or raw weights
    INDEX_FILE,
    CARD_FILE,
    PICTURE_FILE,
    *(f"{part}/*" for part in PARTS if part != RAW_UNET),
    "pytorch_lora_weights.safetensors",  # of an adapter
    "conv_in.safetensors",
]


def load_safety(section: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The base pipeline's safety checker and its feature extractor; empty where it has none.

    Raises: UsageError: the base names them, but they cannot be read.
    """
    base = str(section.pretrained_model_name_or_path)
    if Path(base).is_dir() and not (Path(base) / "safety_checker").is_dir():
        return {}
    place: dict[str, Any] = {"revision": section.revision, "cache_dir": section.cache_dir}
    try:
        index: Any = DiffusionPipeline.load_config(base, **place)
        if index.get("safety_checker", [None])[0] is None:
            return {}
        checker = StableDiffusionSafetyChecker.from_pretrained(
            base,
            subfolder="safety_checker",
            variant=section.variant,
            dtype=dtype,
            use_safetensors=True,
            **place,
        )
        extractor = CLIPImageProcessor.from_pretrained(base, subfolder="feature_extractor", **place)
    except (OSError, ValueError) as error:
        raise UsageError(f"{base}: its safety checker cannot be read: {_line(error)}") from None
    return {"safety_checker": checker, "feature_extractor": extractor}


def save_pipeline(
    folder: Path,
    *,
    family: Family,
    zero_null: bool,
    unet: nn.Module,
    components: Mapping[str, Any],
    raw_weights: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
) -> None:
    """Writes the whole editing pipeline into `folder`, beside whatever else is there.

    It is written next door and renamed part by part, model_index.json last: who loads the folder
    finds a whole pipeline or none. The modules given are left as they are.

    Args:
        unet: what `unet/` will hold: the averages where there are any; 8 input channels.
        zero_null: an instruction that is left out is zeros (XL alone).
        components: VAE, text encoders, tokenizers, scheduler and, where the base pipeline has them,
            safety_checker and feature_extractor.
        raw_weights: of the UNet when `unet` holds averages, by name; kept in `unet_raw/`.
        dtype: of every weight on disk.

    Raises: UsageError: the folder cannot be written.
    """
    staging = folder / STAGING
    parts = dict(components)
    for name in parts.keys() & {*family.text_encoders, "safety_checker"}:
        parts[name] = copy.deepcopy(parts[name]).to("cpu", dtype)
    modules: dict[str, Any] = {"vae": parts["vae"], "unet": unet}
    for name, module in modules.items():
        parts[name] = model_of(type(module), module.config, module.state_dict(), dtype)
    pipeline = family.make_pipeline(zero_null=zero_null, **parts)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        pipeline.save_pretrained(staging)
        if raw_weights is not None:
            raw = model_of(type(unet), parts["unet"].config, raw_weights, dtype)
            raw.save_pretrained(staging / RAW_UNET)
        _move_into_place(staging, folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder}: the pipeline cannot be written: {_line(error)}") from None


def model_of(
    cls: Any,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A diffusers model on the CPU of a configuration and these weights; none are drawn before."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        made = cls.from_config(public)
    cast = {name: w.detach().to("cpu", dtype) for name, w in weights.items()}
    made.load_state_dict(cast, assign=True)
    return made


def _move_into_place(staging: Path, folder: Path) -> None:
    (folder / INDEX_FILE).unlink(missing_ok=True)
    for part in PARTS:
        if (folder / part).exists():
            (folder / part).rename(staging / f"old_{part}")
        if (staging / part).exists():
            (staging / part).rename(folder / part)
    os.replace(staging / INDEX_FILE, folder / INDEX_FILE)
    shutil.rmtree(staging)


def model_card(
    folder: Path,
    *,
    family: Family,
    command: str,
    settings: Mapping[str, Any],
    base: str,
    dataset: str,
    versions: Mapping[str, str],
    steps: int,
    picture: Path | None,
    loading: str | None = None,
) -> None:
    """Writes README.md, the hub's model card, and the picture it shows.

    Args:
        command: what was typed; secrets in it are masked.
        base, dataset: hub names, or local folders, whose last names head the card.
        picture: PNG of edits; copied.
        loading: Python that makes `pipeline`, where the folder is none.
    """
    local_base, local_dataset = Path(base).exists(), Path(dataset).exists()
    about = ModelCardData(
        base_model=None if local_base else base,
        datasets=None if local_dataset else [dataset],
        license="other",
        license_name="license-of-the-base-model",
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=[family.tag, "instruct-pix2pix", "diffusers", "image-to-image", "fusedit"],
    )
    if picture is not None:
        _copy_picture(picture, folder / PICTURE_FILE)
    name, pipeline = folder.resolve().name, family.pipeline.__name__
    card = CARD.format(
        about=about.to_yaml(),
        name=name,
        loading=(loading or LOADING.format(name=name, pipeline=pipeline)).rstrip(),
        base=public_name(base),
        dataset=public_name(dataset),
        steps=steps,
        picture=f"![Edits: input, edit, truth]({PICTURE_FILE})\n\n" if picture else "",
        command=without_secrets(command),
        versions=_table("package", versions),
        settings=_table("setting", settings),
    )
    write_text(folder / CARD_FILE, card)


def _copy_picture(picture: Path, path: Path) -> None:
    try:
        shutil.copyfile(picture, beside(path))
        put_in_place(beside(path), path)
    except OSError as error:
        raise cannot_write(path, error) from None


CARD = """\
---
{about}
---
# {name}

Edits images from instructions: {base}, trained as InstructPix2Pix on {dataset} for {steps} steps.

{picture}## Use

```python
{loading}
image = load_image("input.png")
edited = pipeline(
    "turn it into a painting",
    image=image,
    num_inference_steps=20,
    image_guidance_scale=1.5,
    guidance_scale=10,
    generator=torch.Generator("cuda").manual_seed(0),
).images[0]
edited.save("edited.png")
```

## Training

```bash
{command}
```

{versions}<details><summary>All settings</summary>

{settings}</details>

The weights carry the licence of the model they were trained from, and its limits of use.
"""


LOADING = """\
import torch
from diffusers import {pipeline}
from diffusers.utils import load_image

model = "{name}"  # this folder, or its name on the hub
pipeline = {pipeline}.from_pretrained(model).to("cuda")
"""


def public_name(name: str) -> str:
    """A hub's name as it is, of a local folder its last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def _table(heading: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
    return f"| {heading} | |\n|-|-|\n{rows}\n"


def without_secrets(command: str) -> str:
    """The command with a hub token, as a flag's value or anywhere else, masked."""
    command = re.sub(r"(--\S*hub[-_]token(?:\s+|=))('[^']*'|\"[^\"]*\"|\S+)", r"\1***", command)
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", command)


def check_push(section: OutputConfig) -> str:
    """Makes the repository on the hub, if it is not there, and returns its full name.

    Raises: UsageError: no token, one that cannot write, a bad name, or no network.
    """
    api = HfApi(token=section.hub_token)
    try:
        token_kind = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if token_kind == "read":
            raise ValueError("the token can only read; make one that can write")
        return api.create_repo(_repository(section), exist_ok=True).repo_id
    except (HTTPError, OSError, ValueError) as error:
        raise _cannot_push(section, error) from None


def push(section: OutputConfig, message: str) -> str:
    """Sends the exported pipeline, its card and picture, and returns their address.

    Raises: UsageError: the hub refuses, or cannot be reached.
    """
    api = HfApi(token=section.hub_token)
    try:
        repository = api.create_repo(_repository(section), exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=section.output_dir,
            allow_patterns=PUSHED,
            commit_message=message,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise _cannot_push(section, error) from None
    return str(repository)


def _repository(section: OutputConfig) -> str:
    return section.hub_model_id or Path(section.output_dir).resolve().name


def _cannot_push(section: OutputConfig, error: Exception) -> UsageError:
    reason = without_secrets(_line(error))
    for token in filter(None, (section.hub_token, get_token())):
        reason = reason.replace(token, "***")
    return UsageError(
        f"--push_to_hub {_repository(section)}: {reason}; log in with `hf auth login`, or give "
        "--hub_token and --hub_model_id"
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
