"""How good the edits of held-out rows are, during training, and which checkpoint's were best.

    evaluation/step-000500.json   what was measured by --eval_protocol; step-000500.png: its curve
    best.json                     with --keep_best: the value at each step, and the best step, whose
                                  checkpoint is not deleted

All ranks share the rows. Their noise is that of the protocol, whatever the step, and training's
draws are functions of the position: none of it touches what is trained.
"""

import dataclasses
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import BEST_FILE
from .config import DataConfig, EvaluationConfig
from .curve import plot
from .ema import Ema
from .errors import UsageError
from .evaluate import (
    Point,
    best_value,
    curve_through,
    measure,
    open_extractors,
    split_metrics,
    with_sampler,
)
from .examples import Examples, survey
from .extractors import KINDS, Extractors
from .files import write_text
from .log import RunLog
from .plan import EVALUATION, Plan
from .protocols import CURVE, UNPINNED, Protocol, read_protocol
from .world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What is measured, once it is known that it can be."""

    section: EvaluationConfig
    protocol: Protocol  # with the run's own rows and resolution
    examples: Examples
    extractors: Extractors
    metrics: list[str]
    left_out: dict[str, str]  # metrics, and why
    output: Path


def open_evaluation(plan: Plan, world: World) -> Evaluation | None:
    """Reads the networks and the held-out rows; None without --eval_steps.

    Raises: UsageError on all ranks: a network or a row cannot be read, or --keep_best has nothing
        to go by.
    """
    section, data = plan.config.evaluation, plan.config.data
    if section.eval_steps is None:
        return None
    with world.together():
        protocol = of_run(read_protocol(section.eval_protocol, "--eval_protocol"), data)
        places = {kind: getattr(section, f"eval_{kind}") for kind in KINDS}
        extractors, missing = open_extractors(protocol, places, world.device, flag="eval_")
        rows = sorted(plan.held_out_rows[: section.eval_rows].tolist())
        examples = Examples(plan.rows, protocol, rows)
    examples = survey(examples, world, data.on_bad_sample).examples
    missing |= examples.missing
    metrics, left_out = split_metrics(protocol, missing, len(examples.rows))
    wanted = ("clip_image", "clip_direction") if protocol.judge == CURVE else (protocol.judge,)
    for name in wanted if section.keep_best else ():
        if name in left_out:
            raise UsageError(
                f"--keep_best goes by {protocol.judge} of --eval_protocol {protocol.name}, and "
                f"{name} is left out: {left_out[name]}"
            )
    return Evaluation(
        section=section,
        protocol=protocol,
        examples=examples,
        extractors=extractors,
        metrics=metrics,
        left_out=left_out,
        output=plan.output,
    )


def of_run(protocol: Protocol, section: DataConfig) -> Protocol:
    """The protocol on a run's held-out rows, as the run sees them."""
    side = section.resolution
    sampling = dataclasses.replace(protocol.sampling, resolution=side, resize="square")
    data = dataclasses.replace(
        protocol.data,
        dataset=None,
        last_share=1.0,
        most_rows=None,
        rows_sha256=UNPINNED,
        original_column=section.original_image_column,
        edited_column=section.edited_image_column,
        instruction_column=section.edit_prompt_column,
        session_column=None,
        turn_column=None,
    )
    return dataclasses.replace(protocol, sampling=sampling, data=data)


class Evaluator:
    """Measures every --eval_steps, by all ranks together.

    Args:
        pipeline: around the UNet in training, with a sampler of its own.
        step: the run's, done before; what was measured later is of a course that is now left.
    """

    def __init__(
        self, evaluation: Evaluation, pipeline: Any, step: int, world: World, batch_size: int
    ) -> None:
        self.evaluation, self.world, self.batch_size = evaluation, world, batch_size
        self.pipeline = with_sampler(pipeline, evaluation.protocol)
        self.told = not evaluation.left_out
        self.values: dict[int, float] = {}
        if evaluation.section.keep_best:
            path = evaluation.output / BEST_FILE
            known = json.loads(path.read_text())["values"] if path.is_file() else {}
            self.values = {int(at): value for at, value in known.items() if int(at) <= step}

    def due(self, step: int, last_step: int) -> bool:
        return step % (self.evaluation.section.eval_steps or 1) == 0 or step == last_step

    def run(self, step: int, ema: Ema | None, log: RunLog) -> bool:
        """Measures and logs, by the EMA's weights if there are any.

        Returns: whether it is the best so far, whose checkpoint is to be kept; alike on all ranks.
        """
        evaluation = self.evaluation
        if not self.told:
            for name, reason in evaluation.left_out.items():
                log.note(f"--eval_protocol: {name} is left out: {reason}")
            self.told = True
        with ema.in_place() if ema is not None else nullcontext():
            points = measure(
                self.pipeline,
                evaluation.protocol,
                evaluation.examples,
                evaluation.extractors,
                evaluation.metrics,
                self.world,
                batch_size=self.batch_size,
                in_step=True,
            )
        value = best_value(evaluation.protocol, points)
        with self.world.together():
            if self.world.is_main:
                self._log(step, points, log)
        if not evaluation.section.keep_best or value is None:
            return False
        return self._is_best(step, value)

    def _is_best(self, step: int, value: float) -> bool:
        """Writes it down before the checkpoint is saved, which then stays when older ones go."""
        best = all(value > other for at, other in self.values.items() if at != step)
        self.values[step] = value
        best_step = max(self.values, key=lambda at: (self.values[at], -at))
        told = {
            "step": best_step,
            "by": f"{self.evaluation.protocol.judge} of {self.evaluation.protocol.name}",
            "values": {str(at): self.values[at] for at in sorted(self.values)},
        }
        with self.world.together():
            if self.world.is_main:
                write_text(self.evaluation.output / BEST_FILE, json.dumps(told, indent=1))
        return best

    def _log(self, step: int, points: list[Point], log: RunLog) -> None:
        several = len(points) > 1
        values = {
            f"eval/{name}" + (f"_at_{point.image_guidance_scale:g}" if several else ""): value
            for point in points
            for name, value in point.metrics.items()
        }
        curve = curve_through(points)
        place = self.evaluation.output / EVALUATION / f"step-{step:06d}.json"
        if curve is not None:
            values |= {"eval/curve_area": curve.area, "eval/curve_reach": curve.reach}
            source = f"{self.evaluation.protocol.name}, {len(self.evaluation.examples.rows)} rows"
            if plot({f"step {step}": curve}, source, place.with_suffix(".png")):
                with Image.open(place.with_suffix(".png")) as picture:
                    log.image(step, "curve", picture.convert("RGB"), f"step {step}")
        log.scalars(step, values)
        told = {
            "step": step,
            "protocol": self.evaluation.protocol.pinned(),
            "protocol_sha256": self.evaluation.protocol.sha256,
            "extractors": self.evaluation.extractors.sha256(),
            "values": values,
        }
        write_text(place, json.dumps(told, indent=1))
