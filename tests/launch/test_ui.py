"""The page of `fusedit edit --ui` in a real browser, on the demo's base made an editing model."""

import ast
import contextlib
import io
import os
import signal
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from browser import DESKTOP, PHONE, barriers, browser_or_skip, opened
from PIL import Image

from fusedit.benchmarks.edit import make_editor
from fusedit.launch import edit
from fusedit.launch.demo.run import BASE
from fusedit.launch.demo.world import make_pair
from fusedit.trainer.editing import Editor, Settings
from fusedit.trainer.pipelines import load_pipeline

gradio = pytest.importorskip("gradio")
from fusedit.launch import ui  # noqa: E402, which imports it

HOST = "127.0.0.1"
SETTINGS = Settings(steps=2)
# What axe-core says of Gradio's own components, which we cannot mend:
GRADIOS = {"image-redundant-alt"}  # a gallery's picture has its caption as its description too
browser = pytest.fixture(scope="module")(browser_or_skip)


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_editor(BASE, tmp_path_factory.mktemp("demo") / "editor")


@pytest.fixture(scope="module")
def editor(model):
    return Editor(load_pipeline(str(model)), torch.device("cpu"))


@pytest.fixture(scope="module")
def address(editor):
    with ui.serving(editor, "demo", SETTINGS, HOST, free_port()) as address:
        yield address


class Waits:
    """An editor that takes its step when it is let."""

    resolution = 512

    def __init__(self):
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def fitted(self, image):
        return image

    def one(self, image, instruction, settings, shows):
        shows(1)
        self.begun.set()
        self.goes_on.wait(30)
        return image


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "house.png"
    make_pair(0, 3).original.save(path)
    return path


def give(page, path):
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#upload img").wait_for()


def say(page, instruction):
    page.get_by_label("Instruction").fill(instruction)


def edited(page, count):
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator("#history .grid-container button").nth(count - 1).wait_for()


def sources(page):
    """Of the input and its edit, as the slider shows them."""
    return page.locator("#result img").evaluate_all("all => all.map(one => one.src)")


def asked_elsewhere(seen, address):
    own = address, "data:", "blob:"
    return [asked for asked in seen.requests if not asked.startswith(own)]


def pixels(source):
    return np.asarray(Image.open(source).convert("RGB"))


def test_an_edit_from_the_upload_to_its_history(browser, address, photo, model, tmp_path):
    with opened(browser, address) as seen:
        page = seen.page
        give(page, photo)
        say(page, "make it night")
        page.get_by_label("Seed", exact=True).fill("7")
        edited(page, 1)
        before, after = sources(page)
        made = pixels(io.BytesIO(page.request.get(after).body()))
        assert np.array_equal(pixels(io.BytesIO(page.request.get(before).body())), pixels(photo))
        words = [str(model), str(photo), "make it night", "-o", str(tmp_path / "out.png")]
        assert edit.main([*words, "--seed", "7", "--steps", "2"]) == 0
        assert np.array_equal(made, pixels(tmp_path / "out.png"))

        say(page, "make it snowy")
        page.get_by_role("button", name="Random", exact=True).click()
        page.wait_for_function("() => document.querySelector('input[type=number]').value != '7'")
        edited(page, 2)
        assert sources(page)[1] != after
        page.locator("#history .grid-container button").nth(1).click()  # the earlier one
        page.wait_for_function(
            "wanted => document.querySelectorAll('#result img')[1].src == wanted", arg=after
        )
        assert page.get_by_label("Instruction").input_value() == "make it night"
        assert page.get_by_label("Seed", exact=True).input_value() == "7"
        assert not [
            asked for asked in seen.requests if not asked.startswith((address, "data:", "blob:"))
        ]
        assert seen.errors == []


