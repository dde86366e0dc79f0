"""What a program that calls `train` is told of its run, and a validation of its own."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from .errors import UsageError

OWN = {"step", "time", "event", "told"}  # keys of the log's lines


class Callback:
    """Override what you need; none of it changes what is trained.

    The trainer's random numbers are functions of the step, so a callback may draw as it likes.
    """

    def on_log(self, step: int, values: dict[str, float]) -> None:
        """On rank 0, after each line of log.jsonl with its numbers: `loss`, `grad_norm`, `lr`,
        `images_per_second`, ..., and at a validation `held_out/full` and so on."""

    def on_image(self, step: int, image: Image.Image) -> None:
        """On rank 0, after each validation with pictures: the sheet of inputs, edits and truths."""

    def on_validate(self, step: int, pipeline: Any) -> dict[str, float]:
        """On all ranks, at each validation (--validation_steps), held-out rows or not.

        Args:
            pipeline: the diffusers editing pipeline around the UNet in training, with its averaged
                weights under --use_ema. Its modules are those that train: take nothing of it along.
        Returns: what rank 0's goes into the log as.
        """
        return {}


class Callbacks:
    """All callbacks of a run, as one tracker of the log."""

    identity = None  # a tracker's run to go on with

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    @property
    def validate(self) -> bool:
        """Whether one of them does at a validation."""
        return any(type(one).on_validate is not Callback.on_validate for one in self._callbacks)

    def on_validate(self, step: int, pipeline: Any) -> dict[str, float]:
        """What all of them found."""
        found: dict[str, float] = {}
        for one in self._callbacks:
            told = one.on_validate(step, pipeline)
            try:
                found |= {str(name): float(value) for name, value in told.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise UsageError(
                    f"on_validate of {type(one).__name__} must return numbers by name: {error}"
                ) from None
        if taken := sorted(OWN & found.keys()):
            raise UsageError(f"on_validate may not return {', '.join(taken)}, a log line's own")
        return found

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for one in self._callbacks:
            one.on_log(step, dict(values))

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        if name == "validation":  # others are curves
            for one in self._callbacks:
                one.on_image(step, image)

    def close(self) -> None:
        pass
