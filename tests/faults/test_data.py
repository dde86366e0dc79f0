"""Data as bad as it comes: each image and instruction is read rightly, or is one bad row by name.

And what a run does with bad rows: it stops or skips, alike on all ranks, and tells each row once.
"""

import io
import json
import shutil
import struct
import zlib
from contextlib import suppress

import datasets
import numpy as np
import pytest
import torch
from faulty import RED, bomb, encoded, opened, save_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from ranks import Ranks, run_flags
from tiny import save_tiny_inputs
from transformers import CLIPTokenizer

from fusedit.launch import train
from fusedit.trainer.config import REFUSED_PIXELS, WARNED_PIXELS, DataConfig, LoopConfig
from fusedit.trainer.data import EditPairs, make_tokenize
from fusedit.trainer.images import image_size, load_image
from fusedit.trainer.quarantine import QUARANTINE, Quarantine
from fusedit.trainer.rows import BadSample, parts_of
from fusedit.trainer.windows import Verdict, Windows
from fusedit.trainer.world import World


def noise(width=40, height=30):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_of_size(width, height):
    """A PNG whose header says so, and with hardly any data behind it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def palette(**options):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 255, *RED, 0, 255, 0])
    return encoded(image, **options)


def animated(kind):
    frames = [Image.new("RGB", (3, 2), colour) for colour in (RED, "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


UNREADABLE = {
    "no byte": (b"", "it is no image"),
    "text": (b"not an image at all\n" * 9, "it is no image"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "it is no image"),
    "a vector image": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "it is no image"),
    "a program to draw it": (encoded(Image.new("RGB", (3, 2)), "EPS"), "EPS, a program"),
    "truncated": (encoded(Image.fromarray(noise()))[:-40], "truncated"),
    "only a header": (encoded(Image.fromarray(noise()))[:60], "cannot be decoded|it is no image"),
    "no pixel wide": (png_of_size(0, 5), "it is no image"),
    "what Pillow warns of": (png_of_size(9460, 9459), "9460 x 9459 pixels are more than --max_im"),
    "what Pillow refuses": (png_of_size(20000, 20000), "bomb"),
    "the largest header": (png_of_size(2**31 - 1, 2**31 - 1), "bomb"),
}
READABLE = {  # what is seen, and its first pixel
    "one pixel": (encoded(Image.new("RGB", (1, 1), RED)), (1, 1), RED),
    "a line": (encoded(Image.new("RGB", (3000, 1), RED)), (3000, 1), RED),
    "inks": (encoded(Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "TIFF"), (3, 2), RED),
    "a palette": (palette(), (3, 2), RED),
    "a palette, one colour clear": (palette(transparency=1), (3, 2), RED),
    "a palette, all half clear": (palette(transparency=bytes([9, 99, 199])), (3, 2), RED),
    "clear": (encoded(Image.new("RGBA", (3, 2), (*RED, 0))), (3, 2), RED),
    "clear grey": (encoded(Image.new("LA", (3, 2), (77, 0))), (3, 2), (77, 77, 77)),
    "16 bits": (encoded(Image.fromarray(np.full((2, 3), 77 * 257, np.uint16))), (3, 2), (77,) * 3),
    "black and white": (encoded(Image.new("1", (3, 2), 1)), (3, 2), (255, 255, 255)),
    "an animated GIF": (animated("GIF"), (3, 2), RED),
    "an animated PNG": (animated("PNG"), (3, 2), RED),
    "an animated WebP": (animated("WEBP"), (3, 2), RED),
    "several pages": (animated("TIFF"), (3, 2), RED),
}


# Images.


@pytest.mark.parametrize("fault", UNREADABLE)
def test_an_unreadable_image_is_told(fault):
    data, reason = UNREADABLE[fault]
    with pytest.raises(ValueError, match=reason):
        load_image(data)


@pytest.mark.parametrize("kind", READABLE)
def test_an_unusual_image_is_read_rightly(kind, recwarn):
    data, size, pixel = READABLE[kind]
    image = load_image(data)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", size, pixel)
    assert image_size(data) == size
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation):
    turns = {  # how a camera that was held so stores what it sees
        1: lambda seen: seen,
        2: np.fliplr,
        3: lambda seen: np.rot90(seen, 2),
        4: np.flipud,
        5: lambda seen: seen.swapaxes(0, 1),
        6: np.rot90,
        7: lambda seen: np.rot90(seen, 2).swapaxes(0, 1),
        8: lambda seen: np.rot90(seen, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](noise())))
    data = encoded(stored, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(data)), noise())
    assert image_size(data) == (40, 30)


def test_a_bomb_is_known_by_its_header(monkeypatch):
    data = bomb(5000)
    assert len(data) < 2**12
    with monkeypatch.context() as decoding:
        decoding.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
        for look in (load_image, image_size):
            with pytest.raises(ValueError, match=r"5000 x 5000 pixels .* --max_image_pixels 999"):
                look(data, 999)
    assert image_size(data) == (5000, 5000)


def test_the_limit_goes_by_its_flag(tmp_path):
    folder = save_set(tmp_path / "set", [bomb(50)])
    opened(folder, max_image_pixels=2500).read(0, 0.0)
    rows = opened(folder, max_image_pixels=2499)
    for look in (lambda: rows.read(0, 0.0), lambda: rows.size(0)):
        with pytest.raises(BadSample, match=r"row 0 \(0.png\): input_image: its 50 x 50 pixels"):
            look()


def test_the_limits_are_pillows():
    assert WARNED_PIXELS == Image.MAX_IMAGE_PIXELS
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(png_of_size(REFUSED_PIXELS + 1, 1)))


KINDS = {kind: data for kind, (data, *_) in {**READABLE, **UNREADABLE}.items() if len(data) < 9999}
KINDS |= {kind: encoded(Image.fromarray(noise()), kind) for kind in ("JPEG", "BMP", "TIFF", "WEBP")}


def look_at_damaged(kind, cuts):
    data = bytearray(KINDS[kind])
    for place, byte in cuts:
        if data:
            data[place % len(data)] = byte
    for look in (image_size, load_image):
        with suppress(ValueError):
            look(bytes(data), 10**6)


damage = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.sampled_from(sorted(KINDS)), damage)
def test_a_damaged_image_is_read_or_told(kind, cuts):
    look_at_damaged(kind, cuts)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(KINDS)), damage)
def test_very_many_damaged_images_are_read_or_told(kind, cuts):
    look_at_damaged(kind, cuts)


# Instructions.

TEXTS = {
    "empty": "",
    "blank": " \t\n ",
    "long": "make it red " * 834,
    "one long word": "x" * 10_000,
    "a joined emoji": "👩‍👩‍👧 " * 9,
    "right to left": "اجعلها حمراء \u202eder ti ekam",
    "NUL": "make\0it red",
    "combining": "e\u0301" * 99,
    "beyond the basic plane": "\U0001d4f6\U0001d4ea\U0001d4f4\U0001d4ee" * 9,
    "no character": "\uffff\ufdd0\ufeff",
    "special tokens": "<|endoftext|><|startoftext|>",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 20)


@pytest.fixture(scope="module")
def tokenize(inputs):
    return make_tokenize([CLIPTokenizer.from_pretrained(inputs / "base/tokenizer")])


def pairs_of(rows, tokenize, global_batch=1):
    section = DataConfig(resolution=16)
    return EditPairs(rows, torch.arange(len(rows)), section, 0, global_batch, tokenize)


def test_any_text_is_an_instruction(tmp_path, tokenize):
    folder = save_set(tmp_path / "set", [bomb(9)] * len(TEXTS), list(TEXTS.values()))
    rows = opened(folder)
    for row, text in enumerate(TEXTS.values()):
        assert rows.read(row, 0.0)[2] == text
    for position in range(len(TEXTS)):
        sample = pairs_of(rows, tokenize)[position]
        assert (sample.weight, sample.tokens.shape) == (1.0, (16,))


@pytest.mark.parametrize("value", [3, 1.5, True, ["make it red"], {"a": 1}])
def test_what_is_no_text_is_a_bad_row(tmp_path, value):
    rows = opened(save_set(tmp_path / "set", [bomb(9)], [value]))
    with pytest.raises(BadSample, match=r"row 0 \(0.png\): edit_prompt is .*, not text"):
        rows.read(0, 0.0)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ({"edit": "\ud800"}, "holds half a character"),
        ({"edit": None}, "None, not text"),
        (["edit"], "prompt.json gives no"),
    ],
)
def test_a_bad_instruction_of_the_papers_is_a_bad_row(tmp_path, prompt, reason, tokenize):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/prompt.json").write_text(json.dumps(prompt))
    for end in (0, 1):
        Image.fromarray(noise()).save(tmp_path / f"a/1_{end}.jpg")
    (tmp_path / "seeds.json").write_text('[["a", ["1"]]]')
    sample = pairs_of(opened(tmp_path), tokenize)[0]
    assert sample.weight == 0.0
    assert sample.error is not None
    assert reason in sample.error


@pytest.mark.parametrize(
    "name", ["a\0b.png", "x" * 300, "\U0001f600.png", "http://a/b.png", "", "."]
)
def test_a_file_of_an_odd_name_is_a_bad_row(tmp_path, name):
    folder = save_set(tmp_path / "set", [bomb(9)])
    line = {"input_image": "0.png", "edited_image": name, "edit_prompt": "x"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    rows = opened(folder)
    with pytest.raises(BadSample, match=r"^row 0 .*edited_image: [^\n]+$"):
        rows.read(0, 0.0)
    assert rows.fingerprint()


def test_a_name_that_is_half_a_character_is_told_in_one_line(tmp_path):
    (tmp_path / "seeds.json").write_text('[["\\ud800\\n", ["1"]]]')
    with pytest.raises(BadSample) as raised:
        opened(tmp_path).read(0, 0.0)
    told = str(raised.value).encode().decode()
    assert "\n" not in told
    assert parts_of(told)[0] == 0


# Files that go away.


def test_a_table_that_is_deleted_while_it_is_read_is_read_on(tmp_path, tokenize):
    """It is mapped into memory, which keeps what is deleted."""
    rows = saved_table(tmp_path)
    expected = pairs_of(rows, tokenize)[0]
    shutil.rmtree(tmp_path / "set")
    assert torch.equal(pairs_of(rows, tokenize)[0].original, expected.original)


def saved_table(tmp_path):
    data = encoded(Image.fromarray(noise()))
    image = {"bytes": data, "path": "0.png"}
    line = {"input_image": image, "edited_image": image, "edit_prompt": "make it red"}
    made = datasets.Dataset.from_list([line] * 8)
    made = made.cast_column("input_image", datasets.Image())
    made.cast_column("edited_image", datasets.Image()).save_to_disk(tmp_path / "set")
    return opened(tmp_path / "set")


def test_a_table_that_is_gone_when_a_worker_opens_it_ends_in_one_line(inputs, tmp_path, tokenize):
    rows = saved_table(tmp_path)
    for file in (tmp_path / "set").glob("*.arrow"):
        file.unlink()
    section = DataConfig(resolution=16, dataloader_num_workers=1, on_bad_sample="skip")
    windows = Windows(
        pairs_of(rows, tokenize), LoopConfig(train_batch_size=1), section, World(), 0, 4
    )
    window, verdict, messages = windows.take(False)
    assert (window, verdict) == ([], Verdict.NO_DATA)
    assert len(messages) == 1
    assert "DataLoader worker" in messages[0]


# A run.


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As conftest.py says, also where a run is started in this process."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def data(inputs, tmp_path):
    return shutil.copytree(inputs / "data", tmp_path / "data")


def flags_of(inputs, data, output, *more, ranks=1, steps=6):
    return [*run_flags(inputs, output, ranks, steps), f"--train_data_dir={data}", *more]


def truncate(data, *rows):
    for row in rows:
        path = data / f"{row:03}_edited.png"
        path.write_bytes(path.read_bytes()[:-40])


def quarantined(output):
    return [json.loads(line) for line in (output / QUARANTINE).read_text().splitlines()]


def test_each_bad_row_is_in_the_quarantine_once_on_any_ranks_and_after_a_resume(
    inputs, data, tmp_path, capfd
):
    truncate(data, 3, 11)
    (data / "007_input.png").unlink()
    skips = "--on_bad_sample=skip", "--max_bad_fraction=0.15"
    found = []
    for ranks in (1, 2):
        output = tmp_path / f"of-{ranks}"
        for steps in (3, 6):  # 20 rows, 12 a step: each is seen twice
            flags = flags_of(inputs, data, output, *skips, ranks=ranks, steps=steps)
            of_ranks = Ranks(ranks, flags, tmp_path / f"{ranks}-{steps}.log")
            assert of_ranks.wait() == [0] * ranks, of_ranks.output()
        found.append(quarantined(output))
        told = "".join((tmp_path / f"{ranks}-{steps}.log").read_text() for steps in (3, 6))
        assert told.count("skipped: row") == 3
    assert [line["row"] for line in found[0]] == [line["row"] for line in found[1]]
    by_row = {line.pop("row"): line for line in found[0]}
    assert sorted(by_row) == [3, 7, 11]
    assert by_row[7] == {"file": "007_input.png", "reason": "input_image: there is no such file"}
    assert by_row[3]["file"] == "003_edited.png"
    assert "truncated" in by_row[3]["reason"]


def test_too_many_bad_rows_stop_the_run_with_a_checkpoint(inputs, data, tmp_path, capfd):
    truncate(data, 3, 11)
    output = tmp_path / "run"
    flags = flags_of(inputs, data, output, "--on_bad_sample=skip", "--max_bad_fraction=0.05")
    assert train.main(flags) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fusedit: ")]
    assert "2 of 20 rows cannot be trained on, more than --max_bad_fraction 0.05: " in line
    assert str(output / QUARANTINE) in line
    assert len(quarantined(output)) == 2
    assert list(output.glob("checkpoint-*"))
    assert train.main([*flags, "--max_bad_fraction=0.1"]) == 0
    assert len(quarantined(output)) == 2


def test_a_folder_that_goes_away_while_training_stops_and_the_run_goes_on(
    inputs, data, tmp_path, capfd, monkeypatch
):
    """And ends in the weights of a run that nothing happened to."""
    assert train.main(flags_of(inputs, data, tmp_path / "whole")) == 0
    flags = flags_of(inputs, data, tmp_path / "run", "--on_bad_sample=skip")
    asked, requested = [], train.StopSignals.requested

    def taken_away(signals):
        asked.append(1)
        if len(asked) == 3:
            data.rename(tmp_path / "elsewhere")
        return requested(signals)

    with monkeypatch.context() as patched:
        patched.setattr(train.StopSignals, "requested", taken_away)
        assert train.main(flags) == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert "there is no such file" in printed
    assert "more than --max_bad_fraction" in printed
    (tmp_path / "elsewhere").rename(data)
    (tmp_path / "run" / QUARANTINE).unlink()
    assert train.main(flags) == 0
    for name in ("unet", "ema", "optimizer"):
        file = f"checkpoint-6/{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_too_many_bad_rows_stop_the_cache_before_they_are_written(inputs, data, tmp_path, capfd):
    truncate(data, 3, 11)
    cache = tmp_path / "cache"
    flags = flags_of(inputs, data, tmp_path / "run", "--center_crop", f"--cache_latents={cache}")
    assert train.main([*flags, "--on_bad_sample=skip"], cache_only=True) == 2
    told = "2 pairs cannot be encoded, more than --max_bad_fraction 0.05"
    assert told in capfd.readouterr().err
    assert not list(cache.rglob("pairs-*"))


def test_overwrite_begins_the_quarantine_anew(inputs, data, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / QUARANTINE).write_text('{"row": 1}\n')
    truncate(data, 3)
    assert train.main(flags_of(inputs, data, output, "--on_bad_sample=skip", "--overwrite")) == 0
    assert [line["row"] for line in quarantined(output)] == [3]


def test_a_torn_line_of_the_quarantine_is_written_again(tmp_path):
    (tmp_path / QUARANTINE).write_text('{"row": 1, "file": null, "reason": "a"}\n{"row": 2, "fi')
    quarantine = Quarantine(tmp_path, 10, 0.2, World())
    assert quarantine.complaint() is None
    assert quarantine.add(["row 1: a", "row 2 (b.png): c: d", "row 2: e"]) == [
        "row 2 (b.png): c: d"
    ]
    assert quarantine.complaint() is None
    assert quarantine.add(["row 3: f"])
    assert "3 of 10 rows" in str(quarantine.complaint())
    lines = (tmp_path / QUARANTINE).read_text().splitlines()
    assert json.loads(lines[2]) == {"row": 2, "file": "b.png", "reason": "c: d"}
    assert len(Quarantine(tmp_path, 10, 1.0, World()).add(["row 3: f", "row 4: g"])) == 1
