from __future__ import annotations

import pytest
import torch
from peers import modules_without_gradient, weights_by_rule

from gplws.models import DDFFNet


@pytest.fixture(scope="module")
def model():
    return weights_by_rule(DDFFNet(n_frames=5))


def test_another_number_of_frames_is_an_error_that_says_which_is_right(model):
    with pytest.raises(ValueError, match=r"N = 5 frames.* got N = 4"):
        model(torch.rand(1, 3, 4, 32, 32))
    with pytest.raises(ValueError, match="n_frames must be at least 1"):
        DDFFNet(n_frames=0)


@torch.no_grad()
def test_the_maps_of_the_frames_are_added_by_the_weights_of_the_scoring(model):
    """Scores of single frames, added by hand."""
    stack = torch.rand(1, 3, 5, 32, 32)
    scores = torch.cat([model.autoencoder(stack[:, :, n]) for n in range(5)], 1)
    expected = (scores * model.scoring.weight).sum(1)
    torch.testing.assert_close(model(stack).disparity, expected, rtol=1e-4, atol=1e-5)


def test_the_frame_count_of_weights_is_read_from_them(model):
    assert DDFFNet.config_of_weights(model.state_dict()) == {"n_frames": 5}
    assert DDFFNet.config_of_weights({}) == {}


def test_training_drops_out_and_reaches_every_parameter():
    model = DDFFNet(n_frames=2).train()
    stack = torch.rand(1, 3, 2, 64, 64)
    first, second = model(stack).depth, model(stack).depth
    assert not torch.equal(first, second)
    assert modules_without_gradient(model, (first - 0.3).square().mean()) == set()
