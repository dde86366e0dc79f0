"""The page of `fusedit edit --ui MODEL`: image, instruction, settings, and what comes of them.

A Gradio app for this machine. Nothing is asked of any other host, nothing is told to one, and what
was uploaded or made is deleted when it ends.
"""

import html
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
from PIL import Image

from ..trainer.editing import Editor, Settings, save_image
from ..trainer.editing_rows import check_text
from ..trainer.errors import UsageError
from ..trainer.images import load_image

UPLOAD = "32mb"
MOST_PIXELS = 40_000_000  # of an upload; more than a camera's 7000 x 5000
WAITING = 20  # edits in the queue, of all visitors
REMEMBERED = 24  # edits of a visitor
MOST_STEPS, MOST_GUIDANCE, MOST_IMAGE_GUIDANCE = 100, 15.0, 4.0  # of the sliders
MOST_SEED = 2**53 - 1  # that a browser's numbers hold
HOUR = 3600
THEME = gr.themes.Default(
    primary_hue="blue", neutral_hue="slate", font=("system-ui", "sans-serif"),
    font_mono=("monospace",),
).set(
    body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600",
    block_label_text_color="*neutral_600", input_placeholder_color="*neutral_500",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)  # fmt: skip
# On a phone the settings come after the result; a caption of the history stands below its picture.
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
#heading h1 { margin: 0; font-size: 1.5rem; }
#heading p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); }
#instruction textarea { min-height: 3.8em; }
#random { font-weight: 500; }
#earlier { margin: 0.25rem 0 0; }
#history { border: 0; background: none; }
#history .grid-wrap { min-height: 0; max-height: 30rem; padding: 0; }
#history .thumbnail-item { aspect-ratio: auto; height: auto; display: flex; }
#history .thumbnail-item { flex-direction: column; align-items: stretch; }
#history .thumbnail-item > img { aspect-ratio: 1; height: auto; }
#history .caption-label {
  position: static; max-width: none; border: 0; white-space: normal; opacity: 1;
  padding: 0.4rem 0.5rem; line-height: 1.3; overflow-wrap: anywhere; border-radius: 0;
}
@media (max-width: 768px) {
  #columns { flex-direction: column; flex-wrap: nowrap; }
  #columns > .column { display: contents; }
  #settings { order: 1; }
  #earlier, #history { order: 2; }
  #history .grid-container { grid-template-columns: repeat(2, 1fr); }
}
"""
RANDOM_SEED = "() => Math.floor(Math.random() * 2 ** 31)"


class Entry(NamedTuple):
    """An edit of this visit: what it was made of, and the files that show it."""

    upload: str
    fitted: str
    edit: str
    instruction: str
    settings: Settings


def check_address(host: str, port: int) -> None:
    """Raises: UsageError: nothing can be served there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror}; give another") from None