def bomb(path, width, height):
    """A PNG of some bytes, that says it has many pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_what_cannot_be_edited_is_told_in_the_page(browser, address, photo, tmp_path, capfd):
    text = tmp_path / "text.png"
    text.write_text("<b>no image</b>")
    with opened(browser, address) as seen:
        page = seen.page

        def message(part):
            page.locator(".toast-body", has_text=part).first.wait_for(timeout=10_000)

        button = page.get_by_role("button", name="Edit", exact=True)
        button.click()
        message("Give an image first.")
        files = page.locator("#upload input[type=file]")
        for path, reason in {
            text: "it is no image",
            bomb(
                tmp_path / "bomb.png", 20000, 20000
            ): "Image size (400000000 pixels) exceeds limit",
            bomb(tmp_path / "many.png", 8000, 6000): "8000 x 6000 pixels are more than 40000000",
        }.items():
            files.set_input_files(path)
            message(reason)
            page.locator("#upload img").wait_for(state="detached")
        large = tmp_path / "large.png"
        with large.open("wb") as file:
            file.truncate(33 * 2**20)
        files.set_input_files(large)
        message("exceed the maximum allowed size")
        give(page, photo)
        button.click()
        message("the instruction is empty")
        page.get_by_label("Instruction").fill("make it night")
        page.get_by_label("Seed", exact=True).fill("")
        button.click()
        message("seed")
        assert "Traceback" not in page.content()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_second_visitor_waits_in_the_queue(browser, photo):
    waits = Waits()
    with (
        ui.serving(waits, "demo", SETTINGS, HOST, free_port()) as address,
        opened(browser, address) as one,
        opened(browser, address) as other,
    ):
        for visitor in (one, other):
            give(visitor.page, photo)
            visitor.page.get_by_label("Instruction").fill("make it night")
        one.page.get_by_role("button", name="Edit", exact=True).click()
        assert waits.begun.wait(30)
        one.page.get_by_text("1/2").first.wait_for()
        other.page.get_by_role("button", name="Edit", exact=True).click()
        other.page.get_by_text("queue: ").first.wait_for()
        waits.goes_on.set()
        for visitor in (one, other):
            visitor.page.locator("#history .grid-container button").first.wait_for()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_fits_and_can_be_used_by_all(browser, photo, size):
    waits = Waits()
    waits.goes_on.set()
    with (
        ui.serving(waits, "demo", SETTINGS, HOST, free_port()) as address,
        opened(browser, address, size) as seen,
    ):
        page = seen.page
        give(page, photo)
        say(page, "make it night")
        edited(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        found = [told for told in barriers(page) if told.split(":")[0] not in GRADIOS]
        assert found == []


def test_the_slider_shows_more_of_one_or_the_other(browser, photo):
    waits = Waits()
    waits.goes_on.set()
    with (
        ui.serving(waits, "demo", SETTINGS, HOST, free_port()) as address,
        opened(browser, address) as seen,
    ):
        page = seen.page
        give(page, photo)
        say(page, "make it night")
        edited(page, 1)
        handle = page.locator("#result .outer")
        before = handle.bounding_box()
        page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
        page.mouse.down()
        page.mouse.move(before["x"] - 80, before["y"] + before["height"] / 2, steps=4)
        page.mouse.up()
        assert handle.bounding_box()["x"] < before["x"] - 40


def test_nothing_else_of_the_machine_is_served(address):
    for path in ("/etc/passwd", Path.cwd() / "pyproject.toml", Path(__file__)):
        with pytest.raises(HTTPError) as caught:
            urlopen(f"{address}gradio_api/file={path}")
        assert caught.value.code in (403, 404)


def test_ctrl_c_ends_it_in_one_line(model, capsys, monkeypatch):
    asked = set()
    own = socket.getaddrinfo

    def watched(host, *args, **options):
        asked.add(host)
        return own(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    port = free_port()
    folders = []

    def visit():
        while True:
            with contextlib.suppress(OSError):
                urlopen(f"http://{HOST}:{port}/").read()
                break
            time.sleep(0.1)
        time.sleep(0.5)
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    handler = signal.getsignal(signal.SIGINT)
    assert edit.main(["--ui", str(model), "--port", str(port)]) == 0
    visitor.join()
    assert signal.getsignal(signal.SIGINT) is handler
    said = capsys.readouterr()
    assert said.out.splitlines()[0].endswith(f"http://{HOST}:{port}/; Ctrl-C ends it")
    assert said.out.splitlines()[-1] == "fusedit: the page is closed"
    assert "Traceback" not in said.err
    assert asked <= {HOST, "localhost"}
    assert not folders[0].exists()


def test_a_page_that_cannot_be_is_one_line(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        assert edit.main(["--ui", "missing", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use; give another" in capsys.readouterr().err
    monkeypatch.setattr(edit, "find_spec", lambda name: None)
    assert edit.main(["--ui", "missing"]) == 2
    assert "pip install 'fusedit[ui]'" in capsys.readouterr().err


def test_gradio_is_not_imported_for_other_edits():
    tree = ast.parse(Path(edit.__file__).read_text())
    names = {alias.name for node in tree.body for alias in getattr(node, "names", [])}
    assert "Event" in names
    assert not {"ui", "gradio"} & names
