"""Experiment trackers behind one small interface: TensorBoard, W&B, MLflow, trackio.

A resumed run goes on in the tracker's own run: `identity` is what the tracker calls it. Trackers
other than TensorBoard are optional packages, so they are imported only when asked for.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter

from .errors import UsageError

PROJECT = "instruct-pix2pix"  # the reference's project, so that old and new runs lie together


class Tracker(Protocol):
    """What the log asks of a tracker."""

    @property
    def identity(self) -> str | None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None: ...
    def close(self) -> None: ...


def is_installed(name: str) -> bool:
    """A plain folder called wandb or mlflow where Python starts is found too, without an origin."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError, naming the cure, when a tracker's package is not installed."""
    for name in names:
        if not is_installed(name):
            extra = "tensorboard" if name == "tensorboard" else f"'fusedit[{name}]'"
            raise UsageError(
                f"--report_to {name}: the package {name} is not installed; pip install {extra}"
            )


def open_tracker(
    name: str,
    *,
    folder: Path,
    settings: dict[str, Any],
    run_name: str,
    first_step: int,
    identity: str | None,
) -> Tracker:
    """Starts a tracker, or goes on with the run `identity`.

    Args:
        name: tensorboard, wandb, mlflow or trackio.
        folder: where a tracker that writes files puts them.
        settings: shown as the run's configuration.
        first_step: optimizer steps done before this start.
        identity: what the tracker called this run at its first start; None at a first start.
    """
    if name == "tensorboard":
        return TensorBoard(folder, settings, first_step)
    if name == "wandb":
        return Wandb(folder, settings, run_name, identity)
    if name == "mlflow":
        return Mlflow(settings, run_name, identity)
    return Trackio(settings, run_name, identity)


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, settings: dict[str, Any], first_step: int):
        self.identity = None
        # Hides what a killed run wrote after its last checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=30)
        rows = "".join(f"|{name}|{value}|\n" for name, value in settings.items())
        self._writer.add_text("settings", f"|setting|value|\n|-|-|\n{rows}", first_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.add_text(f"{name}/caption", caption, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. A step logged before is ignored by W&B: it would be the same."""

    def __init__(self, folder: Path, settings: dict[str, Any], run_name: str, identity: str | None):
        self._wandb = import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)  # else W&B silently takes a temporary one
        self._run = self._wandb.init(
            project=PROJECT,
            name=run_name,
            config=settings,
            dir=str(folder),
            id=identity,
            resume="allow",
            allow_val_change=True,  # what may change when a run goes on, config.py's table says
        )
        self.identity = self._run.id

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._run.log({name: self._wandb.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, at the tracking server its environment names."""

    def __init__(self, settings: dict[str, Any], run_name: str, identity: str | None):
        self._mlflow = import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        run = self._mlflow.start_run(run_id=identity, run_name=run_name)
        if identity is None:  # MLflow refuses a parameter that changes
            items = list(settings.items())
            for start in range(0, len(items), 100):  # the most its server takes in one request
                self._mlflow.log_params(dict(items[start : start + 100]))
        self.identity = run.info.run_id

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._mlflow.log_image(image, key=name, step=step)
        self._mlflow.log_text(caption, f"captions/{name}/{step}.txt")

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """A run of trackio, which knows runs by their names."""

    def __init__(self, settings: dict[str, Any], run_name: str, identity: str | None):
        self._trackio = import_module("trackio")
        self._run = self._trackio.init(
            project=PROJECT,
            name=identity or run_name,
            config=settings,
            resume="allow" if identity else "never",
        )
        self.identity = self._run.name

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(metrics=values, step=step)

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._run.log(metrics={name: self._trackio.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()
