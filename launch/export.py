"""fusedit export RUN [--merge] [--out FOLDER]: the newest checkpoint of a run as files to use.

A run with --lora_rank is written as its adapter, with --merge as a whole pipeline that needs
neither base nor peft; any other run as its pipeline, again. Exit codes: 0 done, 2 a mistake the
user can put right.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from ..trainer.errors import UsageError
from .train import DONE, MISTAKE, quiet_libraries

Run = Annotated[Path, Positional, arg(metavar="RUN")]


@dataclass(frozen=True, slots=True)
class ExportFlags:
    """Writes the newest checkpoint of a run as a pipeline, or as the adapter that it is."""

    run: Run  # its --output_dir
    merge: bool = False  # add the adapter to its base, and write the whole pipeline
    out: Path | None = None  # folder to write; default: RUN, with --merge RUN/merged


def main(argv: list[str]) -> int:
    """Exports and returns the exit code."""
    quiet_libraries()
    from ..trainer.exporting import export_checkpoint

    try:
        flags = tyro.cli(ExportFlags, prog="fusedit export", args=argv, use_underscores=True)
        found, out = export_checkpoint(flags.run, flags.out, merged=flags.merge)
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    print(f"{out}: written from {found.name}")
    return DONE
