import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch._functorch.config
from records import refusal

from fusedit.benchmarks import attention, harness, kernels, ops, others
from fusedit.benchmarks.directions import backward, forward
from fusedit.benchmarks.ops import OPS, PRESETS, cases
from fusedit.benchmarks.shapes import shapes
from fusedit.benchmarks.timing import MODES, MOST_SETS, Timer, ceilings
from fusedit.kernels.attention import attention_reference
from fusedit.kernels.geglu import geglu_reference

SMALL = ["--shapes", "sd15-64", "--batch", "1"]


def command(*flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fusedit.benchmarks.kernels", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", **environment},
    )


@pytest.fixture
def replaced(monkeypatch):
    """An op whose function is another."""

    def replace(name, **changes):
        monkeypatch.setitem(ops.OPS, name, dataclasses.replace(OPS[name], **changes))

    return replace


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_shape_is_counted_on_meta_tensors(name, preset):
    every = list(cases([name], [preset], None, "bf16"))
    names = {"/".join(map(str, case.labels.values())) for case in every}
    assert len(names) == len(every) > 0
    for case in every:
        inputs = case.inputs("meta")
        assert case.batch == PRESETS[preset]
        assert case.op.least_bytes(inputs)[0] >= next(iter(inputs.values())).nbytes
        differentiable = any(value.requires_grad for value in inputs.values())
        assert (case.op.least_bytes(inputs)[1] > 0) == differentiable


def test_bytes_are_those_of_the_passes():
    def least(name):
        case = next(cases([name], ["sd15-256"], 1, "bf16"))
        size = next(iter(case.inputs("meta").values())).nbytes
        return [count / size for count in case.op.least_bytes(case.inputs("meta"))]

    assert least("group_norm") == [3, 5]
    assert least("layer_norm") == [2, 3]
    assert least("geglu") == [1.5, 2.5]


def test_the_heaviest_shapes_come_first():
    every = list(cases(["geglu", "layer_norm"], ["sd15-512"], 1, "bf16"))
    moved = [case.shape.times * sum(case.op.least_bytes(case.inputs("meta"))) for case in every]
    assert moved == sorted(moved, reverse=True)
    sizes = [(c.shape.queries, c.shape.keys) for c in cases(["attention"], ["sd15-512"], 1, "bf16")]
    assert sizes[:3] == [(4096, 4096), (1024, 1024), (4096, 77)]  # of products, not of bytes
    assert sizes[-1] == (64, 64)


def test_attention_is_counted_by_hand():
    by_keys = {case.shape.keys: case for case in cases(["attention"], ["sd15-512"], 2, "bf16")}
    inputs = by_keys[4096].inputs("meta")
    of_queries, of_keys = 2 * 4096 * 320 * 2, 2 * 4096 * 320 * 2  # [2, 4096, 8, 40] in bf16
    assert attention.least_bytes(inputs) == (2 * (of_queries + of_keys), 4 * (of_queries + of_keys))
    assert attention.flops(inputs) == (4 * 2 * 8 * 4096**2 * 40, 10 * 2 * 8 * 4096**2 * 40)
    over_text = next(c for c in cases(["attention"], ["sd15-512"], 2, "bf16") if c.shape.keys == 77)
    assert over_text.shape.queries == 4096
    of_keys = 2 * 77 * 320 * 2
    inputs = over_text.inputs("meta")
    assert attention.least_bytes(inputs) == (2 * (of_queries + of_keys), 4 * (of_queries + of_keys))
    assert attention.flops(inputs)[0] == 4 * 2 * 8 * 4096 * 77 * 40


def test_labels_tell_keys_apart_and_other_ops_keep_theirs():
    def shape(name, **wanted):
        every = cases([name], ["sd15-512"], 2, "bf16")
        fits = (c for c in every if all(getattr(c.shape, n) == v for n, v in wanted.items()))
        return next(fits).labels["shape"]

    assert shape("attention", queries=4096, keys=77) == "2x4096x8x40+77keys"
    assert shape("attention", queries=4096, keys=4096) == "2x4096x8x40+4096keys"
    assert shape("geglu", tokens=4096) == "2x4096x2560"
    assert shape("group_norm", size=64, time_embedding=True) == "2x320x64x64+silu+add"


def test_self_attention_at_one_position_is_not_listed():
    listed = {(one.queries, one.keys) for one in shapes("sd15-64").attentions}
    own = {(64, 64), (16, 16), (4, 4)}
    assert listed == own | {(queries, 77) for queries in (64, 16, 4, 1)}


