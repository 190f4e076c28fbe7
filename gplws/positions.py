"""Focus positions of the frames of a stack, and frames between them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gplws.ops.reference import frame_at


def rise_or_fall(positions: ArrayLike | Tensor) -> bool:
    """Whether positions (N,), each from one to the next, all rise or all fall; NaN does neither."""
    if isinstance(positions, Tensor):
        steps = positions.diff()
        return bool((steps > 0).all() or (steps < 0).all())
    differences = np.diff(positions)
    return bool((differences > 0).all() or (differences < 0).all())


def frame_index(depth: Tensor, positions: Tensor, *, extrapolate: bool = False) -> Tensor:
    """Where a depth lies between focus positions: linear, and differentiable in ``depth``.

    Args:
        depth: any shape, unit of ``positions``.
        positions: (N,) strictly rising or falling, N >= 1.
        extrapolate: go on beyond the ends with the step there, which takes N >= 2; else NaN.

    Returns:
        Frame numbers with fractions, shape of ``depth``.
    """
    if positions.numel() == 1:
        return torch.where(depth == positions[0], 0.0, torch.nan)
    sign = -1.0 if bool(positions[1] < positions[0]) else 1.0
    index = frame_at(sign * positions, sign * depth)
    if extrapolate:
        return index
    inside = (depth >= positions.min()) & (depth <= positions.max())
    return torch.where(inside, index, torch.nan)
