"""What guards the compiled form: each rule is broken once, and then our kernels are held to them.

The kernels are compiled in a process of their own, since here they are exchanged for interpreted
ones.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import samples

from fusedit.benchmarks import compiled
from fusedit.benchmarks.captured import Captured, Launch
from fusedit.benchmarks.compiled import coverage, findings, main, representatives
from fusedit.benchmarks.machine_code import Record, dump, load, read
from fusedit.kernels import tables

GOOD = Record(
    kernel="geglu._forward_kernel",
    arguments="*bf16:16 x2 i32:16 x3",
    configuration="ROWS=4 COLUMNS=256 num_warps=4",
    registers=100,
    shared_bytes=2048,
    instructions=400,
    loads={"128": 4, "16": 1},
    stores={"128": 2},
    mma={"HGMMA.64x64x16.F32.BF16": 2},
)


@pytest.fixture
def compiles(monkeypatch):
    """Triton's variable as it is outside of these tests."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def apart():
    """Calls a function of samples.py where Triton compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()


def whats(found) -> list[str]:
    return [one.what for one in found]


def test_a_launch_is_recorded_as_the_jit_would_specialize_it(apart):
    first, second = apart(samples.specialized)
    assert first.kernel == "samples.copy"
    assert first.arguments == "*bf16 *bf16:16 i32:16"
    assert first.configuration == "stride=1 BLOCK=64 num_warps=2"
    assert second.arguments == "*bf16:16 x2 i32 i64:16"
    assert second.configuration == "BLOCK=64"


def test_a_recorded_launch_does_not_run(apart):
    assert not apart(samples.not_run).any()


def test_equal_launches_are_recorded_once(apart):
    launches = list(apart(samples.repeated).launches.values())
    assert [one.arguments for one in launches] == ["*bf16:16 x2 i32:16", "*bf16:16 x2 i32"]
    assert representatives(launches) == launches[:1]
    assert representatives([launches[0]] * 7, 3) == [launches[0]] * 3  # of 0, 3 and 6


def test_lost_alignment_is_found(apart):
    good, bad = apart(samples.aligned_and_not)
    assert good.loads == {"128": 1}
    assert good.stores == {"128": 1}
    assert set(bad.loads) == {"16"}
    found = findings("sm_90", [bad], [replace(good, arguments=bad.arguments)])
    assert "16-byte loads lost" in whats(found)


def test_a_spill_is_found(apart):
    free, held = apart(samples.in_few_registers)
    assert whats(findings("sm_90", [free], None)) == []
    assert held.registers <= 32
    assert held.local_bytes > 0
    assert held.spills > 0
    held = replace(held, configuration=free.configuration)
    assert "spills" in whats(findings("sm_90", [held], [free]))


@pytest.mark.parametrize(
    ("family", "instruction"),
    [("sm_80", "HMMA.16816"), ("sm_90", "HGMMA.64x"), ("sm_100", "UTCHMMA")],
)
def test_matrix_products_and_shared_memory_are_read(family, instruction, apart):
    record = apart(samples.products, family)
    assert record.mma
    assert all(code.startswith(instruction) for code in record.mma)
    assert record.shared_bytes >= 2 * 64 * 64


def test_what_does_not_compile_is_found(apart):
    record = apart(samples.uncompilable)
    assert whats(findings("sm_90", [record], [])) == ["does not compile"]


def test_code_is_counted():
    text = """
 Function _kernel:
  REG:40 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:576 TEXTURE:0
    code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000e220000000800 */
        /*0010*/               @P0 LDG.E.128 R4, desc[UR6][R12.64] ;
        /*0020*/              @!P1 LDG.E.ENL2.256 R4, R8, desc[UR6][R12.64] ;
        /*0030*/             @!UPT LDGSTS.E.BYPASS.128 [R5], [R6.64] ;
        /*0040*/                   LDG.E.U16 R5, desc[UR6][R2.64] ;
        /*0050*/                   LDG.E R5, desc[UR6][R2.64] ;
        /*0060*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*0070*/                   STG.E.U8 desc[UR6][R2.64], R4 ;
        /*0080*/                   LDL.64 R4, [R1+0x8] ;
        /*0090*/               @P2 STL [R1], R4 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*00b0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   NOP;