def projections(dtype, *, batch=2, queries=10, keys=7, heads=3, width=8):
    sizes = {"q": queries, "k": keys, "v": keys}
    return {
        name: torch.randn(batch, rows, heads, width, dtype=dtype, requires_grad=True)
        for name, rows in sizes.items()
    }


@pytest.mark.parametrize(("most", "pieces"), [(1, 6), (140, 4), (10**6, 2)])
def test_attentions_truth_is_the_definitions_some_heads_at_a_time(monkeypatch, most, pieces):
    held = []

    def watched(*projections):
        held.append(projections[0].shape[2])
        return attention_reference(*projections)

    monkeypatch.setattr(attention, "MOST_SCORES", most)
    inputs = projections(torch.float64)
    expected = attention_reference(*inputs.values())
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [*inputs.values()], direction)
    monkeypatch.setattr(attention, "attention_reference", watched)
    out = attention.definition(**inputs)
    assert len(held) == pieces
    assert sum(held) == 2 * 3
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, [*inputs.values()], direction), grads)
    assert len(held) == 2 * pieces  # made again: no piece's scores wait for the backward


def test_attention_in_another_dtype_is_the_definition_whole(monkeypatch):
    monkeypatch.setattr(attention, "checkpoint", None)
    inputs = projections(torch.bfloat16)
    assert torch.equal(attention.definition(**inputs), attention_reference(*inputs.values()))


@pytest.mark.parametrize("by", ["sdpa-flash", "flex", "flash-attn"])
def test_a_rival_computes_attention(by, fake_gpu, monkeypatch):
    class Library:
        @staticmethod
        def flash_attn_func(q, k, v):
            return attention_reference(q, k, v)

    monkeypatch.setattr(others, "_FLASH_ATTENTION", Library)
    rivals = others.ATTENTIONS | {"flash-attn": others._flash_attention}
    inputs = {name: value.detach() for name, value in projections(torch.float32).items()}
    found = rivals[by](**inputs)  # without a gradient: flex_attention has none on a CPU
    torch.testing.assert_close(found, attention_reference(*inputs.values()))
    others._flex.cache_clear()


