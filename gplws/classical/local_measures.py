"""Focus measures from the differences of neighbouring pixels, and their local statistics.

All of them are magnitudes: in the unit of the frames, 0 for a constant image (1e-10 where a root is
taken, which then has a derivative), twice as large for twice the contrast. Borders are mirrored
without repeating the edge pixel; NaN spreads over the reach of the filter; results are
differentiable, but for kinks at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gplws.classical.focus_measures import check_images, in_chunks
from gplws.ops.local_filters import second_differences
from gplws.ops.reference import Shifted

# The square root of an energy has an infinite slope at 0; this keeps gradients finite, and lies
# below what float32 can tell from 0 in images of 0..1.
_LEAST_ENERGY = 1e-20


def sum_modified_laplacian(frames: Tensor, *, spacing: int = 1) -> Tensor:
    """Modified Laplacian: second differences along rows and columns, without their signs.

    In a Laplacian the two may cancel; here they add up. The sum over a window that gives the
    measure its name is left to the aggregation.

    Args:
        frames: (..., H, W) float32 or float64 images.
        spacing: distance of the pixels that are compared, px, >= 1.

    Returns:
        (..., H, W) responses >= 0, dtype and unit of ``frames``.

    Raises:
        ValueError: ``spacing`` is below 1, or ``frames`` has no H and W.
        TypeError: ``frames`` is not of a floating dtype.

    Source:
        Nayar and Nakagawa, "Shape from focus", IEEE TPAMI 16(8), 1994, doi:10.1109/34.308479.
    """
    check_images("frames", frames)
    _check_spacing("spacing", spacing)
    return _second_differences(frames, [(0, spacing), (spacing, 0)])


def multi_directional_modified_laplacian(
    frames: Tensor, *, spacings: tuple[int, ...] = (1, 2, 3)
) -> Tensor:
    """Second differences along 0, 45, 90 and 135 degrees at several spacings, without their signs.

    Args:
        frames: (..., H, W) float32 or float64 images.
        spacings: distances of the pixels that are compared, in rows and columns, px, >= 1.

    Returns:
        (..., H, W) sum over directions and spacings, >= 0, dtype and unit of ``frames``.

    Raises:
        ValueError: no spacing, one below 1, or ``frames`` has no H and W.
        TypeError: ``frames`` is not of a floating dtype.

    Source:
        After Yan et al., Pattern Recognition 98, 2020. The weights of directions and spacings
        there are not known to this package: all are 1 here.
    """
    check_images("frames", frames)
    if not spacings:
        raise ValueError("spacings: expected at least one")
    for spacing in spacings:
        _check_spacing("spacings", spacing)
    directions = [
        (dy * s, dx * s) for s in spacings for dy, dx in ((0, 1), (1, 1), (1, 0), (1, -1))
    ]
    return _second_differences(frames, directions)


def tenengrad(frames: Tensor) -> Tensor:
    """Magnitude of the gradient, by the Sobel operator.

    The mean of its square over a window is the Tenengrad of the literature, there with a threshold
    that is not used here.

    Args:
        frames: (..., H, W) float32 or float64 images.

    Returns:
        (..., H, W) responses >= 0, 8 times the gradient per pixel.

    Raises:
        ValueError: ``frames`` has no H and W.
        TypeError: ``frames`` is not of a floating dtype.

    Source:
        Krotkov, "Focusing", International Journal of Computer Vision 1, 1988,
        doi:10.1007/BF00127822.
    """
    check_images("frames", frames)
    return in_chunks(_sobel_magnitude, frames)


def gray_level_deviation(frames: Tensor, *, radius: int = 2) -> Tensor:
    """Standard deviation of the gray levels in a square window; its square is their variance.

    Args:
        frames: (..., H, W) float32 or float64 images.
        radius: the window has 2 radius + 1 pixels along each side, >= 1.

    Returns:
        (..., H, W) responses >= 0, unit of ``frames``.

    Raises:
        ValueError: ``radius`` is below 1, or ``frames`` has no H and W.
        TypeError: ``frames`` is not of a floating dtype.

    Source:
        Gray level variance: Pertuz et al., "Analysis of focus measure operators for
        shape-from-focus", Pattern Recognition 46(5), 2013, doi:10.1016/j.patcog.2012.11.011.
    """
    check_images("frames", frames)
    _check_spacing("radius", radius)
    return in_chunks(lambda chunk: _window_deviation(chunk, radius), frames)


def _check_spacing(name: str, spacing: int) -> None:
    if spacing < 1:
        raise ValueError(f"{name}: expected at least 1, got {spacing}")


def _second_differences(frames: Tensor, directions: list[tuple[int, int]]) -> Tensor:
    return in_chunks(lambda chunk: second_differences(chunk, directions), frames, by_kernel=True)


def _sobel_magnitude(images: Tensor) -> Tensor:
    at = Shifted(images, 1)
    right, left = (at(-1, s) + 2 * at(0, s) + at(1, s) for s in (1, -1))
    below, above = (at(s, -1) + 2 * at(s, 0) + at(s, 1) for s in (1, -1))
    energy = (right - left).square() + (below - above).square()
    return energy.clamp(min=_LEAST_ENERGY).sqrt()


def _window_deviation(images: Tensor, radius: int) -> Tensor:
    at = Shifted(images, radius)
    total = torch.zeros_like(images)
    squares = torch.zeros_like(images)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            # Against the pixel itself, not against 0: E(d^2) - E(d)^2 then cancels few digits.
            difference = at(dy, dx) - images
            total.add_(difference)
            squares.add_(difference.square())
    count = (2 * radius + 1) ** 2
    variance = squares / count - (total / count).square()
    return variance.clamp(min=_LEAST_ENERGY).sqrt()
