import dataclasses

import pytest

from fusedit.trainer.errors import UsageError
from fusedit.trainer.examples import chosen_rows, long_side_size
from fusedit.trainer.protocols import UNPINNED, names, read_protocol

OURS = ["emu-edit", "held-out", "ip2p-curve", "magicbrush-multi", "magicbrush-single"]


@pytest.fixture
def write(tmp_path):
    def call(text):
        path = tmp_path / "own.toml"
        path.write_text(text)
        return str(path)

    return call


def test_ours_are_there_and_each_is_another():
    assert names() == OURS
    assert len({read_protocol(name).sha256 for name in OURS}) == len(OURS)
    assert [read_protocol(name).name for name in OURS] == OURS


def test_the_curve_is_the_papers():
    sampling = read_protocol("ip2p-curve").sampling
    assert sampling.image_guidance_scales == (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    assert (sampling.guidance_scale, sampling.steps, sampling.resolution) == (7.5, 100, 512)


def test_published_rows_stand_beside_and_are_no_part_of_the_hash():
    single, multi = read_protocol("magicbrush-single"), read_protocol("magicbrush-multi")
    values = [list(one.values.values()) for one in (*single.published, *multi.published)]
    assert values == [
        [0.1122, 0.0371, 0.8524, 0.7428, 0.2764],
        [0.0625, 0.0203, 0.9332, 0.8987, 0.2781],
        [0.1584, 0.0598, 0.7924, 0.6177, 0.2726],
        [0.0964, 0.0353, 0.8924, 0.8273, 0.2754],
    ]
    assert all("2306.10012" in one.source for one in (*single.published, *multi.published))
    assert dataclasses.replace(single, published=()).sha256 == single.sha256


@pytest.mark.parametrize("change", ["steps = 5", "seed = 1", "image_guidance_scales = [1, 2]"])
def test_every_setting_is_part_of_the_hash(write, change):
    plain = 'name = "own"\nmetrics = ["psnr"]\n[data]\nedited_column = "x"\n[sampling]\n'
    assert read_protocol(write(plain)).sha256 != read_protocol(write(plain + change)).sha256


def test_what_is_not_known_is_unpinned():
    protocol = read_protocol("magicbrush-single")
    assert protocol.data.rows_sha256 == UNPINNED
    assert {one.sha256 for one in protocol.extractors.values()} == {UNPINNED}


TRUTH = '[data]\nedited_column = "x"\n'
HEAD = 'name = "own"\nmetrics = ["psnr"]\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name = 1", "metrics is missing"),
        ('name = 1\nmetrics = ["psnr"]', "name must be str, got 1"),
        ('name = "own"\nmetrics = ["snr"]\n' + TRUTH, "metric snr is none of"),
        (HEAD + 'metric = "x"', "unknown metric; did you mean metrics"),
        (HEAD, "no edited_column"),
        (HEAD + 'against = "all"\n' + TRUTH, "against all is none of input, truth"),
        (HEAD + 'best_by = "l1"\n' + TRUTH, "best_by l1 is none of curve, psnr"),
        (HEAD + 'best_by = "curve"\n' + TRUTH, "a curve needs several"),
        (HEAD + TRUTH + "[sampling]\nsteps = 1.5", "steps must be int, got 1.5"),
        (HEAD + TRUTH + "[sampling]\nsteps = 0", "steps must be 1 or more"),
        (HEAD + TRUTH + "[sampling]\nimage_guidance_scales = [0.5]", "each 1 or more"),
        (HEAD + TRUTH + '[sampling]\nsampler = "Fast"', "no sampler Fast"),
        (HEAD + TRUTH + 'session_column = "s"', "go together"),
        (HEAD + TRUTH + '[extractors.vgg]\nplace = "x"', "extractor vgg is none of"),
        (HEAD + TRUTH + "[extractors.clip]", "place is missing"),
        ("name = [", "own.toml: "),
    ],
)
def test_a_file_that_is_none_is_told_in_a_line(write, text, reason):
    with pytest.raises(UsageError) as caught:
        read_protocol(write(text))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none_of_ours_is_told_them():
    with pytest.raises(UsageError, match="no such protocol; ours are emu-edit"):
        read_protocol("magicbrush")


def test_the_papers_rows_are_the_last_twentieth():
    protocol = read_protocol("ip2p-curve")
    assert chosen_rows(1000, protocol) == list(range(950, 1000))
    many = chosen_rows(200_000, protocol)
    assert len({*many}) == 5000
    assert many == sorted(many)
    assert min(many) >= 190_000


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((512, 512), (512, 512)), ((1000, 500), (512, 256)), ((400, 640), (320, 512))],
)
def test_the_long_side_as_the_papers_code_has_it(size, wanted):
    assert long_side_size(size, 512) == wanted
