"""The command line: the sections of RunConfig as flat flags, over an optional TOML file."""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from ..trainer.config import RunConfig
from ..trainer.settings import from_toml

ALIASES = {"--val_image_url_or_path": "--val_image_url"}  # of the reference's script for XL


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainFlags:
    """Fine-tunes Stable Diffusion to edit images from instructions.

    Flags are those of diffusers' train_instruct_pix2pix.py and its XL twin; "ours" marks others.
    `fusedit train` also takes --nproc_per_node N and --master_port P for torchrun. `fusedit cache`
    takes the same flags, fills --cache_latents and trains nothing; `fusedit plan` takes them too,
    with --gpu TYPE and --json, and says what the run will take.
    """

    run: Annotated[RunConfig, tyro.conf.OmitArgPrefixes]
    config: Path | None = None  # TOML file of these flags; the command line overrides it
    dry_run: bool = False  # load and check everything, print the plan, train nothing
    local_rank: int = -1  # no effect: torchrun's LOCAL_RANK is used


def parse(argv: list[str], quiet: bool = False) -> TrainFlags:
    """Reads the flags; tyro prints help and its own mistakes and exits.

    Args:
        quiet: print nothing, as all ranks but the first.

    Raises: UsageError: a --config that cannot be read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(argv)[0].config
    default = from_toml(path) if path else RunConfig()
    token = default.output.hub_token
    told = tyro.cli(
        TrainFlags,
        prog="fusedit train",
        # Apart, or the value counts when tyro looks for the nearest name.
        args=[part for word in argv for part in _apart(word)],
        # Help tells the defaults, which a file's token is not to be among.
        default=TrainFlags(run=_with_token(default, None), config=path),
        use_underscores=True,
        console_outputs=not quiet,
    )
    own = told.run.output.hub_token
    return replace(told, run=_with_token(told.run, token if own is None else own))


def _with_token(run: RunConfig, token: str | None) -> RunConfig:
    return replace(run, output=replace(run.output, hub_token=token))


def _apart(word: str) -> list[str]:
    """--name=value as two words, any other as it is; by the name that the sections have."""
    name, *value = word.split("=", 1) if re.match(r"--\w[\w-]*=", word) else [word]
    return [ALIASES.get(name.replace("-", "_").replace("__", "--", 1), name), *value]
