"""Wheel, sdist and editable install beside Hugging Face's `kernels`; and the set-up scripts.

An environment here is a new venv with ours alone in it; all other packages are the development
environment's, whose site-packages a .pth file puts behind its own.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
OTHER_VERSION = "3.12" if sys.version_info[:2] == (3, 11) else "3.11"
FOLDERS = ("trainer", "kernels", "launch", "benchmarks")
LEFT_BY_TOOLS = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs", "__pycache__")
BASH = shutil.which("bash") or "bash"

# `kernels` is Hugging Face's, which transformers and diffusers look for.
PRINT_FILES = """
import kernels, fusedit.trainer.config, fusedit.kernels.philox
for module in (kernels, fusedit.trainer.config, fusedit.kernels.philox):
    print(module.__file__)
"""
IMPORT_ALL = f"import transformers, diffusers, fusedit.trainer.run\n{PRINT_FILES}"
IMPORT_WITHOUT_TORCH = """
import sys
import fusedit.launch.cli, fusedit.launch.flags, fusedit.trainer.config
print(fusedit.launch.flags.parse(["--seed=42"]).run.loop.seed, "torch" in sys.modules)
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Output of a command that must succeed, away from this process's Python settings."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=own | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Environment:
    """A venv with one copy of ours, from a wheel, an sdist or a folder."""

    def __init__(self, folder: Path, python: str | Path, *what: str | Path) -> None:
        run(python, "-m", "venv", "--without-pip", folder)
        self.bin = folder / "bin"
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site_packages = Path(run(self.bin / "python", "-c", purelib).strip())
        # pip must not see the development environment's copy of ours, but builds by its setuptools.
        builders = folder / "builders"
        builders.mkdir()
        for path in (*SITE_PACKAGES.glob("setuptools*"), SITE_PACKAGES / "_distutils_hack"):
            (builders / path.name).symlink_to(path)
        others = self.site_packages / "others.pth"
        others.write_text(str(builders))
        pip = sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"
        run(*pip, "--no-index", "--no-deps", "--no-build-isolation", *what)
        others.write_text(str(SITE_PACKAGES))

    def prints(self, code: str, cwd: Path) -> list[str]:
        return run(self.bin / "python", "-c", code, cwd=cwd).splitlines()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source, for a build leaves its traces beside it."""
    copy = tmp_path_factory.mktemp("source") / "fusedit"
    shutil.copytree(ROOT, copy, ignore=LEFT_BY_TOOLS)
    return copy


@pytest.fixture(scope="module")
def built(tree) -> dict[str, Path]:
    """The wheel, which is built from the sdist, and the sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree.parent / "built", tree)
    [wheel] = (tree.parent / "built").glob("*.whl")
    [sdist] = (tree.parent / "built").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def other_python() -> Path:
    """The other Python that is supported, wherever it is."""
    on_path = shutil.which(f"python{OTHER_VERSION}")
    of_pyenv = Path.home().glob(f".pyenv/versions/{OTHER_VERSION}.*/bin/python")
    for python in filter(None, (on_path, *of_pyenv)):
        if subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0:
            return Path(python)
    pytest.skip(f"there is no Python {OTHER_VERSION} here")


def package_files(tree: Path) -> set[str]:
    """What belongs into an install: modules, recipes, protocols, a page, the base, tables."""
    modules = [path for folder in FOLDERS for path in (tree / folder).rglob("*.py")]
    recipes = [
        path
        for folder in ("recipes", "slurm", "kubernetes", "ssh")
        for path in (tree / "launch" / folder).iterdir()
    ]
    recipes += [*tree.glob("trainer/protocols/*.toml"), tree / "launch/report.html"]
    base = (path for path in (tree / "launch/demo/base").rglob("*") if path.is_file())
    tables = (tree / "kernels/tables").glob("*.json")
    compiled = (tree / "benchmarks/results").glob("compiled-*.json")
    files = (*modules, *recipes, *base, *tables, *compiled)
    return {str(path.relative_to(tree)) for path in files}


def test_the_wheel_holds_the_namespace_and_nothing_else(tree, built):
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        f"fusedit/{name}" for name in package_files(tree)
    }
    must = {"fusedit/kernels/philox.py", "fusedit/launch/demo/base/model_index.json"}
    assert must <= set(names)


