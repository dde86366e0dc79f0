"""How long a checkpoint holds the training loop, its bytes, and how long a resume takes to read it.

    python -m fusedit.benchmarks.checkpoint --out results
    python -m fusedit.benchmarks.checkpoint --size demo --out results

The state is that of a run with averages, on the GPU where there is one: weights, two moments and
averages, all fp32. `hold` is what the loop waits for: the copy to memory of the host, which the
first round finds. `save` is until it is kept: copied, written, hashed, synced to disk, renamed, and
from the second round on the older checkpoint deleted, as by --checkpoints_total_limit 1; all but
the copy beside the loop. In each round also `copy`, as many bytes from memory to the same disk,
synced, the least there is; and `torch.save` of the same state, as Accelerate writes the
optimizer's, neither hashed nor synced, then with the sync. `find` is a resume's search for the
newest checkpoint that is whole, which hashes all of it; `load` reads it into the run. Both read
what was just written, from the memory that the system keeps of it as far as that goes. Before it is
read the state is set to zero, and afterwards each tensor must be what it was.

Sizes: `demo`, and `sd15`, Stable Diffusion 1.5's UNet with random weights, 13.8 GB. Where there is
not enough memory or disk for that, its row says so; asked for by --size it is a mistake.

Exit codes: 0 done, 1 a wrong answer, 2 a mistake in the flags.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel

from ..launch.demo.run import BASE
from ..launch.train import quiet_libraries
from ..trainer import checkpoint
from ..trainer.caching import in_bytes
from ..trainer.checkpoint import Checkpoint
from ..trainer.config import ModelConfig, OptimConfig, RunConfig
from ..trainer.ema import Ema
from ..trainer.files import sync
from ..trainer.job import Job
from ..trainer.log import RunLog
from ..trainer.optim import make_optimizer
from ..trainer.pretrained import load_unet
from ..trainer.saver import Save, Saver
from ..trainer.settings import flat
from ..trainer.unet import prepare_unet
from ..trainer.world import World
from . import harness, report
from .flags import Flags
from .harness import Record, Timing, say
from .shapes import shapes
from .timing import timing
from .update import make_unet

STATE_BYTES = 16  # a parameter: weight, two moments, average
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK_BYTES = 2**26  # of the plain copy
# Of the state, at least: in memory, with its copy; on the disk; and of a GPU's memory.
NEEDED = {"memory": 2.2, "disk": 2.1, "GPU memory": 1.6}


class Size(NamedTuple):
    make: Callable[[], UNet2DConditionModel]
    rounds: int
    state_bytes: int = 0  # where it matters


def demo_unet() -> UNet2DConditionModel:
    return load_unet(ModelConfig(pretrained_model_name_or_path=str(BASE)))


SIZES = {
    "demo": Size(demo_unet, 20),
    "sd15": Size(make_unet, 3, STATE_BYTES * shapes("sd15-512").parameters),
}


class Kept(Job):
    """What a run keeps of itself, without what it takes to train."""

    def __init__(self, unet: UNet2DConditionModel, device: torch.device) -> None:
        fused = device.type == "cuda"
        prepared = prepare_unet(unet, device, fused=fused)
        self.unet, self.masters, _, self.adapter = prepared
        self.named = named = prepared.parameters
        self.ema = Ema(named, decay=0.9999)
        self.kept = {}
        self.optimizer = make_optimizer(named, OptimConfig(), self.ema, fused=fused)
        for name, parameter in named.items():  # as after some steps
            moments = {f"{name}.{key}": torch.rand_like(parameter) for key in MOMENTS}
            self.optimizer.load_state({f"{name}.step": torch.tensor(500.0), **moments})

    def zero(self) -> None:
        for part in self.tensors().values():
            for tensor in part.values():
                tensor.zero_()

    def equals(self, folder: Path) -> bool:
        """Whether a checkpoint holds these very numbers."""
        own, found = self.tensors(), checkpoint.read(folder).tensors
        return own.keys() == found.keys() and all(
            part.keys() == found[stem].keys()
            and all(torch.equal(tensor.cpu(), found[stem][name]) for name, tensor in part.items())
            for stem, part in own.items()
        )


class Rounds:
    """Milliseconds of what is done to a checkpoint, by direction and by whom; what was wrong.

    Args:
        root: an empty folder on the disk that is measured.
    """

    def __init__(self, kept: Kept, root: Path) -> None:
        self.kept, self.root, self.beside = kept, root, root / "beside"
        self.saver = Saver(World(device=next(kept.unet.parameters()).device), None, RunLog.silent())
        self.step, self.bytes, self.wrong = 0, 0, ""
        self.milliseconds: dict[tuple[str, str], list[float]] = {}
        self.block = torch.randint(256, (BLOCK_BYTES,), dtype=torch.uint8).numpy()

    def round(self) -> None:
        self.step += 1
        held = self._take("hold", "ours", self._save)
        self._take("save", "ours", self.saver.finish, held)
        folder = self.root / f"checkpoint-{self.step}"
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())
        self._take("save", "copy", self._copy)
        self.beside.unlink()
        written = self._take("save", "torch.save", self._torch_save)
        self._take("save", "torch.save, synced", lambda: sync(self.beside), written)
        self.beside.unlink()
        saved = self.kept.equals(folder)
        self.kept.zero()
        self._take("find", "ours", self._find)
        self._take("load", "ours", lambda: self._load(folder))
        if not (saved and self.kept.equals(folder)):
            self.wrong = "what was loaded is not what was saved"

    def _take(
        self, direction: str, by: str, call: Callable[[], object], before: float = 0.0
    ) -> float:
        """Milliseconds of the call, and of what came before it."""
        since = time.perf_counter()
        call()
        taken = before + 1e3 * (time.perf_counter() - since)
        self.milliseconds.setdefault((direction, by), []).append(taken)
        return taken

    def _save(self) -> None:  # as Run.save does
        facts = {"step": self.step, "settings": flat(RunConfig())}
        made = Checkpoint(self.kept.tensors(), facts)
        self.saver.save(self.step, [Save(self.root, made, keep=1)])

    def _copy(self) -> None:
        with self.beside.open("wb", buffering=0) as file:
            for start in range(0, self.bytes, BLOCK_BYTES):
                file.write(self.block[: self.bytes - start].data)
        sync(self.beside)

    def _torch_save(self) -> None:
        torch.save(self.kept.tensors(), self.beside)

    def _find(self) -> None:
        folder, passed_over = checkpoint.newest(self.root)
        if folder is None or passed_over:
            self.wrong = f"the newest checkpoint is not found: {', '.join(passed_over)}"

    def _load(self, folder: Path) -> None:
        self.kept.load_tensors(checkpoint.read(folder).tensors)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def measured(name: str, folder: Path | None, device: torch.device) -> list[Record]:
    size = SIZES[name]
    kept = Kept(size.make(), device)
    parameters = sum(parameter.numel() for parameter in kept.unet.parameters())
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rounds = Rounds(kept, Path(place))
        for number in range(size.rounds):
            say(f"{name}, round {number + 1} of {size.rounds}")
            rounds.round()
        rounds.saver.close()
        disk = file_system(place)
    return rows({"op": "checkpoint", "preset": name, "shape": parameters}, rounds, disk)


def rows(labels: dict[str, str | int], rounds: Rounds, disk: str) -> list[Record]:
    made = []
    for (direction, by), milliseconds in rounds.milliseconds.items():
        wrong = rounds.wrong if by == "ours" else ""
        found = timing(milliseconds)
        values = {"bytes": rounds.bytes, "bytes_per_s": 1e3 * rounds.bytes / found.median_ms}
        if direction == "save":
            copy = timing(rounds.milliseconds["save", "copy"])
            values["of_copy"] = copy.median_ms / found.median_ms
        made.append(
            harness.row(
                labels | {"dtype": "fp32", "direction": direction, "by": by},
                verdict="wrong" if wrong else "right",
                timings=None if wrong else {"warm": found},
                least_bytes=rounds.bytes,
                values={} if wrong else values,
                note=wrong or disk,
            )
        )
    return made


def lacking(size: Size, folder: Path | None, device: torch.device) -> str:
    """What there is too little of for a size, or nothing."""
    if not size.state_bytes:
        return ""
    kilobytes = re.search(r"^MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)
    free = {"disk": shutil.disk_usage(folder or tempfile.gettempdir()).free}
    if kilobytes:
        free["memory"] = 1024 * int(kilobytes[1])
    if device.type == "cuda":
        free["GPU memory"] = torch.cuda.mem_get_info(device)[0]
    for kind, found in free.items():
        needed = NEEDED[kind] * size.state_bytes
        if found < needed:
            return f"needs {needed / 1e9:.1f} GB of {kind}, {found / 1e9:.1f} are free"
    return ""


def file_system(folder: str) -> str:
    """ext2/ext3, tmpfs: what the bytes went to."""
    return subprocess.run(
        ("stat", "--file-system", "--format=%T", folder), capture_output=True, text=True
    ).stdout.strip()


def table(record: Record) -> str:
    lines = ["| size | what | by | s | ± % | bytes | bytes a second | speed of a copy's |"]
    lines.append("| --- " * 8 + "|")
    for row in record["rows"]:
        labels, values = row["labels"], row["values"]
        if not values:
            told = f"{row['verdict']}: {row['note']}"
            lines.append(f"| {labels['preset']} | {told} | {labels['by']} |{' - |' * 5}")
            continue
        found = Timing(**row["timings"]["warm"])
        cells = [labels["preset"], labels["direction"], labels["by"]]
        cells += [f"{found.median_ms / 1e3:.3g}", f"{100 * found.spread:.0f}"]
        cells += [in_bytes(values["bytes"]), in_bytes(values["bytes_per_s"])]
        cells.append(f"{values['of_copy']:.0%}" if "of_copy" in values else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return report.heading(record) + "\n\n" + "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.checkpoint", str(__doc__))
    flags.add_record()
    flags.add_argument("--size", nargs="+", choices=list(SIZES), help="default: all that fit")
    flags.add_folder()
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    quiet_libraries()
    words = list(sys.argv[1:] if argv is None else argv)
    path = flags.out / "checkpoint.json"
    record = harness.new_record("checkpoint", words, flags.commit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in flags.size or SIZES:
        reason = lacking(SIZES[name], flags.folder, device)
        if reason and flags.size:
            say(f"fusedit.benchmarks.checkpoint: --size {name} {reason}: leave it out, or free it")
            return 2
        if reason:
            labels = {"op": "checkpoint", "preset": name, "by": "ours"}
            record["rows"].append(harness.row(labels, note=reason))
        else:
            record["rows"] += measured(name, flags.folder, device)
        harness.write(record, path)
    return report.finish(record, path, flags.compare, table)


if __name__ == "__main__":
    sys.exit(main())
