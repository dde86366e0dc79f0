import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny_pipeline
from transformers import CLIPConfig, CLIPImageProcessor

from fusedit.trainer import export
from fusedit.trainer.config import ModelConfig, OutputConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.export import (
    check_push,
    load_safety,
    model_card,
    push,
    without_secrets,
)
from fusedit.trainer.families import STABLE_DIFFUSION

save_pipeline = partial(export.save_pipeline, family=STABLE_DIFFUSION, zero_null=False)
TOKEN = "hf_" + "secretsecret" * 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "base", in_channels=8)


@pytest.fixture
def parts(base):
    loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(base)
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    return loaded.unet, {name: getattr(loaded, name) for name in names}


def bits(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype is two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def test_the_pipeline_has_one_dtype_and_the_trained_modules_stay(tmp_path, parts):
    unet, components = parts
    components["vae"] = components["vae"].to(memory_format=torch.channels_last)
    unet.to(memory_format=torch.channels_last)
    components["text_encoder"].bfloat16()
    modules = unet, components["vae"], components["text_encoder"]
    before = [bits(module) for module in modules]
    save_pipeline(tmp_path, unet=unet, components=components, raw_weights=None, dtype=torch.float16)
    assert all(same(bits(module), was) for module, was in zip(modules, before, strict=True))
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    assert {value.dtype for path in files for value in load_file(path).values()} == {torch.float16}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert type(loaded) is StableDiffusionInstructPix2PixPipeline
    expected = {name: value.half().contiguous() for name, value in before[0].items()}
    assert same(bits(loaded.unet), expected)
    assert not (tmp_path / "unet_raw").exists()


def test_no_path_of_this_machine_is_written(tmp_path, base, parts):
    unet, components = parts
    save_pipeline(
        tmp_path, unet=unet, components=components, raw_weights=bits(unet), dtype=torch.float32
    )
    for path in tmp_path.rglob("*.json"):
        assert str(base) not in path.read_text(), path


def test_averages_in_unet_and_the_raw_weights_beside(tmp_path, parts):
    unet, components = parts
    raw = {name: p.detach() + 1 for name, p in unet.named_parameters()}
    save_pipeline(tmp_path, unet=unet, components=components, raw_weights=raw, dtype=torch.float32)
    kept = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet_raw")
    assert same(bits(kept), raw)
    averages = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path).unet
    assert same(bits(averages), bits(unet))


def test_a_second_export_replaces_the_first_and_nothing_else(tmp_path, parts):
    unet, components = parts
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "unet.safetensors").write_text("kept")
    (tmp_path / "log.jsonl").write_text("kept")
    options = {"unet": unet, "components": components, "dtype": torch.float32}
    save_pipeline(tmp_path, raw_weights=bits(unet), **options)
    (tmp_path / "unet" / "stale").touch()
    with torch.no_grad():
        unet.conv_in.bias += 1
    save_pipeline(tmp_path, raw_weights=None, **options)
    loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path)
    assert same(bits(loaded.unet), bits(unet))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint-5", "log.jsonl", "model_index.json"),
        *("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    }
    assert not (tmp_path / "unet" / "stale").exists()
    assert (tmp_path / "checkpoint-5" / "unet.safetensors").read_text() == "kept"


@pytest.mark.parametrize("renames", range(0, 12, 2))
def test_a_killed_export_leaves_no_half_pipeline(tmp_path, parts, monkeypatch, renames):
    """Killed after so many renames, the folder loads as the new pipeline or not at all."""
    unet, components = parts
    options = {"components": components, "raw_weights": None, "dtype": torch.float32}
    save_pipeline(tmp_path, unet=unet, **options)
    with torch.no_grad():
        unet.conv_in.bias += 1
    left = [renames]

    class Killed(Exception):
        pass

    path_type = type(tmp_path)
    rename = path_type.rename

    def rename_until_killed(path, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(path_type, "rename", rename_until_killed)
        try:
            save_pipeline(tmp_path, unet=unet, **options)
            assert renames >= 10  # five parts, out and in
        except Killed:
            with pytest.raises(OSError, match=r"model_index\.json"):
                DiffusionPipeline.from_pretrained(tmp_path)
    save_pipeline(tmp_path, unet=unet, **options)
    loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path)
    assert same(bits(loaded.unet), bits(unet))
    assert not (tmp_path / ".export.partial").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, parts):
    unet, components = parts
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written") as caught:
        save_pipeline(
            tmp_path / "file",
            unet=unet,
            components=components,
            raw_weights=None,
            dtype=torch.float32,
        )
    assert "\n" not in str(caught.value)


