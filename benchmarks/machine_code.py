"""What one launch compiles to: built ahead of time, its machine code read, kept as JSON.

Triton brings `ptxas` for every card and `cuobjdump`; a GPU is not asked.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import triton
from triton import knobs
from triton.compiler import ASTSource
from triton.errors import TritonError

from ..kernels.tables import FAMILIES
from .captured import Launch, target

VERSION = triton.__version__.partition("+")[0]
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MMA = re.compile(r"[A-Z]+MMA$")  # HMMA; HGMMA on Hopper; UTCHMMA on Blackwell


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One compiled launch. Accesses are counted in the code, by bits: {"128": 2, "16": 1}."""

    kernel: str
    arguments: str
    configuration: str
    registers: int = 0  # a thread
    local_bytes: int = 0  # a thread; what does not fit in registers
    spills: int = 0  # instructions that read or write local memory
    shared_bytes: int = 0
    instructions: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    mma: dict[str, int] = field(default_factory=dict)  # matrix products by shape and types
    error: str = ""  # the compiler's, when it gave up

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.arguments, self.configuration


def build(family: str, launch: Launch) -> Record:
    """Compiles one launch and reads its machine code."""
    kernel = getattr(import_module(launch.module), launch.function)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    names = dict(zip(("kernel", "arguments", "configuration"), launch.key, strict=True))
    try:
        compiled = triton.compile(source, target=target(family), options=launch.options)
    except (TritonError, RuntimeError) as error:  # Triton's own, and its passes'
        return Record(**names, error=(str(error).strip() or repr(error)).splitlines()[-1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Record(**names, **read(text, dynamic_shared_bytes=compiled.metadata.shared))


def read(text: str, dynamic_shared_bytes: int) -> dict:
    """The numbers of a Record from what `cuobjdump -res-usage -sass` prints."""
    used = [[int(number) for number in found] for found in RESOURCES.findall(text)]
    registers, stack, shared, local = (max(column) for column in zip(*used, strict=True))
    codes = [code.split(".") for code in INSTRUCTION.findall(text)]
    return {
        "registers": registers,
        "local_bytes": stack + local,
        "spills": sum(code[0] in ("LDL", "STL") for code in codes),
        "shared_bytes": shared + dynamic_shared_bytes,
        "instructions": sum(code[0] != "NOP" for code in codes),  # NOPs fill up the end
        "loads": _counted(_bits(c) for c in codes if c[0] in ("LDG", "LDGSTS", "UTMALDG")),
        "stores": _counted(_bits(c) for c in codes if c[0] in ("STG", "UTMASTG")),
        "mma": _counted(".".join(code) for code in codes if MMA.match(code[0])),
    }


def _bits(code: list[str]) -> str:
    """Of one access by one thread: LDG.E.128 128, LDG.E 32, LDG.E.U16 16; tensor copies "bulk"."""
    if code[0].startswith("UTMA"):
        return "bulk"
    sizes = [part.lstrip("US") for part in code[1:]]
    return next((size for size in sizes if size in ("256", "128", "64", "16", "8")), "32")


def _counted(items: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(items).items()))


def load(path: Path) -> dict[str, list[Record]] | None:
    """Family -> records; None without a file."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())["families"]
    return {family: [Record(**one) for one in records] for family, records in content.items()}


def dump(path: Path, origin: dict, records: dict[str, list[Record]]) -> None:
    """A line for each launch, sorted, so that a difference shows what changed."""
    lines = []
    for family in sorted(records, key=FAMILIES.index):
        listed = [
            json.dumps({name: value for name, value in asdict(one).items() if value})
            for one in sorted(records[family], key=lambda one: one.key)
        ]
        lines.append(f'    "{family}": [\n      ' + ",\n      ".join(listed) + "\n    ]")
    head = f'  "triton": "{VERSION}",\n  "origin": {json.dumps(origin)},\n'
    body = ",\n".join(lines)
    path.write_text(f'{{\n{head}  "families": {{\n{body}\n  }}\n}}\n')
