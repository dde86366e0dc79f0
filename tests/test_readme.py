"""What the documents say is so: their commands parse, what they name and quote exists."""

import ast
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import parse_args as parse_torchrun

from fusedit.launch.cli import OF_TORCHRUN, launcher_flags
from fusedit.launch.compare import CompareFlags
from fusedit.launch.demo.run import DemoFlags
from fusedit.launch.doctor import own_flags as doctor_flags
from fusedit.launch.edit import EditFlags
from fusedit.launch.ema import EmaFlags
from fusedit.launch.evaluate import EvaluateFlags
from fusedit.launch.evaluate import parse as parse_evaluate
from fusedit.launch.export import ExportFlags
from fusedit.launch.flags import TrainFlags, parse
from fusedit.launch.report import ReportFlags
from fusedit.trainer.config import RunConfig
from fusedit.trainer.gpus import GPUS
from fusedit.trainer.metrics import METRICS
from fusedit.trainer.protocols import names as protocol_names
from fusedit.trainer.protocols import read_protocol
from fusedit.trainer.settings import MAY_CHANGE

ROOT = Path(__file__).parents[1]
TROUBLE = "launch/troubleshooting.md"
DOCUMENTS = (
    "README.md", "trainer/README.md", "launch/README.md", TROUBLE, "CONTRIBUTING.md",
    "CHANGELOG.md",
)  # fmt: skip
FOLDERS = ("kernels", "trainer", "launch", "benchmarks", "tests", ".ci")
TEXT = {name: (ROOT / name).read_text() for name in DOCUMENTS}
SECTIONS = [field.default_factory() for field in dataclasses.fields(RunConfig)]
TRAIN_FLAGS = {field.name for part in SECTIONS for field in dataclasses.fields(part)}
TRAIN_FLAGS |= {field.name for field in dataclasses.fields(TrainFlags)} - {"run"}
OTHER_FLAGS = {
    field.name
    for cls in (EditFlags, EmaFlags, ExportFlags, DemoFlags, EvaluateFlags, ReportFlags)
    for field in dataclasses.fields(cls)
}
OTHER_FLAGS |= {
    "compare",
    "tune",
    "quick",
    "write",
    "reference",
    "rehearse",
    "tiny",
    "updates",
    "warm_up",
    "scenes",
    "edits",
    "rounds",
}  # of benchmarks, whose own tests hold them
OTHER_FLAGS |= {"gpu", "json"}  # of fusedit plan and doctor
OTHER_FLAGS |= {
    *OF_TORCHRUN,
    "nproc",
    "nproc_per_node",
    "signal",
    "signals",
}  # torchrun's, Slurm's --signal
OTHER_FLAGS |= {"report"}  # of fusedit check-data


