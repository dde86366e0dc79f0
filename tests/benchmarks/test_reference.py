"""A script that is watched from outside: its stamps, its trace; where it is found, how it fails."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from records import refusal
from tiny import save_tiny_pipeline

from fusedit.benchmarks import learning, models, parity, reference, reference_run, step, tracing
from fusedit.benchmarks.demo_steps import RunFailed
from fusedit.benchmarks.shapes import shapes
from fusedit.benchmarks.tracing import kind_of, phase_of
from fusedit.launch.demo.run import save_pairs

SCRIPT = Path(__file__).with_name("small_script.py")
UPDATES = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_pipeline(folder / "base")
    save_pairs(folder / "data", 16)
    return folder


@pytest.fixture
def watched(inputs, tmp_path):
    """Runs it here, as its own process would, and gives what was written."""

    def run(watch, *more):
        flags = [
            f"--pretrained_model_name_or_path={inputs / 'base'}",
            f"--dataset_name={inputs / 'data'}",
            f"--output_dir={tmp_path / 'run'}",
            "--resolution=16",
            "--train_batch_size=2",
            "--gradient_accumulation_steps=2",
            "--learning_rate=1e-4",
            f"--max_train_steps={UPDATES}",
            *more,
        ]
        assert reference_run.main([watch, str(tmp_path), str(SCRIPT), *flags]) == 0
        return tmp_path

    return run


def test_each_update_is_stamped_and_the_log_agrees(watched):
    found = reference.read_stamps(watched("stamps"))
    assert len(found.steps) == len(found.logged) == UPDATES
    assert found.steps == sorted(found.steps)
    assert all(0 <= log - step < 5 for step, log in zip(found.steps, found.logged, strict=True))
    assert found.memory_gib > 0.1


def test_a_log_that_lacks_an_update_is_refused(watched):
    folder = watched("stamps")
    stamps = json.loads((folder / "stamps.json").read_text())
    stamps["steps"].append(0.0)
    (folder / "stamps.json").write_text(json.dumps(stamps))
    with pytest.raises(RunFailed, match="5 steps were taken, 4 losses logged"):
        reference.read_stamps(folder)


def test_nothing_stays_watched(watched):
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in tracing.WATCHED]
    rand = torch.rand
    watched("stamps")
    assert all(getattr(owner, name) is own for owner, name, own in kept)
    assert torch.rand is rand
    assert "torchvision" not in sys.modules


def test_a_trace_tells_the_phases_apart(watched, monkeypatch):
    monkeypatch.setattr(tracing, "SKIPPED", 1)
    monkeypatch.setattr(tracing, "TRACED", 2)
    found = json.loads((watched("trace") / "trace.json").read_text())
    phases = found["phases"]
    assert {"data", "encode", "forward", "backward", "optimizer"} <= {*phases}
    assert phases["forward"]["convolution"] > 0
    assert phases["backward"]["linear"] > 0
    assert phases["encode"]["attention"] > 0
    assert "convolution" not in phases["optimizer"]
    in_all = sum(sum(kinds.values()) for kinds in phases.values())
    assert 0.5 * found["wall_ms"] < in_all < 1.05 * found["wall_ms"]


class Event:
    def __init__(self, name, parent=None, kernels=()):
        self.name, self.cpu_parent, self.kernels = name, parent, kernels
        self.device_type = torch.autograd.DeviceType.CPU


def test_an_exchange_is_no_part_of_the_backward_it_runs_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels = [
        SimpleNamespace(name="ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)", duration=3000.0),
        SimpleNamespace(name="void at::native::elementwise_kernel", duration=1000.0),
    ]
    backward = Event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad")
    events = [Event("record_param_comms", backward, kernels[:1])]
    events.append(Event("aten::div_", Event("c10d::allreduce_", backward), kernels[1:]))
    events.append(Event("aten::div_", backward, kernels[1:]))
    found = {phase: sum(kinds.values()) for phase, kinds in tracing.summed(events).items()}
    assert found == {"all-reduce": 4.0, "backward": 1.0}


def test_an_operation_belongs_to_the_outermost_phase():
    backward = Event("backward")
    again = Event("aten::conv2d", Event("forward", backward))  # checkpointing computes it again
    assert phase_of(again) == "backward"
    assert (
        phase_of(Event("aten::mm", Event("autograd::engine::evaluate_function: Mm"))) == "backward"
    )
    assert phase_of(Event("aten::add")) == "rest"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::addmm", "linear"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("fusedit::attention", "attention"),
        ("aten::baddbmm", "attention"),
        ("fusedit::group_norm", "elementwise"),
        ("aten::native_layer_norm", "elementwise"),
        ("encode", "host"),
    ],
)
def test_the_kind_of_an_operation(name, kind):
    assert kind_of(name) == kind


def test_either_script_is_found_beside_the_other(tmp_path):
    for name in reference.SHA256:
        (tmp_path / name).write_text(name)
    found = reference.found_script(str(tmp_path))
    xl = reference.script_named(found, reference.XL_NAME)
    assert xl is not None
    assert (found.path.name, xl.path.name) == (reference.NAME, reference.XL_NAME)
    assert xl.sha256 == hashlib.sha256(reference.XL_NAME.encode()).hexdigest()
    assert reference.script_named(xl, reference.NAME) == found
    stand_in = reference.found_script(str(SCRIPT))
    assert all(reference.script_named(stand_in, name) == stand_in for name in reference.SHA256)
    (tmp_path / reference.XL_NAME).unlink()
    assert reference.script_named(found, reference.XL_NAME) is None


def test_xls_unet_is_the_true_one():
    with torch.device("meta"):
        unet = models.xl_unet(models.SDXL)
    more_channels = 4 * 320 * 9  # of conv_in, for the image that is edited
    count = sum(parameter.numel() for parameter in unet.parameters()) + more_channels
    assert count == shapes("sdxl-1024").parameters


def test_a_tiny_xl_is_a_pipeline(tmp_path):
    folder = models.make_sdxl(tmp_path, models.TINY_SDXL)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    text, _, pooled, _ = pipeline.encode_prompt("make it night", do_classifier_free_guidance=False)
    unet = pipeline.unet.config
    assert text.shape[-1] == unet.cross_attention_dim
    sizes = 6 * unet.addition_time_embed_dim
    assert pooled.shape[-1] + sizes == unet.projection_class_embeddings_input_dim
    assert models.make_sdxl(tmp_path, models.TINY_SDXL) == folder


def test_the_stand_in_draws_as_torchvision_does():
    with reference_run.torchvision_there():
        from torchvision import transforms  # pyright: ignore[reportMissingImports]

        flip = transforms.RandomHorizontalFlip()
        images = torch.arange(6.0).view(1, 2, 3)
        torch.manual_seed(0)
        found = [bool((flip(images) != images).any()) for _ in range(20)]
        torch.manual_seed(0)
        assert found == [bool(torch.rand(1) < 0.5) for _ in range(20)]
        with pytest.raises(ValueError, match="only a crop of everything, 4 px"):
            transforms.RandomCrop(4)(images)


def checkout(folder):
    place = folder / reference.FOLDER
    place.mkdir(parents=True)
    shutil.copy(SCRIPT, place / reference.NAME)
    return place / reference.NAME


def test_the_script_is_found_in_its_checkout(tmp_path):
    path = checkout(tmp_path)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *who, "commit", "-qm", "x"], check=True)
    for given in (tmp_path, path.parent, path):
        found = reference.found_script(str(given))
        assert found.path == path
        assert found.sha256 == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        assert len(found.commit or "") == 40
    assert "not the one measured" in found.told()


def test_a_place_without_the_script_is_refused(tmp_path, capsys):
    said = refusal(parity.main, [f"--reference={tmp_path}", "--out=x"], capsys)
    assert "--reference" in said
    assert "no train_instruct_pix2pix.py there; give a checkout of huggingface/diffusers" in said


def test_a_script_that_fails_says_its_last_line(tmp_path):
    script = reference.found_script(str(checkout(tmp_path)))
    with pytest.raises(RunFailed, match="exit code 1: the script met a mistake"):
        reference.run_script("stamps", script, ["--mistake=crash"], tmp_path / "out")


@pytest.mark.parametrize("module", [learning, parity, step])
def test_without_the_script_it_is_said_where_it_is(module, capsys):
    said = refusal(module.main, ["--out=x"], capsys)
    assert "--reference is missing: give a checkout of huggingface/diffusers" in said
    assert reference.MEASURED[:8] in said
