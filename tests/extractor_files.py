"""Tiny CLIP, DINO and LPIPS networks on disk, with random weights that are the same each time."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_tokenizer
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

ALEX = {  # convolution of a slice: channels out, in, side of the kernel
    "slice1.0": (4, 3, 11),
    "slice2.3": (6, 4, 5),
    "slice3.6": (8, 6, 3),
    "slice4.8": (6, 8, 3),
    "slice5.10": (6, 6, 3),
}
VGG = {
    f"slice{number + 1}.{index}": (4, 3 if index == 0 else 4, 3)
    for number, indices in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)))
    for index in indices
}


def save_clip(folder: Path) -> str:
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "projection_dim": 8}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    words |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    words |= {"pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**shape, **words},
            vision_config={**shape, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_preparation(folder, "CLIPImageProcessor", 16)
    return str(folder)


def save_dino(folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    _save_preparation(folder, "ViTImageProcessor", 16)
    return str(folder)


def save_lpips(folder: Path, layers: dict[str, tuple[int, int, int]] = ALEX) -> str:
    draw = torch.Generator().manual_seed(2)
    weights: dict[str, torch.Tensor] = {}
    for name, (out, channels, side) in layers.items():
        weights[f"net.{name}.weight"] = torch.randn(out, channels, side, side, generator=draw) / 5
        weights[f"net.{name}.bias"] = torch.randn(out, generator=draw) / 5
    lasts = {name.split(".")[0]: shape[0] for name, shape in layers.items()}
    for level, out in enumerate(lasts.values()):
        weights[f"lin{level}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=draw)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "lpips.safetensors")
    return str(folder)


def _save_preparation(folder: Path, kind: str, side: int) -> None:
    size = (
        {"shortest_edge": side} if kind == "CLIPImageProcessor" else {"height": side, "width": side}
    )
    told = {
        "image_processor_type": kind,
        "size": size,
        "crop_size": {"height": side, "width": side},
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(told))
