"""Every layout gives the same rows, every kind of image is read, every mistake is one line."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fusedit.trainer.config import DataConfig
from fusedit.trainer.errors import UsageError
from fusedit.trainer.images import load_image
from fusedit.trainer.rows import BadSample, open_rows

COUNT = 3
SIZE = (6, 4)  # width, height


def colour(row):
    return (10 * row, 100, 200)


def save_images(folder, first=0):
    """{row}_before.png of colour(row) and {row}_after.png of its inverse, in folder/images."""
    (folder / "images").mkdir(parents=True)
    for row in range(first, first + COUNT):
        before = Image.new("RGB", SIZE, colour(row))
        before.save(folder / f"images/{row}_before.png")
        before.point(lambda value: 255 - value).save(folder / f"images/{row}_after.png")


def records(folder=None, first=0, suffix=""):
    at = f"{folder}/images" if folder else "images"
    return [
        {
            f"input_image{suffix}": f"{at}/{row}_before.png",
            f"edited_image{suffix}": f"{at}/{row}_after.png",
            "edit_prompt": f"edit {row}",
        }
        for row in range(first, first + COUNT)
    ]


def write_jsonl(folder, first=0, suffix=""):
    save_images(folder, first)
    lines = (json.dumps(record) + "\n" for record in records(first=first, suffix=suffix))
    (folder / "metadata.jsonl").write_text("".join(lines))


def table(folder, first=0):
    """A `datasets` table with Image features, as people push to the hub."""
    save_images(folder, first)
    return as_table(records(folder, first))


def as_table(lines):
    """With the images' bytes in it, as on the hub."""
    for line in lines:
        for column in ("input_image", "edited_image"):
            path = Path(line[column])
            line[column] = {"bytes": path.read_bytes(), "path": path.name}
    made = datasets.Dataset.from_list(lines)
    return made.cast_column("input_image", datasets.Image()).cast_column(
        "edited_image", datasets.Image()
    )


def file_name_columns(folder, raw):
    write_jsonl(folder, suffix="_file_name")


def plain_columns(folder, raw):
    write_jsonl(folder)


def csv_index(folder, raw):
    save_images(folder)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records()[0])
        writer.writeheader()
        writer.writerows(records())


def parquet_index(folder, raw):
    save_images(folder)
    datasets.Dataset.from_list(records(suffix="_file_name")).to_parquet(folder / "metadata.parquet")


def train_subfolder(folder, raw):
    write_jsonl(folder / "train")
    write_jsonl(folder / "test", first=20)


def saved_dataset(folder, raw):
    table(raw).save_to_disk(folder)


def saved_splits(folder, raw):
    splits = {"train": table(raw / "a"), "test": table(raw / "b", first=20)}
    datasets.DatasetDict(splits).save_to_disk(folder)


def parquet_file(folder, raw):
    table(raw).to_parquet(folder / "pairs.parquet")


def parquet_splits(folder, raw):
    table(raw / "a").to_parquet(folder / "data/train-00000-of-00001.parquet")
    table(raw / "b", first=20).to_parquet(folder / "data/test-00000-of-00001.parquet")


def arrow_file(folder, raw):
    table(raw).save_to_disk(raw / "saved")
    shutil.copy(raw / "saved/data-00000-of-00001.arrow", folder / "pairs.arrow")


def paper(folder, raw, seeds=1):
    names = [f"{row:07}" for row in range(COUNT)]
    for row, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "prompt.json").write_text(json.dumps({"edit": f"edit {row}"}))
        for seed in range(seeds):
            before = Image.new("RGB", SIZE, (10 * row, 100, 200 - 40 * seed))
            before.save(folder / name / f"{seed}_0.jpg")
            before.point(lambda value: 255 - value).save(folder / name / f"{seed}_1.jpg")
    index = [[name, [str(seed) for seed in range(seeds)]] for name in names]
    (folder / "seeds.json").write_text(json.dumps(index))


LAYOUTS = [
    file_name_columns,
    plain_columns,
    csv_index,
    parquet_index,
    train_subfolder,
    saved_dataset,
    saved_splits,
    parquet_file,
    parquet_splits,
    arrow_file,
    paper,
]
WITH_SPLITS = [train_subfolder, saved_splits, parquet_splits]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.fixture
def opened(tmp_path, folder):
    """Opens the folder as --dataset_name, with other settings as given."""

    def opened(**settings):
        section = DataConfig(**{"dataset_name": str(folder), **settings})
        return open_rows(section, cache_dir=str(tmp_path / "cache"))

    return opened


