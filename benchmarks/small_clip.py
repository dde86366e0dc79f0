"""A small CLIP of the demo's world, for the metrics that see by one: minutes on two CPU cores.

It learns from scenes that neither the demo's base nor its runs have seen, each with its caption.
Both scenes of an edit are in one batch, so that it has to tell them apart. Its scores are of this
world alone, and no more than a yardstick for models of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel
from transformers import CLIPTokenizer as Tokenizer

from ..launch.demo.base_parts import TOKENS, build_tokenizer
from ..launch.demo.scene import SIZE
from ..launch.demo.world import make_pair
from .harness import say

WORLD_SEED = 4  # 0 to 3 are the demo's
PAIRS, STEPS, BATCH = 2000, 600, 64  # edits drawn, optimizer steps, edits a step
HELD_BACK = 200  # further edits, to see how well it tells captions apart
WIDTH = 64


def save_small_clip(folder: Path, *, pairs: int = PAIRS, steps: int = STEPS) -> float:
    """Trains and writes it, for `--clip`.

    Returns: of scenes held back, the share whose own caption is nearer than that of the other scene
        of its edit.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    side = {"height": SIZE, "width": SIZE}
    prepared = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}}
    told = json.dumps({**prepared, "crop_size": side})
    (folder / "preprocessor_config.json").write_text(told)
    prepare = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels, tokens = _drawn(prepare, tokenizer, range(pairs + HELD_BACK))
    model = CLIPModel(_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(0, pairs, (BATCH,))
        batch = torch.cat([chosen, chosen + pairs + HELD_BACK])  # before the edit, after it
        loss = model(input_ids=tokens[batch], pixel_values=pixels[batch], return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"small CLIP: step {step} of {steps}, loss {loss.item():.3f}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _told_apart(model, pixels, tokens, pairs)


def _drawn(prepare: Any, tokenizer: Tokenizer, indices: range) -> tuple[Tensor, Tensor]:
    """Pixels and tokens of all scenes before their edits, then of all after them."""
    edits = [make_pair(index, WORLD_SEED) for index in indices]
    images = [edit.original for edit in edits] + [edit.edited for edit in edits]
    texts = [edit.caption for edit in edits] + [edit.edited_caption for edit in edits]
    pixels = prepare(images=images, return_tensors="pt")["pixel_values"]
    read = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return pixels, read["input_ids"]


def _config(tokenizer: Tokenizer) -> CLIPConfig:
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    shape |= {"num_hidden_layers": 2, "projection_dim": WIDTH}
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    words = {name: getattr(tokenizer, name) for name in special}
    words |= {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    seen = {"image_size": SIZE, "patch_size": 16}
    return CLIPConfig(
        text_config={**shape, **words}, vision_config={**shape, **seen}, projection_dim=WIDTH
    )


@torch.no_grad()
def _told_apart(model: CLIPModel, pixels: Tensor, tokens: Tensor, pairs: int) -> float:
    before = torch.arange(pairs, pairs + HELD_BACK)
    after = before + pairs + HELD_BACK
    out = model(input_ids=tokens[torch.cat([before, after])],
                pixel_values=pixels[torch.cat([before, after])])  # fmt: skip
    alike = out.image_embeds @ out.text_embeds.T
    own = alike.diagonal()
    other = alike.diagonal(HELD_BACK).tolist() + alike.diagonal(-HELD_BACK).tolist()
    return (own > torch.tensor(other)).float().mean().item()