def add_safety_checker(folder) -> None:
    narrow = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    words = {"vocab_size": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = CLIPConfig(
        text_config=narrow | words,
        vision_config=narrow | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    extractor.save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def test_the_bases_safety_checker_is_kept(tmp_path, base, parts):
    unet, components = parts
    assert load_safety(ModelConfig(pretrained_model_name_or_path=str(base)), torch.float16) == {}
    guarded = shutil.copytree(base, tmp_path / "guarded")
    add_safety_checker(guarded)
    section = ModelConfig(pretrained_model_name_or_path=str(guarded))
    components |= load_safety(section, torch.float16)
    out = tmp_path / "out"
    save_pipeline(out, unet=unet, components=components, raw_weights=None, dtype=torch.float16)
    weights = load_file(out / "safety_checker" / "model.safetensors").values()
    assert {value.dtype for value in weights if value.is_floating_point()} == {torch.float16}
    loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(out)
    assert loaded.safety_checker is not None
    assert loaded.feature_extractor.size["shortest_edge"] == 8

    (guarded / "safety_checker" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="its safety checker cannot be read"):
        load_safety(section, torch.float16)


def write_card(folder, **changes) -> ModelCard:
    options = {
        "family": STABLE_DIFFUSION,
        "command": f"fusedit train --hub_token {TOKEN} --resolution 256",
        "settings": {"loop.seed": 3},
        "base": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "dataset": "fusing/instructpix2pix-1000-samples",
        "versions": {"torch": "2.13.0"},
        "steps": 15000,
        "picture": None,
    }
    model_card(folder, **options | changes)
    return ModelCard.load(folder / "README.md")


def test_model_card(tmp_path):
    picture = tmp_path / "step-100.png"
    Image.new("RGB", (4, 4)).save(picture)
    folder = tmp_path / "my-model"
    folder.mkdir()
    card = write_card(folder, picture=picture)
    assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert card.data.datasets == ["fusing/instructpix2pix-1000-samples"]
    assert card.data.pipeline_tag == "image-to-image"
    assert {"stable-diffusion", "instruct-pix2pix", "diffusers"} <= set(card.data.tags)
    assert card.data.license == "other"
    for told in ("15000 steps", "loop.seed | 3", "torch | 2.13.0"):
        assert told in card.text
    assert '"my-model"' in card.text
    assert "](edits.png)" in card.text
    assert (folder / "edits.png").read_bytes() == picture.read_bytes()
    assert TOKEN not in card.content
    assert "--hub_token *** --resolution 256" in card.text


def test_the_cards_snippet_is_python(tmp_path):
    text = write_card(tmp_path).text
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "README.md", "exec")


def test_the_card_tells_no_path_of_local_models_and_data(tmp_path):
    local = tmp_path / "somewhere" / "sd"
    local.mkdir(parents=True)
    card = write_card(tmp_path, base=str(local), dataset=str(local))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "somewhere" not in card.content
    assert "edits.png" not in card.content


@pytest.mark.parametrize(
    "typed",
    [
        f"--hub_token {TOKEN} --seed 1",
        f"--hub_token={TOKEN} --seed 1",
        f"--hub-token '{TOKEN}' --seed 1",
        f'--output.hub_token="{TOKEN}" --seed 1',
        f"HF_TOKEN={TOKEN} fusedit --seed 1",
        "--hub_token not-of-the-usual-form --seed 1",
    ],
)
def test_secrets_in_a_command_are_masked(typed):
    masked = without_secrets(typed)
    assert TOKEN not in masked
    assert "usual" not in masked
    assert masked.endswith("--seed 1")


class FakeHub:
    """Stands in for HfApi; `error` is raised by every call."""

    error: Exception | None = None
    role = "write"
    calls: tuple | list = ()  # a list in each test

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def whoami(self):
        if self.error:
            raise self.error
        return {"name": "me", "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo_id, exist_ok=False):
        assert exist_ok
        if self.error:
            raise self.error
        self.calls.append(("create_repo", repo_id))
        return Repository(f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id, folder_path, allow_patterns, commit_message))


class Repository(str):
    @property
    def repo_id(self):
        return str(self)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "error", None)
    monkeypatch.setattr(FakeHub, "role", "write")
    monkeypatch.setattr(export, "HfApi", FakeHub)
    return FakeHub


def test_push_sends_the_pipeline_and_nothing_else(tmp_path, hub):
    section = OutputConfig(output_dir=str(tmp_path / "my-model"), hub_token=TOKEN)
    assert check_push(section) == "me/my-model"
    push(section, "15000 steps")
    kind, repo_id, folder, patterns, message = hub.calls[-1]
    assert (kind, repo_id, message) == ("upload", "me/my-model", "15000 steps")
    assert folder == section.output_dir
    assert ("token", TOKEN) in hub.calls
    sent = [
        *("model_index.json", "README.md", "edits.png", "unet/config.json"),
        *("vae/diffusion_pytorch_model.safetensors", "safety_checker/config.json"),
    ]
    kept = [
        *("checkpoint-5/unet.safetensors", "checkpoint-5/optimizer.safetensors", "run.toml"),
        *("log.jsonl", "trackers.json", "logs/events.out", "wandb/run/x", "validation/5.png"),
        *("unet_raw/config.json", ".export.partial/unet/config.json", "evil/unet/config.json"),
    ]
    assert list(filter_repo_objects([*sent, *kept], allow_patterns=patterns)) == sent


@pytest.mark.parametrize("call", [check_push, lambda section: push(section, "done")])
def test_a_hub_that_refuses_is_one_line_without_the_token(tmp_path, hub, call):
    section = OutputConfig(output_dir=str(tmp_path / "m"), hub_token=TOKEN)
    hub.error = OSError(f"401 Client Error: {TOKEN} is wrong\nmore lines")
    with pytest.raises(UsageError, match=r"--push_to_hub m: 401 Client Error: \*\*\*") as caught:
        call(section)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_token_that_can_only_read_is_refused_before_training(tmp_path, hub):
    hub.role = "read"
    with pytest.raises(UsageError, match="can only read"):
        check_push(OutputConfig(output_dir=str(tmp_path)))


def test_the_real_client_without_a_network_is_one_line(tmp_path):
    """tests/conftest.py sets the hub offline."""
    section = replace(OutputConfig(hub_token=TOKEN), hub_model_id="me/x")
    with pytest.raises(UsageError, match="--push_to_hub me/x"):
        check_push(section)
