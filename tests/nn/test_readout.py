from __future__ import annotations

import pytest
import torch

from gplws.nn import (
    confidence_of,
    deviation_of,
    expected_depth,
    expected_depth_and_deviation,
    is_known,
    median_and_deviation,
)


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


def test_the_median_of_a_narrow_peak_is_where_the_peak_is():
    truth = torch.linspace(2, 7, 12).view(1, 1, 3, 4)
    frames = torch.arange(10.0).view(1, 10, 1, 1)
    median, deviation = median_and_deviation(-0.5 * ((frames - truth) / 0.7) ** 2)
    assert (median - truth[:, 0]).abs().max() < 0.05
    assert (deviation - 0.7 * (2 / torch.pi) ** 0.5).abs().max() < 0.12


def test_the_median_of_two_peaks_lies_in_the_heavier_one():
    probability = torch.tensor([0.0, 0.45, 0.0, 0.0, 0.0, 0.0, 0.0, 0.55]).view(1, 8, 1, 1)
    median, deviation = median_and_deviation(probability.log())
    assert median.item() == pytest.approx(6.5 + 0.05 / 0.55, abs=1e-5)
    expected = 0.45 * (median.item() - 1) + 0.55 * (7 - median.item())
    assert deviation.item() == pytest.approx(expected, abs=1e-5)


def test_the_median_says_the_same_in_parts_and_of_one_frame(monkeypatch):
    volume = torch.randn(2, 6, 50, 7)
    whole = median_and_deviation(volume)
    monkeypatch.setattr("gplws.nn.readout._VALUES_AT_A_TIME", 600)
    for one, other in zip(whole, median_and_deviation(volume), strict=True):
        assert one.shape == (2, 50, 7)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    median, deviation = median_and_deviation(torch.randn(1, 1, 3, 3))
    assert torch.equal(median, torch.zeros(1, 3, 3)) and not deviation.any()


def test_a_nan_in_a_volume_is_a_nan_in_the_median_of_that_pixel():
    volume = torch.randn(1, 4, 2, 2)
    volume[0, 2, 1, 0] = torch.nan
    median, _ = median_and_deviation(volume)
    assert median.isnan().sum() == 1 and median[0, 1, 0].isnan()


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (1, 5, 1, 1), (2, 2, 4, 9)])
def test_the_median_of_the_smallest_volumes(shape):
    median, deviation = median_and_deviation(torch.randn(shape))
    assert median.shape == deviation.shape == (shape[0], *shape[2:])
    assert median.isfinite().all() and (median <= shape[1] - 1).all()


def test_confidence_and_deviation_belong_together():
    deviation = torch.tensor([0.0, 1.0, 4.0])
    torch.testing.assert_close(confidence_of(deviation), torch.tensor([1.0, 0.5, 0.2]))
    torch.testing.assert_close(deviation_of(confidence_of(deviation)), deviation)
    assert (
        confidence_of(torch.tensor(torch.nan)) == 0 and deviation_of(torch.tensor(0.0)) == torch.inf
    )


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 10, 40, 100])
def test_a_narrow_peak_is_known_and_even_probability_is_not(frames):
    volume = torch.zeros(1, frames, 1, 2)
    volume[0, :, 0, 1] = -0.5 * ((torch.arange(frames) - frames // 2) / 0.7) ** 2
    _, deviation = median_and_deviation(volume)
    even, narrow = is_known(confidence_of(deviation), frames)[0, 0].tolist()
    assert narrow and even == (frames < 3)


def test_gradients_reach_the_volume_through_median_and_deviation():
    volume = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(median_and_deviation, volume)
