"""torchrun --nproc-per-node=N -m fusedit.launch.evaluate MODEL FLAGS: a process of an evaluation.

`fusedit evaluate MODEL --out FOLDER` starts it on all local devices. Exit codes: 0 done, 2 a
mistake the user can put right.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from ..trainer.errors import UsageError
from .train import DONE, MISTAKE, make_world, quiet_libraries

Model = Annotated[str, Positional, arg(metavar="MODEL")]


@dataclass(frozen=True, slots=True)
class EvaluateFlags:
    """Edits the rows of a dataset by a protocol, and measures the edits.

    `fusedit evaluate` also takes --nproc_per_node N and --master_port P for torchrun.
    """

    model: Model  # folder or hub name of an InstructPix2Pix pipeline, or RUN/checkpoint-500
    out: Path  # folder for results.json, rows.jsonl and curve.png; the same command goes on in it
    protocol: str = "held-out"  # held-out, ip2p-curve, magicbrush-single, -multi, emu-edit, a .toml
    dataset: str | None = None  # folder or hub name; default: the protocol's, or the run's held out
    split: str | None = None  # of --dataset; default: the protocol's
    clip: str | None = None  # folder or hub name of CLIP, instead of the protocol's
    dino: str | None = None  # of DINO
    lpips: str | None = None  # of a folder with lpips.safetensors
    batch_size: int = 8  # edits made at once by a rank; guidance triples it
    on_bad_sample: Literal["stop", "skip"] = "stop"  # an unreadable row stops it, or is left out
    keep_edits: bool = False  # keep the edits, in edits/
    overwrite: bool = False  # start anew in a folder that holds an evaluation

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch_size must be 1 or more, got {self.batch_size}")
        if self.split is not None and self.dataset is None:
            raise UsageError(f"--split {self.split} is of --dataset, which was not given")


def parse(argv: list[str], quiet: bool = False) -> EvaluateFlags:
    return tyro.cli(
        EvaluateFlags,
        prog="fusedit evaluate",
        args=argv,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=not quiet,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs this rank to its end and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    rank = int(os.environ.get("RANK", 0))
    try:
        flags = parse(argv, quiet=rank != 0)
        from ..trainer.comparing import totals
        from ..trainer.evaluating import RESULTS, Asked, evaluate
        from ..trainer.protocols import read_protocol

        read_protocol(flags.protocol)  # a mistake in it is told before seconds of start-up
        quiet_libraries()
        world = make_world()
        world.start()
        asked = Asked(
            model=flags.model,
            out=flags.out,
            protocol=flags.protocol,
            dataset=flags.dataset,
            split=flags.split,
            places={"clip": flags.clip, "dino": flags.dino, "lpips": flags.lpips},
            batch_size=flags.batch_size,
            on_bad_sample=flags.on_bad_sample,
            keep_edits=flags.keep_edits,
            overwrite=flags.overwrite,
        )
        results = evaluate(asked, world, command=shlex.join(["fusedit", "evaluate", *argv]))
    except UsageError as error:  # on all ranks alike
        if rank == 0:
            print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    if world.is_main:
        print(*totals(results), f"{flags.out / RESULTS}: written", sep="\n")
    world.stop()
    return DONE


if __name__ == "__main__":
    sys.exit(main())
