"""Measuring during training: what it asks of flags, and which checkpoint stays."""

import json

import pytest
import torch

from fusedit.trainer import best, checkpoint
from fusedit.trainer.best import Evaluation, Evaluator, of_run
from fusedit.trainer.config import DataConfig, EvaluationConfig, RunConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.evaluate import Point
from fusedit.trainer.log import RunLog
from fusedit.trainer.protocols import read_protocol
from fusedit.trainer.world import World


@pytest.mark.parametrize(
    ("section", "held_out", "reason"),
    [
        ({"eval_steps": 5}, 0, "--eval_steps 5 measures held-out rows: give --held_out 64"),
        ({"keep_best": True}, 9, "--keep_best needs --eval_steps; or leave it out"),
        ({"eval_clip": "clip"}, 9, "--eval_clip clip needs --eval_steps"),
        ({"eval_protocol": "emu-edit"}, 9, "--eval_protocol emu-edit needs --eval_steps"),
    ],
)
def test_flags_that_do_not_go_together(section, held_out, reason):
    config = RunConfig(evaluation=EvaluationConfig(**section), data=DataConfig(held_out=held_out))
    with pytest.raises(UsageError, match=reason):
        config.check_together()


def test_the_protocol_is_of_the_runs_rows():
    own = of_run(read_protocol("magicbrush-multi"), DataConfig(resolution=64))
    assert (own.sampling.resolution, own.sampling.resize) == (64, "square")
    assert (own.data.dataset, own.data.session_column) == (None, None)
    assert own.data.edited_column == "edited_image"
    assert own.data.after_column == "caption"


class Pipeline:
    scheduler = None


@pytest.fixture
def evaluator(tmp_path, monkeypatch):
    """Of a run at a step; what is measured are these values."""

    def call(step, values):
        given = iter(values)
        points = lambda: [Point(1.5, {"psnr": next(given)}, {})]  # noqa: E731
        monkeypatch.setattr(best, "measure", lambda *args, **options: points())
        evaluation = Evaluation(
            section=EvaluationConfig(eval_steps=2, keep_best=True),
            protocol=read_protocol("held-out"),
            examples=None,
            extractors=best.Extractors(),
            metrics=["psnr"],
            left_out={},
            output=tmp_path,
        )
        return Evaluator(evaluation, Pipeline(), step, World(), batch_size=2)

    return call


def told(folder):
    return json.loads((folder / "best.json").read_text())


def test_the_best_is_told_once_it_is_better(evaluator, tmp_path):
    log, own = RunLog.silent(), evaluator(0, [20.0, 22.0, 21.0, 22.0])
    assert [own.run(step, None, log) for step in (2, 4, 6, 8)] == [True, True, False, False]
    values = {"2": 20.0, "4": 22.0, "6": 21.0, "8": 22.0}
    assert told(tmp_path) == {"step": 4, "by": "psnr of held-out", "values": values}
    written = json.loads((tmp_path / "evaluation/step-000006.json").read_text())
    assert written["values"] == {"eval/psnr": 21.0}


def test_what_was_measured_after_the_checkpoint_is_forgotten(evaluator, tmp_path):
    log, own = RunLog.silent(), evaluator(0, [20.0, 22.0, 23.0])
    assert [own.run(step, None, log) for step in (2, 4, 6)] == [True, True, True]
    again = evaluator(2, [21.0])
    assert again.run(4, None, log)
    assert told(tmp_path)["values"] == {"2": 20.0, "4": 21.0}


def test_it_is_due_every_so_many_steps_and_at_the_end(evaluator):
    own = evaluator(0, [])
    assert [step for step in range(1, 8) if own.due(step, 7)] == [2, 4, 6, 7]


def test_the_best_checkpoint_is_not_deleted(tmp_path):
    made = checkpoint.Checkpoint({"unet": {"weight": torch.zeros(1)}}, {"step": 0})
    for step in range(1, 6):
        if step == 2:
            (tmp_path / "best.json").write_text('{"step": 2}')
        checkpoint.save(tmp_path, step, made, keep=2)
    assert sorted(checkpoint.steps(tmp_path)) == [2, 4, 5]
    (tmp_path / "best.json").write_text('{"step": 4}')
    checkpoint.save(tmp_path, 6, made, keep=1)
    assert sorted(checkpoint.steps(tmp_path)) == [4, 6]
    (tmp_path / "best.json").write_text("torn")
    checkpoint.save(tmp_path, 7, made, keep=1)
    assert checkpoint.steps(tmp_path) == [7]
