"""What is read of a run's folder, in whatever state it is."""

import fcntl
import json
import threading
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fusedit.trainer import report_pictures
from fusedit.trainer.errors import UsageError
from fusedit.trainer.images import TILES
from fusedit.trainer.log import LOG_FILE, PHASES, Lines
from fusedit.trainer.output_lock import LOCK_FILE, OutputLock, is_held
from fusedit.trainer.report_charts import charts, curves, time_by_phase
from fusedit.trainer.report_pictures import MOST_SHEETS, Pictures
from fusedit.trainer.run_report import in_words, read_run
from fusedit.trainer.sample import grid, save_grid
from fusedit.trainer.series import Series, extent, smoothed, spread, thinned


def _line(step, **values):
    return {"step": step, "time": 1000.0 + step, "loss": 1 / step, **values}


def _write(folder, name, *lines, torn=""):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines) + torn)


def _started(step=0, total=100):
    return {"step": step, "time": 1000.0, "what": "started", "total_steps": total}


# The state.


def test_an_empty_folder_is_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "report.html").touch()  # of before
    told = read_run(tmp_path)
    assert (told["state"]["word"], told["charts"], told["headline"]) == ("not begun", [], [])


def test_a_run_that_holds_its_folder_is_running_and_tells_when_it_ends(tmp_path):
    _write(tmp_path, "history.jsonl", _started())
    _write(tmp_path, LOG_FILE, *(_line(step, images_per_second=8.0) for step in (10, 20)))
    with OutputLock(tmp_path) as lock:
        lock.take()
        told = read_run(tmp_path)
        assert told["state"] == {"word": "running", "detail": "", "step": 20, "total": 100}
        left = next(one for one in told["headline"] if one["label"] == "time left")
        assert left["value"] == "1 min 20 s"  # 80 steps, of a second each
        # It was stopped for a day: that day is none of its speed.
        _write(tmp_path, "history.jsonl", _started(), _started(20) | {"time": 87_000.0})
        later = [_line(step) | {"time": 87_000.0 + step} for step in (30, 40)]
        lines = [_line(10), _line(20), *later]
        _write(tmp_path, LOG_FILE, *({**line, "images_per_second": 8.0} for line in lines))
        left = next(one for one in read_run(tmp_path)["headline"] if one["label"] == "time left")
        assert left["value"] == "1 min 0 s"
    assert not is_held(tmp_path)


def test_looking_at_a_run_does_not_keep_another_from_starting(tmp_path):
    with OutputLock(tmp_path) as lock:
        lock.take()
        assert is_held(tmp_path)
    with (tmp_path / LOCK_FILE).open() as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        ended = threading.Timer(0.01, fcntl.flock, (looks, fcntl.LOCK_UN))
        ended.start()
        with OutputLock(tmp_path) as lock:
            lock.take()
        ended.join()


@pytest.mark.parametrize(
    ("last", "word", "detail"),
    [
        ("started", "stopped", "killed"),
        ("stopped", "stopped", "asked"),
        ("done", "finished", ""),
    ],
)
def test_how_a_run_ended(last, word, detail, tmp_path):
    _write(tmp_path, "history.jsonl", _started(), {"step": 20, "time": 1.0, "what": last})
    _write(tmp_path, LOG_FILE, _line(20))
    state = read_run(tmp_path)["state"]
    assert state["word"] == word
    assert detail in state["detail"]


def test_a_log_in_parts_with_a_torn_line_and_what_is_no_number(tmp_path):
    log = Lines(tmp_path / LOG_FILE, 0, part_bytes=200)
    for step in range(1, 21):
        log.add(_line(step))
    log.add({"step": 21, "time": 1021.0, "loss": None})
    log.close()
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": "x", "loss": 1}\n{"step": 22, "loss": NaN}\n[1]\n{"step": 23, "lo')
    (tmp_path / "quarantine.jsonl").write_text(
        '{"row": 3, "file": "a.png", "reason": "gone"}\n{"row'
    )
    assert len(list(tmp_path.glob("log-*.jsonl"))) > 2
    told = read_run(tmp_path)
    (loss,) = (chart for chart in told["charts"] if chart["title"] == "Loss")
    assert loss["series"][0]["steps"] == list(range(1, 21))
    assert told["skipped"] == [{"row": "3", "file": "a.png", "reason": "gone"}]
    json.dumps(told, allow_nan=False)


