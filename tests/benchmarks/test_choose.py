import json

import pytest
import torch
from records import both_ways, record, refusal, row

from fusedit.benchmarks import choose, harness
from fusedit.kernels import attention_choice, dispatch
from fusedit.kernels.tables import FAMILIES

CPU = torch.device("cpu")  # whose family is sm_90


def shape(queries: int, keys: int, *, batch: int = 32, width: int = 40, preset: str = "sd15-512"):
    return {"shape": f"{batch}x{queries}x8x{width}+{keys}keys", "preset": preset}


def rows_of(times: dict[str, float], **labels):
    """Forward and backward of each, whose sum is given."""
    return [one for by, ms in times.items() for one in both_ways(by, 0.3 * ms, 0.7 * ms, **labels)]


@pytest.fixture
def chosen(tmp_path):
    """Writes records, chooses, and returns the table."""

    def run(*records, out="choices.json"):
        files = []
        for index, made in enumerate(records):
            files.append(tmp_path / f"{index}.json")
            harness.write(made, files[-1])
        assert choose.main([*map(str, files), "--out", str(tmp_path / out)]) == 0
        return json.loads((tmp_path / out).read_text())

    return run


def backend(chosen, *several: dict[str, float]) -> str:
    """What is chosen of one shape, measured several times."""
    records = [record(*rows_of(times, **shape(4096, 4096))) for times in several]
    (only,) = chosen(*records)["sm_90"]["choices"]
    assert [only[name] for name in ("width", "dtype", "queries", "keys")] == [
        40, "bf16", 4096, 4096
    ]  # fmt: skip
    return only["backend"]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"eager": 10, "ours": 8, "sdpa-cudnn": 9, "sdpa-flash": 10}, "triton"),
        ({"eager": 10, "ours": 9, "sdpa-cudnn": 8, "sdpa-flash": 10}, "cudnn"),
        ({"eager": 10, "ours": 11, "sdpa-flash": 9}, "flash"),
        ({"eager": 10, "ours": 9.9, "sdpa-cudnn": 9.9}, "sdpa"),  # within the noise
        ({"eager": 10, "ours": 9.7}, "triton"),
        ({"eager": 10, "flex": 1, "flash-attn": 1, "compile": 1, "sdpa-efficient": 1}, "sdpa"),
        ({"ours": 1, "sdpa-cudnn": 2}, "sdpa"),  # nothing to compare with
    ],
)
def test_the_fastest_of_forward_and_backward_is_chosen(chosen, times, expected):
    assert backend(chosen, times) == expected


def test_it_is_the_sum_of_both_directions_that_counts(chosen):
    rows = both_ways("eager", 4, 6) + both_ways("ours", 1, 8) + both_ways("sdpa-cudnn", 6, 2)
    (only,) = chosen(record(*rows))["sm_90"]["choices"]
    assert only["backend"] == "cudnn"


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"eager": 10, "ours": 8, "sdpa-cudnn": 7}, "cudnn"),  # at least 1.25 against 1.43
        ({"eager": 10, "ours": 8, "sdpa-cudnn": 9}, "triton"),  # at least 1.25 against 1.11
        ({"eager": 10, "ours": 10, "sdpa-cudnn": 9}, "cudnn"),
        ({"eager": 10, "ours": 10, "sdpa-cudnn": 11}, "sdpa"),
        ({"eager": 10, "ours": 8}, "triton"),
    ],
)
def test_at_every_batch_it_must_be_faster(chosen, second, expected):
    assert backend(chosen, {"eager": 10, "ours": 7, "sdpa-cudnn": 7}, second) == expected


def test_presets_and_batches_in_one_record_are_measurements_too(chosen):
    fast, slow = {"eager": 10, "ours": 5}, {"eager": 10, "ours": 12}
    of = [
        rows_of(fast, **shape(256, 77)),
        rows_of(slow, **shape(256, 77, batch=4)),
        rows_of(slow, **shape(64, 77, preset="sd15-256")),
        rows_of(fast, **shape(64, 77)),
        rows_of(fast, **shape(64, 64)),
    ]
    choices = chosen(record(*(one for rows in of for one in rows)))["sm_90"]["choices"]
    told = {(row["queries"], row["keys"]): row["backend"] for row in choices}
    assert told == {(256, 77): "sdpa", (64, 77): "sdpa", (64, 64): "triton"}


@pytest.mark.parametrize("verdict", ["wrong", "failed"])
def test_what_is_wrong_or_failed_is_not_chosen(chosen, verdict):
    rows = rows_of({"eager": 10, "sdpa-flash": 9}) + both_ways("ours", 1, 1, verdict=verdict)
    forward, _ = both_ways("sdpa-cudnn", 1, 1)
    _, backward = both_ways("sdpa-cudnn", 1, 1, verdict=verdict)
    rows += [forward, backward]
    assert chosen(record(*rows))["sm_90"]["choices"][0]["backend"] == "flash"
    again = record(*rows_of({"eager": 10, "ours": 1, "sdpa-flash": 9}))
    assert chosen(record(*rows), again)["sm_90"]["choices"][0]["backend"] == "flash"
    rows = both_ways("eager", 1, 1, verdict=verdict) + both_ways("ours", 1, 1, verdict=verdict)
    timed = rows_of({"eager": 1}, dtype="fp16")
    assert chosen(record(*rows, *timed), again)["sm_90"]["choices"][0]["backend"] == "sdpa"


