"""What the losses on pyramids share, by hand where the losses' own tests cannot tell one form from another."""

import torch

from pcdistill.losses._pyramid import cells_of_boxes, keep_mask, normalize_channels


def test_width_and_height_have_scales_of_their_own():
    """A level of 4 x 6 cells over 32 x 96 pixels: a cell is 8 pixels high and 16 wide."""
    boxes = torch.tensor([[16.0, 8.0, 40.0, 12.0], [0.0, 0.0, 96.0, 32.0]])
    inside, area = cells_of_boxes(boxes, (4, 6), (32, 96))
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:3, 1:4] = True  # rows 1 to ceil(1.5), columns 1 to ceil(2.5)
    assert torch.equal(inside[0], expected)
    assert inside[1].all()
    assert area.tolist() == [6.0, 35.0]  # the second runs one cell over either edge


def test_of_equal_attention_the_first_are_masked():
    keep = keep_mask(torch.ones(2, 100), 0.3)
    assert keep[:, :30].eq(0).all()
    assert keep[:, 30:].eq(1).all()


def test_channels_that_hardly_vary_are_not_blown_up():
    features = 1e-6 * torch.tensor([-1.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    std = 2**0.5 * 1e-6
    torch.testing.assert_close(normalize_channels(features), features / (std + 1e-6))
