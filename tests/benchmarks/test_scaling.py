"""Scaling: rows of runs that are made up, what is noted of real backwards, and the prediction."""

import json
import os
import time

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from PIL import Image
from records import record, refusal, timing
from tiny import save_tiny_inputs
from torch import nn

from fusedit.benchmarks import demo_steps, gradients, harness, predicted, scaling, update
from fusedit.benchmarks.demo_steps import RunFailed, Steps
from fusedit.benchmarks.gradients import Backward, Stamps
from fusedit.benchmarks.overlap import Cluster, Exchange, Gradient, Link
from fusedit.launch.flags import parse
from fusedit.trainer.world import World

MEBI = 2**20 // 4  # elements of a MiB in fp32
STEPS = 10
# Three buckets of 1 MiB; the backward is half of the step.
BACKWARD = Backward([Gradient(MEBI, share) for share in (0.2, 0.6, 1.0)], 0.5, 200.0)


# The demo on several ranks.


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Of runs that are made up: seconds of a step, by ranks; and the cores each one had."""

    class Made:
        def __init__(self):
            self.step_s = {1: [0.2, 0.25], 2: [0.24, 0.3]}  # of each round
            self.beside_s, self.all_reduce_ms, self.fails = 0.22, 20.0, ""
            self.cores: dict[str, set[int]] = {}

    def run(steps, words, output, *, ranks):
        name = output.name
        found.cores[name] = os.sched_getaffinity(0)
        if name == found.fails:
            raise RunFailed("exit code 1: out of luck")
        beside = name.count("-") == 2
        step_s = found.beside_s if beside else found.step_s[ranks][int(name.split("-")[1])]
        speed = scaling.BATCH * ranks / step_s
        return Steps([0.5] * steps, [speed * (1 + at * 1e-9) for at in range(steps)], 0.5)

    def run_module(name, words, output, ranks=1):
        kind, _, *own = words
        found.cores[kind] = os.sched_getaffinity(0)
        output.mkdir(parents=True)
        taken = [[found.all_reduce_ms] * 3 for _ in own] if kind == "exchange" else BACKWARD
        (output / f"{kind}.json").write_text(json.dumps(taken))

    found = Made()
    monkeypatch.setattr(scaling, "run_steps", run)
    monkeypatch.setattr(scaling, "demo_data", lambda folder: folder)
    monkeypatch.setattr(demo_steps, "run_module", run_module)
    monkeypatch.setattr(gradients, "counted", lambda pixels: BACKWARD._replace(step_ms=None))
    return found


@pytest.fixture
def measure(tmp_path):
    def main(*more):
        words = [f"--out={tmp_path}", f"--work={tmp_path}", f"--steps={STEPS}", "--rounds=2"]
        code = scaling.main([*words, *more])
        rows = harness.read(tmp_path / "scaling.json")["rows"]
        return code, {row["name"]: row for row in rows}

    return main


def test_ranks_are_measured_beside_single_ones(made, measure):
    code, rows = measure()
    assert code == 0
    row = rows[f"scaling/demo/2/16/{STEPS}/ours"]
    values = row["values"]
    assert values["images_per_s"] == pytest.approx((32 / 0.24 + 32 / 0.3) / 2)
    assert (values["efficiency_low"], values["efficiency_high"]) == pytest.approx(
        (0.25 / 0.3, 0.2 / 0.24)
    )
    assert row["timings"]["warm"]["median_ms"] == pytest.approx(270)
    assert row["timings"]["warm"]["runs"] == 2 * STEPS
    assert rows[f"scaling/demo/1/16/{STEPS}/ours"]["values"]["efficiency"] == 1.0
    bucket = rows["scaling/bucket/1/ours"]["values"]
    assert bucket == {"bytes": 2**20, "ready": 0.3, "all_reduce_ms_2": 20.0}


def test_a_rank_has_a_core_alone_or_not(made, measure):
    before = os.sched_getaffinity(0)
    first, second, *_ = sorted(before)
    measure()
    assert made.cores == {
        **{f"1-{number}": {first} for number in range(2)},
        **{f"2-{number}": {first, second} for number in range(2)},
        **{f"2-{number}-0": {first} for number in range(2)},
        **{f"2-{number}-1": {second} for number in range(2)},
        "demo": {first},
        "exchange": {first, second},
    }
    assert os.sched_getaffinity(0) == before


def test_the_model_is_held_against_the_measured_step(made, measure):
    made.step_s = {1: [0.2, 0.2], 2: [0.24, 0.24]}
    code, rows = measure()
    found = rows["scaling/check/2/model"]
    # Of 220 ms the backward is 110: buckets are ready at 22, 66 and 110, the last is exposed.
    assert found["values"]["model_ms"] == pytest.approx(240)
    assert found["values"]["all_reduce_ms"] == pytest.approx(60)
    assert (code, found["verdict"]) == (0, "right")
    assert found["error"] == pytest.approx(0, abs=1e-6)


def test_a_model_that_is_off_is_told(made, measure, capsys):
    made.step_s = {1: [0.2, 0.2], 2: [0.27, 0.27]}
    code, rows = measure()
    found = rows["scaling/check/2/model"]
    assert (code, found["verdict"]) == (1, "wrong")
    assert found["error"] == pytest.approx((0.27 - 0.24) / 0.27 / scaling.ALLOWED)
    assert "the model is off by -11%, allowed: 10%" in capsys.readouterr().err


def test_a_noisy_machine_judges_nothing():
    calm, noisy = timing(240.0), timing(240.0, spread=0.11)
    assert scaling.check_row(2, calm, calm, Exchange(60, 20))["verdict"] == "right"
    for pair in ((calm, noisy), (noisy, calm)):
        found = scaling.check_row(2, *pair, Exchange(60, 0))
        assert (found["verdict"], found["error"]) == ("unchecked", None)
        assert "steps differ by 33%" in found["note"]


def test_what_it_writes(made, measure, tmp_path, capsys):
    measure()
    text = (tmp_path / "scaling.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "| 2 | 120.0, 106.7 to 133.3 | 83.3%, 83.3% to 83.3% | 270.0 |" in text
    assert "680 images/s, the target for 64 images, which nobody has measured" in text
    assert Image.open(tmp_path / "scaling.png").width > 500


@pytest.mark.parametrize(("gpus", "ranks"), [(1, [1]), (4, [1, 2, 4])])
def test_on_gpus_the_model_starts_from_one_of_them(made, measure, monkeypatch, gpus, ranks):
    machine = harness.machine() | {"gpu": "Fake H100"}
    monkeypatch.setattr(harness, "machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    made.step_s = {1: [0.2, 0.2], 2: [0.22, 0.22], 4: [0.22, 0.22]}
    code, rows = measure()
    assert code == 0
    for what in ("demo", "check"):
        found = [row for row in rows.values() if row["labels"]["what"] == what]
        own = ranks if what == "demo" else ranks[1:]
        assert [row["labels"]["ranks"] for row in found] == own
    for row in found:  # the checks
        assert row["values"]["without_exchange_ms"] == pytest.approx(200)
        assert row["values"]["model_ms"] == pytest.approx(220)
    assert set(map(frozenset, made.cores.values())) == {frozenset(os.sched_getaffinity(0))}
    assert rows["scaling/sd15-256/8/fp32/64/model"]["values"]["efficiency"] > 0.99


def test_a_run_that_fails_ends_it(made, tmp_path, capsys):
    made.fails = "2-1-0"
    words = [f"--out={tmp_path}", f"--work={tmp_path}"]
    assert scaling.main(words) == 1
    assert "out of luck" in capsys.readouterr().err
    assert not (tmp_path / "scaling.json").exists()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_its_runs_can_be_asked_for(monkeypatch, tmp_path, on_gpu):
    monkeypatch.setattr(scaling, "demo_data", lambda folder: folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    demo = scaling.Demo(STEPS, tmp_path)
    run = parse([*demo.words, *demo_steps.unattended(tmp_path), "--cuda_graphs=off"]).run
    run.check_complete()
    assert (run.loop.train_batch_size, run.loop.bucket_mb) == (16, 1)
    assert run.data.cache_latents == str(tmp_path / "cache")
    assert run.precision.mixed_precision == ("bf16" if on_gpu else "no")


@pytest.mark.parametrize(
    ("gpus", "ranks"), [(0, [1, 2]), (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_how_many_ranks(monkeypatch, gpus, ranks):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert scaling.ranks_here() == ranks


# Gradients and all-reduces.


class Slow(torch.autograd.Function):
    """Gives what it takes; its backward lasts."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x * 1

    @staticmethod
    def backward(ctx, *grads):
        time.sleep(ctx.seconds)
        return grads[0], None


