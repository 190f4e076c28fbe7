"""What regularisation lowers."""

from __future__ import annotations

import math

from torch import Tensor

from gplws.ops.reference import NEIGHBOURS, neighbour_difference, similarity


def regularisation_energy(
    result: Tensor,
    depth: Tensor,
    confidence: Tensor,
    guide: Tensor,
    *,
    strength: float,
    data_scale: float,
    smoothness_scale: float,
    guide_scale: float,
) -> Tensor:
    """E of ``result``, (H, W) maps each, as one number that has derivatives."""

    def penalty(x: Tensor, scale: float) -> Tensor:
        return scale**2 * (1 - similarity(x, scale))

    energy = (confidence * penalty(result - depth, data_scale)).sum()
    for offset in NEIGHBOURS:
        weight = strength / math.hypot(*offset)
        weights = weight * similarity(neighbour_difference(guide, offset), guide_scale)
        steps = neighbour_difference(result, offset)
        energy = energy + (weights * penalty(steps, smoothness_scale)).sum()
    return energy
