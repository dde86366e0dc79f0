import torch

from fusedit.trainer.conditioning import drop_masks


def test_one_rate_cuts_the_draw_as_the_paper_does():
    draw = torch.tensor([0.0, 0.049, 0.05, 0.099, 0.1, 0.149, 0.15, 0.999])
    text, image = drop_masks(draw, (0.05, 0.05, 0.05))
    assert text.tolist() == [True] * 4 + [False] * 4
    assert image.tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_each_rate_is_its_own():
    draw = (torch.arange(1000) + 0.5) / 1000
    text, image = drop_masks(draw, (0.2, 0.1, 0.4))
    assert (text & ~image).sum() == 200
    assert (text & image).sum() == 100
    assert (image & ~text).sum() == 400


def test_rate_zero_drops_nothing():
    text, image = drop_masks(torch.zeros(3), (0.0, 0.0, 0.0))
    assert not text.any()
    assert not image.any()
