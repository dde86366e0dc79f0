"""The untrained parts of the demo's base, small enough for two CPU cores and for the repository."""

# diffusers and transformers take and return more than their annotations say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections import Counter
from itertools import pairwise

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scene import SIZE
from .world import vocabulary

TOKENS = 24  # the longest caption, with its start and end
TEXT_WIDTH = 64
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_vae() -> AutoencoderKL:
    """64 px to [4, 16, 16] latents; narrow at full size, where the encoder's time goes."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes, as in CLIP's and GPT-2's byte-level BPE."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until each word is one token."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(parts) > 1 for parts in split):
        counts = Counter(pair for parts in split for pair in pairwise(parts))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        split = [_merged(parts, best) for parts in split]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a small vocabulary: any text in bytes, the world's words whole."""
    symbols, merges = _byte_symbols(), _merges(vocabulary())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [first + second for first, second in merges]
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    nn.init.normal_(model.get_input_embeddings().weight)  # apart, also for words no caption has
    return model
