from __future__ import annotations

import pytest
import torch
from peers import (
    error_to_recorded,
    modules_without_gradient,
    padded,
    parameters,
    recorded_state,
    stack_by_rule,
    state_shapes,
    weights_by_rule,
)

from gplws.models import AiFDepthNet


@pytest.fixture(scope="module")
def model():
    return weights_by_rule(AiFDepthNet())


@pytest.mark.shared
@torch.no_grad()
def test_depth_and_image_are_those_of_the_original(shared_dir, model):
    found = model(*stack_by_rule(64))
    assert error_to_recorded(shared_dir, "aifdepthnet/depth", found.depth) < 1e-4
    assert error_to_recorded(shared_dir, "aifdepthnet/all_in_focus", found.all_in_focus) < 1e-4


@pytest.mark.shared
def test_the_state_has_the_published_names_and_shapes(shared_dir, model):
    assert state_shapes(model) == recorded_state(shared_dir, "aifdepthnet")


def test_the_number_of_parameters_is_that_of_the_original(model):
    assert parameters(model) == 16_533_873


@torch.no_grad()
def test_other_sizes_are_continued_by_their_border(model):
    stack = torch.rand(2, 3, 3, 50, 70)
    found, expected = model(stack), model(padded(stack, 26, 14))
    assert torch.equal(found.volume, expected.volume[..., :50, :70])
    torch.testing.assert_close(found.depth, expected.depth[:, :50, :70])
    torch.testing.assert_close(found.all_in_focus, expected.all_in_focus[..., :50, :70])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 32, 33), (7, 1, 40), (1, 1, 1)])
def test_any_number_of_frames_and_any_size_goes_through(model, shape):
    found = model(torch.rand(1, 3, *shape), torch.linspace(2, 3, shape[0]))
    assert found.depth.shape == (1, *shape[1:])
    assert ((found.depth >= 2 - 1e-5) & (found.depth <= 3 + 1e-5)).all()


@torch.no_grad()
def test_depth_and_image_share_one_attention(model):
    """Frames that show their own position in the red channel give depth as the red image."""
    positions = torch.tensor([0.1, 0.3, 0.4, 0.9])
    stack = torch.rand(1, 3, 4, 32, 32)
    stack[:, 0] = positions[:, None, None]
    found = model(stack, positions)
    torch.testing.assert_close(found.all_in_focus[:, 0], found.depth)


def test_the_image_alone_trains_every_parameter():
    model = AiFDepthNet().train()
    stack = torch.rand(1, 3, 3, 64, 64)
    loss = (model(stack).all_in_focus - stack[:, :, 1]).square().mean()
    assert modules_without_gradient(model, loss) == set()
