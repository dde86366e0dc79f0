"""Every shape the fused ops meet in the UNets of Stable Diffusion 1.5 and XL, with its count.

A test holds the lists against the modules of the true architectures.
"""

from dataclasses import dataclass

GROUPS = 32


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
class Shapes:
    """What one forward of a UNet normalizes and gates, for images of a size."""

    group_norms: list[GroupNormShape]
    layer_norms: list[RowShape]
    geglus: list[RowShape]
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
# (transformer blocks, width, halvings): each has three LayerNorms and one GEGLU of four widths
SD15_BLOCKS = [(5, 320, 0), (5, 640, 1), (5, 1280, 2), (1, 1280, 3)]
SDXL_BLOCKS = [(10, 640, 1), (60, 1280, 2)]
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
    tokens = [(count, (latent >> halvings) ** 2, width) for count, width, halvings in blocks]
    return Shapes(
        [
            GroupNormShape(times, channels, latent >> halvings, eps, silu, time_embedding)
            for times, channels, halvings, eps, silu, time_embedding in norms
        ],
        [RowShape(3 * count, rows, width) for count, rows, width in tokens],
        [RowShape(count, rows, 4 * width) for count, rows, width in tokens],
        parameters,
    )
