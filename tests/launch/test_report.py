"""`fusedit report` in a browser: a small run's page, as it is read on a phone and at a desk."""

import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
from browser import DESKTOP, PHONE, barriers, browser_or_skip, opened
from playwright.sync_api import expect
from tiny import save_tiny_inputs

from fusedit.launch import cli, report, train
from fusedit.trainer.log import PHASES, read_lines

EVIL = "</script><img src=x onerror=\"document.title='run'\"><!-- <script>"


@pytest.fixture(scope="module")
def browser():
    yield from browser_or_skip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps with validations, a bad row and, added by hand, evaluations."""
    folder = save_tiny_inputs(tmp_path_factory.mktemp("run"), 8)
    table = folder / "data" / "metadata.jsonl"
    rows = [json.loads(row) for row in table.read_text().splitlines()]
    table.write_text("".join(json.dumps({**row, "edit_prompt": EVIL}) + "\n" for row in rows))
    flags = {
        "pretrained_model_name_or_path": folder / "base",
        "train_data_dir": folder / "data",
        "output_dir": folder / "run",
        "resolution": 16,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "held_out": 3,
        "validation_steps": 2,
        "validation_inference_steps": 2,
        "log_every": 1,
        "conditioning_dropout_prob": 0.2,
        "max_grad_norm": "inf",
        "report_to": "none",
    }
    assert train.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of its numbers and pictures, with evaluations and skipped samples beside them."""
    for path in [*trained.glob("*.jsonl"), trained / "run.toml"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(trained / "validation", tmp_path / "validation")
    with (tmp_path / "log.jsonl").open("a") as log:
        for step in (2, 4, 6):
            values = {
                f"eval/clip_{name}_at_{scale}": base + step / 100 + sign * scale / 20
                for name, base, sign in (("direction", 0.2, -1), ("image", 0.7, 1))
                for scale in (1.0, 1.6, 2.2)
            }
            log.write(json.dumps({"step": step, "time": 1.0, "eval/curve_area": 0.1} | values))
            log.write("\n")
    (tmp_path / "quarantine.jsonl").write_text(
        json.dumps({"row": 3, "file": EVIL, "reason": "gone"}) + "\n"
    )
    return tmp_path


def _page(run, *flags):
    assert cli.main(["report", str(run), *flags]) == 0
    return (run / "report.html").as_uri()


def test_the_log_tells_losses_by_group_and_the_seconds_of_each_phase(trained):
    lines = [line for line in read_lines(trained / "log.jsonl") if "loss" in line]
    assert len(lines) == 6
    for line in lines:
        assert {f"seconds/{phase}" for phase in PHASES} <= line.keys()
    assert any("loss_by_condition/full" in line for line in lines)
    whats = [line["what"] for line in read_lines(trained / "history.jsonl")]
    assert whats == ["started", "done"]
    seconds = [sum(v for k, v in line.items() if k.startswith("seconds/")) for line in lines]
    passed = lines[-1]["time"] - lines[0]["time"]
    assert sum(seconds[1:]) == pytest.approx(passed, abs=0.1)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_charts_are_drawn_from_the_page_alone_and_fit(size, run, browser):
    with opened(browser, _page(run), size) as seen:
        page = seen.page
        paths = page.eval_on_selector_all(
            "svg path", "all => all.map(one => one.getAttribute('d'))"
        )
        assert len(paths) >= 15
        assert all(path.count(",") >= 1 and "NaN" not in path for path in paths)
        titles = page.locator("h3").all_text_contents()
        assert {"Loss", "Loss by condition", "Loss by timestep", "Time by phase"} <= {*titles}
        assert {"Trade-off", "Learning rate", "Gradient norm", "Memory"} <= {*titles}
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        assert page.locator("#state").text_content() == "finished"
        assert seen.requests == [page.url]
        assert seen.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_stands_in_anyones_way(size, scheme, run, browser):
    with opened(browser, _page(run), size) as seen:
        seen.page.emulate_media(color_scheme=scheme)
        assert barriers(seen.page) == []


def test_a_picture_goes_from_input_to_edit_to_truth_by_keys_and_pointer(run, browser):
    with opened(browser, _page(run)) as seen:
        page = seen.page
        figure = page.locator(".picture").first
        slider, layers = figure.locator("input"), figure.locator("img")

        def shown():
            return layers.evaluate_all("all => all.map(one => one.style.clipPath)")

        slider.focus()
        page.keyboard.press("Home")
        assert shown() == ["none", "inset(0px 100% 0px 0px)", "inset(0px 100% 0px 0px)"]
        assert slider.get_attribute("aria-valuetext") == "input"
        page.keyboard.press("End")
        assert shown() == ["none", "none", "inset(0px)"] or shown()[2].startswith("inset(0px 0%")
        assert slider.get_attribute("aria-valuetext") == "truth"
        page.keyboard.press("Home")
        stage = figure.locator(".stage")
        box = stage.bounding_box()
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 20)
        page.mouse.up()
        assert slider.input_value() == "75"
        others = page.locator(".picture input")
        page.locator("#all").fill("130")
        values = others.evaluate_all("all => all.map(one => one.value)")
        assert {*values} == {"130"}


