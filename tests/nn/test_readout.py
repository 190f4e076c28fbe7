from __future__ import annotations

import pytest
import torch

from gplws.nn import expected_depth, expected_depth_and_deviation


def test_a_sharp_volume_reads_as_its_frame():
    volume = torch.full((1, 5, 2, 3), -50.0)
    volume[:, 3] = 50
    assert torch.equal(expected_depth(volume), torch.full((1, 2, 3), 3.0))
    positions = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0])
    assert torch.equal(expected_depth(volume, positions), torch.full((1, 2, 3), 9.0))


def test_an_even_volume_reads_as_the_mean_and_is_differentiable():
    volume = torch.zeros(2, 4, 1, 1, requires_grad=True)
    positions = torch.tensor([[0.0, 1, 2, 3], [10, 20, 30, 40]])
    depth = expected_depth(volume, positions)
    torch.testing.assert_close(depth.flatten(), torch.tensor([1.5, 25.0]))
    depth.sum().backward()
    assert volume.grad.abs().sum() > 0


def test_the_deviation_is_that_of_the_distribution_over_the_frames():
    probability = torch.tensor([0.1, 0.2, 0.4, 0.3]).view(1, 4, 1, 1)
    positions = torch.tensor([0.0, 1.0, 4.0, 9.0])
    depth, std = expected_depth_and_deviation(probability.log(), positions)
    torch.testing.assert_close(depth.item(), 4.5)
    torch.testing.assert_close(std.item(), (30.9 - 4.5**2) ** 0.5)


def test_a_deviation_of_zero_has_a_gradient_of_zero():
    volume = torch.tensor([200.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    _, std = expected_depth_and_deviation(volume)
    assert std.item() < 1e-18
    std.sum().backward()
    assert torch.equal(volume.grad, torch.zeros_like(volume))


def test_wrong_positions_are_named():
    with pytest.raises(ValueError, match="focus_positions must be"):
        expected_depth(torch.zeros(1, 4, 1, 1), torch.arange(3.0))
