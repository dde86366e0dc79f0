"""GPU types, for predictions: memory, dense products and memory speed."""

import difflib
import re
from typing import NamedTuple

from .errors import UsageError


class Gpu(NamedTuple):
    """One card, by its vendor's sheet. What of it is reached, the estimate says."""

    name: str
    memory_mib: int  # as nvidia-smi shows it: what error correction takes is off
    half_tflops: float  # dense, bf16 (fp16 on a card without), summed in fp32
    tf32_tflops: float
    fp32_tflops: float
    gb_per_s: float  # of its memory
    has_bf16: bool = True


GPUS = {
    "b200": Gpu("B200", 183359, 2250, 1125, 75, 8000),
    "h200": Gpu("H200", 143771, 989, 495, 67, 4800),
    "h100": Gpu("H100 SXM", 81559, 989, 495, 67, 3350),
    "a100-80": Gpu("A100 SXM 80 GB", 81920, 312, 156, 19.5, 2039),
    "a100-40": Gpu("A100 SXM 40 GB", 40960, 312, 156, 19.5, 1555),
    "l40s": Gpu("L40S", 46068, 362, 183, 91.6, 864),
    "l4": Gpu("L4", 23034, 121, 60, 30.3, 300),
    "a10": Gpu("A10", 23028, 125, 62.5, 31.2, 600),
    "rtx4090": Gpu("GeForce RTX 4090", 24564, 165, 82.6, 82.6, 1008),
    "rtx4080": Gpu("GeForce RTX 4080", 16376, 97.5, 48.7, 48.7, 717),
    "rtx3090": Gpu("GeForce RTX 3090", 24576, 71, 35.6, 35.6, 936),
    "t4": Gpu("T4", 15360, 65, 8.1, 8.1, 320, has_bf16=False),
}


def gpu_named(key: str) -> Gpu:
    """A type of GPUS.

    Raises: UsageError: there is none of this name; the message lists them.
    """
    if key.lower() not in GPUS:
        nearest = difflib.get_close_matches(key.lower(), GPUS, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise UsageError(f"--gpu {key} is not known{hint}; there are {', '.join(GPUS)}")
    return GPUS[key.lower()]


def gpu_of_device(name: str, memory_bytes: int) -> str | None:
    """The type of a card, by the name and memory PyTorch gives; None where it is not in GPUS."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower())
    for key, gpu in GPUS.items():
        marks = key.replace("rtx", "rtx ").split("-")[0]  # "NVIDIA GeForce RTX 4090"
        alike = 0.9 < memory_bytes / (gpu.memory_mib * 2**20) < 1.1
        if re.search(rf"\b{marks}\b", words) and alike:
            return key
    return None