def test_the_slider_of_steps_shows_other_edits_and_keeps_inputs(run, browser):
    with opened(browser, _page(run)) as seen:
        page = seen.page
        first = page.locator(".picture").first.locator("img")

        def sources():
            return first.evaluate_all("all => all.map(one => one.src)")

        newest = sources()
        assert "6 (3 of 3)" in page.locator("#shown-step").text_content()
        page.locator("#sheet").focus()
        page.keyboard.press("ArrowLeft")
        assert "4 (2 of 3)" in page.locator("#shown-step").text_content()
        before = sources()
        assert (before[0], before[2]) == (newest[0], newest[2])
        assert before[1] != newest[1]


def test_pointing_at_a_chart_tells_the_values_of_that_step_in_all(run, browser):
    with opened(browser, _page(run)) as seen:
        page = seen.page
        chart = page.locator(".chart", has=page.get_by_role("heading", name="Loss", exact=True))
        plot = chart.locator(".plot")
        lines = [line for line in read_lines(run / "log.jsonl") if "loss" in line]
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        page.mouse.move(box["x"] + 52 + (box["width"] - 62) * 2 / 6, box["y"] + 60)
        assert chart.locator(".at").text_content() == "step 2"
        told = chart.locator(".legend b").first.text_content()
        assert float(told) == pytest.approx(lines[1]["loss"], rel=1e-3)
        others = page.locator("#optimizer .at").all_text_contents()
        assert {*others} == {"step 2"}
        plot.focus()
        page.keyboard.press("Home")
        assert chart.locator(".at").text_content() == "step 1"
        page.keyboard.press("Escape")
        assert chart.locator(".at").text_content() == ""


def test_settings_are_searched_and_only_those_that_differ_are_shown(run, browser):
    with opened(browser, _page(run)) as seen:
        page = seen.page
        visible = page.locator("#setup tbody tr:visible th")
        assert "max_train_steps" in visible.all_text_contents()
        assert "seed" not in visible.all_text_contents()
        page.locator("#only").uncheck()
        page.locator("#search").fill("infinity")
        assert visible.all_text_contents() == ["max_grad_norm"]
        page.locator("#search").fill("adam beta")
        assert visible.all_text_contents() == ["adam_beta1", "adam_beta2"]


def test_no_text_of_the_run_is_run(run, browser):
    with (run / "log.jsonl").open("a") as log:
        event = {"step": 6, "time": 1.0, "event": "save failed", "told": EVIL}
        log.write(json.dumps(event) + "\n")
    with opened(browser, _page(run)) as seen:
        assert seen.page.locator("figcaption", has_text="onerror").count() == 3
        assert seen.page.locator("#events td", has_text="onerror").count() == 2
        assert seen.page.title() == run.name
        assert seen.requests == [seen.page.url]
        assert seen.errors == []


