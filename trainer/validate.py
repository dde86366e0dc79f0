"""What is looked at during training: pictures, and the held-out loss by condition.

All ranks share the work. Draws have purposes of their own and are keyed by row, so validation
changes nothing in training and shows the same noise every time.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .conditioning import CONDITIONS
from .config import ValidationConfig
from .data import EditPairs, collate
from .draws import Purpose, draw_normal
from .ema import Ema
from .encoders import Encoders
from .errors import UsageError
from .files import beside, cannot_write, put_in_place
from .log import RunLog
from .loss import HELD_OUT, EditLoss
from .sample import edit_images, grid, save_grid
from .world import World

HELD_OUT_PICTURES = 8  # held-out rows that are shown


class Picture(NamedTuple):
    """One edit to be shown."""

    original: Image.Image  # resolution x resolution
    instruction: str
    truth: Image.Image | None
    noise_position: int  # which fixed noise it starts from


class Validator:
    """Shows what the run can do, every so many steps, on all ranks together.

    Args:
        pipeline: the editing pipeline around the UNet in training.
        pairs: the held-out rows are taken from.
        rows: the held-out rows.
        image: to edit by --validation_prompt, resolution x resolution, or None.
        every: optimizer steps between two validations.
        folder: where grids are written, step-000500.png.
        batch_size: pictures sampled, or rows whose loss is taken, at once; guidance triples it.
        on_bad_sample: what an unreadable held-out row does, stop or skip.
        asked: a validation of the caller's own, of step and pipeline; its numbers are logged.
    """

    def __init__(
        self,
        section: ValidationConfig,
        pipeline: Any,
        encoders: Encoders,
        loss_fn: EditLoss,
        pairs: EditPairs,
        rows: Sequence[int],
        image: Image.Image | None,
        every: int,
        folder: Path,
        world: World,
        batch_size: int,
        on_bad_sample: str,
        asked: Callable[[int, Any], dict[str, float]] | None = None,
    ) -> None:
        self.section, self.pipeline = section, pipeline
        self.encoders, self.loss_fn = encoders, loss_fn
        self.pairs, self.rows = pairs, rows
        self.every, self.folder, self.world = every, folder, world
        self.batch_size, self.on_bad_sample = batch_size, on_bad_sample
        self.asked = asked
        self.pictures = _pictures(section, image, pairs, rows)

    def due(self, step: int, last_step: int) -> bool:
        wanted = bool(self.pictures or self.rows or self.asked)
        return wanted and (step % self.every == 0 or step == last_step)

    def run(self, step: int, ema: Ema | None, log: RunLog) -> None:
        """Logs the held-out losses and the grid of edits, by the EMA's weights if there are any."""
        with ema.in_place() if ema is not None else nullcontext():
            if self.rows:
                log.scalars(step, self._held_out_losses())
            if self.pictures:
                edited = self._sample()
                with self.world.together():
                    if self.world.is_main:
                        self._show(step, edited, log)
            if self.asked is not None:
                log.scalars(step, self.asked(step, self.pipeline))

    @torch.no_grad()
    def _held_out_losses(self) -> dict[str, float]:
        """Mean loss over held-out rows for each of CONDITIONS, with fixed noise and timesteps.

        Guidance is being learned while the four part.
        """
        mine: list[int | None] = [*self.rows[self.world.rank :: self.world.size]]
        # As often as every rank: a sharded UNet is run by all of them together.
        mine += [None] * (-(-len(self.rows) // self.world.size) - len(mine))
        totals = torch.zeros(len(CONDITIONS) + 1, device=self.world.device)
        errors: list[str] = []
        for start in range(0, len(mine), self.batch_size):
            rows = mine[start : start + self.batch_size]
            batch = collate(
                [self.pairs.blank() if row is None else self.pairs.sample(row) for row in rows]
            )
            errors += batch.errors
            samples = self.encoders.encode(batch)
            for index, drops in enumerate(CONDITIONS.values()):
                drop_text, drop_image = (
                    torch.full_like(samples.positions, drop, dtype=torch.bool) for drop in drops
                )
                given = self.loss_fn.edit_input(samples, drop_text, drop_image, HELD_OUT)
                totals[index] += self.loss_fn.errors(self.pipeline.unet, given, samples.weights)[0]
            totals[-1] += samples.weights.sum()
        if self.world.highest(bool(errors)) and self.on_bad_sample == "stop":
            told = next(text for text in self.world.texts("; ".join(errors)) if text)
            raise UsageError(f"held out: {told}; --on_bad_sample skip goes on without it")
        *sums, count = self.world.sum(totals).tolist()
        return {
            f"held_out/{name}": total / max(count, 1.0)
            for name, total in zip(CONDITIONS, sums, strict=True)
        }

    def _sample(self) -> list[Image.Image]:
        return sample_pictures(
            self.pipeline,
            self.pictures,
            self.world,
            seed=self.loss_fn.seed,
            steps=self.section.validation_inference_steps,
            guidance_scale=self.section.validation_guidance_scale,
            image_guidance_scale=self.section.validation_image_guidance_scale,
            batch_size=self.batch_size,
        )

    def _show(self, step: int, edited: list[Image.Image], log: RunLog) -> None:
        rows = [(p.original, e, p.truth) for p, e in zip(self.pictures, edited, strict=True)]
        sheet = grid(rows, [p.instruction for p in self.pictures], ("input", "edit", "truth"))
        path = grid_path(self.folder, step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_grid(sheet, beside(path))
            put_in_place(beside(path), path)
        except OSError as error:
            raise cannot_write(path, error) from None
        log.image(step, "validation", sheet, f"step {step}")


def newest_picture(folder: Path, step: int) -> Path | None:
    """The last grid up to a step, also of before the run was resumed."""
    steps = [int(path.stem.split("-")[1]) for path in folder.glob("step-*.png")]
    newest = max((other for other in steps if other <= step), default=None)
    return None if newest is None else grid_path(folder, newest)


def grid_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.png"


def _pictures(
    section: ValidationConfig, image: Image.Image | None, pairs: EditPairs, rows: Sequence[int]
) -> list[Picture]:
    """The validation image as often as asked for, then the first held-out rows that can be read."""
    pictures = []
    if image is not None and section.validation_prompt is not None:
        pictures += [
            Picture(image, section.validation_prompt, None, index)
            for index in range(section.num_validation_images)
        ]
    for row in rows[:HELD_OUT_PICTURES]:
        sample = pairs.sample(row)
        if not sample.error:
            original, edited = pixels_to_image(sample.original), pixels_to_image(sample.edited)
            pictures.append(Picture(original, pairs.instruction(row), edited, 1000 + row))
    return pictures


def pixels_to_image(pixels: Tensor) -> Image.Image:
    """[3, height, width] uint8 -> image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def sample_pictures(
    pipeline: Any,
    pictures: Sequence[Picture],
    world: World,
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    batch_size: int,
) -> list[Image.Image]:
    """The edits of all pictures, of one size, made by all ranks, in order and on every rank."""
    width, height = pictures[0].original.size
    factor = pipeline.vae_scale_factor
    mine = [*pictures[world.rank :: world.size]]
    each = -(-len(pictures) // world.size)
    # Ranks with fewer pictures edit one that nobody sees: all run a sharded UNet together.
    mine += [pictures[0]] * (each - len(mine))
    edited: list[Image.Image] = []
    for start in range(0, len(mine), batch_size):
        chunk = mine[start : start + batch_size]
        positions = torch.tensor([picture.noise_position for picture in chunk])
        edited += edit_images(
            pipeline,
            [picture.original for picture in chunk],
            [picture.instruction for picture in chunk],
            draw_normal(
                seed, Purpose.VALIDATION_NOISE, positions, (4, height // factor, width // factor)
            ),
            steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
        )
    sent = torch.zeros(each, height, width, 3, dtype=torch.uint8)
    for index, image in enumerate(edited):
        sent[index] = _bytes_of(image)
    gathered = torch.stack(world.gather(sent), dim=1).flatten(0, 1)  # index * size + rank
    return [Image.fromarray(pixels.numpy()) for pixels in gathered[: len(pictures)]]


def _bytes_of(image: Image.Image) -> Tensor:
    """[height, width, 3] uint8."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3)