def test_settings_that_cannot_be_read_are_said_to_be(tmp_path):
    _write(tmp_path, LOG_FILE, _line(1))
    (tmp_path / "run.toml").write_text("[data]\nresolution = 'no'\n")
    told = read_run(tmp_path)
    assert told["settings"] == []
    assert "resolution must be int" in told["complaint"]
    (tmp_path / "run.toml").write_text("[data]\nresolution = 128\n")
    differing = [one["name"] for one in read_run(tmp_path)["settings"] if one["differs"]]
    assert differing == ["data.resolution"]


@pytest.mark.parametrize("name", ["missing", "other"])
def test_what_is_no_run_is_refused(name, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").touch()
    with pytest.raises(UsageError, match="give the --output_dir"):
        read_run(tmp_path / name)


def test_warnings_skipped_steps_and_the_best(tmp_path):
    event = {"step": 2, "time": 1.0, "event": "save failed", "told": "WARNING: not saved"}
    _write(tmp_path, LOG_FILE, _line(1), event)
    rows = list(range(40))
    _write(tmp_path, "audit.jsonl", {"step": 2, "what": "a spike", "applied": False, "rows": rows})
    (tmp_path / "best.json").write_text('{"step": 2, "by": "psnr", "values": {"2": 21.5}}')
    told = read_run(tmp_path)
    assert told["events"] == [{"step": 2, "time": 1.0, "text": "WARNING: not saved"}]
    assert told["audit"][0]["rows"].endswith("11 and 28 more")
    assert told["best"] == {"step": 2, "by": "psnr", "value": 21.5}
    assert {"best", "unusual steps"} <= {one["label"] for one in told["headline"]}


# The charts.


def test_no_peak_is_lost_by_thinning():
    values = [float(index % 10) for index in range(50_000)]
    values[12_345], values[40_000] = 1e3, -1e3
    series = thinned(Series(list(range(50_000)), values), 300)
    assert len(series.steps) <= 602
    assert {1e3, -1e3} <= {*series.values}
    assert (series.steps[0], series.steps[-1]) == (0, 49_999)
    assert series.steps == sorted(series.steps)


def test_few_outliers_do_not_stretch_a_chart():
    values = [1.0, 2.0] * 500
    values[500] = 1e6
    assert extent([Series(list(range(1000)), values)]) == (1.0, 2.0)


def test_the_trend_begins_as_the_mean_of_what_there_is():
    trend = smoothed(Series([1, 2, 3], [4.0, 2.0, 2.0]), window=1e9)
    assert trend.values == pytest.approx([4.0, 3.0, 8 / 3])
    assert smoothed(Series([1, 2], [4.0, 2.0]), window=1.0).values == [4.0, 2.0]


def test_what_is_spread_is_even_and_has_the_newest():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(100, 4) == [0, 33, 66, 99]
    assert spread(0, 4) == []


def test_each_key_of_the_log_is_in_a_chart_of_its_section():
    groups = {"loss_by_condition/full": 1.0, "loss_by_timestep/0-249": 2.0, "held_out/full": 3.0}
    rest = {"lr": 1.0, "grad_norm": 1.0, "images_per_second": 1.0, "memory_gib": 1.0}
    found = charts([_line(step, **groups, **rest) for step in (1, 2)])
    names = {one["name"] for chart in found for one in chart["series"]}
    assert names == {"loss", *groups, *rest}
    assert charts([{"step": 1, "loss": None}]) == []


def test_the_trade_off_has_both_similarities_of_each_guidance():
    line = {"step": 5, "eval/clip_direction_at_1": 0.1, "eval/clip_image_at_1": 0.9}
    line |= {"eval/clip_direction_at_2.2": 0.05, "eval/clip_image_at_2.2": 0.95}
    alone = {"step": 6, "eval/clip_image_at_1": 0.8}
    assert curves([line, alone]) == [
        {"step": 5, "points": [[1.0, 0.1, 0.9], [2.2, 0.05, 0.95]]},
    ]
    titles = {chart["title"]: len(chart["series"]) for chart in charts([line])}
    assert titles == {"CLIP direction": 2, "CLIP image": 2}


def test_the_time_of_all_phases_is_that_of_the_lines_and_the_end():
    lines = [_line(step, **{"seconds/update": 2.0, "seconds/data": 1.0}) for step in range(1, 101)]
    told = time_by_phase(lines, [{"step": 100, "what": "done", "seconds/update": 5.0}])
    assert told is not None
    seconds = {one["name"]: one["seconds"] for one in told["phases"]}
    assert seconds == {**dict.fromkeys(PHASES, 0.0), "data": 100.0, "update": 205.0}
    assert len(told["columns"]) == 60
    assert sum(column["seconds"][1] for column in told["columns"]) == 100.0
    assert time_by_phase([_line(1)], []) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3700, "1 h 1 min"), (180_000, "2 d 2 h")],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


