"""fusedit ema RUN --length 0.075 --out FOLDER: a run's pipeline with averages of another length.

RUN is the output folder of a run with --post_hoc_ema. Its UNet's weights are mixed from all of its
snapshots, by least squares; the rest of the pipeline is copied. A length is an average's relative
standard deviation: 0.1 looks back about twice as far as 0.05. Exit codes: 0 done, 2 a mistake the
user can put right.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from ..trainer.errors import UsageError
from ..trainer.post_hoc import write_pipeline
from .train import DONE, MISTAKE, quiet_libraries

Run = Annotated[Path, Positional, arg(metavar="RUN")]


@dataclass(frozen=True, slots=True)
class EmaFlags:
    """Writes a run's pipeline with averages of a length that is chosen after training."""

    run: Run  # output folder of a run with --post_hoc_ema that has ended
    length: float  # relative standard deviation, for instance 0.075
    out: Path  # folder to write the pipeline to


def main(argv: list[str]) -> int:
    """Writes the pipeline and returns the exit code."""
    quiet_libraries()
    flags = tyro.cli(EmaFlags, prog="fusedit ema", args=argv, use_underscores=True)
    try:
        mix = write_pipeline(flags.run, flags.length, flags.out)
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    count = len(mix.weights)
    print(f"{flags.out}: of {count} averages, the profile within {mix.error:.2%}")
    return DONE
