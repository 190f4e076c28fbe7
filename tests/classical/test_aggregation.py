"""The aggregation window: its sum, width, reach and borders."""

import pytest
import torch

from gplws.classical import aggregate, aggregation_reach, aggregation_sigma


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_window_has_the_width_and_reach_that_it_says(levels):
    reach = aggregation_reach(levels)
    size = 2 * reach + 9
    impulse = torch.zeros(size, size, dtype=torch.float64)
    impulse[size // 2, size // 2] = 1
    window = aggregate(impulse, levels)
    place = torch.arange(size, dtype=torch.float64) - size // 2
    assert window.sum() == pytest.approx(1)
    assert (window.sum(0) * place**2).sum() ** 0.5 == pytest.approx(aggregation_sigma(levels))
    assert torch.equal(window.sum(0) > 0, place.abs() <= reach)
    torch.testing.assert_close(window, window.T)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (33, 17)])
def test_a_constant_stays_and_bounds_hold_for_any_size(size):
    assert torch.allclose(aggregate(torch.full((2, *size), 0.3), 4), torch.tensor(0.3))
    volume = torch.rand(2, *size)
    found = aggregate(volume, 3)
    assert found.shape == volume.shape
    assert found.min() >= volume.min() - 1e-6 and found.max() <= volume.max() + 1e-6


def test_no_level_copies():
    volume = torch.rand(2, 5, 5)
    found = aggregate(volume, 0)
    assert torch.equal(found, volume) and found.data_ptr() != volume.data_ptr()


def test_its_gradient_agrees_with_finite_differences():
    volume = torch.rand(1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(aggregate, (volume,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": -1}, ValueError, "levels: expected at least 0, got -1"),
        ({"volume": torch.ones(3)}, ValueError, "volume: expected"),
        ({"volume": torch.ones(3, 3, dtype=torch.int32)}, TypeError, "volume: .*int32"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        aggregate(**{"volume": torch.ones(3, 3), **arguments})
