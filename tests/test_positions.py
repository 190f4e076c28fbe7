import math

import numpy as np
import pytest
import torch

from gplws.positions import frame_index, rise_or_fall

POSITIONS = torch.tensor([10.0, 20.0, 40.0])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_positions_rise_or_fall_from_each_to_the_next(kind):
    assert rise_or_fall(kind([1.0, 2.0, 2.5])) and rise_or_fall(kind([3.0, 1.0, -1.0]))
    assert rise_or_fall(kind([1.0]))
    for wrong in ([1.0, 2.0, 2.0], [1.0, 2.0, 1.0], [1.0, math.nan, 2.0]):
        assert not rise_or_fall(kind(wrong))


def test_frame_numbers_are_linear_between_rising_or_falling_positions():
    depth = torch.tensor([9.0, 10.0, 15.0, 20.0, 30.0, 40.0, 41.0, torch.nan])
    expected = torch.tensor([torch.nan, 0.0, 0.5, 1.0, 1.5, 2.0, torch.nan, torch.nan])
    torch.testing.assert_close(frame_index(depth, POSITIONS), expected, equal_nan=True)
    falling = frame_index(depth, POSITIONS.flip(0))
    torch.testing.assert_close(falling, 2 - expected, equal_nan=True)


def test_frame_numbers_go_on_beyond_the_ends_with_the_step_there():
    depth = torch.tensor([[0.0, 15.0], [50.0, torch.nan]])
    expected = torch.tensor([[-1.0, 0.5], [2.5, torch.nan]])
    found = frame_index(depth, POSITIONS, extrapolate=True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    falling = frame_index(depth, POSITIONS.flip(0), extrapolate=True)
    torch.testing.assert_close(falling, 2 - expected, equal_nan=True)


def test_one_position_is_the_first_frame():
    found = frame_index(torch.tensor([3.0, 4.0]), torch.tensor([3.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, torch.nan]), equal_nan=True)
