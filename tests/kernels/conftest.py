from collections.abc import Iterator

import pytest
import torch
from interpreter import interpreted
from launches import Launches, counted


# Not of the package: a folder without __init__.py is none, and its scope would be the session's.
@pytest.fixture(scope="module", autouse=True)
def kernels_run() -> Iterator[None]:
    """Kernels run here on any machine: on its GPU, or interpreted."""
    if torch.cuda.is_available():
        yield
        return
    with interpreted():
        yield


@pytest.fixture
def launches() -> Iterator[Launches]:
    """How many kernels have been launched, so that a test sees a definition that ran instead."""
    with counted() as launches:
        yield launches
