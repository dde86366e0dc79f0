"""Files and flags of any content are read rightly or refused in one line, never by a traceback.

In CI a few examples, the same each time; `-m slow` draws thousands of new ones.
"""

import dataclasses
import io
import json
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import tomli_w
import torch
from faulty import bomb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedit.launch.flags import parse
from fusedit.trainer import checkpoint, plan
from fusedit.trainer.cache_files import MANIFEST, CacheFolder, Shape
from fusedit.trainer.config import DataConfig, ModelConfig, RunConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.files import fingerprint
from fusedit.trainer.pretrained import describe
from fusedit.trainer.rows import BadSample, open_rows
from fusedit.trainer.settings import flat, from_toml, to_toml

SLOW = 60  # times the examples of CI


def fuzzed(examples, **strategies):
    """Runs a test with drawn arguments, quickly; and, marked slow, with many more of them."""

    def decorate(check):
        quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
        options = {"deadline": None, "suppress_health_check": quiet, "database": None}

        @pytest.mark.parametrize(
            "profile", ["quick", pytest.param("thorough", marks=pytest.mark.slow)]
        )
        def test(profile):
            quick = profile == "quick"
            few = examples if quick else SLOW * examples
            drawn = given(**strategies)(check)
            settings(max_examples=few, derandomize=quick, **options)(drawn)()

        test.__doc__ = check.__doc__
        return test

    return decorate


@contextmanager
def refused_in_one_line():
    try:
        yield
    except UsageError as error:
        if "\n" in str(error):
            pytest.fail(f"more than a line: {error}")
    except BadSample as error:
        if "\n" in str(error):
            pytest.fail(f"more than a line: {error}")


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


FIELDS = [
    field.name for part in dataclasses.fields(RunConfig) for field in dataclasses.fields(part.type)
]
SECTIONS = [part.name for part in dataclasses.fields(RunConfig)]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1", "0", "-1", "nan", "inf", "1e400", "auto", "off", "bf16", "hf_x", "\0"])
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
names = st.sampled_from(FIELDS) | st.text(max_size=8)
bytes_or_json = st.one_of(
    st.binary(max_size=60),
    anything.map(lambda value: json.dumps(value).encode()),
    st.just(b"[" * 3000),
)


# Configuration.


def settle(run):
    """All that is checked of settings before anything is opened."""
    run.check_complete()
    run.data.with_cache("cache")
    with folder() as place:
        file = place / "again.toml"
        file.write_text(to_toml(run))
        assert flat(from_toml(file)) == flat(
            dataclasses.replace(
                run,
                output=dataclasses.replace(
                    run.output, overwrite=False, resume_from_checkpoint=None
                ),
            )
        )


@fuzzed(
    60,
    content=st.binary(max_size=80)
    | st.text(max_size=80).map(str.encode)
    | st.just(b"a=" + b"[" * 3000),
)
def test_any_file_as_a_configuration(content):
    with folder() as place, refused_in_one_line():
        (place / "run.toml").write_bytes(content)
        from_toml(place / "run.toml")


tomls = st.dictionaries(
    names | st.sampled_from(SECTIONS),
    st.recursive(
        st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=5,
    ),
    max_size=5,
)


