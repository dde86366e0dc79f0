"""A tiny base and tiny data, and a folder of its own for each test that runs a command."""

import shutil
import signal

import pytest
from tiny import save_tiny_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


@pytest.fixture
def here(inputs, tmp_path, monkeypatch):
    """An empty folder to run in, with `base` and `data` beside it; signals are given back."""
    for name in ("base", "data"):
        shutil.copytree(inputs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
