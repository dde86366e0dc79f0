"""The demo's world: reproducible pairs, edits that one right answer exists for, words that fit."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from fusedit.launch.demo.base_parts import TOKENS, build_tokenizer
from fusedit.launch.demo.world import GLOBAL_KINDS, KINDS, Pair, make_pair, vocabulary


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [make_pair(index, seed=7) for index in range(40 * len(KINDS))]


def psnr(image: Image.Image, truth: Image.Image) -> float:
    difference = np.asarray(image, np.float64) - np.asarray(truth, np.float64)
    return 10 * np.log10(255**2 / np.square(difference).mean())


def changed(pair: Pair) -> float:
    """The share of pixels that an edit changes visibly."""
    difference = np.asarray(pair.original, np.int64) - np.asarray(pair.edited, np.int64)
    return (np.abs(difference).max(axis=-1) > 8).mean()


def test_a_pair_is_a_function_of_seed_and_index():
    later = make_pair(31, seed=7)
    for index in (31, 30, 31):
        pair = make_pair(index, seed=7)
    assert pair == later
    assert pair != make_pair(31, seed=8)
    assert pair.instruction != make_pair(32, seed=7).instruction


def test_kinds_are_equally_frequent(pairs):
    assert len(KINDS) >= 8
    assert set(Counter(pair.kind for pair in pairs).values()) == {40}
    assert set(KINDS) > GLOBAL_KINDS


def test_each_kind_is_asked_for_in_several_ways(pairs):
    phrasings = defaultdict(set)
    for pair in pairs:
        phrasings[pair.kind].add(pair.instruction)
    assert {kind: len(said) for kind, said in phrasings.items() if len(said) < 3} == {}


def test_no_instruction_means_two_kinds(pairs):
    kinds = defaultdict(set)
    for pair in pairs:
        kinds[pair.instruction].add(pair.kind)
    assert [said for said, meant in kinds.items() if len(meant) > 1] == []


def test_images_are_64_px_rgb(pairs):
    assert {(image.mode, image.size) for p in pairs for image in (p.original, p.edited)} == {
        ("RGB", (64, 64))
    }


def test_every_edit_shows_and_local_ones_stay_local(pairs):
    for pair in pairs:
        share = changed(pair)
        assert share > 0.03, pair.instruction
        assert pair.kind in GLOBAL_KINDS or share < 0.4, pair.instruction


def test_the_unedited_image_scores_low(pairs):
    """So that an edit beats it clearly with a VAE of 30 dB."""
    scores = defaultdict(list)
    for pair in pairs:
        scores[pair.kind].append(psnr(pair.original, pair.edited))
    means = {kind: np.mean(values) for kind, values in scores.items()}
    assert max(means.values()) < 18
    assert np.mean([means[kind] for kind in GLOBAL_KINDS]) < 12


def test_adding_and_removing_a_tree_meet_in_the_same_place():
    """Where a tree would stand is told by the house: added to its own scene, it is the one removed.

    Of two scenes with the same house, one gains the tree that the other loses.
    """
    added, removed = (KINDS.index(kind) for kind in ("add tree", "remove tree"))
    columns = []
    for start in (added, removed):
        for index in range(start, 300, len(KINDS)):
            pair = make_pair(index)
            with_tree, without = (
                (pair.edited, pair.original) if start == added else (pair.original, pair.edited)
            )
            columns.append(_tree_from_house(with_tree, without))
    assert np.std(columns) < 1.5  # pixels; the houses themselves stand up to 25 apart


def _tree_from_house(with_tree: Image.Image, without: Image.Image) -> float:
    """The tree's distance from the path's lower end, which every house has in the same place."""
    difference = np.abs(np.asarray(with_tree, np.int64) - np.asarray(without, np.int64)).sum(-1)
    tree = np.average(np.arange(64), weights=difference.sum(0))
    row = np.asarray(without, np.int64)[-1]
    path = np.abs(row - np.median(row, axis=0)).sum(-1)
    return abs(tree - np.average(np.arange(64), weights=path))


def test_every_word_is_in_the_vocabulary(pairs):
    said = {
        word.strip("?,")
        for pair in pairs
        for text in (pair.instruction, pair.caption, pair.edited_caption)
        for word in text.split()
    }
    assert said == set(vocabulary())


def test_words_are_single_tokens_and_texts_fit(pairs):
    tokenizer = build_tokenizer()
    assert [word for word in vocabulary() if len(tokenizer(word).input_ids) != 3] == []
    texts = {text for p in pairs for text in (p.instruction, p.caption, p.edited_caption)}
    assert max(len(tokenizer(text).input_ids) for text in texts) <= TOKENS


def test_captions_follow_the_edit(pairs):
    words = {"snow": "snow", "desert": "desert", "black and white": "black", "negative": "negative"}
    for pair in pairs:
        if pair.kind in words:
            assert words[pair.kind] in pair.edited_caption
            assert words[pair.kind] not in pair.caption
