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
ORIGIN = {"device": "NVIDIA H100", "commit": "abc"}


@pytest.fixture
def a_table(monkeypatch):
    rows = [dict(zip(NAMES, row, strict=True)) for row in ROWS]
    table = {"measured": ORIGIN, "choices": rows}
    monkeypatch.setattr(module, "measured", lambda family: table)


@pytest.mark.parametrize(
    ("width", "queries", "keys", "backend"),
    [
        (40, 4096, 4096, "triton"),  # as measured
        (40, 2304, 2304, "triton"),  # between two that agree
        (40, 9216, 9216, "sdpa"),  # between two that do not
        (40, 65536, 65536, "cudnn"),  # longer than all
        (40, 256, 256, "sdpa"),  # shorter than all
        (40, 1024, 77, "triton"),
        (40, 2304, 77, "sdpa"),
        (40, 9216, 77, "flash"),
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
    assert explained("auto", gpu).endswith("as measured on NVIDIA H100 at commit abc")
    assert explained("flash", gpu) == "attention: flash, as asked"
    assert explained("auto", CPU) == "attention: PyTorch's own, where there is no GPU"
    monkeypatch.setattr(module, "measured", lambda family: {"measured": None, "choices": []})
    assert "PyTorch's own choice: none was measured on sm_90" in explained("auto", gpu)


def test_shipped_restricts_pytorch():
    x = torch.randn(1, 1, 4, 8)
    enabled = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    assert [one() for one in enabled] == [True, True]
    with shipped("flash"):
        assert [one() for one in enabled] == [True, False]
        F.scaled_dot_product_attention(x, x, x)
    with shipped("cudnn"):
        assert [one() for one in enabled] == [False, False]
        assert torch.backends.cuda.cudnn_sdp_enabled()
    with shipped("sdpa"):
        assert [one() for one in enabled] == [True, True]
    assert [one() for one in enabled] == [True, True]
