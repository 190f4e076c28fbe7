from __future__ import annotations

import pytest
import torch

from gplws.nn import (
    agreed_median_and_deviation,
    confidence_of,
    deviation_of,
    expected_depth,
    expected_depth_and_deviation,
    is_known,
    median_and_deviation,
)
from gplws.nn.readout import agreement_reach


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


def peaks(heights: dict[int, float], frames: int = 12, side: int = 41) -> torch.Tensor:
    """(1, frames, side, side) logits of the same peaks, as probabilities, at every pixel."""
    probability = torch.full((frames,), 1e-4)
    for frame, height in heights.items():
        probability[frame] = height
    return probability.log().view(1, -1, 1, 1).repeat(1, 1, side, side)


def test_a_lone_pixel_of_two_peaks_takes_the_one_that_its_surroundings_share():
    volume = peaks({3: 1.0})
    volume[..., 20, 20] = peaks({3: 0.4, 9: 0.6})[..., 0, 0]
    volume[..., 30, 12] = peaks({8: 1.0})[..., 0, 0]
    own, _ = median_and_deviation(volume)
    median, deviation = agreed_median_and_deviation(volume)
    assert own[0, 20, 20] > 8 and abs(median[0, 20, 20] - 3) < 0.5
    assert deviation[0, 20, 20] > 3  # such a pixel is not to be trusted
    assert median[0, 30, 12] == own[0, 30, 12] > 7  # it has no doubt of its own
    own[0, 20, 20] = median[0, 20, 20]
    assert torch.equal(median, own)


def test_the_agreed_median_keeps_steps_slopes_and_parts_of_a_frame():
    rows, columns = torch.meshgrid(torch.arange(41.0), torch.arange(50.0), indexing="ij")
    truth = 3 + rows / 10 + 4 * (columns > 22)
    frames = torch.arange(14.0).view(1, 14, 1, 1)
    volume = -0.5 * ((frames - truth) / 0.7) ** 2
    for one, other in zip(
        agreed_median_and_deviation(volume), median_and_deviation(volume), strict=True
    ):
        assert torch.equal(one, other)


def test_the_agreed_median_of_reversed_frames_is_the_same():
    volume = torch.nn.functional.interpolate(torch.randn(2, 9, 7, 8) * 3, (40, 53))
    volume += torch.randn(volume.shape)
    median, deviation = agreed_median_and_deviation(volume)
    assert ((median - median_and_deviation(volume)[0]).abs() > 1).any()
    backward, same = agreed_median_and_deviation(volume.flip(1))
    torch.testing.assert_close(8 - backward, median, rtol=0, atol=1e-3)
    torch.testing.assert_close(same, deviation, rtol=0, atol=1e-3)


def test_only_pixels_within_reach_have_a_say():
    torch.manual_seed(0)
    reach, middle = agreement_reach(), 64
    volume = torch.randn(1, 6, 129, 129, dtype=torch.float64) * 2
    median, _ = agreed_median_and_deviation(volume)
    changed = volume.clone()
    changed[..., middle - 12 : middle + 12, middle - 12 : middle + 12] += 9 * torch.randn(6, 24, 24)
    other, _ = agreed_median_and_deviation(changed)
    rows, columns = (median != other)[0].nonzero().unbind(1)
    assert rows.min() >= middle - 12 - reach and columns.max() < middle + 12 + reach
    assert columns.max() > middle + 12


def test_a_nan_does_not_vote():
    volume = torch.randn(1, 4, 30, 30)
    volume[0, 2, 11, 7] = torch.nan
    median, deviation = agreed_median_and_deviation(volume)
    assert median.isnan().sum() == deviation.isnan().sum() == 1 and median[0, 11, 7].isnan()


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (1, 5, 1, 1), (2, 2, 4, 9)])
def test_the_agreed_median_of_the_smallest_volumes(shape):
    median, deviation = agreed_median_and_deviation(torch.randn(shape))
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
