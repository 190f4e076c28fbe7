"""Cost aggregation: focus responses averaged over a neighbourhood."""

from __future__ import annotations

import math

from torch import Tensor

from gplws.classical.focus_measures import _check_images, _in_chunks, mirror

# The cubic B-spline [1, 4, 6, 4, 1] / 16. With its taps 1, 2, 4, ... pixels apart, level after
# level, it approaches a Gaussian whose width doubles while the work per level stays the same.
_REACH_PER_SPACING = 2


def aggregate(volume: Tensor, levels: int = 2) -> Tensor:
    """Averages each frame with a bell-shaped window that sums to one.

    The window is the product of ``levels`` cubic B-splines with taps 1, 2, 4, ... pixels apart
    along both axes; see :func:`aggregation_sigma` for its width. Borders are mirrored; NaN spreads
    over :func:`aggregation_reach`.

    Args:
        volume: (..., H, W) float32 or float64 responses.
        levels: 0 returns a copy; each further level about doubles the width.

    Returns:
        (..., H, W) averaged responses; not below the minimum of ``volume``; differentiable.

    Raises:
        ValueError: ``levels`` is negative, or ``volume`` has no H and W.
        TypeError: ``volume`` is not of a floating dtype.

    Source:
        The "a trous" B-spline transform: Starck and Murtagh, Astronomical Image and Data
        Analysis, Springer, 2006, doi:10.1007/978-3-540-33025-7.
    """
    _check_images("volume", volume)
    if levels < 0:
        raise ValueError(f"levels: expected at least 0, got {levels}")
    return _in_chunks(lambda chunk: smooth(chunk, 0, levels), volume)


def aggregation_sigma(levels: int) -> float:
    """Standard deviation of the window of :func:`aggregate`, px: 1, 2.24, 4.58, 9.22 for 1..4."""
    return math.sqrt((4**levels - 1) / 3)


def aggregation_reach(levels: int) -> int:
    """How far a pixel's window reaches, px: 2, 6, 14, 30 for 1..4 levels."""
    return _REACH_PER_SPACING * (2**levels - 1)


def smooth(images: Tensor, first: int, last: int) -> Tensor:
    """Levels ``first`` to ``last - 1`` of the window over (C, H, W), all images at a time."""
    result = images
    for level in range(first, last):
        result = _spline(_spline(result, -1, 2**level), -2, 2**level)
    return result if last > first else images.clone()


def _spline(images: Tensor, dim: int, spacing: int) -> Tensor:
    size = images.shape[dim]
    padded = mirror(images, _REACH_PER_SPACING * spacing, dim)
    taps = [padded.narrow(dim, k * spacing, size) for k in range(5)]
    total = taps[0] + taps[4]
    total.add_(taps[1], alpha=4).add_(taps[3], alpha=4).add_(taps[2], alpha=6)
    return total.mul_(1 / 16)