def test_a_rival_that_does_not_serve_a_shape_is_told_and_ends_nothing(
    fake_gpu, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(kernels, "dispatch", dispatch_that_runs())
    assert kernels.main(["--op", "attention", *SMALL, "--out", str(tmp_path)]) == 0
    rows = harness.read(tmp_path / "kernels.json")["rows"]
    verdicts = {row["labels"]["by"]: row["verdict"] for row in rows}
    assert verdicts == {
        **dict.fromkeys(["ours", "eager", "compile", "sdpa-flash"], "right"),
        **dict.fromkeys(["sdpa-cudnn", "sdpa-efficient", "flex"], "failed"),
    }
    notes = {row["labels"]["by"]: row["note"] for row in rows}
    assert notes["sdpa-cudnn"].startswith("RuntimeError: No")
    assert "does not support backward on CPU" in notes["flex"]
    assert "failed" not in capsys.readouterr().err


def test_what_is_left_out_is_not_run_and_files_are_named(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "dispatch", dispatch_that_runs())
    flags = ["--op", "attention", *SMALL, "--out", str(tmp_path), "--name", "attention-4"]
    flags += ["--modes", "graph", "--only_json"]
    assert kernels.main([*flags, "--without", *sorted({*kernels.RIVALS} - {"eager"})]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["attention-4.json"]
    record = harness.read(tmp_path / "attention-4.json")
    assert {row["labels"]["by"] for row in record["rows"]} == {"ours", "eager"}
    assert all({*row["timings"]} == {"graph"} for row in record["rows"])
    assert record["provenance"]["machine"]["family"] == "sm_90"


@pytest.mark.parametrize(("dtype", "by"), [("fp32", "definition"), ("fp16", "ours")])
def test_only_what_ran_as_kernels_is_said_to_be_ours(dtype, by, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "dispatch", dispatch_that_runs())
    flags = ["--op", "attention", *SMALL, "--dtype", dtype, "--out", str(tmp_path)]
    assert kernels.main(flags) == 0
    rows = harness.read(tmp_path / "kernels.json")["rows"]
    assert {row["labels"]["by"] for row in rows} == {by}
    told = {row["note"] for row in rows}
    assert told == {
        "the definition ran: no kernel takes fp32" if dtype == "fp32" else "interpreted"
    }


def test_without_a_gpu_the_definitions_are_checked_and_said_to_be(tmp_path, capsys):
    flags = ["--op", "geglu", "edit_input", *SMALL, "--out", str(tmp_path)]
    assert kernels.main(flags) == 0
    record = harness.read(tmp_path / "kernels.json")
    assert {row["labels"]["by"] for row in record["rows"]} == {"definition"}
    assert {row["verdict"] for row in record["rows"]} == {"right"}
    assert not any(row["timings"] for row in record["rows"])
    assert (tmp_path / "kernels.md").is_file()
    said = capsys.readouterr().err
    assert said.count("no GPU here") == 1
    assert "answers only, of the definitions; nothing is timed" in said


def test_a_wrong_answer_has_no_time_and_ends_with_1(fake_gpu, replaced, tmp_path, capsys):
    replaced("geglu", ours=lambda projected: 1.1 * geglu_reference(projected))
    assert kernels.main(["--op", "geglu", *SMALL, "--out", str(tmp_path)]) == 1
    record = harness.read(tmp_path / "kernels.json")
    ours = [row for row in record["rows"] if row["labels"]["by"] == "definition"]
    assert {row["verdict"] for row in ours} == {"wrong"}
    assert not any(row["timings"] for row in ours)
    assert all(row["timings"] for row in record["rows"] if row["labels"]["by"] == "eager")
    assert "wrong: output 0: RMS error" in capsys.readouterr().err


def test_a_function_that_fails_is_told_and_the_others_go_on(fake_gpu, replaced, tmp_path):
    def broken(projected):
        raise RuntimeError("out of registers\nand a long dump")

    replaced("geglu", ours=broken)
    assert kernels.main(["--op", "geglu", *SMALL, "--out", str(tmp_path)]) == 1
    rows = harness.read(tmp_path / "kernels.json")["rows"]
    assert {row["labels"]["by"]: row["verdict"] for row in rows} == {
        "definition": "failed",
        "eager": "right",
        "compile": "right",
    }
    assert "RuntimeError: out of registers" in {row["note"] for row in rows}


def test_on_a_gpu_everything_is_timed_in_every_way(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "dispatch", dispatch_that_runs())
    flags = ["--op", *OPS, *SMALL, "--out", str(tmp_path)]
    assert kernels.main(flags) == 0
    record = harness.read(tmp_path / "kernels.json")
    assert record["complete"]
    assert {row["labels"]["op"] for row in record["rows"]} == {*OPS}
    gpu_alone = {"sdpa-cudnn", "sdpa-efficient", "flex"}
    for row in record["rows"]:
        if row["labels"]["by"] not in gpu_alone:
            assert {*row["timings"]} == {*MODES}, row["name"]
    assert (tmp_path / "kernels.png").is_file()
    assert "eager / ours" in (tmp_path / "kernels.md").read_text()


def dispatch_that_runs():
    """On the CPU the definition stands in for the kernel; the benchmark is told that it ran."""

    class Dispatch:
        INTERPRETED = False

        @staticmethod
        def runs_triton(tensor):
            return True

    return Dispatch


def test_what_is_compiled_may_run_its_backward_many_times(fake_gpu, replaced):
    def geglu(projected):
        assert not torch._functorch.config.donated_buffer
        return geglu_reference(projected)

    replaced("geglu", ours=geglu)
    assert kernels.main(["--op", "geglu", "--shapes", "sd15-64", "--batch", "1"]) == 0


def test_a_run_goes_on_where_it_stopped(fake_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "_git_state", lambda: ("abc", False))
    ticks = iter([0, *[1] * 2, *[10**6] * 50])
    flags = ["--op", "geglu", *SMALL, "--out", str(tmp_path), "--limit_s", "60"]
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(ticks))
    assert kernels.main(flags) == 0
    first = harness.read(tmp_path / "kernels.json")
    shapes = {row["labels"]["shape"] for row in first["rows"]}
    assert len(shapes) == 2
    assert not first["complete"]
    assert "--limit_s 60: 2 shapes are left" in capsys.readouterr().err
    assert kernels.main(flags[:-2]) == 0
    second = harness.read(tmp_path / "kernels.json")
    assert second["rows"][: len(first["rows"])] == first["rows"]
    assert second["complete"]
    assert len({row["labels"]["shape"] for row in second["rows"]}) == 4


@pytest.mark.parametrize("change", [("def", False), ("abc", True), (None, None)])
def test_a_run_of_another_tree_starts_anew(monkeypatch, tmp_path, change):
    monkeypatch.setattr(harness, "_git_state", lambda: ("abc", False))
    begun = harness.new_record("kernels", [])
    harness.write(begun, tmp_path / "kernels.json")
    monkeypatch.setattr(harness, "_git_state", lambda: change)
    fresh = harness.new_record("kernels", [])
    assert harness.resumed(tmp_path / "kernels.json", fresh) is fresh


def test_a_slowdown_ends_with_1(fake_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "dispatch", dispatch_that_runs())
    flags = ["--op", "geglu", *SMALL, "--out", str(tmp_path / "new")]
    assert kernels.main(flags) == 0
    old = harness.read(tmp_path / "new" / "kernels.json")
    harness.write(old, tmp_path / "same.json")
    assert kernels.main([*flags, "--compare", str(tmp_path / "same.json")]) == 0
    for row in old["rows"]:
        for found in row["timings"].values():
            found |= {name: found[name] / 10 for name in ("median_ms", "low_ms", "high_ms")}
    harness.write(old, tmp_path / "faster.json")
    capsys.readouterr()
    assert kernels.main([*flags, "--compare", str(tmp_path / "faster.json")]) == 1
    assert "900% slower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--op", "geglo"], "--op: invalid choice: 'geglo'"),
        (["--shapes", "sd15-500"], "--shapes: a preset is one of sd15, sdxl, a dash, and pixels"),
        (["--batch", "0"], "--batch: must be a whole number from 1, got '0'"),
        (["--shpes", "sd15-256"], "there is no --shpes: did you mean --shapes?"),
        (["--compare", "nowhere.json"], "--compare: 'nowhere.json': No such file"),
        (["--tune"], "--tune: there is no GPU here to tune for; run it where there is one"),
        (["--name", "a/b"], "--name: must be letters, digits, _ and -, got 'a/b'"),
        (["--without", "ours"], "--without: invalid choice: 'ours'"),
        (["--modes", "hot"], "--modes: invalid choice: 'hot'"),
        (["--kernel", "geglu.forward"], "--kernel geglu.forward: it goes with --tune"),
    ],
)
def test_a_bad_flag_is_one_line_and_2(flags, told, capsys):
    assert told in refusal(kernels.main, flags, capsys)