def test_gradients_are_noted_as_they_come():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)

        def forward(self, x):
            return self.last(Slow.apply(self.first(x), 0.06)), None

    model = Model()
    stamps = Stamps(model, torch.device("cpu"))
    for _ in range(8):
        time.sleep(0.04)  # the rest of the update
        model(torch.randn(3, 4))[0].sum().backward()
    found = stamps.backward()
    assert [gradient.elements for gradient in found.gradients] == [
        16,
        32,
    ]  # of the last layer first
    assert found.gradients[0].ready < 0.2
    assert found.gradients[1].ready == 1.0
    assert found.step_ms == pytest.approx(100, rel=0.5)
    assert found.share == pytest.approx(0.6, abs=0.15)


def test_the_trainers_run_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_steps, "make_world", World)
    inputs = save_tiny_inputs(tmp_path, 16)
    flags = [
        f"--pretrained_model_name_or_path={inputs / 'base'}",
        f"--train_data_dir={inputs / 'data'}",
        "--resolution=16",
        "--train_batch_size=4",
        "--max_train_steps=20",
        *demo_steps.unattended(tmp_path / "run"),
    ]
    file = tmp_path / "demo.json"
    assert gradients.main(["demo", str(file), "6", *flags]) == 0
    found = gradients._read(file.read_text())
    unet = UNet2DConditionModel.from_pretrained(inputs / "base/unet")
    grown = unet.conv_in.weight.numel()  # for the image's channels
    expected = sum(parameter.numel() for parameter in unet.parameters()) + grown
    assert sum(gradient.elements for gradient in found.gradients) == expected
    ready = [gradient.ready for gradient in found.gradients]
    assert ready == sorted(ready)
    assert 0 < ready[0] < ready[-1] == 1.0
    assert 0 < found.share < 1


