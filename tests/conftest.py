import os

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when huggingface_hub is imported: no test asks the network
)

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
