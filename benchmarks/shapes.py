"""Every shape the fused ops meet in the UNets of Stable Diffusion 1.5 and XL, with its count.

A test holds the lists against the modules of the true architectures.
"""

from dataclasses import dataclass

GROUPS = 32
TEXT_TOKENS = 77  # of CLIP


@dataclass(frozen=True, slots=True)
class GroupNormShape:
    times: int  # in one forward
    channels: int
    size: int  # height and width
    eps: float
    silu: bool
    time_embedding: bool  # one is added to the input


@dataclass(frozen=True, slots=True)
class RowShape:
    """Of LayerNorm (width in and out) and GEGLU (2 width in, width out)."""

    times: int
    tokens: int  # per image
    width: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Self-attention, where there are as many keys as queries; else cross-attention."""

    times: int
    heads: int
    width: int  # of a head
    queries: int  # per image
    keys: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """What one forward of a UNet normalizes, gates and attends to, for images of a size."""

    group_norms: list[GroupNormShape]
    layer_norms: list[RowShape]
    geglus: list[RowShape]
    attentions: list[AttentionShape]
    parameters: int


# (count, channels, halvings of the latents, eps, silu, time embedding)
SD15_NORMS = [
    (5, 320, 0, 1e-6, False, False), (3, 320, 0, 1e-5, True, False),
    (5, 320, 0, 1e-5, True, True), (2, 640, 0, 1e-5, True, False),
    (1, 960, 0, 1e-5, True, False), (1, 320, 1, 1e-5, True, False),
    (5, 640, 1, 1e-6, False, False), (1, 640, 1, 1e-5, True, False),
    (5, 640, 1, 1e-5, True, True), (1, 960, 1, 1e-5, True, False),
    (1, 1280, 1, 1e-5, True, False), (1, 1920, 1, 1e-5, True, False),
    (1, 640, 2, 1e-5, True, False), (5, 1280, 2, 1e-6, False, False),
    (1, 1280, 2, 1e-5, True, False), (5, 1280, 2, 1e-5, True, True),
    (1, 1920, 2, 1e-5, True, False), (2, 2560, 2, 1e-5, True, False),
    (1, 1280, 3, 1e-6, False, False), (4, 1280, 3, 1e-5, True, False),
    (7, 1280, 3, 1e-5, True, True), (3, 2560, 3, 1e-5, True, False),
]  # fmt: skip
SDXL_NORMS = [
    (3, 320, 0, 1e-5, True, False), (5, 320, 0, 1e-5, True, True),
    (2, 640, 0, 1e-5, True, False), (1, 960, 0, 1e-5, True, False),
    (1, 320, 1, 1e-5, True, False), (5, 640, 1, 1e-6, False, False),
    (1, 640, 1, 1e-5, True, False), (5, 640, 1, 1e-5, True, True),
    (1, 960, 1, 1e-5, True, False), (1, 1280, 1, 1e-5, True, False),
    (1, 1920, 1, 1e-5, True, False), (1, 640, 2, 1e-5, True, False),
    (6, 1280, 2, 1e-6, False, False), (3, 1280, 2, 1e-5, True, False),
    (7, 1280, 2, 1e-5, True, True), (1, 1920, 2, 1e-5, True, False),
    (2, 2560, 2, 1e-5, True, False),
]  # fmt: skip
# (transformer blocks, width, halvings, heads): each has three LayerNorms, one GEGLU of four widths,
# self-attention and cross-attention
SD15_BLOCKS = [(5, 320, 0, 8), (5, 640, 1, 8), (5, 1280, 2, 8), (1, 1280, 3, 8)]
SDXL_BLOCKS = [(10, 640, 1, 10), (60, 1280, 2, 20)]
UNETS = {
    "sd15": (SD15_NORMS, SD15_BLOCKS, 859_532_484),
    "sdxl": (SDXL_NORMS, SDXL_BLOCKS, 2_567_475_204),
}


def shapes(preset: str) -> Shapes:
    """The shapes of a preset: UNet and pixels, "sd15-512".

    Raises: ValueError, for a UNet not in UNETS or pixels that are no multiple of 64.
    """
    unet, _, pixels = preset.partition("-")
    if unet not in UNETS or not pixels.isdecimal() or int(pixels) % 64:
        raise ValueError(
            f"a preset is one of {', '.join(UNETS)}, a dash, and pixels divisible by 64, "
            f"as in sd15-512; got {preset!r}"
        )
    norms, blocks, parameters = UNETS[unet]
    latent = int(pixels) // 8
    tokens = [
        (count, (latent >> halvings) ** 2, width, heads) for count, width, halvings, heads in blocks
    ]
    return Shapes(
        [
            GroupNormShape(times, channels, latent >> halvings, eps, silu, time_embedding)
            for times, channels, halvings, eps, silu, time_embedding in norms
        ],
        [RowShape(3 * count, rows, width) for count, rows, width, _ in tokens],
        [RowShape(count, rows, 4 * width) for count, rows, width, _ in tokens],
        [
            AttentionShape(count, heads, width // heads, rows, keys)
            for count, rows, width, heads in tokens
            for keys in (rows, TEXT_TOKENS)
            if keys > 1  # one key has no gradient but what rounding leaves: nothing to hold it to
        ],
        parameters,
    )
