"""fusedit plan [--gpu TYPE] [--nproc_per_node N] [--json] FLAGS: what a run will take.

FLAGS are those of fusedit train; nothing is trained and no weights are read. On a machine with a
GPU, and without --gpu, the largest micro-batch is also found by trying.

Memory, FLOPs and sizes are counted; times are estimated, not measured. Exit codes: 0 done, 2 a
mistake the user can put right.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.exceptions import DatasetsError

from ..trainer.cache_build import wanted_units
from ..trainer.caching import in_bytes
from ..trainer.config import RunConfig
from ..trainer.data import split_rows
from ..trainer.errors import UsageError
from ..trainer.estimate import GIB
from ..trainer.gpus import GPUS, Gpu, gpu_named, gpu_of_device
from ..trainer.plan import check_precision, default_cache, describe_trained, set_numerics
from ..trainer.prediction import Data, Prediction
from ..trainer.pretrained import check_resolution
from ..trainer.rows import open_rows
from ..trainer.trial import TrialRun, largest_tried
from .flags import parse
from .train import DONE, MISTAKE, quiet_libraries

DEFAULT_GPU = "h100"


def main(argv: list[str]) -> int:
    """Predicts and prints; returns the exit code."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--gpu")
    own.add_argument("--nproc_per_node", "--nproc-per-node", type=int)
    own.add_argument("--json", action="store_true")
    asked, flags = own.parse_known_args(argv)
    if {"-h", "--help"} & {*flags}:
        print(__doc__)  # then those of FLAGS
    try:
        gpu = gpu_named(asked.gpu or gpu_of_this_machine())
        ranks = asked.nproc_per_node or max(torch.cuda.device_count(), 1)
        config = parse(flags).run
        check(config)
        config = with_gpu_defaults(config, gpu)
        quiet_libraries()
        described = describe_trained(config)
        check_resolution(config.data.resolution, described)
        plan = Prediction(config, described, gpu, ranks, data_of(config))
        tried = None
        # One GPU cannot try what several share.
        if asked.gpu is None and torch.cuda.is_available() and config.parts(ranks) == 1:
            set_numerics(config.precision)
            tried = largest_tried(
                lambda: TrialRun(config, described, torch.device("cuda", 0)).update
            )
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    facts = plan.facts() | ({} if tried is None else {"largest_micro_batch_tried": tried})
    print(json.dumps(facts, indent=1) if asked.json else "\n".join(lines(plan, tried)))
    return DONE


def gpu_of_this_machine() -> str:
    """The type of the first GPU here; without one, DEFAULT_GPU.

    Raises: UsageError: it is of no type we know.
    """
    if not torch.cuda.is_available():
        return DEFAULT_GPU
    card = torch.cuda.get_device_properties(0)
    found = gpu_of_device(card.name, card.total_memory)
    if found is None:
        raise UsageError(f"a {card.name} is not known: give its nearest as --gpu {', '.join(GPUS)}")
    return found


def with_gpu_defaults(config: RunConfig, gpu: Gpu) -> RunConfig:
    """The precision and the cache that `fusedit train` takes on such a GPU."""
    precision = config.precision.mixed_precision or ("bf16" if gpu.has_bf16 else "no")
    if precision == "bf16" and not gpu.has_bf16:
        raise UsageError(f"--mixed_precision bf16: a {gpu.name} has no bf16 products; take fp16")
    check_precision(config, precision, on_gpu=True)
    section = dataclasses.replace(config.precision, mixed_precision=precision)
    data = config.data.with_cache(default_cache(config))
    return dataclasses.replace(config, precision=section, data=data)


def check(config: RunConfig) -> None:
    """Raises UsageError as `fusedit train`; but a plan needs no dataset."""
    has_data = config.data.dataset_name is not None or config.data.train_data_dir is not None
    if has_data or config.model.pretrained_model_name_or_path is None:
        config.check_complete()
    config.check_together()


