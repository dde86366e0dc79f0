"""The parts of gpu.sh that have no module of their own.

    python -m fusedit.benchmarks.gpu ceilings --out DIR   # what the card does at best, as found
    python -m fusedit.benchmarks.gpu tests --out DIR      # TESTS on the real device
    python -m fusedit.benchmarks.gpu checks --out DIR     # every op compiled, captured, run twice

Each writes DIR/PART.json. Exit codes: 0 done, 1 something failed, 2 a mistake in the flags.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch
import torch._dynamo

from . import harness, report
from .accuracy import Inputs, as_tuple
from .directions import FAILURES, told
from .flags import Flags, positive
from .harness import ROOT, Record, say
from .ops import OPS, Case, cases
from .shapes import TEXT_TOKENS
from .timing import Timer, ceilings

TRAINER_TESTS = ("captured", "compiled", "masters", "no_sync")
TESTS = ("tests/kernels", *(f"tests/trainer/test_{name}.py" for name in TRAINER_TESTS))
PYTEST_PROCESSES = 6  # each compiles the kernels it meets; compiling is most of the time
PRESET, BATCH, DTYPE = "sd15-256", 2, "bf16"  # of the checks
BARS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of compiled against eager, over the largest


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = Flags("fusedit.benchmarks.gpu", str(__doc__))
    flags.add_argument("part", choices=list(PARTS))
    flags.add_record()
    flags.add_argument("--limit_s", type=positive, default=200, help="of the tests")
    chosen = flags.parse_args(argv)
    if chosen.part != "tests" and not torch.cuda.is_available():
        flags.error(f"part {chosen.part}: there is no GPU here; run it where there is one")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    record = harness.new_record("gpu", words, flags.commit)
    record["benchmark"] = flags.part
    PARTS[flags.part](record, flags)
    return report.finish(record, flags.out / f"{flags.part}.json", flags.compare)


def find_ceilings(record: Record, flags: argparse.Namespace) -> None:
    device = torch.device("cuda")
    record["ceilings"] = ceilings(Timer(device), device)


def run_tests(record: Record, flags: argparse.Namespace) -> None:
    """pytest, with a row for the sum and one for each test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "--timeout=120"]
        command += ["-n", str(PYTEST_PROCESSES)] if find_spec("xdist") else []
        command += [f"--junitxml={results}", "--tb=short", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=flags.limit_s, stdin=subprocess.DEVNULL
            )
            note = "" if done.returncode in (0, 1) else f"pytest ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            note = f"stopped at --limit_s {flags.limit_s}"
        record["rows"] = test_rows(results.read_text() if results.exists() else None, note)


def test_rows(xml: str | None, note: str) -> list[Record]:
    """From JUnit's XML; without any, what is known is the note."""
    labels: dict[str, str | int] = {"part": "tests"}
    if xml is None:
        return [harness.row(labels, verdict="failed", note=note or "no results")]
    tests = list(ElementTree.fromstring(xml).iter("testcase"))
    bad = [
        (test, kind)
        for test in tests
        for kind in ("failure", "error")
        if test.find(kind) is not None
    ]
    values = {
        "passed": len({id(t) for t in tests} - {id(t) for t, _ in bad})
        - sum(test.find("skipped") is not None for test in tests),
        "failed": len(bad),
        "skipped": sum(test.find("skipped") is not None for test in tests),
        "seconds": sum(float(test.get("time", 0)) for test in tests),
    }
    verdict = "failed" if bad or note else "right"
    rows = [harness.row(labels, verdict=verdict, values=values, note=note)]
    for test, kind in bad:
        found = test.find(kind)
        message = (found.get("message") or "").splitlines() if found is not None else []
        name = f"{test.get('classname')}::{test.get('name')}"
        told = message[0][:200] if message else ""
        rows.append(harness.row({"part": "tests", kind: name}, verdict="failed", note=told))
    return rows


def run_checks(record: Record, flags: argparse.Namespace) -> None:
    """Each op at its heaviest shape: the same twice, in a graph, and under torch.compile."""
    for case in checked():
        for check in (same_twice, captured, compiled):
            say(f"{check.__name__} {' '.join(map(str, case.labels.values()))}")
            labels = {"check": check.__name__, **case.labels}
            try:
                note = check(case)
                verdict = "wrong" if note else "right"
            except FAILURES as failure:
                verdict, note = "failed", told(failure)
                torch.cuda.synchronize()  # raises, if the GPU itself is lost
            record["rows"].append(harness.row(labels, verdict=verdict, note=note))


def checked() -> Iterator[Case]:
    """The heaviest shape of each op; of attention that over text too, which has its own kernels."""
    for name in OPS:
        every = list(cases([name], [PRESET], BATCH, DTYPE))
        over_text = [case for case in every if getattr(case.shape, "keys", 0) == TEXT_TOKENS]
        yield from dict.fromkeys([every[0], *over_text[:1]])


def same_twice(case: Case) -> str:
    """What differs between two runs on the same inputs."""
    inputs = case.inputs("cuda")
    ours = case.bind(case.op.ours)
    run = runner(ours, inputs, gradients_of(ours, inputs))
    return difference(run(), run())


def captured(case: Case) -> str:
    """What differs between a graph, replayed on inputs it was not captured with, and eager."""
    inputs = case.inputs("cuda")
    ours = case.bind(case.op.ours)
    run = runner(ours, inputs, gradients_of(ours, inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        with torch.cuda.graph(graph, stream=stream):
            results = run()
        with torch.no_grad():
            for name, fresh in case.inputs("cuda").items():
                inputs[name].copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        told = difference(results, run())
    torch.cuda.synchronize()
    return told


def compiled(case: Case) -> str:
    """What differs between the op inside a compiled function, whole, and the same eagerly."""
    torch._dynamo.reset()
    inputs = case.inputs("cuda")
    function = case.bind(case.op.ours)

    def around(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value * 2 for value in as_tuple(function(**inputs)))

    gradients = gradients_of(around, inputs)
    expected = runner(around, inputs, gradients)()
    whole = torch.compile(around, fullgraph=True, dynamic=False)
    results = runner(whole, inputs, gradients)()
    for index, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        bar = BARS.get(ours.dtype, 1e-2) * float(theirs.abs().max())
        if not float((ours.float() - theirs.float()).abs().max()) <= bar:
            return f"tensor {index} differs by more than {bar:.3g}"
    return ""


Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def gradients_of(function: Function, inputs: Inputs) -> list[torch.Tensor]:
    """Random output gradients."""
    with torch.no_grad():
        return [torch.randn_like(value) for value in as_tuple(function(**inputs))]


def runner(
    function: Function, inputs: Inputs, gradients: list[torch.Tensor]
) -> Callable[[], list[torch.Tensor]]:
    """Outputs, then gradients."""
    leaves = [value for value in inputs.values() if value.requires_grad]

    def run() -> list[torch.Tensor]:
        outputs = as_tuple(function(**inputs))
        results = [value.detach() for value in outputs]
        if leaves:
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
            results += torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])
        return results

    return run


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> str:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(one, other):
            return f"tensor {index} differs"
    return ""


PARTS = {"ceilings": find_ceilings, "tests": run_tests, "checks": run_checks}

if __name__ == "__main__":
    sys.exit(main())