"""
    assert read(text, dynamic_shared_bytes=512) == {
        "registers": 40,
        "local_bytes": 24,
        "spills": 2,
        "shared_bytes": 1536,
        "instructions": 13,
        "loads": {"128": 2, "16": 1, "256": 1, "32": 1, "bulk": 1},
        "stores": {"64": 1, "8": 1},
        "mma": {"HMMA.16816.F32.BF16": 1},
    }


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"local_bytes": 8}, "spills"),
        ({"spills": 1}, "spills"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory"),
        ({"error": "no"}, "does not compile"),
        ({"loads": {"128": 3, "64": 2, "16": 1}}, "16-byte loads lost"),
        ({"loads": {}}, "16-byte loads lost"),
        ({"stores": {"128": 1, "64": 2}}, "16-byte stores lost"),
        ({"mma": {"HMMA.16816.F32.BF16": 16}}, "matrix instructions"),
        ({"mma": {}}, "matrix instructions"),
        ({"registers": 121}, "registers"),
        ({"instructions": 501}, "instructions"),
        ({"configuration": "ROWS=8"}, "is not recorded"),
    ],
    ids=str,
)
def test_each_rule_finds_its_breach(change, what):
    (found,) = findings("sm_90", [replace(GOOD, **change)], [GOOD])
    assert (found.family, found.kernel, found.what) == ("sm_90", GOOD.kernel, what)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"registers": 120, "instructions": 500, "shared_bytes": 227 * 1024},  # at the margins
        {"registers": 10, "instructions": 40, "shared_bytes": 0},
        {"loads": {"128": 5}, "stores": {"128": 3}},
        {"loads": {"256": 2}, "stores": {"256": 1}},  # 32 bytes are twice 16
        {"mma": {"HGMMA.64x64x16.F32.BF16": 4}},
    ],
    ids=str,
)
def test_no_rule_finds_a_breach_where_there_is_none(change):
    assert not findings("sm_90", [replace(GOOD, **change)], [GOOD])


def test_few_registers_may_grow_by_sixteen():
    few = replace(GOOD, registers=20)
    assert not findings("sm_90", [replace(few, registers=36)], [few])
    assert whats(findings("sm_90", [replace(few, registers=37)], [few])) == ["registers"]


def test_families_have_their_own_shared_memory():
    big = replace(GOOD, shared_bytes=200 * 1024)
    assert whats(findings("sm_80", [big], None)) == ["shared memory"]
    assert not findings("sm_90", [big], None)


def test_without_a_record_of_the_version_the_other_rules_hold():
    assert not findings("sm_90", [GOOD], None)
    assert whats(findings("sm_90", [replace(GOOD, spills=1)], None)) == ["spills"]


@pytest.fixture
def two_entries(monkeypatch):
    listed = [{"up_to": {"width": 8}, "BLOCK": 8}, {"BLOCK": 16}]
    monkeypatch.setattr(tables, "entries", lambda family: {"copy.forward": listed})


def test_a_table_entry_that_nothing_launches_is_found(two_entries):
    record = Captured(picked={("copy.forward", (("BLOCK", 8),))})
    (found,) = coverage("sm_90", record, None)
    assert (found.kernel, found.launch) == ("copy.forward", "{'BLOCK': 16}")
    record.picked.add(("copy.forward", (("BLOCK", 16),)))
    assert not coverage("sm_90", record, None)


def test_a_record_that_nothing_launches_is_found(two_entries):
    assert "is not launched" in whats(coverage("sm_90", Captured(), [GOOD]))


def test_records_are_read_back_as_written(tmp_path):
    path = tmp_path / "compiled.json"
    assert load(path) is None
    records = {"sm_80": [GOOD, replace(GOOD, mma={}, configuration="B")], "sm_100": [GOOD]}
    dump(path, {"commit": "c"}, records)
    assert load(path) == {
        family: sorted(listed, key=lambda one: one.key) for family, listed in records.items()
    }
    assert len(path.read_text().splitlines()) == 13  # a launch a line


@pytest.fixture
def run(monkeypatch, tmp_path, compiles):
    """main() over a kernel that compiles to the given record, with a file of its own."""
    monkeypatch.setattr(compiled, "COMMITTED", tmp_path / "committed.json")
    launch = Launch("samples", "copy", {"source": "*bf16"}, {}, {}, {"num_warps": 4})
    monkeypatch.setattr(compiled, "captured", lambda *_: Captured({launch.key: launch}))
    monkeypatch.setattr(tables, "entries", lambda family: {})
    now = replace(
        GOOD,
        kernel=launch.kernel,
        arguments=launch.arguments,
        configuration=launch.configuration,
    )

    def run(*arguments, **change):
        def build_all(jobs):
            return [replace(now, **change) for _ in jobs]

        monkeypatch.setattr(compiled, "build_all", build_all)
        return main(arguments)

    return run


def test_it_writes_compares_and_tells_what_changed(run, capsys):
    assert run() == 0
    assert "nothing is committed for Triton" in capsys.readouterr().out
    assert run("--write", spills=3) == 1
    assert "3 findings; nothing is written" in capsys.readouterr().out  # one in each family
    assert not compiled.COMMITTED.exists()
    assert run("--write") == 0
    assert run() == 0
    assert "3 launches are as in committed.json" in capsys.readouterr().out
    assert run("--family", "sm_90", registers=130) == 1
    assert "sm_90   samples.copy  registers  100       130" in capsys.readouterr().out
    assert run("--write", "--family", "sm_90", registers=130) == 0
    assert run("--family", "sm_90", registers=130) == 0
    assert run("--family", "sm_80") == 0  # the other families' records are still there


def test_findings_are_given_as_json(run, tmp_path):
    path = tmp_path / "out.json"
    assert run("--family", "sm_90", "--json", str(path), spills=1) == 1
    assert '"what": "spills"' in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "sm_70"], "--family: invalid choice: 'sm_70'"),
        (["--op", "conv"], "--op: invalid choice: 'conv'"),
        (["--fast"], "there is no --fast"),
        (["--write", "--quick"], "--write records whole tables: leave out --quick and --op"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: its folder does not exist"),
    ],
    ids=str,
)
def test_a_bad_flag_is_told_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_it_refuses_to_run_interpreted(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def guard(*arguments: str) -> None:
    """Our kernels, by the command, as it runs from a shell."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusedit.benchmarks.compiled", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_our_kernels_compile_to_what_is_recorded():
    guard("--quick")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_launch_of_every_family_compiles_to_what_is_recorded():
    guard()


