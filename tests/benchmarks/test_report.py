import pytest
from records import record, row

from fusedit.benchmarks import report
from fusedit.benchmarks.harness import write

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
