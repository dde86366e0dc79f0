"""How edits are measured, pinned in a file: data, sampling, metrics, and the networks they see by.

Numbers of two models can be compared when their protocols are one. A hash that is not known yet is
"unpinned" in the file: then what was found is in the results, and is compared instead.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers

from .errors import UsageError
from .extractors import KINDS
from .metrics import METRICS

FOLDER = Path(__file__).parent / "protocols"
UNPINNED = "unpinned"
CURVE = "curve"  # as what a checkpoint is chosen by
LONG_SIDE_MULTIPLE = 64  # pixels, of sides in the paper's own code


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Which rows, and what their columns are called."""

    dataset: str | None = None  # hub name or folder that --dataset may replace by a copy
    split: str = "train"
    last_share: float = 1.0  # of the rows, those at the end
    most_rows: int | None = None  # drawn from them with the seed
    rows_sha256: str = UNPINNED  # of pixels and texts
    original_column: str = "input_image"
    edited_column: str | None = None  # none: there is no truth
    instruction_column: str = "edit_prompt"
    before_column: str | None = None  # caption of the image before the edit
    after_column: str | None = None  # and after it
    session_column: str | None = None  # rows that edit on; measured is the end of each
    turn_column: str | None = None  # their order


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How an image is edited."""

    resolution: int | None = None  # pixels; none: the model's own
    resize: str = "square"  # centre crop; long_side: whole images, that side of `resolution`
    steps: int = 20
    sampler: str | None = None  # class of diffusers; none: the pipeline's own
    guidance_scale: float = 7.5
    image_guidance_scales: tuple[float, ...] = (1.5,)  # several make a curve
    seed: int = 0  # the noise of a row is drawn from it and the row's number


@dataclass(frozen=True, kw_only=True, slots=True)
class Extractor:
    """A network that metrics see by."""

    place: str  # hub name or folder that a flag may replace by a copy
    sha256: str = UNPINNED  # of its weights and its way to prepare images and texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What others measured by this protocol, as they tell it."""

    model: str
    source: str
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """A way to measure; each field is part of its hash, but what others published."""

    name: str
    metrics: tuple[str, ...]
    against: str = "truth"  # or input: what an edit is compared with
    best_by: str | None = None  # a metric, or curve: what --keep_best goes by; none: the first
    data: Data = field(default_factory=Data)
    sampling: Sampling = field(default_factory=Sampling)
    extractors: dict[str, Extractor] = field(default_factory=dict)
    published: tuple[Published, ...] = ()

    def pinned(self) -> dict[str, Any]:
        """As JSON holds it, without what was published."""
        told = json.loads(json.dumps(dataclasses.asdict(self)))
        del told["published"]
        return told

    @property
    def judge(self) -> str:
        """What ranks checkpoints."""
        return self.best_by or self.metrics[0]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.pinned(), sort_keys=True).encode()).hexdigest()


def names() -> list[str]:
    """Of the protocols that come with fusedit."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_protocol(named: str, flag: str = "--protocol") -> Protocol:
    """One of ours by its name, any other by its file.

    Raises: UsageError: there is none, or the file is no protocol; the message says what and where.
    """
    path = Path(named) if named.endswith(".toml") else FOLDER / f"{named}.toml"
    where = f"{flag} {named}"
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{where}: there is no such protocol; ours are {', '.join(names())}, any other is a "
            "file that ends in .toml"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None
    protocol = _built(Protocol, told, where)
    _check(protocol, where)
    return protocol


def _check(protocol: Protocol, where: str) -> None:
    if not protocol.metrics:
        raise UsageError(f"{where}: metrics names none; there are {', '.join(METRICS)}")
    for kind, given, allowed in (
        ("metric", protocol.metrics, {*METRICS}),
        ("best_by", [protocol.judge], {*protocol.metrics, CURVE}),
        ("against", [protocol.against], {"truth", "input"}),
        ("resize", [protocol.sampling.resize], {"square", "long_side"}),
        ("extractor", protocol.extractors, set(KINDS)),
    ):
        for one in given:
            if one not in allowed:
                raise UsageError(f"{where}: {kind} {one} is none of {', '.join(sorted(allowed))}")
    sampling, data = protocol.sampling, protocol.data
    if protocol.against == "truth" and data.edited_column is None:
        raise UsageError(f"{where}: against truth, and data has no edited_column")
    if (data.session_column is None) != (data.turn_column is None):
        raise UsageError(f"{where}: session_column and turn_column go together")
    if data.session_column is not None and sampling.resize == "square":
        raise UsageError(f"{where}: session_column needs resize long_side: turns are whole images")
    if not 0 < data.last_share <= 1:
        raise UsageError(f"{where}: last_share must be above 0 and at most 1")
    scales = sampling.image_guidance_scales
    if not scales or len({*scales}) < len(scales) or min(scales) < 1:
        raise UsageError(f"{where}: image_guidance_scales must be different, each 1 or more")
    if sampling.steps < 1 or not 0 <= sampling.seed < 2**64:
        raise UsageError(f"{where}: steps must be 1 or more, seed from 0 to 2**64 - 1")
    if sampling.sampler is not None and not hasattr(diffusers, sampling.sampler):
        raise UsageError(f"{where}: diffusers has no sampler {sampling.sampler}")
    if protocol.judge == CURVE:
        if len(scales) < 2:
            raise UsageError(f"{where}: a curve needs several image_guidance_scales")
        if not {"clip_image", "clip_direction"} <= {*protocol.metrics}:
            raise UsageError(f"{where}: a curve needs the metrics clip_image and clip_direction")


PARTS: dict[str, type] = {"data": Data, "sampling": Sampling}


def _built(cls: type, told: dict[str, Any], where: str) -> Any:
    """The dataclass from what a file says; an unknown or missing name is told with the nearest."""
    fields = {one.name: one for one in dataclasses.fields(cls)}
    for name in told:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UsageError(f"{where}: unknown {name}{hint}")
    lacks = [
        name
        for name, one in fields.items()
        if one.default is one.default_factory is dataclasses.MISSING and name not in told
    ]
    if lacks:
        raise UsageError(f"{where}: {lacks[0]} is missing")
    kinds = {name: str(getattr(fields[name].type, "__name__", fields[name].type)) for name in told}
    kinds |= {name: str(fields[name].type) for name in told if kinds[name] in ("tuple", "dict")}
    return cls(**{name: _value(name, told[name], kinds[name], where) for name in told})


def _value(name: str, value: Any, declared: str, where: str) -> Any:
    if name in PARTS and isinstance(value, dict):
        return _built(PARTS[name], value, where)
    if name == "extractors" and isinstance(value, dict):
        return {kind: _built(Extractor, one, where) for kind, one in value.items()}
    if name == "published" and isinstance(value, list):
        return tuple(_built(Published, one, where) for one in value)
    if "tuple" in declared and isinstance(value, list):
        kind = float if "float" in declared else str
        if all(isinstance(one, (int, float) if kind is float else str) for one in value):
            return tuple(kind(one) for one in value)
    elif type(value) is int and declared.startswith("float"):
        return float(value)
    elif type(value).__name__ in re.findall(r"\w+", declared):
        return value
    raise UsageError(f"{where}: {name} must be {declared}, got {value!r}")