def assert_rows(rows, first=0):
    assert len(rows) == COUNT
    for row in range(COUNT):
        original, edited, prompt = rows.read(row, draw=0.0)
        assert (original.mode, edited.mode) == ("RGB", "RGB")
        assert (original.size, edited.size) == (SIZE, SIZE)
        before = np.array(colour(first + row))
        np.testing.assert_allclose(np.asarray(original)[0, 0], before, atol=3)  # JPEG in one layout
        np.testing.assert_allclose(np.asarray(edited)[0, 0], 255 - before, atol=3)
        assert prompt == f"edit {first + row}"
        assert rows.name(row).startswith(f"row {row}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_rows(layout, folder, tmp_path, opened):
    layout(folder, tmp_path / "raw")
    assert_rows(opened())


@pytest.mark.parametrize("layout", WITH_SPLITS)
def test_the_split_is_chosen(layout, folder, tmp_path, opened):
    layout(folder, tmp_path / "raw")
    assert_rows(opened(dataset_split="test"), first=20)


@pytest.mark.parametrize(
    "layout", [paper, saved_dataset, saved_splits, plain_columns, parquet_file]
)
def test_an_unknown_split_names_those_there(layout, folder, tmp_path, opened):
    layout(folder, tmp_path / "raw")
    with pytest.raises(UsageError, match=r"(?s)^[^\n]*nosuch[^\n]*train[^\n]*$"):
        opened(dataset_split="nosuch")


def test_dataset_name_wins_over_train_data_dir(folder, opened):
    write_jsonl(folder)
    assert_rows(opened(train_data_dir="/nowhere"))


def test_train_data_dir_alone(folder, opened):
    write_jsonl(folder)
    assert_rows(opened(dataset_name=None, train_data_dir=str(folder)))


def test_columns_go_by_the_flags(folder, opened):
    save_images(folder)
    line = {"a_file_name": "images/1_before.png", "b": "images/1_after.png", "c": "None"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    rows = opened(original_image_column="a", edited_image_column="b", edit_prompt_column="c")
    original, edited, prompt = rows.read(0, draw=0.0)
    assert original.getpixel((0, 0)) == colour(1)
    assert edited.getpixel((0, 0)) != colour(1)
    assert prompt == "None"


def test_a_csv_may_hold_any_words(folder, opened):
    save_images(folder)
    line = "images/1_before.png,images/1_after.png"
    header = "input_image,edited_image,edit_prompt\n"
    (folder / "metadata.csv").write_text(f"{header}{line},None\n{line},\n")
    rows = opened()
    assert [rows.read(row, 0.0)[2] for row in range(2)] == ["None", ""]


def test_a_hub_name_goes_to_datasets(tmp_path, monkeypatch):
    asked = {}

    def load_dataset(path, **options):
        asked.update(path=path, **options)
        return table(tmp_path / "hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    section = DataConfig(dataset_name="owner/pairs", dataset_config_name="small", dataset_split="x")
    assert_rows(open_rows(section, cache_dir="kept"))
    assert asked == {
        "path": "owner/pairs",
        "name": "small",
        "split": "x",
        "cache_dir": "kept",
    }


def test_every_seed_of_a_prompt_is_drawn(folder, tmp_path, opened):
    paper(folder, tmp_path, seeds=4)
    rows = opened()
    assert len(rows) == COUNT
    pairs = [rows.read(2, draw) for draw in (0.0, 0.25, 0.5, 0.75, 0.999999)]
    blue = [original.getpixel((0, 0))[2] for original, _, _ in pairs]
    np.testing.assert_allclose(blue, [200, 160, 120, 80, 80], atol=3)
    for original, edited, _ in pairs:
        np.testing.assert_allclose(np.asarray(edited), 255 - np.asarray(original), atol=4)


# Mistakes, each told in one line.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": "/no/such"}, "--dataset_name /no/such is not a folder"),
        ({"dataset_name": "./such"}, "--dataset_name ./such is not a folder"),
        ({"dataset_name": "a/b/c"}, "--dataset_name a/b/c is not a folder"),
        (
            {"dataset_name": None, "train_data_dir": "owner/pairs"},
            "--train_data_dir owner/pairs is not a folder",
        ),
        (
            {"edit_prompt_column": "text"},
            "has no column text, set --edit_prompt_column; there: input_image, edited_image, "
            "edit_prompt",
        ),
        ({"original_image_column": "x"}, "has no column x, set --original_image_column; there: "),
        ({"edited_image_column": "x"}, "has no column x, set --edited_image_column; there: "),
        ({"dataset_split": "test"}, "has no --dataset_split test; there: train"),
    ],
)
def test_mistakes_in_flags(settings, message, folder, opened):
    write_jsonl(folder)
    with pytest.raises(UsageError) as raised:
        opened(**settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_hub_that_is_out_of_reach(monkeypatch):
    def load_dataset(path, **options):
        raise ConnectionError("Couldn't reach 'owner/pairs' on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError) as raised:
        open_rows(DataConfig(dataset_name="owner/pairs"))
    expected = (
        "--dataset_name owner/pairs (not a folder here): Couldn't reach 'owner/pairs' on the Hub"
    )
    assert str(raised.value) == expected


def test_text_where_a_hub_dataset_should_have_images(monkeypatch):
    made = datasets.Dataset.from_list(records())
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: made)
    with pytest.raises(UsageError, match=r"column input_image .* holds .*string.*, not images"):
        open_rows(DataConfig(dataset_name="owner/pairs"))


def test_a_column_that_holds_no_images(folder, tmp_path, opened):
    made = table(tmp_path / "raw").add_column("number", [1, 2, 3])
    made.save_to_disk(folder)
    with pytest.raises(UsageError, match=r"number \(--edited_image_column\) holds .*int64.*not im"):
        opened(edited_image_column="number")


@pytest.mark.parametrize("path", ["/etc/hostname", "../set2/a.png", "images/../../a.png", ".."])
@pytest.mark.parametrize("suffix", ["", "_file_name"])
def test_paths_stay_inside_the_folder(path, suffix, folder, opened):
    write_jsonl(folder, suffix=suffix)
    lines = records(suffix=suffix)
    lines[1][f"edited_image{suffix}"] = path
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=r"of row 1 leaves the folder: ") as raised:
        opened()
    assert path in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[", "seeds.json must be "),
        ("3", "seeds.json must be "),
        ('[["a", 3]]', "seeds.json must be "),
        ('[["a"]]', "seeds.json must be "),
        ("[]", "has no rows in seeds.json"),
        ('[["a", ["1"]], ["b", []]]', "row 1 lacks a name or its seeds"),
        ('[["../a", ["1"]]]', "row 0 leaves the folder: ../a"),
        ('[["a", ["/etc/x"]]]', "row 0 leaves the folder: a"),
    ],
)
def test_a_broken_seeds_file(text, message, folder, opened):
    (folder / "seeds.json").write_text(text)
    with pytest.raises(UsageError) as raised:
        opened()
    assert str(raised.value).startswith(f"--dataset_name {folder}")
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ['{"input_image": "a.png"\n{]\n', "no json"])
def test_a_broken_metadata_file(text, folder, opened):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UsageError, match=r"^[^\n]*set, metadata\.jsonl: [^\n]+$"):
        opened()


