"""What benchmarks/README.md says is so: its commands parse, what it names exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from records import both_ways, record

from fusedit.benchmarks import reference, step_cases

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "benchmarks/README.md").read_text()
SCRIPT = (ROOT / "benchmarks/gpu.sh").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def check_command(words: list[str], monkeypatch) -> None:
    """Raises, or exits, where a command could not be run as it is written; its files may be any."""
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    match words[len(variables) :]:
        case ["python", "-m", name, *flags]:
            module = importlib.import_module(name)
            made = record(*both_ways("ours", 1, 1), *both_ways("eager", 1, 1))
            readers = {"existing_file": Path, "existing_record": lambda path: made}
            for reader, found in (readers | {"read": lambda path: made}).items():
                if hasattr(module, reader):
                    monkeypatch.setattr(module, reader, found)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(reference, "found_script", Path)
            monkeypatch.setattr(step_cases, "script_named", lambda given, name: given)
            (getattr(module, "parse", None) or module.flags)(flags)
        case ["bash", "benchmarks/gpu.sh", *rest]:
            _, *parts = rest[1:] if rest[:1] == ["--rehearse"] else rest
            assert {*variables} <= {*re.findall(r"^#   ([A-Z_]+) ", SCRIPT, re.MULTILINE)}
            known = re.findall(r'KNOWN\+?="(.*)"', SCRIPT)
            assert {*parts} <= {*" ".join(known).split()}
            kernels = importlib.import_module("fusedit.benchmarks.kernels")
            kernels.parse(shlex.split(variables.get("FLAGS", "")))
        case _:
            raise ValueError(f"this test knows no command {shlex.join(words)}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_typed_as_it_stands(command, monkeypatch):
    check_command(shlex.split(command), monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python -m fusedit.benchmarks.kernels --op attentions",
        "python -m fusedit.benchmarks.choose --outs x a.json",
        "python -m fusedit.benchmarks.chose a.json",
        "PARTS=tune bash benchmarks/gpu.sh results",
        "bash benchmarks/gpu.sh results attentions",
        'FLAGS="--opp geglu" bash benchmarks/gpu.sh results',
        "bash benchmarks/gpu.sh",
        "bash gpu.sh",
    ],
)
def test_a_wrong_command_is_seen(command, monkeypatch):
    with pytest.raises((SystemExit, AssertionError, ValueError, ImportError)):
        check_command(shlex.split(command), monkeypatch)


def test_every_file_of_the_folder_has_its_row():
    named = set(re.findall(r"`(\w+\.(?:py|sh))`", TEXT))
    files = {path.name for kind in ("*.py", "*.sh") for path in (ROOT / "benchmarks").glob(kind)}
    assert files - named == {"directions.py", "flags.py"}  # of no use by themselves
    assert not named - files


def test_a_flag_that_is_named_is_taken():
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    sources = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    taken = set(re.findall(r'add_argument\(\s*"(--\w+)"', sources))
    taken |= set(re.findall(r"^#   (--\w+) ", SCRIPT, re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])--\w+", prose)) <= taken
