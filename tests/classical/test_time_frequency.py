"""Octaves of a stack, their windows over the frames, and the fusion of their depth maps."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from stacks import noise_stack

from gplws.classical import MEASURES, aggregate
from gplws.classical.time_frequency import (
    OCTAVES,
    agreement_of_octaves,
    fuse_by_texture,
    octave,
    octave_measure,
    octave_reach,
)


def splines(image, levels):
    for level in range(levels):
        kernel = np.zeros(4 * 2**level + 1)
        kernel[:: 2**level] = np.array([1, 4, 6, 4, 1]) / 16
        for axis in (0, 1):
            image = ndimage.correlate1d(image, kernel, axis, mode="mirror")
    return image


@pytest.mark.parametrize("number", range(OCTAVES))
def test_an_octave_is_the_difference_of_two_windows(number):
    frames = torch.rand(2, 40, 33, dtype=torch.float64)
    expected = np.stack(
        [splines(f.numpy(), number) - splines(f.numpy(), number + 1) for f in frames]
    )
    torch.testing.assert_close(
        octave(frames, number), torch.from_numpy(expected), rtol=0, atol=1e-12
    )


def test_octaves_add_up_to_the_image_less_its_average():
    frames = torch.rand(2, 30, 30, dtype=torch.float64)
    total = sum(octave(frames, number) for number in range(OCTAVES))
    torch.testing.assert_close(total, frames - aggregate(frames, OCTAVES))


@pytest.mark.parametrize("number", range(OCTAVES))
@pytest.mark.parametrize("peak_width", [0.0, 6.0, 7.0])
def test_noise_is_what_the_table_says(number, peak_width):
    frames = noise_stack(12, (160, 160), 0.01)
    # Mirrored frames beyond the ends would average less noise away.
    inner = (slice(3, -3), slice(40, -40), slice(40, -40))
    measure = octave_measure(number, peak_width)
    response = measure(frames)[inner].mean() / MEASURES["rdf"](frames)[inner].mean()
    assert response == pytest.approx(measure.noise_gain, rel=0.1)


def test_texture_that_stands_still_survives_the_average_over_frames():
    texture = torch.rand(30, 30).expand(9, -1, -1)
    for number in range(OCTAVES):
        found = octave_measure(number, 10.0)(texture)
        torch.testing.assert_close(found, octave(texture, number).abs(), rtol=0, atol=1e-6)


def test_a_symmetric_peak_keeps_its_place():
    sharpness = torch.exp(-0.5 * ((torch.arange(21.0) - 10) / 3) ** 2).view(-1, 1, 1)
    response = octave_measure(0, 7.0)(0.5 + sharpness * (torch.rand(16, 16) - 0.5))
    torch.testing.assert_close(response, response.flip(0), rtol=1e-3, atol=1e-5)
    assert (response.mean((1, 2)).argmax()) == 10


def test_the_reach_is_not_exceeded():
    for number in range(OCTAVES):
        frames = torch.rand(3, 5, 90)
        before = octave(frames, number)
        frames[..., :10] = torch.rand(3, 5, 10)
        after = octave(frames, number)
        edge = 10 + octave_reach(number)
        assert torch.equal(after[..., edge:], before[..., edge:])
        assert not torch.equal(after[..., edge - 3 : edge], before[..., edge - 3 : edge])


def test_reliable_octaves_win_and_strays_are_left_out():
    depths = torch.tensor([[4.0, 4.0, 9.0], [4.2, 4.2, 4.0], [20.0, 4.4, 4.1]])[..., None]
    trusted = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.2, 0.0, 0.5]])[..., None]
    found = fuse_by_texture(depths, trusted)[:, 0].tolist()
    assert 4.0 < found[0] < 4.2  # the stray third octave has no say
    assert math.isclose(found[1], 4.0, abs_tol=1e-4)
    assert math.isclose(found[2], 4.05, abs_tol=0.01)


def test_where_octaves_balance_the_depth_lies_between_them():
    for weights in (torch.zeros(2), torch.full((2,), 0.5)):
        for depths in (torch.tensor([2.0, 8.0]), torch.tensor([8.0, 2.0])):
            assert float(fuse_by_texture(depths, weights)) == pytest.approx(5.0)
    assert float(fuse_by_texture(torch.tensor([2.0, 300.0]), torch.zeros(2))) == 151.0


def test_octaves_that_contradict_the_fused_depth_do_not_agree():
    depths = torch.tensor([[4.0, 4.0, 4.0], [4.0, 9.0, 9.0]])
    weights = torch.tensor([[1.0, 0.75, 0.25], [0.5, 0.25, 0.75]])
    agreement = agreement_of_octaves(depths, weights, torch.tensor([4.0, 4.0, 4.0]))
    torch.testing.assert_close(agreement, torch.tensor([1.0, 0.75, 0.25]), rtol=0, atol=1e-5)


def test_without_any_reliable_octave_there_is_still_a_depth():
    depths = torch.tensor([3.0, 3.0, 3.0])
    assert float(fuse_by_texture(depths, torch.zeros(3))) == pytest.approx(3.0)
