"""fusedit edit MODEL IMAGE "instruction" -o OUT: pictures edited by a trained pipeline.

Of one image, of a folder's, of a list's, or in a page of its own (--ui).
"""

import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm
from tyro.conf import Positional, arg

from ..trainer.editing import Compiled, Editor, Settings, save_image
from ..trainer.editing_many import Done, edit_rows, identity, still_to_do
from ..trainer.editing_rows import Bad, rows_of_folder, rows_of_list
from ..trainer.errors import UsageError
from ..trainer.files import cannot_write
from ..trainer.pipelines import load_pipeline
from ..trainer.sample import open_image
from .train import DONE, MISTAKE, STOPPED, quiet_libraries

LIST = (".jsonl", ".ndjson")
BATCH = 8  # edits at once; guidance triples it
HOST, PORT = "127.0.0.1", 7860

Model = Annotated[str, Positional, arg(metavar="MODEL")]
Source = Annotated[str, Positional, arg(metavar="IMAGE")]
Instruction = Annotated[str, Positional, arg(metavar="INSTRUCTION")]


@dataclass(frozen=True, slots=True)
class EditFlags:
    """Edits images by instructions.

    IMAGE is one image; a folder, of which every image is edited, those of subfolders too; or a list
    edits.jsonl without INSTRUCTION: {"image": "a.png", "instruction": "make it red"} a line, with
    "seed", "steps", "guidance_scale", "image_guidance_scale" and "output" where they differ.
    `fusedit edit --ui MODEL` takes none of these and opens a page to edit in.
    """

    model: Model  # folder of an InstructPix2Pix pipeline, or its name on the hub
    image: Source = ""  # path or http(s) URL; a folder; a list, .jsonl
    instruction: Instruction = ""  # for instance "make it snowy"
    output: Annotated[Path | None, arg(aliases=["-o"])] = None  # image file; of many: a folder
    guidance_scale: float = 7.5  # how closely to follow the instruction; 1: without any guidance
    image_guidance_scale: float = 1.5  # how closely to keep to the image; 1 or more
    steps: int = 20  # denoising steps
    seed: int = 0  # another seed, another edit
    resolution: int = 512  # pixels, limit of the long side; smaller images keep their size
    device: str | None = None  # default: the GPU if there is one
    batch_size: int = BATCH  # of many: how many are edited at once, in one size
    compile: Compiled = (
        "off"  # of the UNet, by torch.compile: blocks or the whole; of use for many edits
    )
    plain: bool = False  # PyTorch's own kernels and layout
    on_bad_image: Literal["stop", "skip"] = "stop"  # of many: on what cannot be edited
    overwrite: bool = False  # of many: edit again what is there already
    ui: bool = False  # a page to edit in, on this machine
    host: str = HOST  # address of the page; 0.0.0.0: anybody who reaches this machine may use it
    port: int = PORT  # of the page

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.batch_size < 1:
            raise UsageError("--resolution and --batch_size must be 1 or more")
        try:
            _ = self.settings
        except UsageError as error:
            raise UsageError(f"--{error}") from None
        if not self.ui and (self.host, self.port) != (HOST, PORT):
            raise UsageError("--host and --port are of --ui, which was not given")
        if not 1 <= self.port < 2**16:
            raise UsageError(f"--port must be from 1 to {2**16 - 1}, got {self.port}")
        if self.ui:
            if self.image or self.instruction or self.output or self.overwrite:
                raise UsageError("--ui takes MODEL alone: image and instruction are for its page")
            return
        if not self.image or (self.is_list == bool(self.instruction)):
            raise UsageError(
                'give MODEL IMAGE "instruction" -o OUT, MODEL FOLDER "instruction" -o OUTFOLDER, '
                "MODEL edits.jsonl -o OUTFOLDER, or --ui MODEL"
            )
        if self.output is None:
            raise UsageError("-o is missing: where shall the edit be written?")
        if self.is_many:
            if self.output.exists() and not self.output.is_dir():
                raise UsageError(f"-o {self.output}: is a file; give a folder")
            return
        if self.overwrite:
            raise UsageError("--overwrite is of folders and lists; one image is always written")
        if self.output.suffix.lower() not in Image.registered_extensions():
            if "://" not in self.image and not Path(self.image).exists():  # a folder, perhaps
                raise UsageError(f"{self.image}: there is no such file or folder")
            raise UsageError(f"-o {self.output}: end the name in .png, .jpg or .webp")
        if self.output.is_dir() or not self.output.parent.is_dir():
            raise UsageError(f"-o {self.output}: is a folder, or lies in one that does not exist")

    @property
    def settings(self) -> Settings:
        return Settings(
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
        )

    @property
    def is_list(self) -> bool:
        return Path(self.image).suffix.lower() in LIST

    @property
    def is_many(self) -> bool:
        return self.is_list or Path(self.image).is_dir()


