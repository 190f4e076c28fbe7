from __future__ import annotations

import pytest
import torch
from peers import modules_without_gradient, weights_by_rule

from gplws.models import AiFDepthNet


@pytest.fixture(scope="module")
def model():
    return weights_by_rule(AiFDepthNet())


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