def test_the_sdist_holds_what_the_wheel_is_built_from_and_no_tests(tree, built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert package_files(tree) | needed <= names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_install_lives_beside_hugging_faces_kernels(kind, tree, built, tmp_path):
    what = ("--editable", tree) if kind == "editable" else (built[kind],)
    environment = Environment(tmp_path / "venv", sys.executable, *what)
    home = tree if kind == "editable" else environment.site_packages / "fusedit"
    files = [
        str(SITE_PACKAGES / "kernels/__init__.py"),
        str(home / "trainer/config.py"),
        str(home / "kernels/philox.py"),
    ]
    # The repository's root has a folder `kernels`, and is first on the path of what runs there.
    assert environment.prints(IMPORT_ALL, cwd=tree) == files
    assert environment.prints(PRINT_FILES, cwd=tmp_path) == files
    run(environment.bin / "fusedit", "--help", cwd=tree)
    module = environment.bin / "python", "-m", "fusedit.launch.train", "--help"
    assert "--pretrained_model_name_or_path" in run(*module, cwd=tmp_path)


def test_an_install_from_the_sdist_is_the_wheels(tree, built, tmp_path):
    home = Environment(tmp_path, sys.executable, built["sdist"]).site_packages / "fusedit"
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".pyc")} == package_files(tree)


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_install_works_on_the_other_python(kind, tree, built, tmp_path, other_python):
    """As far as it can without torch, which is not installed for it."""
    what = ("--editable", tree) if kind == "editable" else (built[kind],)
    environment = Environment(tmp_path / "venv", other_python, *what)
    for cwd in (tmp_path, tree):
        assert environment.prints(IMPORT_WITHOUT_TORCH, cwd) == ["42 False"]
    run(environment.bin / "fusedit", "--help", cwd=tree)
    if kind == "wheel":
        compile_all = environment.bin / "python", "-m", "compileall", "-q", "-f"
        run(*compile_all, environment.site_packages / "fusedit")


class Clone:
    """A repository as the set-up scripts see it; its .venv writes down what it is asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("demo"))
        for name in ("pyproject.toml", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        self.write("python", f'[[ $1 == -c ]] && exec "{sys.executable}" "$@"\n')
        self.write("fusedit", "")

    def write(self, name: str, start: str) -> None:
        path = self.folder / ".venv/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        record = f'echo "{name} $*" >>"{self.log}"\n[[ $* != *pip* || ! -e broken ]]\n'
        path.write_text(f"#!{BASH}\n{start}{record}")
        path.chmod(0o755)

    def call(self, script: str, *arguments: str) -> tuple[int, list[str]]:
        """Exit code, and what was done: "install .[dev]", or a command."""
        self.log.write_text("")
        command = [BASH, str(self.folder / "launch" / script), *arguments]
        code = subprocess.run(command, capture_output=True).returncode
        lines = self.log.read_text().splitlines()
        return code, [f"install {s.split()[-1]}" if " pip " in s else s for s in lines]


def test_set_up_is_done_once_and_again_when_a_pin_changes(tmp_path):
    clone = Clone(tmp_path)
    spread = "--numprocesses logical --maxprocesses 4 --dist loadfile"
    demo, test = "fusedit demo --quick", f"python -m pytest -m not slow {spread} -x"
    assert clone.call("demo.sh", "--quick") == (0, ["install .", demo])
    assert clone.call("demo.sh", "--quick") == (0, [demo])
    assert clone.call("test.sh", "-x") == (0, ["install .[dev]", test])
    assert clone.call("test.sh", "-x") == (0, [test])
    assert clone.call("demo.sh", "--quick") == (0, [demo])
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("tqdm==1\n")
    assert clone.call("test.sh", "-x") == (0, ["install .[dev]", test])


def test_set_up_that_failed_is_done_again_and_nothing_runs_after_it(tmp_path):
    clone = Clone(tmp_path)
    (tmp_path / "broken").touch()
    assert clone.call("test.sh") == (1, ["install .[dev]"])
    assert clone.call("test.sh") == (1, ["install .[dev]"])
    (tmp_path / "broken").unlink()
    assert clone.call("test.sh")[1][0] == "install .[dev]"


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 1", "fusedit: Python 3.11 or newer is needed and python3 is not; install one\n"),
        ('[[ $2 != "import ensurepip"* ]]', "fusedit: python3 comes without venv or ensurepip: "),
    ],
)
def test_set_up_says_in_one_line_what_python_lacks(tmp_path, python, message):
    clone = Clone(tmp_path / "clone")
    shutil.rmtree(clone.folder / ".venv")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname") or "")
    (tools / "python3").write_text(f"#!{BASH}\n{python}\n")
    (tools / "python3").chmod(0o755)
    command = [BASH, str(clone.folder / "launch/test.sh")]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
