"""fusedit doctor [--nproc_per_node N] [--json FILE] FLAGS: what would stop or slow such a run.

FLAGS are those of fusedit train; nothing is trained, no weights are read, and nothing stays behind.
Also under torchrun, on all machines: `torchrun ... -m fusedit.launch.doctor FLAGS`.

Exit codes: 0 fine, or warnings alone; 1 there are problems; 2 a mistake in the flags.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..trainer.config import RunConfig
from ..trainer.errors import RanksLost, UsageError
from ..trainer.world import World
from .flags import parse

FORMAT = 1
HEALTHY, SICK = 0, 1


def main(argv: list[str] | None = None) -> int:
    """Looks at everything with all ranks; rank 0 prints. Returns the exit code."""
    from .train import MISTAKE, make_world

    asked, flags = own_flags(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", 0))
    if {"-h", "--help"} & {*flags} and rank == 0:
        print(__doc__)  # then those of FLAGS
    world = World()
    try:
        config = parse(flags, quiet=rank != 0).run
        config.check_complete()
        world = make_world()
        world.start(config.loop.timeout_s)
        with world.watch:
            findings, exchanges = examine(config, world)
    except UsageError as error:
        if rank == 0:
            print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    except RanksLost as error:
        if error.speaks:
            print(f"fusedit: {error}", file=sys.stderr)
        return SICK
    if rank == 0:
        tell(findings)
        if asked.json is not None:
            rows = [finding._asdict() for finding in findings]
            facts = {"format": FORMAT, "ranks": world.size, "findings": rows}
            asked.json.write_text(json.dumps(facts | {"all_reduce": exchanges}, indent=1) + "\n")
    world.stop()
    return SICK if any(finding.level == "problem" for finding in findings) else HEALTHY


def own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Those of the doctor alone, and the rest."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--json", type=Path)
    return own.parse_known_args(argv)


def examine(config: RunConfig, world: World) -> tuple[list[Any], list[dict[str, float]]]:
    """All findings, which are those of every rank, and the timed exchanges."""
    from ..trainer import checkup
    from .train import quiet_libraries

    quiet_libraries()
    output = Path(config.output.output_dir)
    findings = [checkup.devices(world), checkup.versions(world), checkup.clocks(world)]
    state = checkup.gpu_state(world)
    findings += [] if state is None else [state]
    timed, exchanges = checkup.exchange(world)
    findings += [timed, checkup.shared_folder(world, output)]
    findings += _of_the_run(config, world)
    return findings, exchanges


def _of_the_run(config: RunConfig, world: World) -> Iterator[Any]:
    """Model and data are there and fit together; the space for what is written; the kernels."""
    from ..trainer.alike import check_alike
    from ..trainer.blank import blank_unet
    from ..trainer.checkup import Finding, room
    from ..trainer.estimate import checkpoint_bytes, count_run
    from ..trainer.plan import make_plan
    from ..trainer.unet import prepare_unet

    output = config.output
    # Whatever lies in --output_dir is not looked at: a doctor may be asked at any time.
    fresh = dataclasses.replace(output, overwrite=True, resume_from_checkpoint=None)
    try:
        with world.together():
            plan = make_plan(dataclasses.replace(config, output=fresh), world)
        check_alike(plan, world)
    except UsageError as error:
        yield Finding("model and data", "problem", str(error), "see the message")
        return
    base = plan.config.model.pretrained_model_name_or_path
    yield Finding("model and data", "ok", f"{base}; {len(plan.rows)} rows, alike on all ranks")
    counted = count_run(plan.config, plan.described)
    size = checkpoint_bytes(counted, plan.config.optim)
    yield from room(world, plan.output, size, output.checkpoints_total_limit)
    on_gpu = world.device.type == "cuda"
    if not plan.config.precision.plain:
        lines = prepare_unet(blank_unet(plan.described), torch.device("meta"), fused=True).fused
        whys: dict[str, list[str]] = {}
        for line in lines:
            if line.startswith("left as it is: "):
                _, part, why = line.split(": ", 2)
                whys.setdefault(why, []).append(part)
        left = [f"{len(parts)} parts, {parts[0]} first: {why}" for why, parts in whys.items()]
        text = ("" if on_gpu else "on a GPU: ") + ("; ".join(left) or lines[0])
        cure = "these run as PyTorch has them, to the same result; fusedit train names each"
        yield Finding("kernels", "warning" if left and on_gpu else "ok", text, cure)


def tell(findings: list[Any]) -> None:
    """One line each, and the cure below what is not well."""
    for finding in findings:
        print(f"{finding.level:<8} {finding.name:<16} {finding.text}")
        if finding.level != "ok" and finding.cure:
            print(f"{'':<25} {finding.cure}")


if __name__ == "__main__":
    sys.exit(main())
