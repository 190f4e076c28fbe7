from __future__ import annotations

import pytest
import torch
from peers import modules_without_gradient, weights_by_rule

from gplws.models import DefocusNet


@pytest.fixture(scope="module")
def model():
    return weights_by_rule(DefocusNet())


@torch.no_grad()
def test_the_order_of_the_frames_does_not_matter(model):
    stack, positions = torch.rand(1, 3, 4, 32, 32), torch.tensor([0.1, 0.4, 0.5, 1.0])
    order = [2, 0, 3, 1]
    found, shuffled = model(stack, positions), model(stack[:, :, order], positions[order])
    torch.testing.assert_close(shuffled.depth, found.depth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled.defocus, found.defocus[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_focus_positions_change_the_depth_and_not_the_defocus(model):
    stack = torch.rand(2, 3, 3, 32, 32)
    near, far = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.7, 0.9])
    first, second = model(stack, near), model(stack, far)
    assert torch.equal(first.defocus, second.defocus)
    assert not torch.allclose(first.depth, second.depth, atol=1e-2)
    mixed = model(stack, torch.stack([near, far]))
    torch.testing.assert_close(mixed.depth[0], first.depth[0])
    torch.testing.assert_close(mixed.depth[1], second.depth[1])


def test_training_reaches_every_parameter_in_use():
    model = DefocusNet().train()
    found = model(torch.rand(1, 3, 3, 32, 32), torch.linspace(0, 1, 3))
    loss = (found.depth - 0.5).square().mean() + found.defocus.abs().mean()
    assert modules_without_gradient(model, loss) == {"conv_joint2_4.0"}


def test_the_first_weights_carry_the_signal_through_all_convs():
    with torch.no_grad():
        model = DefocusNet().eval()
        stack = torch.randn(1, 3, 3, 64, 64)
        found, other = model(stack), model(stack.flip(4))
    assert 0.1 < found.defocus.std() < 10
    assert (found.depth - other.depth).std() > 0.05


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="filters must be at least 1"):
        DefocusNet(filters=0)
    with pytest.raises(ValueError, match="two different finite positions"):
        DefocusNet(focus_range=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"focus_positions must be \(N,\)"):
        DefocusNet()(torch.rand(1, 3, 3, 16, 16), torch.arange(4.0))