def test_an_empty_dataset(folder, tmp_path, opened):
    table(tmp_path / "raw").select([]).save_to_disk(folder)
    with pytest.raises(UsageError, match=rf"^--dataset_name {folder} has no rows$"):
        opened()


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_an_empty_table(kind, folder, tmp_path, opened):
    if kind == "parquet":
        table(tmp_path / "raw").select([]).to_parquet(folder / "pairs.parquet")
    else:
        header = "input_image,edited_image,edit_prompt\n" if kind == "csv" else ""
        (folder / f"metadata.{kind}").write_text(header)
    told = rf"^--dataset_name {folder}[^\n]*(has no rows|corresponds to no data!)$"
    with pytest.raises(UsageError, match=told):
        opened()


@pytest.mark.parametrize("file", ["readme.txt", None])
def test_a_folder_with_nothing_to_read(file, folder, opened):
    if file:
        (folder / file).touch()
    with pytest.raises(UsageError, match=rf"^--dataset_name {folder}: [^\n]+$"):
        opened()


# One bad row is one bad sample, told by its name.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def noise(height=40, width=30, channels=3):
    shape = (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_truncated_file_is_named(folder, opened):
    write_jsonl(folder)
    Image.fromarray(noise()).save(folder / "images/1_after.png")
    truncate(folder / "images/1_after.png")
    rows = opened()
    with pytest.raises(BadSample, match=r"row 1 \(images/1_after.png\): edited_image: .*truncated"):
        rows.read(1, draw=0.0)
    rows.read(0, draw=0.0)


def test_a_missing_file_is_named(folder, opened):
    write_jsonl(folder, suffix="_file_name")
    (folder / "images/2_before.png").unlink()
    with pytest.raises(
        BadSample, match=r"row 2 \(images/2_before.png\): .*: there is no such file"
    ):
        opened().read(2, draw=0.0)


def test_broken_bytes_in_a_table_are_one_bad_row(folder, tmp_path, opened):
    save_images(tmp_path / "raw")
    (tmp_path / "raw/images/1_before.png").write_bytes(b"not an image")
    as_table(records(tmp_path / "raw")).to_parquet(folder / "pairs.parquet")
    rows = opened()
    with pytest.raises(BadSample, match=r"row 1 \(.*1_before.png\): input_image: it is no im"):
        rows.read(1, draw=0.0)
    rows.read(2, draw=0.0)


def test_empty_cells_are_bad_rows(folder, opened):
    write_jsonl(folder)
    lines = records()
    lines[0]["edited_image"] = None
    lines[1]["edit_prompt"] = None
    lines[2]["edit_prompt"] = ""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = opened()
    with pytest.raises(BadSample, match=r"row 0 \(images/0_before.png\): edited_image is empty"):
        rows.read(0, draw=0.0)
    with pytest.raises(BadSample, match=r"row 1 .*: edit_prompt is None, not text"):
        rows.read(1, draw=0.0)
    assert rows.read(2, draw=0.0)[2] == ""


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"edit": 3}'])
def test_a_bad_prompt_file(text, folder, tmp_path, opened):
    paper(folder, tmp_path)
    prompt = folder / "0000001/prompt.json"
    prompt.unlink() if text is None else prompt.write_text(text)
    rows = opened()
    with pytest.raises(BadSample, match=r"^row 1 \(0000001\): .*prompt.json"):
        rows.read(1, draw=0.0)
    rows.read(0, draw=0.0)


