"""Filters of focus measures: small symmetric ones, and second differences without their signs.

On the CPU in float32 these are own kernels. Elsewhere, and where derivatives are taken, they are
stock ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops._arguments import has_plain_kernel, require_floats, require_one_device, require_shape

_MOST_REACH = 2**12


def symmetric_filter(images: Tensor, weights: Tensor) -> Tensor:
    """Correlation with a filter that is symmetric in rows and in columns.

    Beyond the borders images are mirrored, without repeating the edge, again and again where they
    are smaller than the filter. NaN spreads over the filter's reach.

    Args:
        images: (C, H, W) float.
        weights: (R + 1, R + 1), dtype of ``images``, R <= 4096: the weight at the offset (dy, dx)
            of rows and columns is ``weights[|dy|, |dx|]``, out to R pixels.

    Returns:
        (C, H, W), dtype of ``images``; differentiable.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: the tensors are not of one floating dtype.
    """
    op = "symmetric_filter"
    require_floats(op, images=images, weights=weights)
    require_one_device(op, images=images, weights=weights)
    _require_images(op, images)
    if weights.dim() != 2 or not 1 <= weights.shape[0] <= _MOST_REACH + 1:
        raise ValueError(f"{op}: weights must be (R + 1, R + 1), got shape {tuple(weights.shape)}")
    require_shape(op, "weights", weights, (weights.shape[0],) * 2, "(R + 1, R + 1)")
    if not has_plain_kernel(images, weights):
        return reference.symmetric_filter(images, weights)
    return torch.ops.gplws.symmetric_filter.default(images, weights)


def second_differences(images: Tensor, shifts: Tensor) -> Tensor:
    """Sum over shifts d of ``|2 I(p) - I(p + d) - I(p - d)|``.

    Borders as in :func:`symmetric_filter`.

    Args:
        images: (C, H, W) float.
        shifts: (D, 2) int64 on the device of ``images``, D >= 1: rows and columns, within 4096 px.

    Returns:
        (C, H, W), dtype of ``images``, >= 0; differentiable, but for the kinks at 0.

    Raises:
        ValueError: a shape or a device does not fit, or a shift is too large.
        TypeError: ``images`` is not of a floating dtype, or ``shifts`` not of int64.
    """
    op = "second_differences"
    require_floats(op, images=images)
    require_one_device(op, images=images, shifts=shifts)
    _require_images(op, images)
    if shifts.dtype != torch.int64:
        raise TypeError(f"{op}: shifts must be int64, got {shifts.dtype}")
    if shifts.dim() != 2 or shifts.shape[0] == 0 or shifts.shape[1] != 2:
        raise ValueError(f"{op}: shifts must be (D, 2), D >= 1, got shape {tuple(shifts.shape)}")
    if not has_plain_kernel(images):
        return reference.second_differences(images, shifts)
    return torch.ops.gplws.second_differences.default(images, shifts)


def _require_images(op: str, images: Tensor) -> None:
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
