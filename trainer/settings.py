"""A run's settings as text: saved beside the run, read back, and compared when it goes on."""

import dataclasses
import difflib
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import tomli_w

from .config import EvaluationConfig, OutputConfig, RunConfig, ValidationConfig
from .errors import UsageError

RUN_FILE = "run.toml"  # in a run's folder

# The table of what may differ when a run goes on in the same output folder. All else is part of
# what the run is. The cut of a step may change, its global batch (kept in the checkpoint) may not.
MAY_CHANGE = frozenset(
    {
        "loop.train_batch_size",
        "loop.gradient_accumulation_steps",
        "loop.num_train_epochs",
        "loop.max_train_steps",
        "loop.bucket_mb",
        "loop.max_skips",
        "loop.timeout_s",
        "model.cache_dir",
        "data.on_bad_sample",
        "data.max_bad_fraction",
        "data.max_image_pixels",
        "data.allow_outside_files",
        "data.cache_latents",  # --cache_crops may not: they are other samples
        "data.dataloader_num_workers",
        "data.dataloader_prefetch",
        "precision.gradient_checkpointing",
        "precision.checkpointing_keeps",
        "precision.checkpointing_levels",
        "precision.sharding",
        "precision.attention",
        "precision.compile",
        "precision.cuda_graphs",
        "precision.plain",
        "precision.enable_xformers_memory_efficient_attention",
        *(f"validation.{f.name}" for f in dataclasses.fields(ValidationConfig)),
        *(f"evaluation.{f.name}" for f in dataclasses.fields(EvaluationConfig)),
        *(f"output.{f.name}" for f in dataclasses.fields(OutputConfig)),
    }
)
LARGEST = 2**64  # of integers: none that is taken is as large, and floats hold it
_SECRET = {"output.hub_token"}
_SECRET_NAMES = {path.split(".")[1] for path in _SECRET}
_OF_ONE_START = {"output.overwrite", "output.resume_from_checkpoint"}


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting as {"section.name": value}, as JSON holds it, without the hub token."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
        if f"{section}.{name}" not in _SECRET
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of settings that differ and are not in MAY_CHANGE; both as made by `flat`.

    What an older version did not have cannot differ: it had what is now the default.
    """
    fixed = (name for name in new if name not in MAY_CHANGE and name in old)
    return [name for name in fixed if old[name] != new[name]]


def to_toml(config: RunConfig) -> str:
    """The settings as TOML tables, one a section; those that are None are left out."""
    tables: dict[str, dict[str, Any]] = {}
    for path, value in flat(config).items():
        section, name = path.split(".")
        if value is not None and path not in _OF_ONE_START:
            tables.setdefault(section, {})[name] = value
    return tomli_w.dumps(tables)


def from_toml(path: Path, flag: str = "--config ") -> RunConfig:
    """Reads a run from TOML: flag names under their sections, or without any section.

    Args:
        flag: what a message calls the file by, before its path.

    Raises: UsageError: no such file, not TOML, an unknown name (with the nearest), a wrong type.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise UsageError(f"{flag}{path}: there is no such file") from None
    except (ValueError, OSError, RecursionError) as error:  # not TOML, or not even UTF-8
        raise UsageError(f"{flag}{path}: {error}") from None
    return from_values(values, source=f"{flag}{path}")


def from_values(values: dict[str, Any], source: str = "settings") -> RunConfig:
    """A run from {flag: value} or {section: {flag: value}}; a path may be a Path.

    Args:
        source: starts each message.

    Raises: UsageError: an unknown name (with the nearest), a wrong type or value.
    """
    sections: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}
    home = {f.name: section for section, cls in sections.items() for f in dataclasses.fields(cls)}
    built: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, value in values.items():
        named = value if isinstance(value, dict) and key in sections else {key: value}
        for name, setting in named.items():
            if name not in home or (named is value and home[name] != key):
                nearest = difflib.get_close_matches(name, [*home, *sections], n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise UsageError(f"{source}: unknown setting {name}{hint}")
            setting = str(setting) if isinstance(setting, Path) else setting
            built[home[name]][name] = _checked(sections[home[name]], name, setting, source)
    return RunConfig(**{section: sections[section](**built[section]) for section in sections})


def _checked(cls: type, name: str, value: Any, source: str) -> Any:
    """The value, as the type its section declares; integers serve as floats."""
    declared = get_type_hints(cls)[name]
    numbers = value if isinstance(value, list) else [value]
    if any(type(number) is int and abs(number) > LARGEST for number in numbers):
        raise UsageError(f"{source}: {name} is out of range")
    allowed: list[str] = []
    for option in get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,):
        if get_origin(option) is tuple:  # of floats
            if isinstance(value, list) and {type(one) for one in value} <= {int, float}:
                return tuple(map(float, value))
            allowed.append("a list of numbers")
        elif isinstance(option, type):
            if type(value) is option:
                return value
            if option is float and type(value) is int:
                return float(value)
            allowed += [option.__name__] if option is not NoneType else []
        else:  # a Literal
            if value in get_args(option):
                return value
            allowed += get_args(option)
    got = type(value).__name__ if name in _SECRET_NAMES else repr(value)
    raise UsageError(f"{source}: {name} must be {' or '.join(allowed)}, got {got}")
