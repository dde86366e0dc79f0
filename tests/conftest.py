import os

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when huggingface_hub is imported: no test asks the network
)

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
