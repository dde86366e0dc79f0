"""The rules of the house, read off the source: who imports whom, and what no file of ours does.

A rule takes a file and returns its breaches, each a line for the reader.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # folder -> folders it imports from, beside itself
    "kernels": set(),
    "trainer": {"kernels"},
    "launch": {"trainer", "kernels"},
    "benchmarks": {"launch", "trainer", "kernels"},
}
INSTALLED = (*MAY_IMPORT, "fusedit")
# Each module of trainer imports only those before it.
TRAINER = [
    "errors", "files", "signals",
    "watch",
    "config", "settings", "world", "draws", "images", "rows", "buckets", "data",
    "windows", "families", "encoders", "diffusion", "conditioning", "loss", "masters", "adapters",
    "recompute", "sharding", "unet", "compiled", "pretrained", "ema", "power_ema", "optim", "step",
    "captured", "checkpoint", "sharded_checkpoint", "cache_key", "cache_files", "cache_remote",
    "cache_build", "cache", "callbacks", "trackers", "log", "meter", "audit", "saver",
    "output_lock", "sample", "export", "adapter_files", "post_hoc", "pipelines", "editing",
    "editing_rows", "editing_many", "validate", "extractors", "metrics", "protocols", "examples",
    "curve", "evaluate", "quarantine", "plan", "alike", "exporting", "evaluating", "comparing",
    "caching", "check_data", "data_report", "checkup", "gpus", "blank", "counting", "estimate",
    "prediction", "trial", "job", "publish", "best", "looking", "run", "series", "report_pictures",
    "report_charts", "run_report",
]  # fmt: skip
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE = {
    "torch.load", "torch.save", "torch.hub.load", "np.load", "allow_pickle", "yaml.load",
    "yaml.unsafe_load", "dist.all_gather_object", "dist.broadcast_object_list",
    "dist.gather_object", "dist.scatter_object_list", "trust_remote_code", "eval", "exec",
}  # fmt: skip
SMALL_FILES = {
    "CLIPTokenizer",
    "CLIPImageProcessor",
    "AutoImageProcessor",
}  # what they are read from holds no weights
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
BROAD = {"", "Exception", "BaseException"}


class Source(NamedTuple):
    path: str  # from the root
    tree: ast.Module


def sources(*folders: str) -> list[Source]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths]


def relative_imports(source: Source) -> Iterator[tuple[str, ...]]:
    """What a file imports relatively, as parts from the root: ("trainer", "config")."""
    here = Path(source.path).with_suffix("").parts
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = *here[: -node.level], *filter(None, (node.module or "").split("."))
            is_module = ROOT.joinpath(*base).with_suffix(".py").is_file()
            yield from [base] if is_module else [(*base, alias.name) for alias in node.names]


def absolute_imports(source: Source) -> set[str]:
    """The packages a file imports by name, without their submodules."""
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def names(source: Source) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file mentions: (12, "os.environ")."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg


def at(source: Source, line: int, breach: str) -> str:
    return f"{source.path}:{line}: {breach}"


def imports_above_itself(source: Source) -> list[str]:
    own = source.path.split("/")[0]
    allowed = MAY_IMPORT[own] | {own}
    return [
        f"{source.path} imports {'.'.join(module)}"
        for module in relative_imports(source)
        if module[0] not in allowed
    ]


def imports_us_by_name(source: Source) -> list[str]:
    ours = absolute_imports(source) & {*INSTALLED, "tests"}
    return [f"{source.path} imports {name} by name: import relatively" for name in sorted(ours)]


def imports_a_later_module(source: Source) -> list[str]:
    before = TRAINER[: TRAINER.index(Path(source.path).stem)]
    return [
        f"{source.path} imports {module[1]}"
        for module in relative_imports(source)
        if module[0] == "trainer" and module[1] not in before
    ]


def needs_more_than_torch(source: Source) -> list[str]:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    knows_unets = source.path in ("kernels/unet.py", "kernels/unet_attention.py")
    allowed |= {"diffusers"} if knows_unets else set()
    return [f"{source.path} imports {name}" for name in absolute_imports(source) - allowed]


def asserts(source: Source) -> list[str]:
    nodes = ast.walk(source.tree)
    return [at(source, node.lineno, "assert") for node in nodes if isinstance(node, ast.Assert)]


def catches_everything(source: Source) -> list[str]:
    handlers = [node for node in ast.walk(source.tree) if isinstance(node, ast.ExceptHandler)]
    return [
        at(source, handler.lineno, f"except {name}")
        for handler in handlers
        for caught in (handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type])
        if (name := ast.unparse(caught) if caught else "") in BROAD
    ]


def pickles_or_runs_what_it_reads(source: Source) -> list[str]:
    found = [f"{source.path} imports {name}" for name in absolute_imports(source) & PICKLES]
    return found + [at(source, line, name) for line, name in names(source) if name in UNSAFE]


def may_read_pickled_weights(source: Source) -> list[str]:
    """trainer/pretrained.py gives use_safetensors among other options; a test of its own."""
    calls = [
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and ast.unparse(node.func.value) not in SMALL_FILES
    ]
    return [
        at(source, call.lineno, ast.unparse(call))
        for call in calls
        if "use_safetensors=True" not in map(ast.unparse, call.keywords)
        and source.path != "trainer/pretrained.py"
    ]


def reads_the_environment(source: Source) -> list[str]:
    """TRITON_INTERPRET, which Triton itself reads, is the exception."""
    allowed = {
        node.lineno
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and node.value == "TRITON_INTERPRET"
    }
    return [
        at(source, line, name)
        for line, name in names(source)
        if name in ENVIRONMENT and line not in allowed
    ]


RULES = {  # rule -> folders it holds for
    imports_above_itself: tuple(MAY_IMPORT),
    imports_us_by_name: ("kernels", "trainer", "launch"),
    imports_a_later_module: ("trainer",),
    needs_more_than_torch: ("kernels",),
    asserts: ("kernels", "trainer", "launch"),
    catches_everything: ("kernels", "trainer", "launch"),
    pickles_or_runs_what_it_reads: ("kernels", "trainer", "launch"),
    may_read_pickled_weights: ("kernels", "trainer", "launch"),
    reads_the_environment: ("kernels", "trainer"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nothing_of_ours(rule):
    files = sources(*RULES[rule])
    assert files
    assert not [breach for source in files for breach in rule(source)]


def test_the_order_names_every_module_of_trainer_once():
    assert sorted(TRAINER) == sorted(path.stem for path in (ROOT / "trainer").glob("*.py"))


def test_no_folder_is_a_package_of_its_own():
    # With an __init__.py, running in the root shadows Hugging Face's `kernels`.
    folders = [ROOT / folder for folder in (*MAY_IMPORT, "tests")]
    assert not [path for folder in folders for path in folder.rglob("__init__*")]


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (imports_above_itself, "from ..launch.flags import parse"),
        (imports_above_itself, "from ..launch import flags"),
        (imports_above_itself, "from ..tests import tiny"),
        (imports_us_by_name, "from fusedit.trainer import draws"),
        (imports_us_by_name, "import kernels.philox"),
        (imports_a_later_module, "from .run import train"),
        (imports_a_later_module, "from . import plan"),
        (imports_a_later_module, "def late():\n    from .step import train_step"),
        (needs_more_than_torch, "import numpy as np"),
        (needs_more_than_torch, "from diffusers import UNet2DConditionModel"),
        (asserts, "assert True"),
        (catches_everything, "try: pass\nexcept Exception: pass"),
        (catches_everything, "try: pass\nexcept: pass"),
        (catches_everything, "try: pass\nexcept (OSError, BaseException): pass"),
        (pickles_or_runs_what_it_reads, "from pickle import loads"),
        (pickles_or_runs_what_it_reads, "import torch\ntorch.load('x')"),
        (pickles_or_runs_what_it_reads, "from torch import save"),
        (pickles_or_runs_what_it_reads, "load('x', trust_remote_code=True)"),
        (pickles_or_runs_what_it_reads, "import numpy as np\nnp.load('x')"),
        (pickles_or_runs_what_it_reads, "import numpy\nnumpy.memmap('x', allow_pickle=True)"),
        (may_read_pickled_weights, "UNet.from_pretrained('x')"),
        (may_read_pickled_weights, "UNet.from_pretrained('x', use_safetensors=False)"),
        (reads_the_environment, "import os\nos.environ['RANK']"),
        (reads_the_environment, "from os import environ"),
        (reads_the_environment, "import os\nos.getenv('RANK')"),
    ],
)
def test_each_rule_sees_its_breach(rule, code):
    assert len(rule(Source("trainer/config.py", ast.parse(code)))) == 1


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (imports_above_itself, "from ..kernels.philox import words"),
        (imports_us_by_name, "from kernel_library import words"),
        (imports_a_later_module, "from .errors import UsageError"),
        (needs_more_than_torch, "import math\nimport triton.language as tl"),
        (catches_everything, "try: pass\nexcept (OSError, ValueError): pass"),
        (pickles_or_runs_what_it_reads, "model.eval()"),
        (may_read_pickled_weights, "UNet.from_pretrained('x', use_safetensors=True)"),
        (may_read_pickled_weights, "CLIPTokenizer.from_pretrained('x')"),
        (reads_the_environment, "import os\nos.environ.get('TRITON_INTERPRET')"),
    ],
)
def test_no_rule_sees_a_breach_where_there_is_none(rule, code):
    assert not rule(Source("trainer/config.py", ast.parse(code)))