@fuzzed(80, values=tomls)
def test_any_values_in_a_configuration(values):
    with folder() as place:
        try:
            (place / "run.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        except (UnicodeEncodeError, ValueError):
            return  # half a character, or what TOML cannot hold
        with refused_in_one_line():
            settle(from_toml(place / "run.toml"))


words = st.lists(
    st.one_of(
        st.sampled_from(FIELDS).map(lambda name: f"--{name}"),
        st.tuples(st.sampled_from(FIELDS), scalars).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        scalars.map(str),
    ),
    max_size=5,
)


@fuzzed(10, argv=words)
def test_any_flags(argv):
    with io.StringIO() as printed, redirect_stdout(printed), redirect_stderr(printed):
        try:
            with refused_in_one_line():
                settle(parse(argv).run)
        except SystemExit as ended:
            if ended.code not in (0, 2):
                pytest.fail(f"exit {ended.code}")


# Data.


def read_all(place):
    with refused_in_one_line():
        section = DataConfig(train_data_dir=str(place / "set"), resolution=8)
        rows = open_rows(section, cache_dir=str(place / "cache"))
        rows.fingerprint()
        for row in range(len(rows)):
            for look in (lambda row=row: rows.read(row, 0.99), lambda row=row: rows.size(row)):
                with refused_in_one_line():
                    look()


def in_folder(name, content):
    with folder() as place:
        (place / "set/a").mkdir(parents=True)
        for image in ("0.png", "a/1_0.jpg", "a/1_1.jpg"):
            (place / "set" / image).write_bytes(bomb(3))
        (place / "set" / name).write_bytes(content)
        if name == "a/prompt.json":
            (place / "set/seeds.json").write_text('[["a", [1]]]')
        read_all(place)


cell = anything | st.sampled_from(["0.png", "../0.png", "/etc/hostname", "\ud800", "http://a/b"])
records = st.lists(
    st.dictionaries(
        st.sampled_from(["input_image", "edited_image", "edit_prompt", "edited_image_file_name"]),
        cell,
        max_size=4,
    ),
    max_size=3,
)
lines = records.map(lambda found: "\n".join(map(json.dumps, found)).encode())


@fuzzed(40, content=st.binary(max_size=60) | lines)
def test_any_metadata_in_json_lines(content):
    in_folder("metadata.jsonl", content)


tables = st.lists(st.lists(st.text(max_size=6), max_size=4), max_size=4).map(
    lambda rows: "\n".join(
        ["input_image,edited_image,edit_prompt", *(",".join(row) for row in rows)]
    ).encode(errors="surrogatepass")
)


@fuzzed(25, content=st.binary(max_size=60) | tables)
def test_any_metadata_in_a_table_of_text(content):
    in_folder("metadata.csv", content)


@fuzzed(
    60,
    content=bytes_or_json
    | st.lists(st.lists(cell, max_size=3)).map(lambda v: json.dumps(v).encode()),
)
def test_any_list_of_seeds(content):
    in_folder("seeds.json", content)


@fuzzed(
    40,
    content=bytes_or_json
    | st.dictionaries(st.just("edit"), cell).map(lambda v: json.dumps(v).encode()),
)
def test_any_prompt_of_the_papers(content):
    in_folder("a/prompt.json", content)


# Checkpoints.

facts = st.fixed_dictionaries({"bytes": anything, "sha256": anything}) | anything
manifests = st.fixed_dictionaries(
    {"format": st.just(checkpoint.FORMAT) | anything, "step": anything},
    optional={
        "files": st.dictionaries(st.sampled_from(["state.json", "../a", "", "\0", "."]), facts)
    },
).map(lambda value: json.dumps(value).encode())


@fuzzed(80, content=bytes_or_json | manifests)
def test_any_manifest_of_a_checkpoint(content):
    with folder() as place, refused_in_one_line():
        made = place / "checkpoint-5"
        made.mkdir()
        (made / "state.json").write_text("{}")
        (made / "manifest.json").write_bytes(content)
        found, passed_over = checkpoint.newest(place)
        assert (found is None) == bool(passed_over)
        with refused_in_one_line():
            checkpoint.check(made)
        checkpoint.set_aside_later(place, 1)
        checkpoint.delete_all(place)


states = st.dictionaries(
    st.sampled_from(["step", "position", "global_batch", "settings", "loss_scale", "versions"]),
    anything | st.just(flat(RunConfig())) | st.integers(0, 9),
).map(lambda value: json.dumps(value).encode())


@fuzzed(80, content=bytes_or_json | states)
def test_any_state_of_a_whole_checkpoint(content):
    with folder() as place:
        made = place / "checkpoint-5"
        made.mkdir()
        (made / "state.json").write_bytes(content)
        files = {"state.json": fingerprint(made / "state.json")}
        manifest = {"format": checkpoint.FORMAT, "step": 5, "files": files}
        (made / "manifest.json").write_text(json.dumps(manifest))
        output = dataclasses.replace(RunConfig().output, output_dir=str(place))
        config = dataclasses.replace(RunConfig(), output=output)
        with refused_in_one_line():
            found, _ = plan._find_checkpoint(config)
            plan.step_of(found)
            if found is not None:
                plan._with_same_batch(config, found, 2)


# The cache.

KEY = {"format": 2}
SHARD = "pairs-0123456789abcdef"
shard_facts = st.fixed_dictionaries(
    {
        "bytes": st.integers(0, 99) | anything,
        "sha256": st.text(max_size=4) | anything,
        "bad": st.dictionaries(st.sampled_from(["1 2", "1", "a b", "-1 0", ""]), cell) | anything,
    }
)
cache_manifests = st.fixed_dictionaries(
    {
        "key": st.just(KEY) | anything,
        "shards": st.dictionaries(
            st.sampled_from([f"{SHARD}.safetensors", "../a.safetensors", "pairs-.safetensors"]),
            shard_facts | anything,
        )
        | anything,
    }
).map(lambda value: json.dumps(value).encode())


@fuzzed(
    80,
    name=st.sampled_from([MANIFEST, f"{SHARD}.json", "notes.json"]),
    content=bytes_or_json | cache_manifests | shard_facts.map(lambda v: json.dumps(v).encode()),
    shard=st.binary(max_size=40),
)
def test_any_index_of_a_cache(name, content, shard):
    with folder() as place:
        (place / name).write_bytes(content)
        (place / f"{SHARD}.safetensors").write_bytes(shard)
        shape = Shape(1, 1, ((4, 2, 2),), (16, 8), 0, torch.float32)
        cache = CacheFolder(place, KEY, shape)
        with refused_in_one_line():
            for of_one in cache.shards():
                assert Path(of_one).name == of_one
                with refused_in_one_line():
                    cache.check([of_one])
                cache.open(of_one, "unit")
            cache.clean()


# The base model's small files.


@fuzzed(
    60,
    part=st.sampled_from(
        ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    ),
    content=bytes_or_json
    | st.dictionaries(
        st.sampled_from(["in_channels", "block_out_channels", "scaling_factor", "prediction_type"]),
        anything | st.just(4),
    ).map(lambda value: json.dumps(value).encode()),
)
def test_any_configuration_of_a_base(part, content):
    whole = {
        "unet/config.json": {"in_channels": 4, "block_out_channels": [8, 16]},
        "vae/config.json": {"block_out_channels": [4, 8], "scaling_factor": 0.2},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    }
    with folder() as place, refused_in_one_line():
        for name, values in whole.items():
            (place / name).parent.mkdir()
            (place / name).write_text(json.dumps(values))
        (place / part).write_bytes(content)
        describe(ModelConfig(pretrained_model_name_or_path=str(place)))
