import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from fusedit.benchmarks import harness, kernels, ops, sweeps, tune
from fusedit.benchmarks.ops import OPS, cases
from fusedit.benchmarks.shapes import TEXT_TOKENS
from fusedit.benchmarks.sweeps import SWEEPS, Sweep
from fusedit.benchmarks.tune import kept, layout, select, serving, sweep
from fusedit.kernels import attention as attention_module
from fusedit.kernels import geglu as geglu_module
from fusedit.kernels import tables
from fusedit.kernels.attention import attention_reference
from fusedit.kernels.geglu import geglu_reference

SMALL, LARGE = (("ROWS", 4), ("num_warps", 4)), (("ROWS", 8), ("num_warps", 4))
OLD = (("ROWS", 1), ("num_warps", 4))
CPU = torch.device("cpu")
OF_ATTENTION = [what for what in SWEEPS if what.ops == ("attention",)]
WIDTHS = (40, 64, 80, 160)  # of the UNets' heads


def test_the_fastest_of_each_size_is_chosen():
    times = {64: {SMALL: 1.0, LARGE: 2.0, OLD: 3.0}, 512: {SMALL: 2.0, LARGE: 1.0, OLD: 3.0}}
    assert select(times, {64: OLD, 512: OLD}, "width") == [
        {"up_to": {"width": 64}, "ROWS": 4, "num_warps": 4},
        {"ROWS": 8, "num_warps": 4},
    ]


def test_the_incumbent_stays_where_it_is_as_fast():
    times = {64: {SMALL: 1.0, OLD: 1.019}, 128: {SMALL: 1.0, OLD: 1.03}}
    chosen = select(times, {64: OLD, 128: OLD}, "width")
    assert [entry["ROWS"] for entry in chosen] == [1, 4]


def test_sizes_that_agree_share_an_entry():
    times = {
        64: {SMALL: 1.0, LARGE: 2.0},
        128: {SMALL: 1.01, LARGE: 1.0},  # as fast as the smaller size's choice
        256: {SMALL: 2.0, LARGE: 1.0},
    }
    assert select(times, {}, "width") == [
        {"up_to": {"width": 128}, "ROWS": 4, "num_warps": 4},
        {"ROWS": 8, "num_warps": 4},
    ]


def test_an_incumbent_that_was_out_is_not_chosen():
    assert select({64: {SMALL: 1.0}}, {64: OLD}, "width") == [{"ROWS": 4, "num_warps": 4}]


def test_entries_bounded_by_something_else_stay_in_front():
    other = {"up_to": {"channels_last": 0}, "ROWS": 512}
    entries = [other, {"up_to": {"elements": 9}, "ROWS": 1}, {"ROWS": 2}]
    assert kept(entries, "elements") == [other]


@pytest.mark.parametrize("family", tables.FAMILIES)
def test_a_table_is_laid_out_as_it_is_committed(family):
    text = (tables.FOLDER / f"{family}.json").read_text()
    assert layout(json.loads(text)) == text


@pytest.mark.parametrize("what", SWEEPS, ids=lambda what: what.kernel)
def test_each_sweep_has_candidates_for_a_kernel_of_the_tables(what):
    for family in tables.FAMILIES:
        committed = tables.entries(family)[what.kernel]
        entries = [entry for entry in committed if entry not in kept(committed, what.by)]
        blocks = {name for entry in entries for name in entry} - {"up_to"}
        assert blocks <= {*what.blocks}
        bounds = {name for entry in entries for name in entry.get("up_to", {})}
        assert bounds <= {what.by}
    assert {*what.ops} <= {*OPS}
    for size in WIDTHS if what in OF_ATTENTION else (64, 320, 1280):
        assert 0 < len(what.candidates(size)) <= 40


@pytest.mark.parametrize("family", tables.FAMILIES)
@pytest.mark.parametrize("what", OF_ATTENTION, ids=lambda what: what.kernel)
def test_attentions_entries_have_all_blocks_in_the_sweeps_order_or_none(what, family):
    entries = tables.entries(family)[what.kernel]
    # What stands in front is for fewer keys than are tuned, and hides no candidate.
    assert all(entry["up_to"]["keys"] < TEXT_TOKENS for entry in kept(entries, what.by))
    for entry in entries:
        blocks = [name for name in entry if name != "up_to"]
        assert blocks == ([*what.blocks] if entry["QUERIES"] else ["QUERIES"])


