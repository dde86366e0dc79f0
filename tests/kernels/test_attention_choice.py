import json

import pytest
import torch
from torch.nn import functional as F

from fusedit.kernels import attention_choice as module
from fusedit.kernels import dispatch, tables
from fusedit.kernels.attention_choice import BACKENDS, choose, explained, shipped

CPU = torch.device("cpu")
ROWS = [
    (40, "bf16", 1024, 1024, "triton"),
    (40, "bf16", 4096, 4096, "triton"),
    (40, "bf16", 16384, 16384, "cudnn"),
    (40, "bf16", 1024, 77, "triton"),
    (40, "bf16", 4096, 77, "flash"),
    (40, "fp16", 4096, 4096, "flash"),
    (64, "bf16", 4096, 4096, "cudnn"),
]
NAMES = ("width", "dtype", "queries", "keys", "backend")
ORIGIN = {"device": "cpu", "commit": "abc"}


@pytest.fixture
def a_table(monkeypatch):
    rows = [dict(zip(NAMES, row, strict=True)) for row in ROWS]
    table = {"measured": ORIGIN, "choices": rows}
    monkeypatch.setattr(module, "measured", lambda family: table)
    module._known.cache_clear()
    yield table
    module._known.cache_clear()


@pytest.mark.parametrize(
    ("width", "queries", "keys", "backend"),
    [
        (40, 4096, 4096, "triton"),  # as measured
        (40, 2304, 2304, "triton"),  # between two that agree
        (40, 9216, 9216, "sdpa"),  # between two that do not
        (40, 16384, 16384, "cudnn"),
        (40, 65536, 65536, "sdpa"),  # longer than all
        (40, 256, 256, "sdpa"),  # shorter than all
        (40, 1024, 77, "triton"),
        (40, 2304, 77, "sdpa"),
        (40, 4096, 77, "flash"),
        (40, 9216, 77, "sdpa"),
        (40, 4096, 154, "sdpa"),  # another number of keys
        (64, 4096, 4096, "cudnn"),
        (64, 4096, 77, "sdpa"),
        (80, 4096, 4096, "sdpa"),
    ],
)
def test_what_was_measured_decides(width, queries, keys, backend, a_table):
    assert choose(CPU, torch.bfloat16, width, queries, keys) == backend


def test_dtypes_are_measured_apart(a_table):
    assert choose(CPU, torch.float16, 40, 4096, 4096) == "flash"
    assert choose(CPU, torch.float32, 40, 4096, 4096) == "sdpa"


def test_cudnn_is_not_taken_where_bits_must_be_the_same(a_table):
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(CPU, torch.bfloat16, 64, 4096, 4096) == "sdpa"
        assert choose(CPU, torch.float16, 40, 4096, 4096) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose(CPU, torch.bfloat16, 64, 4096, 4096) == "cudnn"


def test_another_card_of_the_family_was_not_measured(a_table, monkeypatch):
    monkeypatch.setitem(a_table, "measured", ORIGIN | {"device": "NVIDIA H100 PCIe"})
    assert choose(CPU, torch.bfloat16, 40, 4096, 4096) == "sdpa"


@pytest.mark.parametrize(("capability", "backend"), [((7, 5), "sdpa"), ((8, 0), "triton")])
def test_cards_before_ampere_have_pytorchs(capability, backend, a_table, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "cpu")
    assert choose(torch.device("cuda", 0), torch.bfloat16, 40, 4096, 4096) == backend
    tables.family.cache_clear()


def test_without_a_gpu_it_is_pytorchs(a_table, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert choose(CPU, torch.bfloat16, 40, 4096, 4096) == "sdpa"


def test_the_committed_table_is_whole():
    table = json.loads(module.TABLE.read_text())
    assert tuple(table) == tables.FAMILIES
    for family in table.values():
        assert bool(family["measured"]) == bool(family["choices"])  # no choice without its origin
        for row in family["choices"]:
            assert tuple(row) == NAMES
            assert row["backend"] in BACKENDS[1:]


def test_it_says_what_was_measured(a_table, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(module, "family", lambda device: "sm_90")
    monkeypatch.setattr(module, "name", lambda device: "cpu")
    assert explained("auto", gpu).endswith("measured on this kind of card at commit abc")
    assert explained("flash", gpu) == "attention: flash, as asked"
    assert "PyTorch's own elsewhere" in explained("auto", CPU)
    monkeypatch.setattr(module, "name", lambda device: "NVIDIA H200")
    assert explained("auto", gpu).endswith("own choice: none was measured on NVIDIA H200")


def test_shipped_restricts_pytorch():
    x = torch.randn(1, 1, 4, 8)
    enabled = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    assert [one() for one in enabled] == [True, True]
    with shipped("flash", alone=True):
        assert [one() for one in enabled] == [True, False]
        F.scaled_dot_product_attention(x, x, x)
    with shipped("cudnn", alone=True):
        assert [one() for one in enabled] == [False, False]
        assert torch.backends.cuda.cudnn_sdp_enabled()
    with shipped("cudnn", alone=False):  # what cuDNN cannot serve, another does
        assert [one() for one in enabled] == [True, True]
        F.scaled_dot_product_attention(x, x, x)
    with shipped("sdpa", alone=True):
        assert [one() for one in enabled] == [True, True]
    assert [one() for one in enabled] == [True, True]
