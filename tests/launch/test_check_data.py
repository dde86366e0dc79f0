"""`fusedit check-data`: every fault is found and named, and nothing where there is none."""

import json
import re

import numpy as np
import pytest
from faulty import bomb, encoded, save_set
from PIL import Image, ImageDraw
from tiny import save_tiny_dataset

from fusedit.launch import cli
from fusedit.launch.demo.world import make_pair
from fusedit.trainer.check_data import KINDS, LEAST_ALIKE, alike


def picture(seed, size=(48, 40)):
    """Shapes on a ground, no two alike."""
    chance = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(chance.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = (chance.random(4) * [size[0], size[1], 20, 20]).tolist()
        draw.ellipse((x, y, x + w + 4, y + h + 4), tuple(chance.integers(0, 256, 3).tolist()))
    return image


def save_pairs(folder, pairs):
    folder.mkdir()
    lines = []
    for row, (original, edited, prompt) in enumerate(pairs):
        for name, image in (("a", original), ("b", edited)):
            data = image if isinstance(image, bytes) else encoded(image)
            (folder / f"{row}{name}.png").write_bytes(data)
        line = {"input_image": f"{row}a.png", "edited_image": f"{row}b.png", "edit_prompt": prompt}
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def negative(image):
    return image.point(lambda value: 255 - value)


GOOD = [(picture(n), negative(picture(n)), "make it a negative") for n in range(3)]
FAULTS = {  # finding: a pair that has it
    "unreadable": (b"no image", picture(10), "x"),
    "misaligned": (picture(11), negative(picture(11)).resize((48, 48)), "x"),
    "identical": (picture(12), picture(12), "x"),
    "duplicate": GOOD[1],
    "empty": (picture(14), negative(picture(14)), " "),
    "long": (picture(15), negative(picture(15)), "word " * 99),
    "unrelated": (picture(22), picture(23), "x"),
}


def checked(tmp_path, folder, *flags):
    """Exit code and report."""
    code = cli.main(
        ["check-data", f"--report={tmp_path / 'report'}", f"--train_data_dir={folder}", *flags]
    )
    return code, json.loads((tmp_path / "report/report.json").read_text())


def rows_of(report, kind):
    return [pair["row"] for pair in report["findings"][kind]["pairs"]]


def test_each_fault_is_found_and_nothing_else(inputs, tmp_path, capfd):
    assert alike(picture(22), picture(23)) < LEAST_ALIKE
    folder = save_pairs(tmp_path / "set", [*GOOD, *FAULTS.values()])
    code, report = checked(tmp_path, folder, f"--pretrained_model_name_or_path={inputs / 'base'}")
    assert code == 1
    assert list(FAULTS) == list(KINDS)
    for place, kind in enumerate(FAULTS, start=len(GOOD)):
        assert rows_of(report, kind) == [place], kind
    findings = report["findings"]
    assert findings["unreadable"]["pairs"][0]["name"] == "row 3 (3a.png)"
    assert "it is no image" in findings["unreadable"]["pairs"][0]["detail"]
    assert findings["misaligned"]["pairs"][0]["detail"] == "48 x 40 and 48 x 48"
    assert findings["duplicate"]["pairs"][0]["detail"] == "as row 1 (1a.png)"
    assert re.fullmatch(r"\d+ tokens, 16 are read", findings["long"]["pairs"][0]["detail"])
    assert (report["rows"], report["pairs"], report["clean"]) == (10, 10, False)
    assert report["sizes"]["most_common"] == [[48, 40, 9]]
    assert "NOT clean" in capfd.readouterr().out


def test_a_clean_dataset_passes_and_a_hint_does_not_fail_it(tmp_path, capfd):
    folder = save_pairs(tmp_path / "set", [*GOOD, FAULTS["unrelated"]])
    code, report = checked(tmp_path, folder)
    assert (code, report["clean"], rows_of(report, "unrelated")) == (0, True, [3])
    assert report["instruction_lengths"] == "not checked: no base model"
    assert "lengths of instructions were not checked" in capfd.readouterr().out


def test_workers_find_the_same(tmp_path):
    folder = save_pairs(tmp_path / "set", [*GOOD, *FAULTS.values()])
    alone = checked(tmp_path, folder)
    assert checked(tmp_path, folder, "--dataloader_num_workers=1") == alone


def test_the_page_shows_the_pairs_and_asks_nobody(tmp_path):
    hostile = "<script src='https://a.b/c.js'></script><img src=x onerror=alert(1)>"
    pairs = [(picture(n), picture(n), hostile) for n in range(15)]
    checked(tmp_path, save_pairs(tmp_path / "set", pairs))
    html = (tmp_path / "report/report.html").read_text()
    shown = html.split("<h2>identical: 15</h2>")[1].split("</section>")[0]
    assert shown.count("<figure>") == 12
    assert shown.count('src="data:image/jpeg;base64,') == 24
    assert "and 3 more" in shown
    assert "<script" not in html
    assert "default-src 'none'" in html
    sources = re.findall(r"<(?:img|link|script|iframe)[^>]*?(?:src|href)=\"?([^\"> ]{1,12})", html)
    assert {source[:11] for source in sources} == {"data:image/"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--dataset_name or --train_data_dir is missing"),
        (["--train_data_dir=nowhere"], "--train_data_dir nowhere is not a folder"),
        (["--train_data_dir=data", "--max_train_samples=9"], "--max_train_samples 9 is above"),
        (["--train_data_dir=data", "--report=data/metadata.jsonl"], "is a file; give a folder"),
        (
            ["--train_data_dir=data", "--pretrained_model_name_or_path=data"],
            "data has no folder unet",
        ),
    ],
)
def test_a_mistake_in_flags_is_2(here, flags, message, capfd):
    assert cli.main(["check-data", *flags]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("fusedit: ")
    assert message in printed
    assert not (here / "check-data").exists()


def test_real_edits_are_not_taken_for_other_pictures():
    """Of the demo's world: each kind of edit, and the same scenes with another's edit."""
    pairs = [make_pair(index) for index in range(64)]
    likeness = [alike(pair.original, pair.edited) for pair in pairs]
    assert min(likeness) > LEAST_ALIKE
    assert alike(Image.new("RGB", (9, 9)), picture(0)) == 1.0  # nothing to compare


def test_bombs_are_known_by_their_header(tmp_path):
    folder = save_set(tmp_path / "set", [bomb(3000)])
    code, report = checked(tmp_path, folder, "--max_image_pixels=1000000")
    assert code == 1
    assert "more than --max_image_pixels" in report["findings"]["unreadable"]["pairs"][0]["detail"]
    save_tiny_dataset(tmp_path / "data", count=2)
    assert checked(tmp_path, tmp_path / "data")[0] == 0
