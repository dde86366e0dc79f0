import pytest
import torch

from fusedit.kernels.tables import family


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "sm_80"), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100"),
        ((12, 0), "sm_80"),  # Ampere's matrix products, and little shared memory
    ],
)  # fmt: skip
def test_the_nearest_table_serves_a_card(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    family.cache_clear()
    assert family(torch.device("cuda", 0)) == name
    family.cache_clear()
    assert family(torch.device("cpu")) == "sm_90"
