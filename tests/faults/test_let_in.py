"""Who is let in: no pickle, no code, no file from elsewhere, no endless answer, and no token out"""

import io
import json
import os
import pickle
import shutil
import tarfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from faulty import RED, bomb, encoded, opened, save_set
from PIL import Image
from ranks import run_flags
from tiny import save_tiny_inputs

from fusedit.launch import edit, train
from fusedit.trainer import export, pretrained, sample
from fusedit.trainer.config import DataConfig, ModelConfig, OutputConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.pretrained import describe
from fusedit.trainer.rows import BadSample, open_rows
from fusedit.trainer.sample import open_image
from fusedit.trainer.settings import from_toml


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 12)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As conftest.py says, also where a run is started in this process."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


# Pickles and code.


class Trap:
    """Leaves a file where it was run."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_of_pickled_weights_is_refused_before_any_is_read(inputs, tmp_path, part, capfd):
    base = shutil.copytree(inputs / "base", tmp_path / "base")
    [weights] = (base / part).glob("*.safetensors")
    pickled = "diffusion_pytorch_model.bin" if "diffusion" in weights.name else "pytorch_model.bin"
    weights.with_name(pickled).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    weights.unlink()
    with pytest.raises(UsageError, match=rf"{part} there is {pickled} and no .safetensors; pick"):
        describe(ModelConfig(pretrained_model_name_or_path=str(base)))
    image = str(inputs / "data/000_input.png")
    assert edit.main([str(base), image, "make it red", "-o", str(tmp_path / "out.png")]) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_weights_are_asked_for_as_safetensors_alone():
    """Also from the hub, whose folders nobody has looked into before."""

    class Asked:
        @staticmethod
        def from_pretrained(source, **options):
            return options

    section = ModelConfig(pretrained_model_name_or_path="owner/name")
    assert pretrained._load(Asked, section, "unet")["use_safetensors"] is True


def test_a_pickle_beside_the_weights_is_not_looked_at(inputs, tmp_path):
    base = shutil.copytree(inputs / "base", tmp_path / "base")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        (base / name).write_bytes(trap)
    flags = run_flags(inputs, tmp_path / "run", 1, 1)
    assert train.main([*flags, f"--pretrained_model_name_or_path={base}"]) == 0
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", ["set.py", "dataset.py", "__init__.py"])
def test_a_dataset_with_a_script_is_refused_and_nothing_is_run(tmp_path, file):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / file).write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    with pytest.raises(UsageError, match=r"^--train_data_dir [^\n]+$"):
        opened(folder)
    assert not (tmp_path / "sprung").exists()


def test_pickled_tables_are_no_dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "data.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UsageError):
        opened(folder)
    assert not (tmp_path / "sprung").exists()


# Paths.


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private/secret.png").write_bytes(encoded(Image.new("RGB", (3, 2), RED)))
    return tmp_path / "private/secret.png"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_out_of_the_folder_is_a_bad_row_unless_allowed(tmp_path, secret, kind):
    folder = save_set(tmp_path / "set", [bomb(9)])
    name = "1.png" if kind == "file" else "links/secret.png"
    (folder / name.split("/")[0]).symlink_to(secret if kind == "file" else secret.parent)
    line = {"input_image": "0.png", "edited_image": name, "edit_prompt": "x"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(BadSample, match=r"row 0 \(.*\): edited_image: it leads out of the dataset"):
        opened(folder).read(0, 0.0)
    edited = opened(folder, allow_outside_files=True).read(0, 0.0)[1]
    assert edited.getpixel((0, 0)) == RED


def test_links_inside_and_a_link_to_the_folder_are_followed(tmp_path):
    folder = save_set(tmp_path / "set", [bomb(9)])
    (folder / "0.png").rename(folder / "blob")
    (folder / "0.png").symlink_to("blob")
    (tmp_path / "other").symlink_to(folder)
    opened(tmp_path / "other").read(0, 0.0)


def test_a_link_out_of_the_papers_layout_is_a_bad_row(tmp_path, secret):
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    (folder / "seeds.json").write_text('[["a", ["1"]]]')
    (folder / "a/prompt.json").write_text('{"edit": "x"}')
    for end in (0, 1):
        (folder / f"a/1_{end}.jpg").symlink_to(secret)
    with pytest.raises(BadSample, match="leads out"):
        opened(folder).read(0, 0.0)
    (secret.parent / "prompt.json").write_text('{"edit": "x"}')
    (folder / "a/prompt.json").unlink()
    (folder / "a/prompt.json").symlink_to(secret.parent / "prompt.json")
    with pytest.raises(BadSample, match=r"prompt\.json.*leads out"):
        opened(folder).read(0, 0.0)


@pytest.mark.parametrize("from_hub", [False, True])
def test_a_table_cannot_name_a_file_of_this_machine(tmp_path, secret, from_hub, monkeypatch):
    image = {"bytes": None, "path": str(secret)}
    made = datasets.Dataset.from_list(
        [{"input_image": image, "edited_image": image, "edit_prompt": "x"}]
    )
    if from_hub:
        monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: made)
        rows = open_rows(DataConfig(dataset_name="owner/pairs"))
    else:
        (tmp_path / "set").mkdir()
        made.to_parquet(tmp_path / "set/pairs.parquet")
        rows = opened(tmp_path / "set")
    with pytest.raises(BadSample, match="leads out"):
        rows.read(0, 0.0)


# Archives.


def test_an_archive_writes_nothing_and_links_nowhere(tmp_path, secret):
    """`datasets` takes a folder of tar files as webdataset, and reads members one by one."""
    folder = tmp_path / "set"
    folder.mkdir()
    image = encoded(Image.new("RGB", (3, 2), RED))
    with tarfile.open(folder / "0.tar", "w") as archive:

        def add(name, data=b"", **options):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for option, value in options.items():
                setattr(member, option, value)
            archive.addfile(member, io.BytesIO(data))

        for name in ("a", "../../escaped", f"{tmp_path}/absolute"):
            add(f"{name}.input.png", image)
            add(f"{name}.edited.png", image)
            add(f"{name}.text.txt", b"make it red")
        add("linked.input.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add("hard.input.png", type=tarfile.LNKTYPE, linkname=str(secret))
        add("device.input.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add("pipe.input.png", type=tarfile.FIFOTYPE)
    before = sorted(tmp_path.rglob("*"))
    columns = {"original_image_column": "input.png", "edited_image_column": "edited.png"}
    rows = opened(folder, **columns, edit_prompt_column="text.txt")
    assert [rows.read(row, 0.0)[2] for row in range(len(rows))] == ["make it red"] * 3
    cache = tmp_path / "cache"
    made = {at for at in tmp_path.rglob("*") if not at.is_relative_to(cache)}
    assert made == set(before)


# Addresses.


class Hostile(BaseHTTPRequestHandler):
    def do_GET(self):
        kind = self.path.strip("/")
        if kind.startswith("to-"):
            self.send_response(302)
            target = {
                "to-file": Path("/etc/hostname").as_uri(),
                "to-ftp": "ftp://127.0.0.1/a.png",
                "to-itself": self.path,
                "to-image": "/image",
            }[kind]
            self.send_header("Location", target)
            self.end_headers()
            return
        if kind == "silent":
            time.sleep(3)
            return
        self.send_response(200)
        self.end_headers()
        try:
            if kind == "image":
                self.wfile.write(bomb(9))
            while kind in ("slow", "endless"):
                self.wfile.write(b"\0" if kind == "slow" else bytes(2**16))
                time.sleep(0.02 if kind == "slow" else 0)
        except OSError:
            pass  # it hung up, as it should

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("silent", "not here after 0.3 seconds|timed out"),
        ("slow", "not here after 0.3 seconds"),
        ("endless", "larger than 1 MiB"),
        ("to-file", "redirects to file:|cannot be fetched"),
        ("to-ftp", "redirects to ftp:"),
        ("to-itself", "redirect"),
    ],
)
def test_an_address_cannot_hold_or_lead_astray(address, kind, reason, monkeypatch):
    monkeypatch.setattr(sample, "DOWNLOAD_SECONDS", 0.3 if kind in ("silent", "slow") else 20)
    monkeypatch.setattr(sample, "DOWNLOAD_BYTES", 2**20)
    start = time.monotonic()
    with pytest.raises(UsageError, match=reason) as raised:
        open_image(f"{address}/{kind}")
    assert time.monotonic() - start < 2
    assert "\n" not in str(raised.value)


def test_a_redirect_to_another_page_is_followed(address):
    assert open_image(f"{address}/to-image").size == (9, 9)


@pytest.mark.parametrize("scheme", ["file", "ftp", "data", "gopher", "FILE"])
def test_other_schemes_are_refused(scheme):
    with pytest.raises(UsageError, match="only http and https"):
        open_image(f"{scheme}:///etc/hostname")


# Tokens.

TOKEN = "hf_" + "MarkedHubToken" * 2
KEYS = {"HF_TOKEN": "marked-environment-token", "WANDB_API_KEY": "MarkedWandbKey" * 3}


@pytest.fixture
def nothing_told(tmp_path, monkeypatch, capfd):
    """Checks that neither what was printed nor any file under tmp_path has a token."""
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)

    def check(besides=()):
        printed = "".join(capfd.readouterr())
        secrets = (TOKEN, *KEYS.values())
        assert not [secret for secret in secrets if secret in printed], printed
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path not in besides]
        found = [path for path in files for s in secrets if s.encode() in path.read_bytes()]
        assert not found
        return printed

    return check


def test_a_run_writes_and_prints_no_token(inputs, tmp_path, nothing_told, monkeypatch):
    class Hub:
        """One that tells, in its refusal of the upload, what it was given."""

        def __init__(self, token=None):
            self.token = token

        def whoami(self):
            return {}

        def create_repo(self, name, exist_ok):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name}")

        def upload_folder(self, **given):
            raise ValueError(f"401 for Authorization: Bearer {self.token} {KEYS['HF_TOKEN']}")

    monkeypatch.setattr(export, "HfApi", Hub)
    flags = run_flags(inputs, tmp_path / "run", 1, 2)
    flags += ["--held_out=1", "--report_to=tensorboard", "--push_to_hub", f"--hub_token={TOKEN}"]
    assert train.main(flags) == 2  # by the hub, after all is written
    assert (tmp_path / "run/README.md").exists()
    assert "401 for Authorization" in nothing_told()


def test_no_token_in_a_trackers_configuration(inputs, tmp_path, nothing_told, monkeypatch):
    from fusedit.trainer import log

    class Tracker:
        identity = None

        def __getattr__(self, name):
            return lambda *given, **more: None

    given = []
    monkeypatch.setattr(log, "open_tracker", lambda name, **more: given.append(more) or Tracker())
    assert train.main([*run_flags(inputs, tmp_path / "run", 1, 1), "--report_to=tensorboard"]) == 0
    assert given
    assert not [s for s in (TOKEN, *KEYS.values()) if s in repr(given)]
    nothing_told()


@pytest.mark.parametrize(
    "more",
    [
        ["--resolution=17"],
        ["--resolution=no"],
        ["--no_such_flag=1"],
        ["--output_dir=base/model_index.json"],
        ["--help"],
        ["--hub_token"],
    ],
)
def test_no_mistake_tells_the_token(inputs, tmp_path, nothing_told, more, monkeypatch):
    monkeypatch.chdir(inputs)
    flags = [*run_flags(inputs, tmp_path / "run", 1, 1), f"--hub_token={TOKEN}", *more]
    with suppress(SystemExit):
        assert train.main(flags) == 2
    assert nothing_told()


@pytest.mark.parametrize("more", ["", "resolution = 17", "x = ", "resolution = 'a'", "--help"])
def test_a_file_with_a_token_is_read_and_not_repeated(inputs, tmp_path, nothing_told, more):
    file = tmp_path / "run.toml"
    more, help_ = ("", ["--help"]) if more == "--help" else (more, [])
    file.write_text(f"hub_token = '{TOKEN}'\n{more}\n")
    flags = [*run_flags(inputs, tmp_path / "run", 1, 1), f"--config={file}", *help_]
    with suppress(SystemExit):
        train.main(flags)
    assert nothing_told(besides=[file])


@pytest.mark.parametrize("value", [f"['{TOKEN}']", f"{{a = '{TOKEN}'}}"])
def test_a_token_of_a_wrong_type_is_not_repeated(tmp_path, value):
    (tmp_path / "run.toml").write_text(f"[output]\nhub_token = {value}")
    with pytest.raises(UsageError, match="hub_token must be str") as raised:
        from_toml(tmp_path / "run.toml")
    assert TOKEN not in str(raised.value)


def test_a_token_comes_from_a_file_too(tmp_path):
    (tmp_path / "run.toml").write_text(f"hub_token = '{TOKEN}'")
    assert from_toml(tmp_path / "run.toml").output.hub_token == TOKEN
    assert OutputConfig(hub_token=TOKEN).hub_token == TOKEN


# Ports.
