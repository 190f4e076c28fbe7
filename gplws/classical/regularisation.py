"""Robust regularisation of a depth map, guided by an image.

    E(d) = sum_p c_p rho(d_p - s_p; a) + strength * sum_(p, q) w_pq rho(d_p - d_q; b)

over all pixels p and all pairs (p, q) of neighbours among eight. s is the depth map that was
searched, c its confidence, w falls where the image has an edge, and

    rho(x; a) = a^2 (1 - exp(-x^2 / (2 a^2)))

grows like x^2 / 2 near 0 and stops growing beyond a few a: an outlier or a step costs the same
however large it is, so outliers give way to their surroundings, and steps stay where the image has
an edge or where they are several times b. Smaller ones where the image is plain are rounded off.
Such a penalty is not convex. It is minimised by majorising it: rho(x) lies below the parabola that
touches it at the present x, whose curvature is exp(-x^2 / (2 a^2)). The sum of these parabolas is
minimised by a few steps of conjugate gradients, and E never rises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gplws.ops.regularise_surface import regularise_surface

_ITERATIONS = 12


def regularise_depth(
    depth: Tensor,
    confidence: Tensor,
    guide: Tensor,
    *,
    strength: float = 0.3,
    data_scale: float = 1.0,
    smoothness_scale: float = 4.0,
    guide_scale: float = 0.1,
    iterations: int = _ITERATIONS,
) -> Tensor:
    """Depth map that agrees with ``depth`` where that is confident, and with its neighbours.

    Memory: 12 floats for each pixel on the CPU in float32, else some 40.

    Args:
        depth: (H, W) or (B, H, W) float32 or float64, finite, frames.
        confidence: shape and dtype of ``depth``, >= 0, finite; 0 where depth says nothing.
        guide: shape and dtype of ``depth``: all-in-focus image in 0..1, finite.
        strength: weight of the neighbours, >= 0; 0 returns ``depth``.
        data_scale: deviation from ``depth``, in frames, beyond which a pixel counts as an outlier,
            > 0.
        smoothness_scale: difference of neighbours, in frames, beyond which it is a step, > 0; where
            ``guide`` is plain, steps below three times that are rounded off.
        guide_scale: difference of neighbours in the guide beyond which they count as two objects,
            > 0.
        iterations: how often the majorant is renewed, >= 1.

    Returns:
        The depth map, shape and dtype of ``depth`` and within its range; not differentiable.

    Raises:
        ValueError: a shape or an option does not fit.
        TypeError: dtypes that are not floating, or differ.

    Source:
        After Ali and Mahmood, whose method minimises a non-convex penalty on the depth map under
        guidance by an image through majorise-minimise. Their penalty's constants, and the terms of
        the guidance, are not known to this package; penalty (Welsch's) and defaults are its own,
        chosen by measurement. Majorants of this kind: Geman and Reynolds, IEEE TPAMI 14(3), 1992,
        doi:10.1109/34.120331.

    Example:
        >>> steps = torch.where(torch.arange(16) < 8, 2.0, 9.0).repeat(16, 1)
        >>> guide = 0.1 * steps  # an edge where the step is
        >>> noisy = steps.clone()
        >>> noisy[4, 4] = 12.0
        >>> even = regularise_depth(noisy, torch.ones(16, 16), guide)
        >>> float((even - steps).abs().max()) < 0.1
        True
    """
    _check_maps(depth, confidence, guide)
    for name, value in (
        ("data_scale", data_scale),
        ("smoothness_scale", smoothness_scale),
        ("guide_scale", guide_scale),
    ):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected above 0, got {value}")
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength: expected at least 0, got {strength}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    maps = (depth, confidence, guide)
    batch = maps if depth.dim() == 3 else tuple(values[None] for values in maps)
    surface = regularise_surface(
        *batch,
        strength=strength,
        data_scale=data_scale,
        smoothness_scale=smoothness_scale,
        guide_scale=guide_scale,
        iterations=iterations,
    )
    # As the minimum does. It raises no term of E, and a few steps may not have come that far.
    low, high = (bound(batch[0], (1, 2), keepdim=True) for bound in (torch.amin, torch.amax))
    result = surface.clamp(low, high)
    return result if depth.dim() == 3 else result[0]


def _check_maps(depth: Tensor, confidence: Tensor, guide: Tensor) -> None:
    if depth.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"depth: expected float32 or float64, got {depth.dtype}")
    if depth.dim() not in (2, 3) or depth.numel() == 0:
        raise ValueError(
            f"depth: expected (H, W) or (B, H, W), not empty, got {tuple(depth.shape)}"
        )
    for name, other in (("confidence", confidence), ("guide", guide)):
        if other.dtype != depth.dtype:
            raise TypeError(f"{name}: expected {depth.dtype} as depth, got {other.dtype}")
        if other.shape != depth.shape:
            raise ValueError(
                f"{name}: expected {tuple(depth.shape)} as depth, got {tuple(other.shape)}"
            )
