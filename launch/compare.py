"""fusedit compare A.json B.json: two results of one protocol, and what parts them.

Both are results.json of `fusedit evaluate`. Results of unlike protocols, rows or networks are
refused: what differs is named. The interval is of the mean difference, over rows drawn again with
replacement 10,000 times, the same ones of both models. Exit codes: 0 done, 2 a mistake the user can
put right.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from ..trainer.comparing import compare, table
from ..trainer.errors import UsageError
from .train import DONE, MISTAKE

File = Annotated[Path, Positional, arg(metavar="RESULTS")]


@dataclass(frozen=True, slots=True)
class CompareFlags:
    """Shows two results of one protocol side by side."""

    one: File  # results.json of an evaluation
    other: File  # another one's


def main(argv: list[str]) -> int:
    """Prints the table and returns the exit code."""
    flags = tyro.cli(CompareFlags, prog="fusedit compare", args=argv, use_underscores=True)
    try:
        lines, published = compare(flags.one, flags.other)
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    # Both files are called the same: their folders tell them apart.
    one, other = (path.parent.name or path.stem for path in (flags.one, flags.other))
    print(*table(lines, published, (one, other)), sep="\n")
    return DONE
