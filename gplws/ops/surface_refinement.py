"""Refinement of a depth map along its own surface: smooth it, sample beside it, fit the peak.

On the CPU in float32 these are own kernels. Elsewhere, and where derivatives are taken, they are
stock ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops.arguments import (
    has_plain_kernel,
    require_floats,
    require_frames,
    require_one_device,
    require_positive,
    require_shape,
)
from gplws.ops.reference import SURFACE_SAMPLES, PeakFit, SurfaceSamples

_SAMPLES = 2 * SURFACE_SAMPLES + 1


def smooth_surface(depth: Tensor, *, limit: float) -> Tensor:
    """Weighted mean of nearby depths, in which depths that are far away have no say: steps stay.

    A bilateral filter over 7 x 7 pixels: a Gaussian of 2 pixels, times Tukey's biweight
    ``(1 - (difference / limit)^2)^2`` of the difference of depth. Edge pixels are repeated.

    Args:
        depth: (H, W) float, any unit.
        limit: difference from which on a neighbour does not count, > 0, unit of ``depth``.

    Returns:
        (H, W), dtype of ``depth``; differentiable.

    Raises:
        ValueError: ``depth`` is not 2-D, or ``limit`` is not positive.
        TypeError: ``depth`` is not of a floating dtype.

    Source:
        C. Tomasi, R. Manduchi, ICCV 1998, doi:10.1109/ICCV.1998.710815; with the biweight: F.
        Durand, J. Dorsey, SIGGRAPH 2002, doi:10.1145/566654.566574.
    """
    op = "smooth_surface"
    require_floats(op, depth=depth)
    if depth.dim() != 2:
        raise ValueError(f"{op}: depth must be (H, W), got shape {tuple(depth.shape)}")
    if not limit > 0:
        raise ValueError(f"{op}: limit must be positive, got {limit}")
    if not has_plain_kernel(depth):
        return reference.smooth_surface(depth, limit=limit)
    return torch.ops.gplws.smooth_surface.default(depth, float(limit))


def sample_surface(responses: Tensor, surface: Tensor, *, spacing: int = 1) -> SurfaceSamples:
    """Focus responses at a surface and at three places before and three behind it.

    Between frames they are interpolated linearly. Near an end of the stack there are as few samples
    on the far side as on the near one, but at least two: peaks are no parabolas, and one flank
    alone draws the vertex outwards. The weight of a sample falls gradually as the end comes closer,
    so that neighbouring pixels have much the same samples.

    Args:
        responses: (N, H, W) float, 1 to 2^24 frames.
        surface: (H, W), dtype of ``responses``, frame numbers 0 .. N - 1.
        spacing: distance of neighbouring samples, frames, >= 1.

    Returns:
        Samples -3 .. 3 of each pixel; differentiable.

    Raises:
        ValueError: a shape, a device or ``spacing`` does not fit.
        TypeError: the tensors are not of one floating dtype.
    """
    op = "sample_surface"
    require_floats(op, responses=responses, surface=surface)
    require_one_device(op, responses=responses, surface=surface)
    if responses.dim() != 3:
        raise ValueError(f"{op}: responses must be (N, H, W), got shape {tuple(responses.shape)}")
    require_frames(op, "responses", responses.shape[0])
    require_shape(op, "surface", surface, tuple(responses.shape[1:]), "(H, W) of responses")
    require_positive(op, spacing=spacing)
    if not has_plain_kernel(responses, surface):
        return reference.sample_surface(responses, surface, spacing=spacing)
    return SurfaceSamples(*torch.ops.gplws.sample_surface.default(responses, surface, spacing))


def fit_peak(
    values: Tensor,
    middle: Tensor | None = None,
    distances: Tensor | None = None,
    weights: Tensor | None = None,
) -> PeakFit:
    """Vertex of a weighted parabola through the logarithms of seven samples of a focus peak.

    Weights grow with the square of the value, so that the noise floor beside a narrow peak does not
    widen it. The vertex stays within the samples.

    Args:
        values: (7, H, W) float responses, >= 0, as of :func:`sample_surface`; they may have been
            averaged over neighbours.
        middle: (7, H, W) the middle response times the weight of each sample, averaged alike. A
            sample is compared with the middle one of those pixels alone that have it.
        distances: (7, H, W) distances times weights, averaged alike.
        weights: (7, H, W) weights, averaged alike. Without these three the samples lie at -3 .. 3
            and count alike.

    Returns:
        Vertex in spacings, and where there is one; differentiable.

    Raises:
        ValueError: a shape or a device does not fit, or only some of the last three are given.
        TypeError: the tensors are not of one floating dtype.

    Source:
        Guo, "A simple algorithm for fitting a Gaussian function", IEEE Signal Processing Magazine
        28(5), 2011, doi:10.1109/MSP.2011.941846.
    """
    op = "fit_peak"
    others = {"middle": middle, "distances": distances, "weights": weights}
    require_floats(op, values=values, **others)
    require_one_device(op, values=values, **others)
    if values.dim() != 3 or values.shape[0] != _SAMPLES:
        raise ValueError(f"{op}: values must be (7, H, W), got shape {tuple(values.shape)}")
    given = [tensor for tensor in others.values() if tensor is not None]
    if len(given) not in (0, len(others)):
        raise ValueError(f"{op}: middle, distances and weights go together")
    for name, tensor in others.items():
        if tensor is not None:
            require_shape(op, name, tensor, tuple(values.shape), "the shape of values")
    if not has_plain_kernel(values, *given):
        return reference.fit_peak(values, middle, distances, weights)
    return PeakFit(*torch.ops.gplws.fit_peak.default(values, middle, distances, weights))


@torch.library.register_fake("gplws::smooth_surface")
def _smooth_fake(depth: Tensor, limit: float) -> Tensor:
    return torch.empty_like(depth, memory_format=torch.contiguous_format)


@torch.library.register_fake("gplws::sample_surface")
def _sample_fake(responses: Tensor, surface: Tensor, spacing: int) -> tuple[Tensor, ...]:
    require_one_device("sample_surface", responses=responses, surface=surface)
    return tuple(surface.new_empty((_SAMPLES, *surface.shape)) for _ in SurfaceSamples._fields)


@torch.library.register_fake("gplws::fit_peak")
def _fit_fake(
    values: Tensor, middle: Tensor | None, distances: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    others = {"middle": middle, "distances": distances, "weights": weights}
    require_one_device("fit_peak", values=values, **others)
    vertex = values.new_empty(values.shape[1:])
    return vertex, torch.empty_like(vertex, dtype=torch.bool)
