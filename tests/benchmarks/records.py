"""Records as a GPU would have them, made up; and what a command says of a mistake."""

from collections.abc import Callable, Sequence

import pytest

from fusedit.benchmarks import harness
from fusedit.benchmarks.harness import Record, Timing

CEILINGS = {
    "copy_bytes_per_s": 3e12,
    "bf16_flops_per_s": 8e14,
    "graph_launch_us": 1.5,
    "noise": 0.01,
    "sm_clock_mhz": None,
}


def timing(median_ms: float, spread: float = 0.01) -> Timing:
    return Timing(median_ms, median_ms * (1 - spread), median_ms * (1 + spread), 20)


def row(by: str = "ours", median_ms: float = 1.0, *, verdict: str = "right", **labels) -> Record:
    named = {"op": "geglu", "preset": "sd15-512", "shape": "32x4096x2560", "dtype": "bf16"}
    named |= {"direction": "forward", **labels, "by": by}
    times = {"graph": timing(median_ms), "cold": timing(2 * median_ms)}
    return harness.row(
        named,
        verdict=verdict,
        timings=times if verdict == "right" else None,
        least_bytes=10**9,
        error=0.5,
        values={"times": 5},
    )


def attention_row(
    by: str,
    median_ms: float,
    direction: str,
    *,
    flops: int | None = 10**12,
    verdict: str = "right",
    **labels,
) -> Record:
    """Of a graph alone, as gpu.sh measures it."""
    named = {"op": "attention", "preset": "sd15-512", "shape": "32x4096x8x40+4096keys"}
    named |= {"dtype": "bf16", "direction": direction, **labels, "by": by}
    times = {"graph": timing(median_ms)} if verdict == "right" else None
    return harness.row(named, verdict=verdict, timings=times, flops=flops, values={"times": 5})


def both_ways(by: str, forward_ms: float, backward_ms: float, **labels) -> list[Record]:
    flops = {"forward": 10**12, "backward": 25 * 10**11}
    return [
        attention_row(by, ms, way, flops=flops[way], **labels)
        for way, ms in (("forward", forward_ms), ("backward", backward_ms))
    ]


def record(*rows: Record, gpu: str | None = "Fake H100") -> Record:
    made = harness.new_record("kernels", ["--op", "geglu"])
    made["provenance"]["machine"] |= {"gpu": gpu, "family": "sm_90"} if gpu else {"gpu": None}
    made["rows"] = list(rows)
    made["ceilings"] = dict(CEILINGS)
    made["complete"] = True
    return made


def refusal(main: Callable, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which a benchmark's main ends, with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1), said
    assert said.startswith(f"{main.__module__}: ")
    return said
