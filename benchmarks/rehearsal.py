"""A benchmark at tiny size on a CPU, as `gpu.sh --rehearse` runs each part: nothing is measured.

    python -m fusedit.benchmarks.rehearsal kernels --op geglu --out runs/rehearsal

The flags are the benchmark's own, followed by those that make it small. What needs a GPU has a
stand-in (stand_in.py), its kernels run in Triton's interpreter, and times are the host's; sizes are
those of tiny.py. A record's GPU is called REHEARSAL: so it is compared with nothing else, and read
by a rehearsal alone.

Exit codes: the benchmark's; 2 too where --out holds what was measured.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

REHEARSAL = "none: a rehearsal, nothing is measured"  # in the place of a GPU's name
ON_GPU = ("gpu", "kernels", "optimizer", "update")  # with a stand-in for one
INTERPRETED = ("gpu", "kernels", "optimizer")
OTHERS = ("choose", "ledger", "data", "checkpoint", "edit", "scaling", "parity", "step")
NAME = "fusedit.benchmarks.rehearsal"


def mistake(words: Sequence[str]) -> str:
    """Why these words cannot be rehearsed; empty: they can."""
    known = (*ON_GPU, *OTHERS)
    if not words or words[0] not in known:
        return f"there is no rehearsal of {' '.join(words[:1])!r}; give one of {', '.join(known)}"
    if "--out" not in words[:-1]:
        return "--out is missing: give a folder of rehearsals"
    out = Path(words[words.index("--out") + 1])
    files = [out] if out.is_file() else sorted(out.glob("*.json"))
    measured = [path.name for path in files if REHEARSAL not in path.read_text()]
    if measured:
        return f"--out {out}: {measured[0]} was measured; give a folder of rehearsals"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    words = [*(sys.argv[1:] if argv is None else argv)]
    if told := mistake(words):
        print(f"{NAME}: {told}", file=sys.stderr)
        return 2
    name, *own = words
    if name in INTERPRETED:  # before anything imports Triton, which reads it then
        os.environ["TRITON_INTERPRET"] = "1"
    module = import_module(f"..{name}", NAME)
    from .tiny import flags_of, rehearsing

    with rehearsing(REHEARSAL, stand_in=name in ON_GPU):
        return module.main([*own, *flags_of(name, own)])


if __name__ == "__main__":
    sys.exit(main())
