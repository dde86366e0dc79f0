"""The documents' blocks of commands are run, as they stand but for sizes, hosts and the hub."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Image
from diffusers import AutoencoderKL
from extractor_files import save_clip, save_dino
from PIL import Image as Pictures
from test_readme import DOCUMENTS, ROOT, TEXT
from tiny import save_tiny_dataset, save_tiny_pipeline

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ELSEWHERE = {  # the first line of a block, and what runs its commands
    "bash launch/demo.sh": ".ci/run and tests/launch/test_demo.py",
    "sbatch launch/slurm/train.sbatch": "tests/launch/test_recipes.py, with stubs of schedulers",
    "bash launch/test.sh": ".ci/run",
}
# What no machine of a test has, or takes hours. All else is run as it is written.
INSTEAD = [
    (r"^pip install .*", ":"),  # .ci/run does
    (r"--nproc-per-node=(gpu|8)", "--nproc-per-node=1"),
    (r"host0:29500", "localhost:{port}"),
    (r"^(torchrun --nnodes=2 .*)", r"\1 & other=$!; \1; wait $other"),  # a host, and the other
    (r"s3://bucket", "file://$PWD/bucket"),
    (r" --push_to_hub", ""),
    (r"--mixed_precision=fp16", "--mixed_precision=bf16"),  # fp16 is a GPU's
    (r"--resolution=256", "--resolution=32"),
    (r"--max_train_steps=15000", "--max_train_steps=2"),
    (r"--max_train_steps 20000", "--max_train_steps 12"),
    (r"checkpoint-5000", "checkpoint-5"),
    (r"^(fusedit edit --ui .*)", r"timeout --preserve-status -s INT 30 \1"),
]
SMALLER = {  # of the recipe; all else of it stays
    "resolution = 256": "resolution = 32",
    "max_resize = 288": "max_resize = 36",
    "train_batch_size = 32": "train_batch_size = 2",
    "gradient_accumulation_steps = 4": "gradient_accumulation_steps = 2",
    "max_train_steps = 10_000": "max_train_steps = 10",
    "[data]": "[data]\nheld_out = 2",
    "[loop]": "[output]\ncheckpointing_steps = 5\n\n[loop]",
}


def blocks() -> list[str]:
    found = [
        block
        for name in DOCUMENTS
        for block in re.findall(r"^```bash\n(.*?)^```", TEXT[name], re.DOTALL | re.MULTILINE)
    ]
    return [block for block in found if not block.startswith(tuple(ELSEWHERE))]


def save_pairs(folder: Path, count: int) -> None:
    """In the paper's own layout, with captions."""
    save_tiny_dataset(folder, count, size=(40, 36))
    for row in range(count):
        name = f"{row:07}"
        (folder / name).mkdir()
        words = {"edit": f"add {row}", "input": f"noise {row}", "output": f"changed {row}"}
        (folder / name / "prompt.json").write_text(json.dumps(words))
        for end, of in (("0", "input"), ("1", "edited")):
            with Pictures.open(folder / f"{row:03}_{of}.png") as picture:
                picture.save(folder / name / f"{row}_{end}.jpg")
            (folder / f"{row:03}_{of}.png").unlink()
    (folder / "metadata.jsonl").unlink()
    (folder / "seeds.json").write_text(
        json.dumps([[f"{row:07}", [str(row)]] for row in range(count)])
    )


def save_table(
    folder: Path, split: str, count: int, source: str, target: str, **texts: str
) -> None:
    """A parquet file with columns of such names, as on the hub."""
    images = save_tiny_dataset(folder.with_name("images"), count, size=(40, 36))
    of = {source: "input", target: "edited"}
    columns = {
        column: [
            {"bytes": (images / f"{row:03}_{name}.png").read_bytes(), "path": None}
            for row in range(count)
        ]
        for column, name in of.items()
    }
    columns |= {column: [f"{text} {row}" for row in range(count)] for column, text in texts.items()}
    table = Dataset.from_dict(columns)
    for column in of:
        table = table.cast_column(column, Image())
    folder.mkdir(parents=True)
    table.to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which all that the documents name is there, and a run `runs/paper`."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_pipeline(folder / BASE)
    eighths = AutoencoderKL(  # sides as Stable Diffusion's has them: some protocols want 512 px
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    )
    eighths.save_pretrained(folder / BASE / "vae")
    save_pairs(folder / "pairs", 8)
    hub = folder / "fusing/instructpix2pix-1000-samples"
    save_table(hub, "train", 8, "input_image", "edited_image", edit_prompt="red")
    brush = folder / "magicbrush-test"
    save_table(brush, "test", 2, "source_img", "target_img", instruction="red", caption="a")
    save_clip(folder / "clip-vit-large-patch14")
    save_clip(folder / "openai/clip-vit-base-patch32")
    save_dino(folder / "facebook/dino-vits16")
    save_tiny_dataset(folder / "photos", 2)
    (folder / "photos/metadata.jsonl").unlink()
    shutil.copy(folder / "photos/000_input.png", folder / "photo.png")
    with Pictures.open(folder / "photo.png") as picture:
        picture.save(folder / "photo.jpg")
    line = {"image": "photo.jpg", "instruction": "make it red"}
    (folder / "edits.jsonl").write_text(json.dumps(line) + "\n")

    recipe = (ROOT / "launch/recipes/paper.toml").read_text()
    for large, small in SMALLER.items():
        assert large in recipe
        recipe = recipe.replace(large, small)
    (folder / "launch/recipes").mkdir(parents=True)
    (folder / "launch/recipes/paper.toml").write_text(recipe)
    run_block(
        folder,
        "fusedit train --config launch/recipes/paper.toml --train_data_dir pairs "
        "--output_dir runs/paper\ncp runs/paper/run.toml .",
    )
    return folder


def run_block(folder: Path, block: str) -> str:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    script = block.replace("\\\n", " ")
    for what, instead in INSTEAD:
        script = re.sub(what, instead.replace("{port}", str(port)), script, flags=re.MULTILINE)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        ["bash", "-euxc", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", blocks())
def test_a_block_of_commands_runs(block, world, tmp_path):
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    run_block(tmp_path / "world", block)


def test_what_is_run_elsewhere_is_a_block():
    for start in ELSEWHERE:
        assert any(
            re.search(rf"^```bash\n{re.escape(start)}", text, re.M) for text in TEXT.values()
        )


def test_what_is_replaced_is_there():
    commands = "\n".join(blocks()).replace("\\\n", " ")
    assert not [what for what, _ in INSTEAD if not re.search(what, commands, re.MULTILINE)]