def test_attentions_candidates_are_of_every_kind():
    for what in OF_ATTENTION:
        every = [dict(found) for width in WIDTHS for found in what.candidates(width)]
        for name, values in what.blocks.items():
            assert {found[name] for found in every if name in found} == {*values}, what.kernel
        assert len(every) <= 100  # of all widths: some two minutes
    unused = [found for found in OF_ATTENTION[-1].candidates(160) if dict(found)["QUERIES"] == 0]
    assert unused == [(("QUERIES", 0),)]


@pytest.mark.parametrize("width", [40, 64, 80, 160])
@pytest.mark.parametrize("what", OF_ATTENTION, ids=lambda what: what.kernel)
def test_a_candidate_of_attention_launches_with_the_committed_ones_arguments(what, width):
    name = what.kernel.removeprefix("attention.")
    q, k = (torch.empty(2, rows, 8, width, device="meta") for rows in (4096, 77))
    keys = k if name.startswith("short") else q
    of_keys = name == "backward_keys"
    arguments = set()
    for found in what.candidates(width):
        with serving({what.kernel: [dict(found)]}):
            plan = attention_module._plan(name, q, keys, of_keys=of_keys)
        if dict(found)["QUERIES"]:
            assert 0 < plan.programs <= 4096 // plan.blocks["KEYS" if of_keys else "QUERIES"]
            arguments.add(tuple(sorted(plan.blocks)))
        else:
            assert plan.programs == 0
    assert len(arguments) <= 1


@pytest.mark.parametrize("family", tables.FAMILIES)
@pytest.mark.parametrize("what", OF_ATTENTION, ids=lambda what: what.kernel)
def test_attentions_committed_blocks_stay_where_nothing_is_faster(what, family):
    """The incumbent of a width is what serves it, and is tried first."""
    case = next(cases(["attention"], ["sd15-256"], 1, "bf16"))
    table, tried = tables.entries(family), []

    def measure(what, case, trial):
        tried.append(trial[what.kernel][-1])
        return harness.Timing(1.0, 1.0, 1.0, 9)

    served = [serves(table[what.kernel], width) for width in WIDTHS]
    entries, rows = sweep(what, {width: [case] for width in WIDTHS}, table, measure)
    assert [serves(entries, width) for width in WIDTHS] == served
    assert "up_to" not in entries[-1]
    assert tried[0] == served[0]
    assert (
        len(tried)
        == len(rows)
        == sum(
            len({*what.candidates(width)} | {tuple(of.items())})
            for width, of in zip(WIDTHS, served, strict=True)
        )
    )


def serves(entries, width):
    entries = [entry for entry in entries if entry not in kept(entries, "width")]
    entry = next(e for e in entries if width <= e.get("up_to", {}).get("width", width))
    return {name: value for name, value in entry.items() if name != "up_to"}


def test_the_heaviest_cases_of_any_preset_are_measured(fake_gpu, monkeypatch):
    def picking(q, k, v):
        name = "short_forward" if k.shape[1] <= 128 else "forward"
        attention_module.pick(f"attention.{name}", CPU, width=q.shape[-1], keys=k.shape[1])
        return attention_reference(q, k, v)

    replaced = dataclasses.replace(OPS["attention"], ours=picking)
    monkeypatch.setitem(ops.OPS, "attention", replaced)
    flags = kernels.parse(
        ["--tune", "--op", "attention", "--shapes", "sd15-64,sd15-128,sd15-192", "--batch", "1"]
    )
    forward, *_, short, _ = OF_ATTENTION
    table = tables.entries("sm_90")

    def lengths(what):
        found = tune.classes(what, table, flags)
        return {
            width: [(case.shape.queries, case.shape.keys) for case in of]
            for width, of in found.items()
        }

    assert lengths(forward) == {40: [(576, 576), (256, 256)], 80: [(144, 144)]}
    assert lengths(short)[40] == [(576, 77), (256, 77)]


def test_inside_serving_a_kernel_gets_other_blocks():
    before = geglu_module.pick("geglu.forward", CPU, width=8)
    with serving({"geglu.forward": [{"ROWS": 1, "COLUMNS": 2}]}) as picked:
        assert geglu_module.pick("geglu.forward", CPU, width=8) == {"ROWS": 1, "COLUMNS": 2}
        assert geglu_module.pick("geglu.backward", CPU, width=9)
    assert picked == [("geglu.forward", {"width": 8}), ("geglu.backward", {"width": 9})]
    assert geglu_module.pick("geglu.forward", CPU, width=8) == before
    assert geglu_module.pick is tables.pick


WHAT = Sweep(
    kernel="geglu.forward", ops=("geglu",), direction="forward", by="width",
    blocks={"ROWS": (1, 2, 4), "num_warps": (4,)}, fits=lambda blocks, width: True,
)  # fmt: skip


