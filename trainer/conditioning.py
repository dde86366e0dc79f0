"""Which samples train without their instruction, without their image, or without both.

Source: Brooks et al. 2023 (arXiv:2211.09800), section 3.2.1, and the authors' ddpm_edit.py, which
uses one draw for all three cases; rates of their own for each case are ours.
"""

from torch import Tensor

# What the UNet is given: (text is dropped, image is dropped), in the order of `condition_of`.
CONDITIONS = {
    "full": (False, False),
    "no_text": (True, False),
    "no_image": (False, True),
    "neither": (True, True),
}


def drop_masks(draw: Tensor, rates: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """Cuts [0, 1) into: text alone, text and image, image alone, neither.

    Args:
        draw: [n] fp32, uniform in [0, 1), one for each sample.
        rates: of dropping the text alone, both, and the image alone; their sum is at most 1.

    Returns: drop_text, drop_image: [n] bool, True where dropped.
    """
    text, both, image = rates
    drop_text = draw < text + both
    drop_image = (draw >= text) & (draw < text + both + image)
    return drop_text, drop_image


def condition_of(drop_text: Tensor, drop_image: Tensor) -> Tensor:
    """[n] int64, which of CONDITIONS each sample is of."""
    return drop_text.long() + 2 * drop_image.long()