# The pictures.


def _sheet(folder, step, colour):
    tiles = [Image.new("RGB", (140, 130), one) for one in ("red", colour, "blue")]
    sheet = grid(
        [tiles, [tiles[0], tiles[1], None]],
        ["make it <b>red</b>", ""],
        ("input", "edit", "truth"),
    )
    folder.mkdir(exist_ok=True)
    save_grid(sheet, folder / f"step-{step:06d}.png")


def test_a_sheet_is_cut_into_what_it_was_made_of(tmp_path):
    for step, colour in ((10, "lime"), (20, "black")):
        _sheet(tmp_path, step, colour)
    told = Pictures().read(tmp_path)
    assert [sheet["step"] for sheet in told["sheets"]] == [10, 20]
    first, second = told["sheets"][0]["pictures"]
    assert first["caption"] == "make it <b>red</b>"
    assert (second["truth"], second["input"]) == (None, first["input"])
    # red and blue once, and the edit of each sheet
    assert len(told["images"]) == 4


def test_few_of_many_sheets_are_shown_and_the_rest_is_counted(tmp_path):
    _sheet(tmp_path, 0, "lime")
    for step in range(1, 50):
        (tmp_path / f"step-{step:06d}.png").write_bytes((tmp_path / "step-000000.png").read_bytes())
    told = Pictures().read(tmp_path)
    assert len(told["sheets"]) == MOST_SHEETS
    assert told["left_out"] == 50 - MOST_SHEETS
    assert told["sheets"][-1]["step"] == 49


def test_only_what_is_shown_is_kept_while_a_run_is_watched(tmp_path):
    pictures = Pictures()
    for step in range(2 * MOST_SHEETS):
        _sheet(tmp_path, step, "lime")
        pictures.read(tmp_path)
    assert len(pictures.cut) == MOST_SHEETS


def test_a_sheet_that_would_take_all_memory_is_named(tmp_path):
    info = PngInfo()
    picture = {"boxes": {"input": [0, 0, 20_000, 20_000]}, "caption": "large"}
    info.add_text(TILES, json.dumps([picture]))
    Image.new("RGB", (4, 4)).save(tmp_path / "step-000001.png", pnginfo=info)
    assert Pictures().read(tmp_path)["damaged"][0].startswith("step-000001.png: ")


def test_a_sheet_is_cut_once_until_it_is_another(tmp_path, monkeypatch):
    _sheet(tmp_path, 1, "lime")
    pictures = Pictures()
    before = pictures.read(tmp_path)
    with monkeypatch.context() as without:
        without.setattr(report_pictures, "cut", None)
        assert pictures.read(tmp_path) == before
    _sheet(tmp_path, 1, "black")
    assert pictures.read(tmp_path) != before


@pytest.mark.parametrize("content", [b"", b"no picture", "plain"])
def test_a_damaged_sheet_is_named_and_the_others_are_shown(content, tmp_path):
    _sheet(tmp_path, 1, "lime")
    path = tmp_path / "step-000002.png"
    if content == "plain":
        Image.new("RGB", (9, 9)).save(path)
    else:
        path.write_bytes(content)
    told = Pictures().read(tmp_path)
    assert len(told["sheets"]) == 1
    assert told["damaged"][0].startswith("step-000002.png: ")


def test_twenty_thousand_lines_are_read_in_seconds(tmp_path):
    _write(tmp_path, LOG_FILE, *(_line(step, grad_norm=1.0) for step in range(1, 20_001)))
    since = time.perf_counter()
    told = read_run(tmp_path)
    assert time.perf_counter() - since < 10
    assert len(json.dumps(told)) < 200_000