def main(argv: list[str]) -> int:
    """Edits and returns the exit code: 0; 2 for a mistake, told in one line; 75 if stopped."""
    quiet_libraries()
    try:
        flags = tyro.cli(
            EditFlags,
            prog="fusedit edit",
            args=argv,
            use_underscores=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if flags.ui:
            return _page(flags)
        print(_many(flags) if flags.is_many else _one(flags))
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("fusedit: stopped; the same command goes on with what is missing", file=sys.stderr)
        return STOPPED
    return DONE


def _one(flags: EditFlags) -> str:
    output = flags.output or Path()
    image = open_image(flags.image)
    editor = _editor(flags, 1)
    with tqdm(total=flags.steps, disable=None) as bar:  # shown in a terminal alone
        edited = editor.one(
            image, flags.instruction, flags.settings, shows=lambda done: _show(bar, done)
        )
    save_image(edited, output)
    return f"{output}: {edited.width} x {edited.height}"


def _page(flags: EditFlags) -> int:
    """Until Ctrl-C, or whoever ends processes."""
    if find_spec("gradio") is None:
        raise UsageError("--ui needs Gradio: pip install 'fusedit[ui]'")
    from . import ui  # it takes seconds

    ui.check_address(flags.host, flags.port)
    editor = _editor(flags, 1)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ui.serving(editor, flags.model, flags.settings, flags.host, flags.port) as address:
            print(f"fusedit: edit at {address}; Ctrl-C ends it", flush=True)
            Event().wait()
    except KeyboardInterrupt:
        print("fusedit: the page is closed")
    finally:
        signal.signal(signal.SIGTERM, handler)
    return DONE


def _show(bar: tqdm, done: int) -> None:
    bar.update(min(done, bar.total) - bar.n)  # some samplers take a step more than they are asked


def _many(flags: EditFlags) -> str:
    out = flags.output or Path()
    bad = Bad(flags.on_bad_image == "skip", lambda line: tqdm.write(line, file=sys.stderr))
    if flags.is_list:
        rows = rows_of_list(Path(flags.image), flags.settings, out, bad)
    else:
        rows = rows_of_folder(Path(flags.image), flags.instruction, flags.settings, out, bad)
    model = identity(flags.model)
    missing = still_to_do(rows, model, flags.resolution, flags.overwrite)
    done = Done(0, len(rows) - len(missing), bad.count)
    if missing:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(out, error) from None
        done = edit_rows(_editor(flags, flags.batch_size), missing, done.kept, model, bad)
    return f"{out}: {done.written} edited, {done.kept} there already, {done.skipped} left out"


def _editor(flags: EditFlags, batch_size: int) -> Editor:
    device = _device(flags.device)
    return Editor(
        load_pipeline(flags.model),
        device,
        resolution=flags.resolution,
        plain=flags.plain,
        compiled=flags.compile,
        batch_size=batch_size,
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by build
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
