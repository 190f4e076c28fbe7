"""Cost aggregation: focus responses averaged over a neighbourhood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gplws.classical.focus_measures import check_images, in_chunks
from gplws.ops import reference
from gplws.ops.spline_smooth import spline_smooth

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
    check_images("volume", volume)
    if levels < 0:
        raise ValueError(f"levels: expected at least 0, got {levels}")
    return in_chunks(lambda chunk: smooth(chunk, 0, levels), volume)


def aggregation_sigma(levels: int) -> float:
    """Standard deviation of the window of :func:`aggregate`, px: 1, 2.24, 4.58, 9.22 for 1..4."""
    return math.sqrt((4**levels - 1) / 3)


def aggregation_reach(levels: int) -> int:
    """How far a pixel's window reaches, px: 2, 6, 14, 30 for 1..4 levels."""
    return _REACH_PER_SPACING * (2**levels - 1)


def smooth(images: Tensor, first: int, last: int, out: Tensor | None = None) -> Tensor:
    """Levels ``first`` to ``last - 1`` of the window over (C, H, W); in ``out`` if it is given."""
    on_kernels = images.device.type == "cpu" and images.dtype == torch.float32
    differentiable = torch.is_grad_enabled() and images.requires_grad
    result = images
    for level in range(first, last):
        if not on_kernels:
            result = reference.spline_smooth(result, spacing=2**level)
        else:
            given = out if level == last - 1 and not differentiable else None
            result = spline_smooth(result, spacing=2**level, out=given)
    if out is None:
        return result if last > first else images.clone()
    return out if result is out else out.copy_(result)