def test_no_script_but_the_pages_own_may_run(run, browser):
    html = report.page(report.read_run(run)).replace(
        "</main>", "</main><script>document.title = 'run'</script>"
    )
    (run / "other.html").write_text(html)
    with opened(browser, (run / "other.html").as_uri()) as seen:
        assert seen.page.title() == run.name
        assert any("Content Security Policy" in error for error in seen.errors)


def test_an_empty_folder_and_a_broken_one_are_pages_too(tmp_path, browser):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "time": 5.0, "loss": 0.5}\n{"step": 2, "lo')
    (tmp_path / "run.toml").write_text("= no toml")
    with opened(browser, _page(tmp_path)) as seen:
        assert seen.page.locator("svg path").count() == 2
        assert "run.toml" in seen.page.locator("#setup").text_content()
        assert (seen.errors, barriers(seen.page)) == ([], [])
    for path in tmp_path.iterdir():
        path.unlink()
    with opened(browser, _page(tmp_path), PHONE) as seen:
        assert seen.page.locator("#state").text_content() == "not begun"
        assert (seen.errors, barriers(seen.page)) == ([], [])


def test_an_open_page_follows_the_run_and_stays_where_it_was(run, browser, monkeypatch):
    monkeypatch.setattr(report, "LOOK_S", 0.05)
    (run / "history.jsonl").unlink()
    (run / "run.toml").unlink()
    out, began = run / "report.html", threading.Event()
    watcher = threading.Thread(target=report.watch, args=(run, out, began.set, 0.3))
    watcher.start()
    assert began.wait(20)
    with opened(browser, out.as_uri(), PHONE) as seen:
        page = seen.page
        page.locator("#sheet").fill("0")
        page.locator("#all").fill("170")
        page.evaluate("scrollTo(0, 400)")
        page.locator("#sheet").evaluate("one => one.focus({preventScroll: true})")
        _append(run / "log.jsonl", {"step": 7, "time": 2.0, "loss": 0.123})
        expect(page.locator(".top")).to_contain_text("step 7", timeout=20_000)
        assert page.evaluate("scrollY") == 400
        assert page.evaluate("document.activeElement.id") == "sheet"
        assert page.locator("#sheet").input_value() == "0"
        assert page.locator("#all").input_value() == "170"
        assert seen.errors == []
        _append(run / "history.jsonl", {"step": 7, "time": 3.0, "what": "done"})
        watcher.join(20)
        expect(page.locator("#state")).to_have_text("finished", timeout=20_000)
        assert '"reload_s":0' in out.read_text()
    assert not watcher.is_alive()


@pytest.mark.parametrize("ended", ["finished", "interrupted"])
def test_watching_ends_with_the_run_or_by_ctrl_c(ended, run, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", interrupt)
    if ended == "interrupted":
        (run / "history.jsonl").unlink()
        (run / "run.toml").unlink()
    assert cli.main(["report", str(run), "--watch"]) == 0
    assert "report.html: watching; Ctrl-C ends it" in capsys.readouterr().out
    assert '"reload_s":0' in (run / "report.html").read_text()


def _append(path, line):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    time.sleep(0.01)


def test_it_begins_without_the_libraries_of_models():
    """They take seconds to import, and a page needs none of them."""
    script = (
        "import sys, fusedit.launch.report; print({'diffusers', 'transformers'} & {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout == "set()\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["missing"], "missing: there is no such folder; give the --output_dir"),
        (["other"], "other holds no run: there is no run.toml"),
        (["good", "--out", "."], "--out . is a folder; give a file"),
        (["good", "--out", "file/x.html"], "cannot write file/x.html"),
    ],
)
def test_a_mistake_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("other/picture.png", "good/log.jsonl", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert cli.main(["report", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fusedit: {message}")
    assert (printed.err.count("\n"), printed.out) == (1, "")
