"""Regularisation of depth maps: outliers give way to their surroundings, steps stay.

On the CPU in float32 this is an own kernel. Elsewhere it is stock ops.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops.arguments import (
    has_plain_kernel,
    require_floats,
    require_one_device,
    require_positive,
    require_shape,
)


def regularise_surface(
    depth: Tensor,
    confidence: Tensor,
    guide: Tensor,
    *,
    strength: float,
    data_scale: float,
    smoothness_scale: float,
    guide_scale: float,
    iterations: int,
) -> Tensor:
    """Depth maps that agree with ``depth`` where that is confident, and with their neighbours.

    Lowers the energy that :mod:`gplws.classical.regularisation` writes down: each iteration renews
    a quadratic majorant and lowers it by 12 steps of conjugate gradients, preconditioned by the
    diagonal. The kernel takes fewer where the residual is down to rounding, and gives the same for
    every number of threads, to the bit.

    Args:
        depth: (B, H, W) float, finite.
        confidence: shape and dtype of ``depth``, >= 0, finite.
        guide: shape and dtype of ``depth``, finite.
        strength: weight of the neighbours, >= 0.
        data_scale: deviation from ``depth`` beyond which a pixel counts as an outlier, > 0.
        smoothness_scale: difference of neighbours beyond which it is a step, > 0.
        guide_scale: difference of neighbours in ``guide`` beyond which they count as two objects,
            > 0.
        iterations: how often the majorant is renewed, >= 1.

    Returns:
        (B, H, W), dtype of ``depth``; not differentiable.

    Raises:
        ValueError: a shape, a device or an option does not fit.
        TypeError: the tensors are not of one floating dtype, or ``iterations`` is no integer.
    """
    op = "regularise_surface"
    require_floats(op, depth=depth, confidence=confidence, guide=guide)
    require_one_device(op, depth=depth, confidence=confidence, guide=guide)
    if depth.dim() != 3:
        raise ValueError(f"{op}: depth must be (B, H, W), got shape {tuple(depth.shape)}")
    require_shape(op, "confidence", confidence, tuple(depth.shape), "the shape of depth")
    require_shape(op, "guide", guide, tuple(depth.shape), "the shape of depth")
    scales = {
        "data_scale": data_scale,
        "smoothness_scale": smoothness_scale,
        "guide_scale": guide_scale,
    }
    for name, scale in scales.items():
        if not 0 < scale < math.inf:
            raise ValueError(f"{op}: {name} must be positive, got {scale}")
    if not 0 <= strength < math.inf:
        raise ValueError(f"{op}: strength must be at least 0, got {strength}")
    require_positive(op, iterations=iterations)
    with torch.no_grad():
        if not has_plain_kernel(depth, confidence, guide):
            return reference.regularise_surface(
                depth, confidence, guide, strength=strength, iterations=iterations, **scales
            )
        return torch.ops.gplws.regularise_surface.default(
            depth,
            confidence,
            guide,
            float(strength),
            float(data_scale),
            float(smoothness_scale),
            float(guide_scale),
            iterations,
        )


@torch.library.register_fake("gplws::regularise_surface")
def _fake(
    depth: Tensor,
    confidence: Tensor,
    guide: Tensor,
    strength: float,
    data_scale: float,
    smoothness_scale: float,
    guide_scale: float,
    iterations: int,
) -> Tensor:
    require_one_device("regularise_surface", depth=depth, confidence=confidence, guide=guide)
    return torch.empty_like(depth, memory_format=torch.contiguous_format)
