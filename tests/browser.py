"""A headless Chromium for the tests of pages, and what is asked of every page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

PHONE, DESKTOP = (390, 844), (1280, 900)  # CSS pixels
NAMES = ("chromium", "chromium-browser", "google-chrome")
# It runs as whoever the tests run as, root too, and asks nothing of the network by itself.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


def browser_or_skip() -> Iterator[Browser]:
    """For a fixture: a browser, or the test is skipped with the reason."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here; Debian, Ubuntu: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass(slots=True)
class Seen:
    """A page, what its console said and what it asked of the network."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, address: str, size: tuple[int, int] = DESKTOP) -> Iterator[Seen]:
    """The page at an address, in a window of this size."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    seen = Seen(context.new_page())
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on(
        "console", lambda said: seen.errors.append(said.text) if said.type == "error" else None
    )
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.goto(address)
    yield seen
    context.close()


def barriers(page: Page) -> list[str]:
    """What stands in the way of people who see or point otherwise, by axe-core; [] is well."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['help']}: {each['nodes'][0]['html']}" for each in found]