def test_the_table_is_the_committed_one_with_a_part_of_its_own(chosen, tmp_path):
    first = record(*rows_of({"eager": 10, "ours": 5}), *rows_of({"eager": 1}, dtype="fp16"))
    second = record(*rows_of({"eager": 10, "ours": 5}, **shape(4096, 4096, batch=4)))
    first["provenance"]["commit"], second["provenance"]["commit"] = "abc", "def"
    first["rows"].append(row())  # geglu
    first["rows"] += rows_of({"eager": 10, "definition": 1}, dtype="fp32")
    table = chosen(first, second)
    committed = json.loads(attention_choice.TABLE.read_text())
    assert [*table] == [*committed] == [*FAMILIES]
    assert {name: of for name, of in table.items() if name != "sm_90"} == {
        name: of for name, of in committed.items() if name != "sm_90"
    }
    versions = first["provenance"]["versions"]
    assert table["sm_90"]["measured"] == {
        "device": "Fake H100", "commit": "abc, def", "triton": versions["triton"],
        "torch": versions["torch"],
    }  # fmt: skip
    assert [row["dtype"] for row in table["sm_90"]["choices"]] == ["bf16", "fp16"]
    lines = (tmp_path / "choices.json").read_text().splitlines()
    assert sum('"backend"' in line for line in lines) == 2


def test_the_committed_table_is_laid_out_so():
    text = attention_choice.TABLE.read_text()
    assert choose.layout(json.loads(text)) == text
    row = {"width": 40, "backend": "sdpa"}
    full = {"sm_80": {"measured": {"device": "x"}, "choices": [row, row]}}
    assert json.loads(choose.layout(full)) == full


def test_without_out_the_committed_table_is_written(chosen, monkeypatch, tmp_path):
    monkeypatch.setattr(choose, "TABLE", tmp_path / "attention.json")
    choose.TABLE.write_text(attention_choice.TABLE.read_text())
    harness.write(record(*rows_of({"eager": 10, "ours": 5})), tmp_path / "kernels.json")
    assert choose.main([str(tmp_path / "kernels.json")]) == 0
    assert json.loads(choose.TABLE.read_text())["sm_90"]["choices"]


def test_what_is_written_is_what_runs(chosen, monkeypatch, tmp_path):
    fast, slow = {"eager": 10, "ours": 5}, {"eager": 10, "ours": 12}
    made = record(
        *rows_of(fast, **shape(1024, 1024)),
        *rows_of(fast, **shape(4096, 4096)),
        *rows_of(slow, **shape(256, 256)),
        *rows_of(fast, **shape(4096, 77)),
    )
    chosen(made)
    monkeypatch.setattr(attention_choice, "TABLE", tmp_path / "choices.json")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    card = made["provenance"]["machine"]["gpu"]
    monkeypatch.setattr(attention_choice, "name", lambda device: card)
    monkeypatch.setattr(attention_choice, "_known", attention_choice._known.__wrapped__)
    attention_choice.measured.cache_clear()

    def runs(queries, keys, dtype=torch.bfloat16, width=40):
        return attention_choice.choose(CPU, dtype, width, queries, keys)

    try:
        assert [runs(size, size) for size in (256, 1024, 2304, 4096, 9216)] == [
            "sdpa", "triton", "triton", "triton", "sdpa"
        ]  # fmt: skip
        assert runs(576, 576) == "sdpa"  # its neighbours differ
        assert (runs(4096, 77), runs(1024, 77)) == ("triton", "sdpa")
        assert runs(4096, 4096, torch.float16) == runs(4096, 4096, width=80) == "sdpa"
    finally:
        attention_choice.measured.cache_clear()


def test_a_record_that_is_not_complete_is_told(chosen, capsys):
    made = record(*rows_of({"eager": 10, "ours": 5})) | {"complete": False}
    chosen(made)
    assert "0.json is not complete: shapes are wanting" in capsys.readouterr().err


def another(**changes):
    made = record(*rows_of({"eager": 10, "ours": 5}))
    made["provenance"]["machine"] |= changes.pop("machine", {})
    made["provenance"]["versions"] |= changes.pop("versions", {})
    return made | changes


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (another(benchmark="tune"), "a.json is of tune; give what fusedit.benchmarks.kernels"),
        (record(*rows_of({"eager": 1}), gpu=None), "a.json names no family of GPUs"),
        (record(row()), "a.json has no time of attention in a graph; measure with --op attention"),
        (record(*both_ways("ours", 1, 1, verdict="wrong")), "a.json has no time of attention"),
        (another(machine={"gpu": "Fake H200"}), "are not of one device: Fake H200 in "),
        (another(versions={"torch": "2"}), "are not of one torch: 2 in "),
        (another(versions={"triton": "2"}), "are not of one triton: 2 in "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_2(made, told, tmp_path, capsys):
    harness.write(made, tmp_path / "a.json")
    harness.write(another(), tmp_path / "b.json")
    out = tmp_path / "choices.json"
    words = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)]
    assert told in refusal(choose.main, words, capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.json"], "files: 'nowhere.json': No such file"),
        ([], "required: files"),
        (["{file}", "--out", "{folder}"], "give a file in a folder that exists"),
        (["{file}", "--out", "{folder}/no/x.json"], "give a file in a folder that exists"),
    ],
)
def test_a_bad_flag_is_one_line_and_2(words, told, tmp_path, capsys):
    harness.write(another(), tmp_path / "a.json")
    given = [word.format(file=tmp_path / "a.json", folder=tmp_path) for word in words]
    assert told in refusal(choose.main, given, capsys)
