"""What kernels/README.md says is so: its Python runs, its ops, tables, files and flags exist."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fusedit.benchmarks.ops import OPS
from fusedit.kernels.tables import FAMILIES
from fusedit.kernels.unet import Fused

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "kernels/README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
ROWS = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)\.py` \|", TEXT, re.MULTILINE)
# Imported before the kernels are exchanged for interpreted ones, so that they are put back after.
MODULES = {
    path.stem: importlib.import_module(f"fusedit.kernels.{path.stem}")
    for path in (ROOT / "kernels").glob("*.py")
}


def test_every_python_block_runs_in_order(device, launches):
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).to(device)  # fmt: skip
    loss = torch.stack([parameter.square().sum() for parameter in unet.parameters()]).sum()
    names: dict = {"unet": unet, "loss": loss}
    for block in BLOCKS:
        exec(compile(block, "kernels/README.md", "exec"), names)
    assert any(isinstance(module, Fused) for module in unet.modules())
    assert {"whole_kernel", "backward_whole_kernel", "_kernel"} <= {*launches}
    assert all(value == "layer_norm was not asked for" for value in names["report"].left.values())


@pytest.mark.parametrize(("op", "module"), ROWS)
def test_an_op_of_the_table_is_there_with_its_definition(op, module):
    assert callable(getattr(MODULES[module], op))
    assert op == "AdamWEma" or callable(getattr(MODULES[module], f"{op}_reference"))


def test_the_table_of_ops_is_whole():
    assert {op for op, _ in ROWS} == {*OPS, "AdamWEma"}


def test_tables_paths_and_flags_that_are_named_exist():
    assert set(re.findall(r"`tables/(\w+)\.json`", TEXT)) == {*FAMILIES, "attention"}
    paths = set(re.findall(r"(?<![\w/.-])(?:kernels|tests|benchmarks)/[\w./-]+\w", TEXT))
    paths = {path for path in paths if "NAME" not in path and "/results/" not in path}
    assert not [path for path in paths if not (ROOT / path).exists()]
    modules = set(re.findall(r"-m (fusedit(?:\.\w+)+)", TEXT))
    sources = [Path(importlib.import_module(name).__file__ or "") for name in modules]
    taken = {flag for source in sources for flag in re.findall(r"--\w+", source.read_text())}
    assert set(re.findall(r"(?<![\w-])--\w+", TEXT)) <= taken
