"""The order of a run, its padding, and batches that do not depend on ranks, cuts or workers."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from fusedit.trainer import data
from fusedit.trainer.config import DataConfig
from fusedit.trainer.data import (
    EditPairs,
    StepSampler,
    collate,
    make_loader,
    make_tokenize,
    positions_of,
    split_rows,
)
from fusedit.trainer.draws import Purpose, draw_uniform
from fusedit.trainer.errors import UsageError
from fusedit.trainer.rows import BadSample, open_rows

COUNT = 21
GLOBAL_BATCH = 8
STEPS = 3  # an epoch: 24 slots, 3 of them padding


class NoiseRows:
    """Rows of noise, told apart by their instruction; row 5 is bad when asked for."""

    def __init__(self, bad=()):
        self.bad, self.draws = bad, []

    def __len__(self):
        return COUNT

    def name(self, row):
        return f"row {row}"

    def read(self, row, draw):
        if row in self.bad:
            raise BadSample(self.name(row), "broken")
        self.draws.append(draw)
        pixels = np.random.default_rng(row).integers(0, 256, (20, 26, 3), np.uint8)
        return Image.fromarray(pixels), Image.fromarray(255 - pixels), str(row)


def to_token(text):
    return torch.tensor([int(text or -1)])


def make_pairs(rows=None, selection=None, seed=3, **settings):
    section = DataConfig(**{"resolution": 16, "max_resize": 19, "random_flip": True, **settings})
    selection = torch.arange(COUNT) if selection is None else selection
    return EditPairs(rows or NoiseRows(), selection, section, seed, GLOBAL_BATCH, to_token)


def rows_of(pairs, epoch=0):
    """The row of each slot of an epoch, -1 for padding."""
    slots = pairs.order.steps_per_epoch * GLOBAL_BATCH
    return [pairs[epoch * slots + slot].tokens.item() for slot in range(slots)]


def test_every_row_once_an_epoch_then_padding():
    pairs = make_pairs()
    assert pairs.order.steps_per_epoch == STEPS
    rows = rows_of(pairs)
    assert sorted(rows[:COUNT]) == list(range(COUNT))
    assert rows[COUNT:] == [-1, -1, -1]


def test_epochs_and_seeds_have_their_own_orders():
    pairs = make_pairs()
    first, second = rows_of(pairs, epoch=0), rows_of(pairs, epoch=1)
    assert sorted(first) == sorted(second)
    assert first != second
    assert rows_of(pairs, epoch=0) == first  # going back is allowed
    assert rows_of(make_pairs(seed=4)) != first


def test_only_the_selection_is_read():
    selection = torch.tensor([20, 4, 9])
    rows = rows_of(make_pairs(selection=selection))
    assert sorted(rows) == [-1] * 5 + [4, 9, 20]


def test_padding_weighs_nothing():
    pairs = make_pairs()
    batch = collate(pairs.__getitems__(list(range(16, 24))))
    torch.testing.assert_close(batch.weights, torch.tensor([1.0] * 5 + [0.0] * 3))
    assert batch.tokens.flatten()[5:].tolist() == [-1] * 3  # the encoding of ""
    assert not batch.original[5:].any()
    assert not batch.edited[5:].any()
    assert batch.original[:5].flatten(1).any(1).all()
    assert batch.errors == ()


def test_a_batch_has_the_shapes_and_types_of_its_docstring():
    batch = collate(make_pairs().__getitems__([3, 4]))
    for images in (batch.original, batch.edited):
        assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.uint8)
    assert (batch.tokens.shape, batch.tokens.dtype) == ((2, 1), torch.int64)
    assert (batch.size_ids.shape, batch.size_ids.dtype) == ((2, 6), torch.float32)
    assert (batch.weights.shape, batch.weights.dtype) == ((2,), torch.float32)
    assert batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == [3, 4]


def test_a_bad_sample_weighs_nothing_and_is_told():
    pairs = make_pairs(NoiseRows(bad={5}))
    good = make_pairs()
    at = rows_of(good).index(5)
    positions = [at, (at + 1) % COUNT]
    batch = collate(pairs.__getitems__(positions))
    assert batch.errors == ("row 5: broken",)
    assert batch.weights.tolist() == [0.0, 1.0]
    assert batch.tokens[0].item() == -1
    assert not batch.original[0].any()
    torch.testing.assert_close(batch.original[1], good[positions[1]].original)


def test_each_sample_has_its_own_decisions():
    """Flips are decided by sample, not by batch, and both happen."""
    pairs = make_pairs(center_crop=True, max_resize=None)
    plain = make_pairs(center_crop=True, max_resize=None, random_flip=False)
    flipped = [not torch.equal(pairs[at].original, plain[at].original) for at in range(COUNT)]
    draws = draw_uniform(3, Purpose.FLIP, torch.arange(COUNT))[:, 0]
    assert flipped == (draws < 0.5).tolist()
    assert 0 < sum(flipped) < COUNT


def test_a_row_looks_different_in_the_next_epoch():
    pairs = make_pairs()
    slots = STEPS * GLOBAL_BATCH
    row = 7
    first, second = (pairs[epoch * slots + rows_of(pairs, epoch).index(row)] for epoch in (0, 1))
    assert first.tokens == second.tokens
    assert not torch.equal(first.original, second.original)


def test_every_decision_has_its_own_draw(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "transform", lambda *given: asked.append(given[3]) or given[:3])
    make_pairs().__getitems__([2, 11])
    at = torch.tensor([2, 11])
    expected = [
        draw_uniform(3, purpose, at, count)
        for purpose, count in [(Purpose.RESIZE, 1), (Purpose.CROP, 2), (Purpose.FLIP, 1)]
    ]
    assert [list(draws) for draws in asked] == torch.cat(expected, dim=1).tolist()


def test_the_pair_is_drawn_at_the_position():
    rows = NoiseRows()
    pairs = make_pairs(rows)
    pairs.__getitems__([2, 11])
    expected = draw_uniform(3, Purpose.PAIR, torch.tensor([2, 11]))[:, 0].tolist()
    assert rows.draws == expected


def test_a_held_out_row_is_the_same_at_every_look():
    pairs = make_pairs()
    sample = pairs.sample(6)
    assert (sample.tokens.item(), sample.position, sample.weight) == (6, 6, 1.0)
    other = make_pairs(seed=9, center_crop=True, max_resize=None, random_flip=False)
    torch.testing.assert_close(sample.original, other.sample(6).original)
    torch.testing.assert_close(sample.original, other[rows_of(other).index(6)].original)
    assert pairs.instruction(6) == "6"
    assert make_pairs(NoiseRows(bad={6})).sample(6).error == "row 6: broken"


# Ranks, micro-steps, resuming.


@pytest.mark.parametrize(
    ("ranks", "micro_steps", "micro_batch"), [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2)]
)
def test_any_cut_of_a_step_has_the_same_samples(ranks, micro_steps, micro_batch):
    batches = [
        collate(make_pairs().__getitems__(positions))
        for rank in range(ranks)
        for positions in StepSampler(0, 2 * STEPS, rank, ranks, micro_batch, micro_steps)
    ]
    positions = torch.cat([batch.positions for batch in batches])
    order = positions.argsort()
    assert positions[order].tolist() == list(range(2 * STEPS * GLOBAL_BATCH))
    whole = collate(make_pairs().__getitems__(list(range(2 * STEPS * GLOBAL_BATCH))))
    for name in ("original", "edited", "tokens", "weights"):
        cut = torch.cat([getattr(batch, name) for batch in batches])[order]
        torch.testing.assert_close(cut, getattr(whole, name), rtol=0, atol=0)


@pytest.mark.parametrize(("micro_step", "rank"), [(0, 2), (1, 0), (1, 2)])
def test_positions_count_steps_micro_steps_ranks_and_samples(micro_step, rank):
    at = positions_of(
        step=5, micro_step=micro_step, rank=rank, ranks=3, micro_batch=4, micro_steps=2
    )
    assert list(at) == [5 * 24 + micro_step * 12 + rank * 4 + index for index in range(4)]


def test_a_sampler_starts_anywhere():
    whole = list(StepSampler(0, 9, rank=1, ranks=2, micro_batch=2, micro_steps=2))
    rest = StepSampler(4, 9, rank=1, ranks=2, micro_batch=2, micro_steps=2)
    assert list(rest) == whole[8:]
    assert len(rest) == 10


# Rows to train on, rows to hold out.


def test_held_out_rows_do_not_depend_on_the_training_rows():
    train, held_out = split_rows(100, None, 10, seed=1)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(100))
    fewer, same = split_rows(100, 30, 10, seed=1)
    assert fewer.tolist() == train[:30].tolist()
    assert same.tolist() == held_out.tolist()
    assert held_out.tolist() != list(range(90, 100))  # drawn
    assert split_rows(100, None, 10, seed=2)[1].tolist() != held_out.tolist()


def test_nothing_held_out():
    train, held_out = split_rows(5, 5, 0, seed=0)
    assert (len(train), len(held_out)) == (5, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((10, None, 10), "--held_out 10 leaves none of the dataset's 10 rows"),
        (
            (10, 9, 2),
            "--max_train_samples 9 is above the 8 rows there are (10 in the dataset less "
            "--held_out 2); leave it out to train on all",
        ),
    ],
)
def test_more_rows_than_there_are(given, message):
    with pytest.raises(UsageError) as raised:
        split_rows(*given, seed=0)
    assert str(raised.value) == message


# The loader.


@pytest.fixture
def tokenizer():
    alphabet = sorted(ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in alphabet]
    tokens = [*alphabet, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)


def test_tokens_are_padded_and_cut(tokenizer):
    tokenize = make_tokenize([tokenizer])
    for text in ("", "make it red", "a very long instruction indeed, it will not fit"):
        tokens = tokenize(text)
        assert (tokens.shape, tokens.dtype) == ((12,), torch.int64)
        assert tokens[0].item() == tokenizer.bos_token_id
        assert tokens[-1].item() == tokenizer.eos_token_id


def loader_over_files(folder, tokenizer, workers, steps):
    """A loader over real files, with one bad row: what a worker needs must travel to it."""
    folder.mkdir(exist_ok=True)
    lines = []
    for row in range(5):
        original, edited, _ = NoiseRows().read(row, 0.0)
        original.save(folder / f"{row}_a.png")
        edited.save(folder / f"{row}_b.png")
        line = {"input_image": f"{row}_a.png", "edited_image": f"{row}_b.png", "edit_prompt": "do"}
        lines.append(json.dumps(line) + "\n")
    (folder / "2_b.png").write_bytes(b"")
    (folder / "metadata.jsonl").write_text("".join(lines))
    section = DataConfig(dataset_name=str(folder), resolution=16, max_resize=19, random_flip=True)
    rows = open_rows(section, cache_dir=str(folder.parent / "cache"))
    pairs = EditPairs(rows, torch.arange(5), section, 3, 4, make_tokenize([tokenizer]))
    sampler = StepSampler(0, steps, rank=0, ranks=1, micro_batch=2, micro_steps=2)
    return make_loader(pairs, sampler, workers, prefetch=2, pin_memory=False)


def test_workers_change_nothing_and_outlive_signals(tmp_path, tokenizer):
    alone = list(loader_over_files(tmp_path / "set", tokenizer, workers=0, steps=8))
    assert len(alone) == 16
    assert sum(len(batch.errors) for batch in alone) == 4  # once in each of 4 epochs
    batches = iter(loader_over_files(tmp_path / "set", tokenizer, workers=2, steps=8))
    shared = [next(batches), next(batches)]  # one of each worker, so both are up
    for worker in batches._workers:  # what Ctrl-C and torchrun send to the process group
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    shared += batches
    for one, other in zip(alone, shared, strict=True):
        assert type(other) is type(one)
        assert other.errors == one.errors
        for name in ("original", "edited", "tokens", "positions", "weights"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=0, atol=0)