def test_all_reduces_are_timed_by_size(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    found = gradients.exchanged([400, 4_000_000], World())
    dist.destroy_process_group()
    assert [len(runs) for runs in found] == [gradients.EXCHANGES] * 2
    assert all(ms > 0 for runs in found for ms in runs)


def test_the_update_on_a_gpu_is_noted(tiny_sd15, tmp_path, monkeypatch):
    """On a CPU: kernels, the compiler and streams need a GPU."""
    asked = []

    def make(case, way, device):
        asked.append((case.name, way.fused, way.compiled, way.graph, device))
        return own(case, update.Way(fused=False), "cpu")

    own = update.Job
    monkeypatch.setattr(update, "Job", make)
    monkeypatch.setattr(gradients, "UPDATES", 5)
    for name in ("Stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    file = tmp_path / "sd15.json"
    assert gradients.main(["sd15", str(file), "1"]) == 0
    found = gradients._read(file.read_text())
    assert asked == [("sd15-256:1x1", True, True, False, "cuda")]
    sizes = [parameter.numel() for parameter in tiny_sd15().parameters()]
    assert sum(one.elements for one in found.gradients) == sum(sizes)
    assert found.step_ms is not None
    assert found.step_ms > 0


def test_the_order_of_flops(tiny_sd15):
    found = gradients.counted(64)
    sizes = [parameter.numel() for parameter in tiny_sd15().parameters()]
    assert sum(one.elements for one in found.gradients) == sum(sizes)
    assert sorted(one.elements for one in found.gradients[:2]) == sorted(sizes[-2:])  # conv_out's
    ready = [one.ready for one in found.gradients]
    assert ready == sorted(ready)
    assert 0 < ready[0] < 0.1
    assert ready[-1] == pytest.approx(1.0)
    # Two products for each of the forward, less that of the input's gradient.
    assert 0.6 < found.share < 0.667


def test_attention_is_counted(tiny_sd15):
    """All else grows as the pixels do, and leaves the shares as they are."""
    few, many = (gradients.counted(pixels).gradients for pixels in (128, 512))
    pairs = zip(few, many, strict=True)
    assert max(abs(one.ready - other.ready) for one, other in pairs) > 0.05


# The prediction.


def chosen(*more):
    return scaling.parse(["--out=x", *more])


def row_of_update(images_per_s, *, shape="64x1", way="all", verdict="right"):
    labels = {"op": "update", "preset": "sd15-256", "shape": shape, "dtype": "bf16", "way": way}
    values = {"images_per_s": images_per_s} if verdict == "right" else {}
    return harness.row(labels | {"by": "ours"}, verdict=verdict, values=values)


COUNTED = BACKWARD._replace(step_ms=None)


def test_one_gpu_is_the_target_unless_more_is_known(tmp_path):
    by_target = predicted.one_gpu(chosen(), COUNTED)
    assert by_target.step_ms == pytest.approx(64e3 / 680)
    assert by_target.backward_ms == pytest.approx(0.5 * (64e3 / 680 - predicted.OPTIMIZER_MS))
    assert "nobody has measured" in by_target.source
    here = predicted.one_gpu(chosen(), BACKWARD)
    assert (here.step_ms, here.backward_ms) == (200.0, 100.0)
    assert "measured in this run" in here.source
    told = predicted.one_gpu(chosen("--images_per_s=320"), BACKWARD)
    assert (told.step_ms, told.backward_ms) == (200.0, 100.0)
    assert "given as --images_per_s" in told.source


def test_one_gpu_is_the_fastest_way_of_a_record(tmp_path):
    rows = [
        row_of_update(500, way="fused"),
        row_of_update(640, way="all"),
        row_of_update(0, way="all-bf16", verdict="wrong"),
        row_of_update(900, shape="128x1"),
        row_of_update(800, shape="16x4"),
    ]
    path = tmp_path / "update.json"
    harness.write(record(*rows), path)
    one = predicted.one_gpu(chosen(f"--update={path}"), BACKWARD)
    assert one.step_ms == pytest.approx(100.0)
    assert "640 images/s, measured: Fake H100, all, commit" in one.source
    wide = predicted.one_gpu(chosen(f"--update={path}", "--batch=128"), BACKWARD)
    assert wide.step_ms == pytest.approx(128e3 / 900)


def test_the_prediction_and_the_papers_run():
    flags = chosen("--images_per_s=320", "--bucket_mb=1", "--price_per_gpu_hour=3")
    one = predicted.one_gpu(flags, BACKWARD)  # 200 ms, buckets ready at 20, 60 and 100
    cluster = Cluster(8, Link(1e-1, 1e-9), Link(1e9, 1e-9))  # 18.4 ms a bucket, nothing between
    rows = {row["name"]: row for row in predicted.rows(one, cluster, 3.0)}
    assert {row["verdict"] for row in rows.values()} == {"unchecked"}
    taken_ms = 14 / 8 * 2**20 / 0.1 / 1e6
    full = rows["scaling/sd15-256/8/fp32/64/model"]["values"]
    assert full["exposed_ms"] == pytest.approx(taken_ms)
    assert full["all_reduce_ms"] == pytest.approx(3 * taken_ms)
    assert full["efficiency"] == pytest.approx(200 / (200 + taken_ms))
    assert full["images_per_s"] == pytest.approx(8 * 64e3 / (200 + taken_ms))
    half = rows["scaling/sd15-256/512/bf16/64/model"]["values"]
    assert half["exposed_ms"] == pytest.approx(taken_ms / 2)
    assert "recipe_hours" not in half
    # 128 images a GPU take two micro-steps, and one exchange.
    hours = 10_000 * (400 + taken_ms) / 3.6e6
    assert full["recipe_hours"] == pytest.approx(hours)
    assert full["recipe_cost"] == pytest.approx(24 * hours)


def test_at_the_target_the_papers_run_is_within_its_goal():
    rows = predicted.rows(predicted.one_gpu(chosen(), COUNTED), predicted.cluster_of(chosen()), 2.0)
    hours = rows[0]["values"]["recipe_hours"]
    assert hours == pytest.approx(10_240_000 / (8 * 680) / 3600, rel=0.01)
    assert rows[0]["values"]["recipe_of_goal"] == hours


def test_links_are_nominal_times_what_is_reached():
    assert predicted.cluster_of(chosen("--link_efficiency=0.5", "--network_us=20")) == Cluster(
        8, Link(225.0, 3.4), Link(25.0, 20.0)
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps=4"], "--steps must be 5 or more, got 4"),
        (["--gpus_a_node=3"], "--gpus_a_node must divide"),
        (["--link_efficiency=0"], "--link_efficiency: must be a number above 0, got '0'"),
        (["--network_us=inf"], "must be a number above 0"),
        (["--update={path}", "--batch=32"], "--update has no right row of sd15-256:32x1"),
        (["--update={path}", "--images_per_s=9"], "leave out --images_per_s"),
    ],
)
def test_a_wrong_flag_is_one_line_and_2(words, told, tmp_path, capsys):
    path = tmp_path / "update.json"
    harness.write(record(row_of_update(640)), path)
    words = [word.format(path=path) for word in words]
    assert told in refusal(scaling.main, [f"--out={tmp_path}", *words], capsys)


def test_two_ranks_want_two_cores(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert "two ranks need two cores" in refusal(scaling.main, [f"--out={tmp_path}"], capsys)
