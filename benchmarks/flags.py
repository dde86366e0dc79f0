"""Command lines of the benchmarks: a mistake is one line that names the flag, and exit code 2."""

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import NoReturn

import torch

from . import harness
from .harness import Record, read
from .rehearsal import REHEARSAL
from .shapes import shapes


class Flags(argparse.ArgumentParser):
    def __init__(self, module: str, description: str) -> None:
        super().__init__(
            f"python -m {module}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_record(self) -> None:
        """--out, --compare and --commit, of a record that is always written."""
        self.add_argument("--out", type=Path, required=True, help="a folder")
        self.add_argument(
            "--compare", type=existing_record, help="an earlier record, of such a machine"
        )
        self.add_argument("--commit", help="for a tree without .git")

    def add_folder(self) -> None:
        self.add_argument("--folder", type=existing_folder, help="for files; default: temporary")

    def demand_gpu(self) -> None:
        if not torch.cuda.is_available():
            self.error("there is no GPU here to time on; run it where there is one")

    def error(self, message: str) -> NoReturn:
        """Argparse's own messages too: "argument --op: invalid choice: ..."."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            names = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[1].partition("=")[0], names, 1)
            cure = f"did you mean {near[0]}?" if near else "--help lists the flags"
            message = f"there is no {unknown[1]}: {cure}"
        sys.stderr.write(f"{self.prog.split()[-1]}: {message.removeprefix('argument ')}\n")
        sys.exit(2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def file_name(text: str) -> str:
    if not re.fullmatch(r"[\w-]+", text):
        raise argparse.ArgumentTypeError(f"must be letters, digits, _ and -, got {text!r}")
    return text


def several_presets(text: str) -> list[str]:
    """Presets with commas between them."""
    names = text.split(",")
    for name in names:
        try:
            shapes(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def existing_folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return Path(text)


def existing_record(text: str) -> Record:
    """What a record's file holds; a rehearsal's is for rehearsals alone."""
    try:
        record = read(Path(text))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}; give a record's file") from None
    if record["provenance"]["machine"]["gpu"] == REHEARSAL != harness.machine()["gpu"]:
        raise argparse.ArgumentTypeError(f"{text!r}: made in a rehearsal; give what was measured")
    return record


def existing_file(text: str) -> Path:
    """A record's file that can be read."""
    existing_record(text)
    return Path(text)
