import torch

from fusedit.trainer.draws import (
    Purpose,
    draw_integers,
    draw_normal,
    draw_uniform,
    permutation,
)


def test_purposes_keep_their_numbers():
    """A renumbered purpose would change every run; new ones go to the end."""
    assert [(p.name, p.value) for p in Purpose][:10] == [
        ("ORDER", 0),
        ("ROWS", 1),
        ("PAIR", 2),
        ("RESIZE", 3),
        ("CROP", 4),
        ("FLIP", 5),
        ("POSTERIOR", 6),
        ("NOISE", 7),
        ("TIMESTEP", 8),
        ("DROPOUT", 9),
    ]


def test_a_draw_belongs_to_its_position():
    positions = torch.arange(8)
    noise = draw_normal(0, Purpose.NOISE, positions, (4, 3, 5))
    assert torch.equal(noise[5:6], draw_normal(0, Purpose.NOISE, positions[5:6], (4, 3, 5)))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, draw_normal(0, Purpose.POSTERIOR, positions, (4, 3, 5)))


def test_nothing_reads_or_moves_the_global_generator():
    before = torch.get_rng_state()
    draw_uniform(0, Purpose.FLIP, torch.arange(4))
    permutation(0, Purpose.ORDER, 0, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_integers_cover_their_range_evenly():
    drawn = draw_integers(1, Purpose.TIMESTEP, torch.arange(100_000), 1000)
    counts = torch.bincount(drawn, minlength=1000)
    assert len(counts) == 1000
    assert ((counts - 100) ** 2 / 100).sum() < 1000 + 5 * 2000**0.5  # chi square, 5 sigma


def test_a_permutation_is_one_and_differs_by_epoch():
    orders = [permutation(0, Purpose.ORDER, epoch, 1001) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1001))
    assert not torch.equal(orders[0], orders[1])
    assert permutation(0, Purpose.ORDER, 0, 1).tolist() == [0]