def blocks(language: str) -> list[str]:
    return [
        block
        for text in TEXT.values()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def commands() -> list[str]:
    joined = [block.replace("\\\n", " ") for block in blocks("bash")]
    return [" ".join(line.split()) for block in joined for line in block.splitlines() if line]


def outside_blocks(name: str) -> str:
    return re.sub(r"^```.*?^```", "", TEXT[name], flags=re.DOTALL | re.MULTILINE)


def check_command(words: list[str]) -> None:
    """Raises, or exits, when a command could not be run as it is written."""
    match words:
        case ["fusedit", "train", "--help"]:
            pass
        case ["fusedit", "train" | "cache", *flags]:
            check_train(flags)
        case ["fusedit", "doctor", *flags]:
            check_train(doctor_flags(flags)[1])
        case ["sbatch" | "kubectl" | "bash", *rest] if (ours := launched(rest)) is not None:
            path, flags = ours
            assert (ROOT / path).is_file()
            check_train(launcher_flags(flags)[1]) if flags else None
        case ["fusedit", "plan", "--gpu", gpu, *flags]:
            assert gpu in GPUS
            check_train(flags)
        case ["fusedit", "check-data", *flags]:
            at = flags.index("--report")
            check_train(flags[:at] + flags[at + 2 :])
        case ["torchrun", *rest]:
            arguments = parse_torchrun(rest)
            jobs = ("fusedit.launch.train", "fusedit.launch.cache", "fusedit.launch.doctor")
            assert arguments.module
            if arguments.training_script == "fusedit.launch.evaluate":
                check_evaluate(arguments.training_script_args)
                return
            assert arguments.training_script in jobs
            check_train(arguments.training_script_args)
        case ["fusedit", "edit", *flags]:
            tyro.cli(EditFlags, args=flags, use_underscores=True)
        case ["fusedit", "evaluate", *flags]:
            check_evaluate(flags)
        case ["fusedit", "compare", *flags]:
            tyro.cli(CompareFlags, args=flags, use_underscores=True)
        case ["fusedit", "report", *flags]:
            tyro.cli(ReportFlags, args=flags, use_underscores=True)
        case ["fusedit", "ema", *flags]:
            tyro.cli(EmaFlags, args=flags, use_underscores=True)
        case ["fusedit", "export", *flags]:
            tyro.cli(ExportFlags, args=flags, use_underscores=True)
        case ["bash", ".ci/run", *_]:
            assert (ROOT / ".ci/run").is_file()
        case ["bash", "launch/demo.sh", *flags]:
            tyro.cli(DemoFlags, args=flags, use_underscores=True)
        case ["bash", "launch/test.sh", *_]:
            assert (ROOT / "launch/test.sh").is_file()
        case ["pip", "install", "-c", constraints, "-e", "."]:
            assert (ROOT / constraints).is_file()
        case ["export", assignment]:
            assert re.fullmatch(r"\w+=[\w./-]+", assignment)
        case _:
            raise ValueError(f"this test knows no command {shlex.join(words)}")


def launched(words: list[str]) -> tuple[str, list[str]] | None:
    """A file for a scheduler, and the flags of the run that follow it."""
    match words:
        case ["apply", "-f", path] | [path] if path.startswith("launch/kubernetes/"):
            return path, []
        case [path, *flags] if path.startswith("launch/slurm/"):
            return path, flags
        case [path, _, *flags] if path.startswith("launch/ssh/"):
            return path, flags
    return None


def check_train(flags: list[str]) -> None:
    """The flags parse; a --config that is not in the repository stands for any."""
    paths = [flags[i + 1] for i, flag in enumerate(flags) if flag == "--config"]
    for path in paths:
        if not (ROOT / path).exists():
            assert Path(path).name == "run.toml"
            at = flags.index("--config")
            flags = flags[:at] + flags[at + 2 :]
    if paths:
        parse(flags)
    else:
        parse(flags).run.check_complete()


def check_evaluate(flags: list[str]) -> None:
    read_protocol(parse_evaluate(flags).protocol)


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_typed_as_it_stands(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    if command.startswith("fusedit edit"):  # which looks what it is given
        monkeypatch.chdir(tmp_path)
        Path("photos").mkdir()
        Path("photo.jpg").touch()
        Path("edits.jsonl").touch()
    check_command(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "fusedit train --config launch/recipes/paper.toml --learning_rat 1",
        "fusedit train --learning_rate 1",
        "torchrun -m fusedit.launch.trains",
        "torchrun --nproc=gpu -m fusedit.launch.train --resolution=no",
        "fusedit edit model photo.jpg",
        "fusedit ema run --length long --out new",
        "fusedit evaluate run --protocol magicbrush --out new",
        "bash launch/tests.sh",
    ],
)
def test_a_wrong_command_is_seen(command):
    with pytest.raises((SystemExit, AssertionError, ValueError)):
        check_command(shlex.split(command))


@pytest.mark.parametrize("snippet", blocks("python"))
def test_a_snippet_compiles(snippet):
    compile(snippet, "README.md", "exec")


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether there is such a file and, after a #, such a heading in it."""
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return False
    titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if heading else [heading]
    return heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_named_exists(name):
    text = TEXT[name]
    folders = "|".join(re.escape(folder) for folder in FOLDERS)
    paths = set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*", text))
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert not [link for link in links if not leads_somewhere(ROOT / name, link)]
    top = set(re.findall(r"(?<![\w/.-])(?:constraints\.txt|pyproject\.toml|setup\.py)", text))
    assert not [path for path in paths | top if not (ROOT / path.rstrip(".")).exists()]
    modules = set(re.findall(r"\bfusedit(?:\.[a-z_]+)+", text))
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_flag_that_is_named_is_taken(name):
    flags = set(re.findall(r"(?<![\w-])--(\w+)", outside_blocks(name)))
    assert flags <= TRAIN_FLAGS | OTHER_FLAGS | {"help"}


def flags_between(start: str, end: str) -> list[str]:
    section = TEXT["trainer/README.md"].split(start, 1)[1].split(end, 1)[0]
    return sorted(re.findall(r"`--(\w+)`", section))


def test_the_table_of_what_may_change_is_the_codes():
    told = flags_between("What may change when a run goes on", "### The output folder")
    assert told == sorted(name.split(".")[1] for name in MAY_CHANGE)


def test_the_table_of_our_own_flags_is_the_codes():
    source = (ROOT / "trainer/config.py").read_text()
    ours = re.findall(r"^    (\w+): .*# ours: ", source, re.MULTILINE)
    told = flags_between("Flags that the reference does not have", "`--held_out N`")
    assert told == sorted([*ours, "config", "dry_run"])


def test_the_tables_of_protocols_and_metrics_are_the_codes():
    section = TEXT["trainer/README.md"].split("## Measure edits", 1)[1].split("\n## ", 1)[0]
    first_cells = " ".join(re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE))
    assert {*re.findall(r"`([\w-]+)`", first_cells)} == {*protocol_names(), *METRICS}


def messages() -> list[str]:
    """Those that troubleshooting is sorted by."""
    tables = re.findall(r"^\| message \|.*?\n\n", TEXT[TROUBLE] + "\n", re.MULTILINE | re.DOTALL)
    return re.findall(r"^\| `([^`]+)`", "".join(tables), re.MULTILINE)


def test_troubleshooting_has_messages():
    assert len(messages()) > 15


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_that_is_told(message):
    """Each of its fixed pieces is in the source, all of them in one file."""
    pieces = [piece.strip() for piece in message.split("...") if piece.strip(" ()")]
    told = [
        "".join(piece.value for piece in ast.walk(ast.parse(path.read_text()))
                if isinstance(piece, ast.Constant) and isinstance(piece.value, str))
        for folder in ("trainer", "launch")
        for path in (ROOT / folder).glob("*.py")
    ]  # fmt: skip
    assert [text for text in told if all(piece in text for piece in pieces)], pieces


def test_no_machine_is_named():
    home = str(ROOT.parent) + "/"
    hosts = r"https?://(?:registry|files|deb)\."
    assert not [name for name, text in TEXT.items() if home in text or re.search(hosts, text)]
