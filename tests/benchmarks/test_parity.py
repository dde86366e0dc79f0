"""A script's updates replayed by ours: they agree, and each mistake of the script is seen."""

import pytest
import torch
from test_reference import SCRIPT
from tiny import save_tiny_pipeline

from fusedit.benchmarks import harness, parity, recording, reference, reference_run, replay
from fusedit.benchmarks.parity import PRESETS, share
from fusedit.launch.demo.run import save_pairs

UPDATES = 4
SEEN_IN = {
    "mask": "loss",
    "noise": "gradients",
    "weight_decay": "weights",
    "average": "averages",
}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def preset(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_pipeline(folder / "base", prediction_type=request.param)
    save_pairs(folder / "data", 20)  # 5 micro-steps of 4: the third window is short
    return PRESETS["tiny"]._replace(pixels=16, pairs=20, make_model=lambda work: folder / "base")


@pytest.fixture
def compared(preset, tmp_path, monkeypatch):
    """The command, its script in this process; its exit code, and its rows by what they are of."""
    monkeypatch.setitem(PRESETS, "tiny", preset)
    data = preset.make_model(tmp_path).parent / "data"
    monkeypatch.setattr(parity, "make_pairs", lambda work, side, count: data)
    for module in (parity, recording, reference_run):
        monkeypatch.setattr(module, "UPDATES", UPDATES)

    def run(*more, watch="record"):
        def here(_, script, flags, folder):
            folder.mkdir(parents=True)
            words = [watch, str(folder), str(SCRIPT), *flags, *more, f"--output_dir={folder}"]
            assert reference_run.main(words) == 0

        monkeypatch.setattr(parity, "run_script", here)
        (tmp_path / reference.NAME).write_bytes(SCRIPT.read_bytes())
        words = [f"--reference={tmp_path}", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"]
        code = parity.main(words)
        rows = harness.read(tmp_path / "parity-tiny.json")["rows"]
        return code, {row["labels"]["what"]: row for row in rows}

    return run


def test_ours_is_as_near_to_the_truth_as_the_script(compared):
    code, rows = compared()
    assert code == 0
    assert [rows[what]["verdict"] for what in parity.QUANTITIES] == ["right"] * 5
    for what in parity.QUANTITIES:
        assert 0 <= rows[what]["values"]["ours"] < 1e-3
        assert rows[what]["values"]["script"] < 1e-3
    assert rows["loss"]["values"]["ours"] < 1e-5
    assert rows["short window"]["values"]["its_gradient_over_ours"] == pytest.approx(0.5, rel=1e-3)
    assert rows["conv_in.bias"]["values"]["script_off_by"] > 0.1
    assert rows["conv_in.bias"]["values"]["others_off_by"] == 0
    assert 0.01 < rows["average"]["values"]["ours_apart_of_its_way"] < 1


@pytest.mark.parametrize("mistake", SEEN_IN)
def test_a_mistake_of_the_script_is_seen(compared, mistake):
    code, rows = compared(f"--mistake={mistake}")
    assert code == 1
    assert rows[SEEN_IN[mistake]]["verdict"] == "wrong"
    if mistake == "average":
        assert rows["weights"]["verdict"] == "right"


def test_of_a_large_model_the_ends_alone_are_kept_whole(compared, tmp_path):
    code, rows = compared(watch="record-ends")
    assert code == 0
    assert rows["gradients"]["labels"]["updates"] == UPDATES
    sizes = [path.stat().st_size for path in sorted((tmp_path / "work").rglob("update-*"))]
    assert len(sizes) == UPDATES
    assert max(sizes[1:-1]) < sizes[0] / 2


def test_ours_itself_is_judged(compared, monkeypatch):
    own = replay.Ours.update

    def nudged(self, recorded):
        found = own(self, recorded)
        name = next(iter(found.gradients))
        return found._replace(
            gradients={**found.gradients, name: found.gradients[name] * 1.01},
        )

    monkeypatch.setattr(replay.Ours, "update", nudged)
    code, rows = compared()
    assert (code, rows["gradients"]["verdict"]) == (1, "wrong")
    assert rows["loss"]["verdict"] == "right"


def test_a_share_is_of_the_way_that_was_gone():
    start, truth = {"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([4.0, 5.0])}
    assert share({"a": torch.tensor([4.0, 5.5])}, truth, start) == pytest.approx(0.1)
    assert share(start, start, start) == 0
    found = parity.distance({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([1.0])}, 3)
    assert found == (parity.NO_NUMBER, "a", 3)
    row = parity.compared("loss", "tiny", [found], [found._replace(value=0.1)])
    assert row["verdict"] == "wrong"