def data_of(config: RunConfig) -> Data | None:
    """Rows and pairs of the dataset; of one on the hub by its card, without downloading it.

    Returns: None: no dataset was given, or its card does not say.
    """
    section = config.data
    source = section.dataset_name or section.train_data_dir
    if source is None:
        return None
    if section.dataset_name is None or Path(source).expanduser().is_dir():
        rows = open_rows(section, config.model.cache_dir)
        total = len(rows)
    else:
        rows, total = None, _rows_on_the_hub(config)
        if not total:
            return None
    chosen, _ = split_rows(total, section.max_train_samples, section.held_out, config.loop.seed)
    return Data(len(chosen), len(chosen) if rows is None else len(wanted_units(rows, chosen)))


def _rows_on_the_hub(config: RunConfig) -> int:
    section, source = config.data, str(config.data.dataset_name)
    try:
        builder = datasets.load_dataset_builder(
            source, section.dataset_config_name, cache_dir=config.model.cache_dir
        )
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"--dataset_name {source} (not a folder here): {reason}; a plan needs none where "
            "--max_train_steps is given"
        ) from None
    splits: Any = builder.info.splits or {}
    return splits[section.dataset_split].num_examples if section.dataset_split in splits else 0


def lines(plan: Prediction, tried: int | None) -> list[str]:
    """All of it in words, the advice last."""
    loop, room = plan.config.loop, plan.room / GIB
    fits = "fits" if plan.total <= plan.room else "does NOT fit"
    batch = (
        f"{loop.train_batch_size} x {loop.gradient_accumulation_steps} micro-steps x "
        f"{plan.ranks} ranks"
    )
    times = ", ".join(f"{name} {ms:.1f}" for name, ms in plan.times_ms.items())
    return [
        f"plan        {plan.ranks} x {plan.gpu.name}, {plan.config.data.resolution} px, "
        f"{batch}; times are estimated, not measured",
        "memory of a GPU, GiB",
        *(f"  {name:<24}{size / GIB:7.2f}" for name, size in plan.memory.items()),
        f"  {'total':<24}{plan.total / GIB:7.2f} of {room:.2f}: {fits}",
        f"micro-batch {plan.largest} at most"
        + ("" if tried is None else f" by this count; {tried} at most, tried on this GPU"),
        f"speed       {plan.images_per_second:.0f} images a second, "
        f"{1000 * plan.step_s:.0f} ms a step: {times}",
        f"length      {_length(plan)}",
        f"cache       {_cache(plan)}",
        f"checkpoint  {in_bytes(plan.checkpoint)} each{_checkpoints(plan)}",
        *_snapshots(plan),
        f"pipeline    {in_bytes(plan.pipeline)}",
        plan.advice(),
    ]


def _length(plan: Prediction) -> str:
    if plan.steps is None:
        return "not known: give the dataset or --max_train_steps"
    return f"{plan.steps} steps, {plan.steps * plan.step_s / 3600:.1f} hours"


def _cache(plan: Prediction) -> str:
    if plan.cache is None:
        return (
            f"{in_bytes(plan.shape.pair_bytes)} a pair, at most "
            f"{in_bytes(plan.shape.text_bytes)} for its instruction"
        )
    pairs, texts = plan.cache
    unused = "" if plan.config.data.cache_latents else ", with --cache_latents"
    return f"{in_bytes(pairs)} of pairs, at most {in_bytes(texts)} of instructions{unused}"


def _checkpoints(plan: Prediction) -> str:
    output = plan.config.output
    if plan.steps is None:
        return ""
    made = -(-plan.steps // output.checkpointing_steps)
    kept = min(made, output.checkpoints_total_limit or made)
    return f", {kept} kept: {in_bytes(kept * plan.checkpoint)}"


def _snapshots(plan: Prediction) -> list[str]:
    """Of --post_hoc_ema, none of which is ever deleted."""
    if not plan.snapshot:
        return []
    line, output = f"snapshots   {in_bytes(plan.snapshot)} each", plan.config.output
    if plan.steps is not None:
        made = -(-plan.steps // (output.ema_snapshot_steps or output.checkpointing_steps))
        line += f", {made} kept: {in_bytes(made * plan.snapshot)}"
    return [line]