def test_a_bad_image_in_the_papers_layout(folder, tmp_path, opened):
    paper(folder, tmp_path)
    (folder / "0000001/0_1.jpg").write_bytes(b"")
    with pytest.raises(BadSample, match=r"^row 1 \(0000001/0_1.jpg\): it is no image"):
        opened().read(1, draw=0.0)


# Image files.


def reread(image, path, **options):
    image.save(path, **options)
    return np.asarray(load_image(path))


def test_exif_turns_the_image_upright(tmp_path):
    pixels = noise()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; turn by 90 degrees clockwise to see it
    read = reread(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read, np.rot90(pixels, -1))


def test_bytes_are_read_like_files(tmp_path):
    pixels = noise()
    read = reread(Image.fromarray(pixels), tmp_path / "a.png")
    np.testing.assert_array_equal(read, pixels)
    np.testing.assert_array_equal(load_image((tmp_path / "a.png").read_bytes()), pixels)


def test_grey(tmp_path):
    grey = noise()[..., 0]
    read = reread(Image.fromarray(grey), tmp_path / "a.png")
    np.testing.assert_array_equal(read, np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize(("dtype", "file"), [("uint16", "a.png"), ("<i4", "a.tif")])
def test_sixteen_bit_grey_is_scaled_not_clipped(dtype, file, tmp_path):
    values = (np.arange(256)[None] * 257).repeat(4, axis=0).astype(dtype)
    read = reread(Image.fromarray(values), tmp_path / file)
    np.testing.assert_array_equal(read[0, :, 1], np.arange(256))


def test_float_grey_is_zero_to_one(tmp_path):
    values = (np.arange(256, dtype=np.float32) / 255)[None].repeat(4, axis=0)
    read = reread(Image.fromarray(values), tmp_path / "a.tif")
    np.testing.assert_array_equal(read[0, :, 1], np.arange(256))


@pytest.mark.parametrize("values", [[[0.0, 2.0]], [[-0.1, 0.5]], [[np.nan, 0.5]]])
def test_float_grey_out_of_range_is_refused(values, tmp_path):
    with pytest.raises(ValueError, match=r"grey of mode F with values outside 0 to 1"):
        reread(Image.fromarray(np.array(values, dtype=np.float32)), tmp_path / "a.tif")


def test_palette(tmp_path):
    image = Image.fromarray(noise()).quantize(16)
    read = reread(image, tmp_path / "a.png")
    np.testing.assert_array_equal(read, np.asarray(image.convert("RGB")))


def test_transparency_is_dropped(tmp_path):
    pixels = noise(channels=4)
    read = reread(Image.fromarray(pixels), tmp_path / "a.png")
    np.testing.assert_array_equal(read, pixels[..., :3])
    pixels = noise(channels=2)
    read = reread(Image.fromarray(pixels, "LA"), tmp_path / "b.png")
    np.testing.assert_array_equal(read, pixels[..., [0, 0, 0]])


def test_cmyk(tmp_path):
    read = reread(Image.new("CMYK", SIZE, (255, 0, 0, 0)), tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(read[0, 0], [0, 255, 255], atol=2)


@pytest.mark.parametrize("file", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"])
def test_a_truncated_image_raises(file, tmp_path):
    Image.fromarray(noise()).save(tmp_path / file)
    truncate(tmp_path / file)
    with pytest.raises(ValueError, match=r"it cannot be decoded|it is no image"):
        load_image(tmp_path / file)


def test_another_process_finds_the_same_fingerprint(tmp_path):
    """The order of a set of strings is another one in each process."""
    (tmp_path / "rows").mkdir()
    parquet_file(tmp_path / "rows", tmp_path / "raw")
    code = (
        "from fusedit.trainer.config import DataConfig\n"
        "from fusedit.trainer.rows import open_rows\n"
        f"print(open_rows(DataConfig(train_data_dir={str(tmp_path / 'rows')!r})).fingerprint())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(1, 5)
    }
    assert len(told) == 1
