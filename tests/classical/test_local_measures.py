"""SML, MDML, Tenengrad and gray level deviation against formulas in float64 by scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from gplws.classical import (
    gray_level_deviation,
    multi_directional_modified_laplacian,
    sum_modified_laplacian,
    tenengrad,
)

MEASURES = (
    sum_modified_laplacian,
    multi_directional_modified_laplacian,
    tenengrad,
    gray_level_deviation,
)
SIZES = [(9, 7), (16, 33)]


def correlated(image, kernel):
    """scipy calls a mirror that does not repeat the edge pixel "mirror"."""
    return ndimage.correlate(image, np.asarray(kernel, float), mode="mirror")


def second_difference(image, dy, dx):
    kernel = np.zeros((2 * abs(dy) + 1, 2 * abs(dx) + 1))
    middle = abs(dy), abs(dx)
    kernel[middle] = 2
    kernel[middle[0] + dy, middle[1] + dx] -= 1
    kernel[middle[0] - dy, middle[1] - dx] -= 1
    return np.abs(correlated(image, kernel))


def expected_sml(image, spacing=1):
    return second_difference(image, 0, spacing) + second_difference(image, spacing, 0)


def expected_mdml(image, spacings=(1, 2, 3)):
    directions = [(0, 1), (1, 1), (1, 0), (1, -1)]
    return sum(second_difference(image, s * dy, s * dx) for s in spacings for dy, dx in directions)


def expected_tenengrad(image):
    return np.hypot(*(ndimage.sobel(image, axis, mode="mirror") for axis in (0, 1)))


def expected_deviation(image, radius=2):
    return ndimage.generic_filter(image, np.std, 2 * radius + 1, mode="mirror")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("measure", "expected", "options"),
    [
        (sum_modified_laplacian, expected_sml, {}),
        (sum_modified_laplacian, expected_sml, {"spacing": 3}),
        (multi_directional_modified_laplacian, expected_mdml, {}),
        (multi_directional_modified_laplacian, expected_mdml, {"spacings": (2,)}),
        (tenengrad, expected_tenengrad, {}),
        (gray_level_deviation, expected_deviation, {}),
        (gray_level_deviation, expected_deviation, {"radius": 1}),
    ],
)
def test_measures_equal_their_formulas(size, measure, expected, options):
    frames = torch.rand(2, *size, dtype=torch.float64)
    truth = torch.from_numpy(np.stack([expected(frame.numpy(), **options) for frame in frames]))
    torch.testing.assert_close(measure(frames, **options), truth, rtol=0, atol=1e-9)
    found = measure(frames.float(), **options)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_contrast_counts_and_brightness_does_not(measure):
    frames = torch.rand(3, 12, 10)
    expected = measure(frames)
    torch.testing.assert_close(measure(0.25 * frames + 0.5), 0.25 * expected, rtol=1e-4, atol=1e-6)
    assert measure(torch.full((1, 6, 6), 0.7)).max() < 1e-6


@pytest.mark.parametrize("measure", MEASURES)
def test_turned_and_mirrored_images_have_turned_and_mirrored_responses(measure):
    frames = torch.rand(2, 14, 11)
    expected = measure(frames)
    torch.testing.assert_close(measure(frames.flip(-1)).flip(-1), expected)
    torch.testing.assert_close(measure(frames.mT).mT, expected)


@pytest.mark.parametrize("measure", MEASURES)
def test_leading_axes_and_tiny_images_work(measure):
    frames = torch.rand(2, 3, 5, 6)
    torch.testing.assert_close(measure(frames)[1, 2], measure(frames[1, 2]))
    assert measure(torch.rand(2, 1, 1)).max() < 1e-6
    assert measure(torch.empty(0, 4, 4)).shape == (0, 4, 4)


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_agree_with_finite_differences(measure):
    frames = torch.rand(1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(measure, (frames,))


def test_a_ramp_has_a_gradient_and_no_second_difference():
    ramp = 0.01 * torch.arange(20.0).repeat(20, 1)
    assert sum_modified_laplacian(ramp)[:, 3:-3].max() < 1e-6
    torch.testing.assert_close(tenengrad(ramp)[:, 3:-3], torch.full((20, 14), 0.08))
    deviation = torch.full((20, 14), 0.01 * 2**0.5)  # of -2 .. 2
    torch.testing.assert_close(gray_level_deviation(ramp)[:, 3:-3], deviation)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: sum_modified_laplacian(f, spacing=0), ValueError, "spacing: .*got 0"),
        (
            lambda f: multi_directional_modified_laplacian(f, spacings=()),
            ValueError,
            "spacings: expected at least one",
        ),
        (
            lambda f: multi_directional_modified_laplacian(f, spacings=(1, 0)),
            ValueError,
            "spacings: .*got 0",
        ),
        (lambda f: gray_level_deviation(f, radius=0), ValueError, "radius: .*got 0"),
        (lambda f: tenengrad(f[0, 0]), ValueError, "frames: expected .* H, W"),
        (lambda f: tenengrad(f.to(torch.uint8)), TypeError, "frames: .*uint8"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(1, 5, 5))
