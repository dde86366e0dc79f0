"""diffusers' script as the benchmarks run it: where it is found, its flags, its runs.

Nothing of it is copied here. It comes from a checkout of huggingface/diffusers, whose
examples/instruct_pix2pix holds it and that of Stable Diffusion XL; MEASURED is the commit that the
committed results were made by.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .demo_steps import RunFailed, run_module
from .flags import Flags
from .harness import Record
from .reference_run import STAMPS

NAME, XL_NAME = "train_instruct_pix2pix.py", "train_instruct_pix2pix_sdxl.py"
FOLDER = "examples/instruct_pix2pix"
MEASURED = "58eb52c0803ea9af3abec60841c2a093bdf1f951"
SHA256 = {  # of the scripts at MEASURED
    NAME: "a20e06f8a91eded5460822f38596efa4be6225eb8b6217e1531abfcce2b1fefb",
    XL_NAME: "1f2ef297f06e97457747baf825f9ce247a9f4bf334a0b3748032801111a26872",
}
COLUMNS = ("original_image", "edited_image", "edit_prompt")
LOSS = "train_loss"  # what the script logs after each update


class Script(NamedTuple):
    path: Path
    commit: str | None  # of the checkout it lies in
    sha256: str

    def told(self) -> str:
        """A line for records: which script it is."""
        measured = self.sha256 == SHA256.get(self.path.name)
        same = "as at the commit measured" if measured else "not the one measured"
        return f"{self.path.name}, sha256 {self.sha256[:12]}, {same}"


def parse_with_script(flags: Flags, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a benchmark of the script: its own, a record's, --reference and --work."""
    flags.add_argument("--reference", type=found_script, help=cure())
    flags.add_argument("--work", type=Path, default=Path("runs/reference"), help="models, data")
    flags.add_record()
    words = sys.argv[1:] if argv is None else argv
    if not any(word.split("=")[0] in ("--reference", "-h", "--help") for word in words):
        flags.error(f"--reference is missing: give {cure()}")
    return flags.parse_args(words)


def cure() -> str:
    return (
        f"a checkout of huggingface/diffusers, or its {FOLDER}/{NAME}; measured at {MEASURED[:8]}"
    )


def found_script(text: str) -> Script:
    """The script, given by itself, by its folder or by the checkout."""
    given = Path(text)
    folders = (given, given / FOLDER)
    places = [given, *(folder / name for name in SHA256 for folder in folders)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise argparse.ArgumentTypeError(f"{text!r}: no {NAME} there; give {cure()}")
    if find_spec("accelerate") is None:
        raise argparse.ArgumentTypeError(
            "the script needs accelerate: pip install 'fusedit[bench]'"
        )
    return script_at(path)


def script_named(given: Script, name: str) -> Script | None:
    """The script of this name beside the one that was found; another's stands in for either."""
    path = given.path.with_name(name) if given.path.name in SHA256 else given.path
    return script_at(path) if path.is_file() else None


def script_at(path: Path) -> Script:
    head = ["git", "-C", str(path.parent), "rev-parse", "HEAD"]
    found = subprocess.run(head, capture_output=True, text=True)
    commit = found.stdout.strip() if found.returncode == 0 else None
    return Script(path.resolve(), commit, hashlib.sha256(path.read_bytes()).hexdigest())


def note(record: Record, script: Script, model: str) -> None:
    """Puts it into a record's provenance which script was run, and says of which model."""
    found = {"commit": script.commit, "sha256": script.sha256, "model": model}
    record["provenance"]["reference"] = found


def data_flags(data: Path, work: Path) -> list[str]:
    """Of the pairs in a folder, for either program."""
    columns = [f"--{name}_column={name.replace('original', 'input')}" for name in COLUMNS]
    return [f"--dataset_name={data}", *columns, f"--cache_dir={work / 'hub'}"]


def run_script(watch: str, script: Script, flags: list[str], folder: Path) -> None:
    """Runs it in a process of its own, watched; its output folder is FOLDER/run.

    Raises: RunFailed: it did not come to its end; the last line that it printed.
    """
    words = [watch, str(folder), str(script.path), *flags, f"--output_dir={folder / 'run'}"]
    run_module("benchmarks.reference_run", words, folder)


class Stamps(NamedTuple):
    """When its updates ended, in seconds since the epoch, by two clocks."""

    steps: list[float]  # of the optimizer, by a hook
    logged: list[float]  # of the loss, as the script's own TensorBoard file has it
    memory_gib: float


def read_stamps(folder: Path) -> Stamps:
    """Raises: RunFailed: the script wrote fewer losses than it took steps."""
    found = json.loads((folder / STAMPS).read_text())
    files = sorted((folder / "run/logs").rglob("*tfevents*"))
    logged: list[float] = []
    for path in files:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        if LOSS in events.Tags()["scalars"]:
            logged = [event.wall_time for event in events.Scalars(LOSS)]
    if len(logged) != len(found["steps"]):
        raise RunFailed(f"{len(found['steps'])} steps were taken, {len(logged)} losses logged")
    return Stamps(found["steps"], logged, found["memory_gib"])