@contextmanager
def serving(editor: Editor, model: str, settings: Settings, host: str, port: int) -> Iterator[str]:
    """Inside, the page is there; gives its address.

    Args:
        settings: what the page starts with.
    """
    with TemporaryDirectory(prefix="fusedit-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and edits
        page = make_page(editor, model, settings, Path(folder))
        page.queue(default_concurrency_limit=1, max_size=WAITING, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                inline=False,
                prevent_thread_lock=True,
                allowed_paths=[],
                max_file_size=UPLOAD,
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                footer_links=[],
                css=CSS,
                theme=THEME,
            )
            yield address
        finally:
            page.close(verbose=False)


def make_page(editor: Editor, model: str, settings: Settings, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        folder: for edits, which are served from it.
    """
    with gr.Blocks(
        title="fusedit", analytics_enabled=False, fill_width=True, delete_cache=(HOUR, 24 * HOUR)
    ) as page:
        name = html.escape(Path(model).name or model)
        heading = f"<h1>Edit an image by an instruction</h1><p>Model: {name}</p>"
        gr.HTML(heading, padding=False, elem_id="heading")
        history = gr.State([])
        with gr.Row(elem_id="columns"):
            with gr.Column():
                upload = gr.Image(
                    type="filepath", label="Image", sources=["upload", "clipboard"], height=320,
                    buttons=[], elem_id="upload",
                )  # fmt: skip
                instruction = gr.Textbox(
                    label="Instruction", placeholder="make it snowy", max_lines=4,
                    elem_id="instruction",
                )  # fmt: skip
                button = gr.Button("Edit", variant="primary")
                controls = _controls(settings)
            with gr.Column():
                result = gr.ImageSlider(
                    label="Before and after", format="png", interactive=False, max_height=560,
                    buttons=["download", "fullscreen"], elem_id="result",
                )  # fmt: skip
                gr.HTML(
                    "Earlier edits: click one to take its settings again", padding=False,
                    elem_id="earlier",
                )  # fmt: skip
                gallery = gr.Gallery(
                    show_label=False, columns=3, object_fit="cover", allow_preview=False,
                    fit_columns=False, interactive=False, buttons=[], elem_id="history",
                )  # fmt: skip

        # Gradio would open the file first; a subclass makes it write a .pyi beside this file.
        upload.preprocess = lambda payload: payload and payload.path

        def edit(
            path: str | None,
            text: str,
            seed: float | None,
            steps: float,
            guidance_scale: float,
            image_guidance_scale: float,
            earlier: list[Entry],
            progress: gr.Progress = gr.Progress(),  # noqa: B008, where Gradio looks for it
        ) -> tuple[Any, ...]:
            def shows(step: int) -> None:  # some samplers take one more than they are asked
                progress((min(step, int(steps)), int(steps)), desc="Denoising", unit="steps")

            unchanged = gr.skip(), gr.skip(), gr.skip()  # the result that is shown stays
            try:
                image = read_upload(path)
                own = checked(text, seed, steps, guidance_scale, image_guidance_scale)
            except ValueError as error:
                tell(error)
                return unchanged
            try:
                fitted = editor.fitted(image)
                made = editor.one(fitted, text, own, shows)
                place = folder / secrets.token_hex(16)
                place.mkdir()
                before, after = place / "input.png", place / f"edit-seed-{own.seed}.png"
                save_image(fitted, before)
                save_image(made, after)
            except UsageError as error:  # of memory or disk
                tell(error)
                return unchanged
            entry = Entry(str(path), str(before), str(after), text, own)
            entries = [entry, *earlier][:REMEMBERED]
            shown = [(each.edit, caption(each)) for each in entries]
            return (entry.fitted, entry.edit), entries, shown

        def take_again(entries: list[Entry], chosen: gr.SelectData) -> tuple[Any, ...]:
            entry = entries[chosen.index]
            own = entry.settings
            return (
                entry.upload, entry.instruction, own.seed, own.steps, own.guidance_scale,
                own.image_guidance_scale, (entry.fitted, entry.edit),
            )  # fmt: skip

        def refuse(path: str | None) -> Any:
            try:
                read_upload(path)
            except ValueError as error:
                tell(error)
                return None
            return gr.skip()

        given: list[Any] = [upload, instruction, *controls]
        gr.on(
            [button.click, instruction.submit], edit, [*given, history], [result, history, gallery],
            show_progress_on=[result], concurrency_limit=1, api_visibility="private",
        )  # fmt: skip
        gallery.select(take_again, history, [*given, result], queue=False, api_visibility="private")
        # By the queue, which alone carries messages; it waits for no edit.
        upload.upload(refuse, upload, upload, trigger_mode="always_last", api_visibility="private")
    return page


def _controls(settings: Settings) -> Sequence[Any]:
    """Seed, steps, and both guidance scales."""
    text, image = settings.guidance_scale, settings.image_guidance_scale
    with gr.Column(elem_id="settings"):
        with gr.Row(equal_height=True):
            seed = gr.Number(settings.seed, label="Seed", precision=0, scale=3)
            random = gr.Button("Random", scale=1, min_width=90, elem_id="random")
        others = (
            gr.Slider(1, max(MOST_STEPS, settings.steps), settings.steps, step=1, label="Steps"),
            gr.Slider(
                min(1, text), max(MOST_GUIDANCE, text), text, step=0.1, label="Guidance",
                info="how closely to follow the instruction; 1: no guidance",
            ),
            gr.Slider(
                min(1, image), max(MOST_IMAGE_GUIDANCE, image), image, step=0.05,
                label="Image guidance", info="how closely to keep to the image",
            ),
        )  # fmt: skip
    random.click(None, None, seed, js=RANDOM_SEED, api_visibility="private")
    return seed, *others


def checked(
    instruction: str,
    seed: float | None,
    steps: float,
    guidance_scale: float,
    image_guidance_scale: float,
) -> Settings:
    """How it is to be edited. Raises: ValueError, for the page."""
    if not instruction.strip():
        raise ValueError("Say what shall be changed: the instruction is empty.")
    check_text("the instruction", instruction)
    if seed is None or not 0 <= seed <= MOST_SEED:
        raise ValueError(f"Give a seed, a whole number from 0 to {MOST_SEED}.")
    return Settings(
        seed=int(seed),
        steps=int(steps),
        guidance_scale=float(guidance_scale),
        image_guidance_scale=float(image_guidance_scale),
    )


def read_upload(path: str | None) -> Image.Image:
    """The image that was uploaded. Raises: ValueError, for the page: it is none, or too large."""
    if path is None:
        raise ValueError("Give an image first.")
    try:
        return load_image(Path(path), MOST_PIXELS)
    except ValueError as error:  # whose flag the page does not have
        raise ValueError(str(error).replace("--max_image_pixels ", "")) from None


def tell(error: ValueError) -> None:
    """A message in the page, where it is read as HTML."""
    gr.Warning(html.escape(str(error)))


def caption(entry: Entry) -> str:
    own = entry.settings
    scales = f"{own.guidance_scale:g} / {own.image_guidance_scale:g}"
    return f"{entry.instruction} · seed {own.seed}, {own.steps} steps, {scales}"