def test_what_is_recorded_rounds_bf16_moments_by_chance():
    # A dtype that went through pickle is equal to Triton's, not identical: a kernel that asked
    # with `is` was compiled without its random numbers, and Triton's cache then kept it.
    records = [
        record
        for record in load(compiled.COMMITTED)["sm_90"]
        if "EMAS=1 ALIGNED=True" in record.configuration and "COPY" in record.configuration
    ]
    instructions = {
        kind: [r.instructions for r in records if f"MOMENTS={kind}" in r.configuration]
        for kind in ("bf16", "fp32")
    }
    assert min(instructions["bf16"]) > 1.3 * max(instructions["fp32"])


@pytest.mark.parametrize(("family", "product"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_attention_is_recorded_with_the_familys_matrix_products_alone(family, product):
    recorded = [r for r in load(compiled.COMMITTED)[family] if "attention_kernels" in r.kernel]
    # The backward of 32 keys or fewer has too few rows for wgmma.
    few = re.compile(r"short_attention_kernels\.(sum_kernel|backward_kernel.* KEYS=(16|32) )")
    products = [r for r in recorded if not few.match(f"{r.kernel} {r.configuration}")]
    assert len(products) > 40
    for record in products:
        kinds = {of.partition(".")[0] for of in record.mma}
        assert kinds == {product}, f"{record.kernel} {record.configuration}: {record.mma}"
