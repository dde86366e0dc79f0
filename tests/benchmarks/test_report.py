import pytest
from records import both_ways, record, row

from fusedit.benchmarks import report
from fusedit.benchmarks.harness import read, write

BACK = {"direction": "backward"}


def three(*medians: float, **labels):
    return [
        row(by, ms, **labels) for by, ms in zip(("ours", "compile", "eager"), medians, strict=True)
    ]


def test_the_table_has_times_bandwidth_and_share():
    text = report.markdown(record(*three(0.5, 1.0, 2.0)))
    line = next(line for line in text.splitlines() if line.startswith("| geglu | sd15-512"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[5:8] == ["0.5", "1", "2"]
    assert cells[8:] == ["1.0", "1", "-", "2000", "67%"]  # 1 GB in 0.5 ms; 2 of 3 TB/s
    assert "copy 3.00 TB/s" in text


def test_a_step_is_the_sum_of_its_shapes_as_often_as_they_occur():
    text = report.markdown(record(*three(0.5, 1.0, 2.0), *three(1.0, 2.0, 4.0, **BACK)))
    assert "| sd15-512 | geglu | 1 | 7.5 | 15 | 30 | 4.00 |" in text


def test_what_is_wrong_is_told_apart_from_the_times():
    bad = row(verdict="wrong", shape="1x1")
    bad["note"] = "output 0: not finite"
    text = report.markdown(record(bad, *three(1.0, 1.0, 1.0)))
    assert "| wrong | 50% | times 5 | output 0: not finite |" in text


def test_a_record_without_rows_has_a_heading():
    assert report.markdown(record(gpu=None)).startswith("# kernels\n")


@pytest.mark.parametrize(("verdict", "code"), [("right", 0), ("wrong", 1), ("failed", 1)])
def test_a_benchmark_ends_with_its_record_and_code(verdict, code, tmp_path, capsys):
    made = record(row(), row(verdict=verdict, shape="1x1")) | {"complete": False}
    assert report.finish(made, tmp_path / "new" / "a.json") == code
    written = read(tmp_path / "new" / "a.json")
    assert written["complete"]
    assert capsys.readouterr().out == report.markdown(written) + "\n"


def test_share_needs_a_time_bytes_and_a_ceiling():
    made = record(row())
    assert report.share(made["rows"][0], made["ceilings"]) == pytest.approx(1 / 3)
    assert report.share(made["rows"][0], None) is None
    assert report.share(row(verdict="wrong"), made["ceilings"]) is None


def test_the_plot_is_a_png(tmp_path):
    path = tmp_path / "kernels.png"
    made = record(*three(0.5, 1.0, 2.0), *three(1.0, 2.0, 4.0, **BACK), *three(1, 2, 3, op="norm"))
    assert report.plot(made, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_there_is_no_plot_where_nothing_was_timed(tmp_path):
    assert not report.plot(record(row(verdict="wrong")), tmp_path / "kernels.png")
    assert not list(tmp_path.iterdir())


def test_files_get_their_table_and_plot_beside_them(tmp_path, capsys):
    write(record(*three(0.5, 1.0, 2.0)), tmp_path / "kernels.json")
    assert report.main([str(tmp_path / "kernels.json")]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png"]
    assert report.main([str(tmp_path / "kernels.json"), "--print"]) == 0
    assert (tmp_path / "kernels.md").read_text() in capsys.readouterr().out


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.split("|")[1:-1]]


ATTENTION = [
    *both_ways("ours", 2.0, 5.0),  # 1 and 2.5 TFLOP
    *both_ways("eager", 4.0, 10.0),
    *both_ways("sdpa-cudnn", 1.0, 9.8),  # faster forward, and less than eager together
    *both_ways("flex", 5.0, 5.5),
    *both_ways("flash-attn", 1.0, 1.0),  # not PyTorch's
    *both_ways("compile", 1.0, 1.0),
]


def test_attention_is_compared_with_the_best_that_pytorch_ships():
    text = report.markdown(record(*ATTENTION))
    found = cells(text, "| attention | sd15-512 | 32x4096x8x40+4096keys | bf16 | flex")
    assert found[5:] == ["500, 200", "500, 455", "500, 333", "1.50"]


def test_an_implementation_that_has_no_backward_is_not_the_best():
    rows = [*both_ways("ours", 2.0, 5.0), *both_ways("eager", 4.0, 10.0)]
    failed = both_ways("sdpa-flash", 1.0, 1.0, verdict="failed")
    text = report.markdown(record(*rows, *failed))
    assert cells(text, "| attention | sd15-512")[4] == "eager"
    assert "ours / best" not in report.markdown(record(*rows[1:]))


def test_attention_has_a_table_of_its_own_in_operations():
    text = report.markdown(record(*ATTENTION, *three(0.5, 1.0, 2.0)))
    heads = [line for line in text.splitlines() if line.startswith("| op | preset | shape | dtype")]
    assert len(heads) == 3
    assert heads[1].endswith("| TFLOP/s | of product |")
    assert "flex ms" not in heads[2]
    forward = cells(text, "| attention | sd15-512 | 32x4096x8x40+4096keys | bf16 | forward")
    assert forward[-2:] == ["500", "62%"]  # of 800
    assert report.share(ATTENTION[0], record()["ceilings"]) == pytest.approx(500 / 800)


def test_a_step_of_what_was_not_compiled_is_ours_and_eagers():
    text = report.markdown(record(*both_ways("ours", 2.0, 5.0), *both_ways("eager", 4.0, 10.0)))
    assert "| sd15-512 | attention | 1 | 35 | 70 | 2.00 |" in text


def test_a_record_is_compared_with_an_earlier_one(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert report.finish(record(row(median_ms=1.0)), path, record(row(median_ms=1.01))) == 0
    assert read(path)["complete"]
    assert report.finish(record(row(median_ms=1.2)), path, record(row(median_ms=1.0))) == 1
    assert "1.2 ms, was 1 ms: 20% slower" in capsys.readouterr().err
    assert report.finish(record(row()), path, record(row(), gpu="Other")) == 2
    assert "--compare: measured on another machine: Other" in capsys.readouterr().err
