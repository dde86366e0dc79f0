"""What a cache of encodings is of: everything that its numbers depend on, and a hash over that.

Not among it: seed, batch, ranks, learning rate, and which rows a run takes. They may change.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .buckets import Size
from .config import DataConfig
from .families import TextEncoder

FORMAT = 2
KEY_DIGITS = 16  # of the hash, in a folder's name
OF_A_FOLDER = (
    "_name_or_path",
    "_diffusers_version",
    "transformers_version",
    "torch_dtype",
    "dtype",
)


def key_parts(
    dataset: str,
    rows: int,
    section: DataConfig,
    sizes: Sequence[Size],
    vae: nn.Module,
    text_encoder: TextEncoder,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> dict[str, Any]:
    """The parts of a cache's key in the clear, for its manifest.

    Args:
        dataset: fingerprint of its rows.
        rows: how many it has.
        sizes: of its buckets.
        vae, text_encoder: in fp32, on the CPU.
        dtype: of the text encoders and of what is kept.
        vae_dtype: what the VAE will encode in.
    """
    return {
        "format": FORMAT,
        "dataset": dataset,
        "rows": rows,
        "columns": [
            section.original_image_column,
            section.edited_image_column,
            section.edit_prompt_column,
        ],
        "resolution": section.resolution,
        "sizes": [list(size) for size in sizes],
        "max_resize": section.max_resize or section.resolution,
        "interpolation": section.interpolation,
        "center_crop": section.center_crop,
        "crops_coords_top_left": [
            section.crops_coords_top_left_h,
            section.crops_coords_top_left_w,
        ],
        "random_flip": section.random_flip,
        "cache_crops": section.cache_crops,
        "vae": _of_module(vae),
        "text_encoders": [_of_module(part) for part in text_encoder.parts.values()],
        "tokenizers": [_of_tokenizer(tokenizer) for tokenizer in tokenizers],
        "dtype": str(dtype).removeprefix("torch."),
        "vae_dtype": str(vae_dtype).removeprefix("torch."),
    }


def key_of(parts: dict[str, Any]) -> str:
    """The first hex digits of the hash over the parts."""
    return hashlib.sha256(_text(parts).encode()).hexdigest()[:KEY_DIGITS]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _of_module(module: nn.Module) -> str:
    """Of configuration and weights as loaded, so that names and formats of files do not count."""
    config: Any = module.config
    config = config if isinstance(config, dict) else config.to_dict()
    kept = {name: value for name, value in config.items() if name not in OF_A_FOLDER}
    digest = hashlib.sha256(_text(kept).encode())
    for name, weights in sorted(module.state_dict().items()):
        digest.update(f"{name} {weights.dtype} {list(weights.shape)}".encode())
        digest.update(weights.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its vocabulary and rules, its length and its special tokens."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest = hashlib.sha256(_text([tokenizer.model_max_length, special]).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # How it pads and cuts is set by each call of it.
        digest.update(_text({**state, "padding": None, "truncation": None}).encode())
    else:  # transformers 4 has one in Python
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(tokenizer.save_vocabulary(folder)):
                digest.update(Path(file).name.encode() + Path(file).read_bytes())
    return digest.hexdigest()
