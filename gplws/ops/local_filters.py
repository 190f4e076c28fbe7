"""Filters of focus measures: small symmetric ones, and second differences without their signs.

On the CPU in float32 these are own kernels. Elsewhere, and where derivatives are taken, they are
stock ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops.arguments import (
    MOST_REACH,
    has_plain_kernel,
    require_floats,
    require_one_device,
)


def symmetric_filter(images: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Correlation with a filter that is symmetric in rows and in columns.

    Beyond the borders images are mirrored, without repeating the edge, again and again where they
    are smaller than the filter. NaN spreads over the filter's reach.

    Args:
        images: (C, H, W) float.
        weights: R + 1 rows of R + 1 numbers, R <= 4096: the weight at the offset (dy, dx) of rows
            and columns is ``weights[|dy|][|dx|]``, out to R pixels.

    Returns:
        (C, H, W), dtype of ``images``; differentiable.

    Raises:
        ValueError: ``images`` is not 3-D, or ``weights`` is not square.
        TypeError: ``images`` is not of a floating dtype.

    Example:
        >>> symmetric_filter(torch.ones(2, 5, 6), [[0.2, 0.1], [0.1, 0.1]]).shape
        torch.Size([2, 5, 6])
    """
    op = "symmetric_filter"
    _require_images(op, images)
    size = len(weights)
    if not 1 <= size <= MOST_REACH + 1 or any(len(row) != size for row in weights):
        raise ValueError(f"{op}: weights must be R + 1 rows of R + 1 numbers, R <= {MOST_REACH}")
    if not has_plain_kernel(images):
        return reference.symmetric_filter(images, weights)
    return torch.ops.gplws.symmetric_filter.default(
        images, torch.tensor(weights, dtype=images.dtype)
    )


def second_differences(images: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Sum over shifts d of ``|2 I(p) - I(p + d) - I(p - d)|``.

    Borders as in :func:`symmetric_filter`.

    Args:
        images: (C, H, W) float.
        shifts: one or more of rows and columns, within 4096 px.

    Returns:
        (C, H, W), dtype of ``images``, >= 0; differentiable, but for the kinks at 0.

    Raises:
        ValueError: ``images`` is not 3-D, there is no shift, or one is too large.
        TypeError: ``images`` is not of a floating dtype.

    Example:
        >>> second_differences(torch.ones(2, 5, 6), [(0, 1), (1, 0)]).any()
        tensor(False)
    """
    op = "second_differences"
    _require_images(op, images)
    if not shifts:
        raise ValueError(f"{op}: shifts must hold at least one")
    for shift in shifts:
        if len(shift) != 2 or max(map(abs, shift)) > MOST_REACH:
            raise ValueError(
                f"{op}: shifts must be rows and columns within {MOST_REACH} px, got {shift}"
            )
    if not has_plain_kernel(images):
        return reference.second_differences(images, shifts)
    return torch.ops.gplws.second_differences.default(
        images, torch.tensor(shifts, dtype=torch.int64)
    )


def _require_images(op: str, images: Tensor) -> None:
    require_floats(op, images=images)
    if images.dim() != 3:
        raise ValueError(f"{op}: images must be (C, H, W), got shape {tuple(images.shape)}")


@torch.library.register_fake("gplws::symmetric_filter")
def _filter_fake(images: Tensor, weights: Tensor) -> Tensor:
    require_one_device("symmetric_filter", images=images, weights=weights)
    return torch.empty_like(images, memory_format=torch.contiguous_format)


@torch.library.register_fake("gplws::second_differences")
def _differences_fake(images: Tensor, shifts: Tensor) -> Tensor:
    require_one_device("second_differences", images=images, shifts=shifts)
    return torch.empty_like(images, memory_format=torch.contiguous_format)
