"""Statistics of a whole stack, and of its tiles."""

import pytest
import torch
from stacks import noise_stack, textured_stack

from gplws.classical import (
    STATISTICS_REACH,
    part_statistics,
    ring_difference_filter,
    stack_statistics,
)
from gplws.tiling import tiles

# Estimates, not computations: shares of the true value.
NOISE_TOLERANCE = 0.12


def assert_same(whole, cut):
    assert (whole.n_frames, whole.n_pixels) == (cut.n_frames, cut.n_pixels)
    torch.testing.assert_close(whole.brightness, cut.brightness)
    torch.testing.assert_close(whole.power, cut.power)
    for name in ("lowest", "flicker", "widths"):
        one, other = getattr(whole, name), getattr(cut, name)
        assert one.sum() == other.sum()
        assert (one - other).abs().sum() <= 4  # rounding may move a pixel to the next bin
    assert cut.noise() == pytest.approx(whole.noise(), rel=1e-4)


@pytest.mark.parametrize("size", [(40, 300), (120, 130)])
def test_tiles_add_up_to_the_whole_stack(size):
    frames = textured_stack(n_frames=7, size=size, noise=0.01)
    cut = tiles(*size, 5000, STATISTICS_REACH)
    assert len(cut) > 2
    first, *others = (
        part_statistics(frames[(slice(None), *tile.seen)], tile.inner) for tile in cut
    )
    assert_same(stack_statistics(frames), sum(others, first))


@pytest.mark.parametrize("sigma", [0.002, 0.02])
@pytest.mark.parametrize("n_frames", [3, 10, 60])
def test_white_noise_is_measured(sigma, n_frames):
    frames = noise_stack(n_frames, (128, 96), sigma)
    true = ring_difference_filter(frames).abs().mean()
    assert stack_statistics(frames).noise() == pytest.approx(float(true), rel=NOISE_TOLERANCE)


def test_noise_is_measured_between_texture_too():
    clean = textured_stack(n_frames=20, noise=0.0)
    noisy = textured_stack(n_frames=20, noise=0.02)
    true = float(ring_difference_filter(noisy - clean).abs().mean())
    assert 0.8 * true < stack_statistics(noisy).noise() < 2 * true


def test_no_light_and_constants_are_no_noise():
    statistics = stack_statistics(torch.zeros(4, 30, 30))
    assert statistics.noise() == 0 and statistics.peak_width() == 0
    assert torch.equal(statistics.gains(), torch.ones(4))


def test_gains_undo_a_drifting_lamp():
    frames = textured_stack(n_frames=9)
    drift = torch.linspace(1, 0.5, 9)
    gains = stack_statistics(frames * drift.view(-1, 1, 1)).gains()
    steady = stack_statistics(frames).gains()
    torch.testing.assert_close(gains * drift / (gains * drift).mean(), steady, rtol=1e-3, atol=0)
    assert gains.mean() == pytest.approx(1)


@pytest.mark.parametrize("background", ["of each frame", "of the stack", "nearly all"])
def test_frames_without_their_background_have_no_gains(background):
    frames = textured_stack(n_frames=9, noise=0.01)
    means = frames.mean((1, 2), keepdim=True)
    taken = {"of each frame": means, "of the stack": means.mean(), "nearly all": 0.999 * means}
    assert torch.equal(stack_statistics(frames - taken[background]).gains(), torch.ones(9))


def test_a_dark_frame_leaves_the_others_their_gains():
    frames = textured_stack(n_frames=4) * torch.tensor([1.0, 0.0, 0.5, 1.0]).view(-1, 1, 1)
    gains = stack_statistics(frames).gains()
    assert gains[2] == pytest.approx(2 * float(gains[0]), rel=0.01)


@pytest.mark.parametrize("width", [1.5, 3.0, 6.0])
def test_the_width_of_peaks_is_found(width):
    frames = textured_stack(n_frames=40, width=width)
    assert stack_statistics(frames).peak_width() == pytest.approx(2.355 * width, abs=1)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.ones(4, 4), ValueError, r"\(N, H, W\)"),
        (torch.ones(2, 0, 4), ValueError, "not empty"),
        (torch.ones(2, 4, 4, dtype=torch.float64), TypeError, "float64"),
    ],
)
def test_wrong_frames_are_named(frames, error, message):
    with pytest.raises(error, match=message):
        stack_statistics(frames)