def test_a_sweep_takes_the_fastest_that_is_right():
    every = list(cases(["geglu"], ["sd15-64"], 1, "bf16"))
    told = {1: harness.Timing(1.0, 1.0, 1.0, 9), 2: "output 0: not finite"}

    def measure(what, case, table):
        rows = table["geglu.forward"][-1]["ROWS"]
        return told.get(rows, harness.Timing(2.0, 2.0, 2.0, 9))

    table = {"geglu.forward": [{"ROWS": 4, "num_warps": 4}]}
    entries, rows = sweep(WHAT, {1280: every[:1], 2560: every[1:2]}, table, measure)
    assert entries == [{"ROWS": 1, "num_warps": 4}]
    assert [row["verdict"] for row in rows].count("failed") == 2
    harness.check(harness.new_record("tune", []) | {"rows": rows})


def test_a_sweep_leaves_the_entries_that_are_bounded_by_something_else():
    case = next(cases(["geglu"], ["sd15-64"], 1, "bf16"))
    other = {"up_to": {"channels_last": 0}, "ROWS": 512, "num_warps": 4}
    trials = []

    def measure(what, case, table):
        trials.append(table["geglu.forward"])
        return harness.Timing(1.0, 1.0, 1.0, 9)

    table = {"geglu.forward": [other, {"ROWS": 4, "num_warps": 4}]}
    entries, _ = sweep(WHAT, {1280: [case]}, table, measure)
    assert entries == table["geglu.forward"]
    assert all(trial[0] == other and len(trial) == 2 for trial in trials)


def test_a_size_without_a_right_candidate_is_an_error():
    case = next(cases(["geglu"], ["sd15-64"], 1, "bf16"))
    table = {"geglu.forward": [{"ROWS": 4, "num_warps": 4}]}
    with pytest.raises(RuntimeError, match="no candidate is right at width 1280"):
        sweep(WHAT, {1280: [case]}, table, lambda *_: "wrong")


def picking(projected):
    """The definition, which asks the table as the kernels do, and is wrong with ROWS of 2."""
    width = projected.shape[-1] // 2
    blocks = geglu_module.pick("geglu.forward", CPU, width=width)
    return geglu_reference(projected) * (1.5 if blocks["ROWS"] == 2 else 1.0)


def test_tuning_writes_the_table_and_every_time(fake_gpu, monkeypatch, tmp_path):
    folder = tmp_path / "tables"
    shutil.copytree(Path(tables.FOLDER), folder)
    monkeypatch.setattr(tables, "FOLDER", folder)
    monkeypatch.setitem(ops.OPS, "geglu", dataclasses.replace(OPS["geglu"], ours=picking))
    monkeypatch.setattr(tune, "SWEEPS", [WHAT])
    flags = ["--tune", "--op", "geglu", "--shapes", "sd15-64", "--batch", "1", "--commit", "abc"]
    assert kernels.main([*flags, "--out", str(tmp_path / "out")]) == 0
    record = harness.read(tmp_path / "out" / "tune.json")
    assert record["complete"]
    verdicts = {(row["labels"]["by"], row["verdict"]) for row in record["rows"]}
    assert ("ROWS=1,num_warps=4", "right") in verdicts
    assert ("ROWS=2,num_warps=4", "failed") in verdicts
    assert {row["labels"]["by"] for row in record["rows"] if row["timings"]}
    written = json.loads((tmp_path / "out" / "sm_90.json").read_text())
    assert written["measured"]["device"] == "Fake H100"
    assert written["measured"]["triton"]
    assert written["measured"]["kernels"] == ["geglu.forward"]
    assert written["kernels"]["geglu.backward"] == tables.entries("sm_90")["geglu.backward"]
    assert kernels.main(flags) == 0  # without --out, the table itself
    assert json.loads((folder / "sm_90.json").read_text())["measured"]["device"] == "Fake H100"


def test_what_was_measured_elsewhere_is_not_kept():
    source = harness.provenance("x", "abc")
    first = tune._measured(None, "a", source)
    assert tune._measured(first, "b", source)["kernels"] == ["a", "b"]
    assert tune._measured(first | {"triton": "2"}, "b", source)["kernels"] == ["b"]


def test_blocks_that_do_not_fit_are_not_tried():
    assert not sweeps._tile_fits({"ROWS": 1, "COLUMNS": 128, "num_warps": 8}, 64)
    assert sweeps._tile_fits({"ROWS": 4, "COLUMNS": 512, "num_warps": 4}, 64)
    assert not sweeps._row_fits({"ROWS": 16, "COLUMNS": 256, "num_warps": 4}, 1280)
    assert not sweeps._whole_fits({"CHANNELS": 128, "num_warps": 4}, 4096)