def test_the_command_ends_with_its_codes():
    bad = command("--op", "geglu", "--batch", "many")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    good = command("--op", "geglu", *SMALL, "--dtype", "fp32", TRITON_INTERPRET="1")
    assert good.returncode == 0, good.stderr
    assert "answers only, of the kernels, interpreted" in good.stderr
    assert "forward/ours | right" in good.stdout


def test_interpreted_attention_is_right_in_fp16():
    done = command("--op", "attention", *SMALL, "--dtype", "fp16", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "+77keys/fp16/backward/ours | right" in done.stdout


def test_a_kernel_is_tuned_with_its_op(fake_gpu, capsys):
    flags = ["--tune", "--kernel", "attention.forward"]
    told = refusal(kernels.parse, [*flags, "--op", "geglu"], capsys)
    assert "--kernel attention.forward: give its op by --op" in told
    asked = kernels.tune.asked(kernels.parse([*flags, "geglu.forward"]))
    assert [what.kernel for what in asked] == ["geglu.forward", "attention.forward"]


def test_the_interpreter_is_not_asked_for_bf16(monkeypatch, capsys):
    monkeypatch.setattr(kernels.dispatch, "INTERPRETED", True)
    told = refusal(kernels.main, ["--op", "geglu"], capsys)
    assert "--dtype bf16: Triton's interpreter is wrong for bf16; use fp16 or fp32" in told


def test_a_backward_can_run_again_and_again():
    inputs = {"projected": torch.randn(3, 8, requires_grad=True)}
    call = backward(geglu_reference, inputs)
    first, second = call(), call()
    assert torch.equal(first[0], second[0])
    assert torch.equal(forward(geglu_reference, inputs)(), geglu_reference(**inputs))


def test_ceilings_are_numbers_and_a_copy_is_timed_twice(fake_gpu):
    device = torch.device("cuda")
    found = ceilings(Timer(device), device)
    assert {*found} == {
        "copy_bytes_per_s", "bf16_flops_per_s", "graph_launch_us", "noise", "sm_clock_mhz"
    }  # fmt: skip
    assert found["noise"] >= 0


def test_inputs_that_are_gone_round_exceed_the_cache(fake_gpu):
    timer = Timer(torch.device("cuda"))
    assert timer.sets(2**16) * 2**16 >= 3 * 2**16
    assert timer.sets(2**30) == 1
    assert timer.sets(1) == MOST_SETS


def test_each_mode_calls_what_it_should(fake_gpu, monkeypatch):
    timer = Timer(torch.device("cuda"))
    called = []
    calls = [lambda: called.append(0), lambda: called.append(1), lambda: called.append(2)]
    for mode, last in (("cold", [0, 1, 2, 0]), ("warm", [0] * 4), ("graph", [0, 1, 2])):
        called.clear()
        timer.measure(calls, mode)
        assert called[-len(last) :] == last, mode
