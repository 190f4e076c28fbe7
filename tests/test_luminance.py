import numpy as np
import pytest
import torch

from gplws.data import FocalStack
from gplws.luminance import luminance


def test_networks_and_focal_stacks_see_the_same_gray():
    rgb = torch.rand(3, 2, 5, 7)
    found = luminance(rgb)
    assert torch.equal(found[0], FocalStack(rgb.movedim(0, 3)).gray())
    assert torch.equal(luminance(rgb[None]), found[None])
    expected = np.tensordot([0.2126, 0.7152, 0.0722], rgb.double().numpy(), 1)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def test_a_gray_stack_stays_as_it_is():
    gray = torch.rand(1, 2, 5, 7)
    assert luminance(gray) is gray


def test_two_channels_are_no_colour():
    for shape in ((2, 2, 5, 7), (5, 7)):
        with pytest.raises(ValueError, match=r"stack: expected .* 1 or 3, N, H, W"):
            luminance(torch.rand(shape))
