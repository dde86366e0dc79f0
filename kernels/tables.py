"""Block shapes and warps of each kernel, by GPU family, from committed tables: no autotuning.

`tables/sm_90.json` maps a kernel's name to its entries. The first entry whose bounds hold for the
sizes at hand is taken: {"up_to": {"width": 512}, "BLOCK": 512, "num_warps": 4}. The last entry of
a kernel has no bounds. `python -m fusedit.benchmarks.kernels --tune` writes a table on a GPU; its
"measured" says on which card and commit, or is null where nobody has measured yet.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tables"
FAMILIES = ("sm_80", "sm_90", "sm_100")  # Ampere and what has its products; Hopper; Blackwell


def pick(kernel: str, device: torch.device, **sizes: int) -> dict[str, Any]:
    """The keyword arguments to launch a kernel with: its constexpr blocks and num_warps.

    Args:
        kernel: as named in the tables, "geglu.forward".
        sizes: what the entries' bounds speak of.
    """
    for entry in entries(family(device))[kernel]:
        if all(sizes[name] <= bound for name, bound in entry.get("up_to", {}).items()):
            return {name: value for name, value in entry.items() if name != "up_to"}
    raise LookupError(f"tables/{family(device)}.json has no entry of {kernel} for {sizes}")


@cache
def entries(of_family: str) -> dict[str, list[dict]]:
    return json.loads((FOLDER / f"{of_family}.json").read_text())["kernels"]


@cache
def family(device: torch.device) -> str:
    """Which table serves a device; off the GPU, where kernels are interpreted, Hopper's.

    Blackwell's cards of 12.0 have Ampere's matrix products and little shared memory.
    """
    if device.type != "cuda":
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_90" if major == 9 else "sm_100" if major in (10, 11) else "sm_80"
