"""The ops in plain torch: slow, obvious, and what the kernels are tested against.

Each function takes the arguments of the op of the same name and works in the dtype of its inputs,
so a float64 call gives the truth that float32 kernels are measured by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.grad import conv3d_weight

Refinement = Literal["none", "parabola", "gaussian"]

LOG_FLOOR = 1e-6
"""Smallest share of the peak that enters a logarithm."""

FLATNESS = 1e-5
"""A curvature below this share of the terms that it sums is rounding, not a peak."""


SURFACE_SAMPLES = 3
"""Samples on each side of a surface."""

SURFACE_REACH = 3
"""How far :func:`gplws.ops.smooth_surface` looks, pixels."""

_SURFACE_SIGMA = 2.0

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Half of the eight neighbours, (dy, dx); the others are the same pairs from the other side."""

_CONJUGATE_STEPS = 12
# A pixel's own diagonal is at least this, so that one without confidence or neighbours is defined.
_LEAST_DIAGONAL = 1e-6


class FocusSearchResult(NamedTuple):
    """What :func:`gplws.ops.focus_search` finds for each pixel."""

    depth: Tensor
    """(B, H, W) best focus position, unit of ``focus_positions``; NaN where all frames are NaN."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """(B, H, W) int64, frame of the highest response."""
    peak: Tensor
    """(B, H, W) the highest response."""
    confidence: Tensor
    """(B, H, W) in 0..1: how far the runner-up group stays below the peak."""


class SurfaceSamples(NamedTuple):
    """Responses on both sides of a surface, (7, H, W) each."""

    values: Tensor
    """Responses times their weights."""
    distances: Tensor
    """From the surface, in spacings."""
    weights: Tensor
    """0 .. 1; 0 where there is no frame."""


class PeakFit(NamedTuple):
    """What :func:`gplws.ops.fit_peak` finds for each pixel, (H, W) each."""

    vertex: Tensor
    """Place of the peak among the samples, -3 .. 3, in spacings; 0 where there is none."""
    concave: Tensor
    """bool: whether the samples have a peak."""


def group_pointwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    groups: int = 1,
    stride: int = 1,
    relu: bool = True,
    pointwise_relu: bool = True,
    residual_relu: bool = False,
) -> Tensor:
    """Grouped 3x3x3 conv, then pointwise conv, from stock ops; differentiable."""
    y = F.conv3d(x, weight, bias, stride=(1, stride, stride), padding=1, groups=groups)
    if relu:
        y = y.relu()
    if pointwise_weight is not None:
        y = F.conv3d(y, pointwise_weight, pointwise_bias)
        if pointwise_relu:
            y = y.relu()
    if residual is not None:
        y = y + residual
        if residual_relu:
            y = y.relu()
    return y


def pointwise_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1
) -> Tensor:
    """1x1x1 conv as products of matrices; differentiable.

    Where channels are few, ten times as fast as the stock conv. Not by torch.matmul, which copies
    ``x`` to make one product of them.
    """
    batch = x.shape[0]
    columns = x.flatten(2).unflatten(1, (groups, -1)).flatten(0, 1)
    matrices = _of_each_image(weight.flatten(1), batch, groups)
    if bias is None:
        y = torch.bmm(matrices, columns)
    else:
        y = torch.baddbmm(_of_each_image(bias.unsqueeze(1), batch, groups), matrices, columns)
    return y.unflatten(0, (batch, groups)).flatten(1, 2).unflatten(2, x.shape[2:])


def _of_each_image(rows: Tensor, batch: int, groups: int) -> Tensor:
    """(M, K) -> (batch * groups, M / groups, K)."""
    return rows.unflatten(0, (groups, -1)).expand(batch, -1, -1, -1).flatten(0, 1)


def conv3d_input_gradient(
    grad: Tensor, weight: Tensor, *, size: tuple[int, int], groups: int = 1, stride: int = 1
) -> Tensor:
    """Transposed 3x3x3 conv to (..., *size), from stock ops; differentiable."""
    beyond = [
        length - stride * (steps - 1) - 1
        for length, steps in zip(size, grad.shape[3:], strict=True)
    ]
    return F.conv_transpose3d(grad, weight, None, (1, stride, stride), 1, (0, *beyond), groups)


def conv3d_weight_gradient(x: Tensor, grad: Tensor, *, groups: int = 1, stride: int = 1) -> Tensor:
    """Gradient of the weight of a 3x3x3 conv, from stock ops; differentiable."""
    shape = (grad.shape[1], x.shape[1] // groups, 3, 3, 3)
    strides = (1, stride, stride)
    return conv3d_weight(x, shape, grad, strides, padding=1, groups=groups)


def up_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    groups: int,
) -> Tensor:
    """Transposed 3x3x3 conv that doubles H and W, plus a residual, from stock ops."""
    y = F.conv_transpose3d(x, weight, bias, (1, 2, 2), 1, (0, 1, 1), groups)
    return y if residual is None else y + residual


def focus_search(
    volume: Tensor,
    focus_positions: Tensor | None = None,
    *,
    groups: int = 4,
    refinement: Refinement = "parabola",
    radius: int = 1,
    log_scale: bool = False,
) -> FocusSearchResult:
    """Per-group argmax, global winner, sub-frame refinement and confidence, from stock ops."""
    batch, frames, height, width = volume.shape
    positions = _batched_positions(focus_positions, volume)  # (B, N)
    v = torch.where(volume.isnan(), -torch.inf, volume)  # (B, N, H, W)

    # Peaks: no lower than both neighbours.
    edge = v.new_full((batch, 1, height, width), -torch.inf)
    left = torch.cat([edge, v[:, :-1]], 1)
    right = torch.cat([v[:, 1:], edge], 1)
    peaks = torch.where((v >= left) & (v >= right), v, -torch.inf)

    # The best peak of each group, then the best group; max() of torch gives no promise on ties,
    # so the lowest frame is found as the first one that equals the maximum.
    size = -(-frames // groups)
    group_peaks = torch.stack([p.amax(1) for p in peaks.split(size, 1)], 1)  # (B, G', H, W)
    peak = group_peaks.amax(1)
    index = (v == peak.unsqueeze(1)).to(torch.int8).argmax(1)
    found = peak > -torch.inf
    index = torch.where(found, index, 0)

    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        confidence = _confidence(group_peaks, peak, index // size, log_scale)

    depth = refine_depth(v, positions, index, peak, refinement=refinement, radius=radius)
    depth = torch.where(found, depth, torch.nan)
    return FocusSearchResult(depth, index, peak, confidence)


def refine_depth(
    volume: Tensor,
    positions: Tensor,
    index: Tensor,
    peak: Tensor,
    *,
    refinement: Refinement,
    radius: int,
) -> Tensor:
    """Vertex of the least-squares parabola around ``index``; see :func:`focus_search`.

    Args:
        volume: (B, N, H, W) responses without NaN.
        positions: (B, N) focus positions.
        index: (B, H, W) int64, the winning frame.
        peak: (B, H, W) ``volume`` at ``index``.
        refinement: "none", "parabola" or "gaussian".
        radius: frames on each side that enter the fit.

    Returns:
        (B, H, W) depth in the unit of ``positions``; differentiable with respect to both.
    """
    batch, frames, height, width = volume.shape
    radius = min(radius, frames)
    columns = positions.to(volume.dtype)[:, :, None, None].expand(volume.shape)
    z0 = columns.gather(1, index.unsqueeze(1)).squeeze(1)
    if refinement == "none":
        return z0
    offsets = torch.arange(-radius, radius + 1, device=volume.device).view(1, -1, 1, 1)
    frame = index.unsqueeze(1) + offsets  # (B, D, H, W)
    exists = (frame >= 0) & (frame < frames)
    frame = frame.clamp(0, frames - 1)
    z = columns.gather(1, frame)
    y = volume.gather(1, frame)
    inside = exists & y.isfinite()

    # Scale: mean absolute spacing of the frames that exist in the window.
    first = (index - radius).clamp_min(0)
    last = (index + radius).clamp_max(frames - 1)
    ends = columns.gather(1, torch.stack([first, last], 1))
    scale = (ends[:, 1] - ends[:, 0]).abs() / (last - first).clamp_min(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))

    t = torch.where(inside, (z - z0.unsqueeze(1)) / scale.unsqueeze(1), 0)
    y = torch.where(inside, y, 0)
    y0 = torch.where(peak.isfinite(), peak, 0).unsqueeze(1)
    linear = y - y0
    if refinement == "gaussian":
        positive = y0 > 0
        safe = torch.where(positive, y0, 1)
        logs = (torch.maximum(y, LOG_FLOOR * safe) / safe).log()
        y = torch.where(positive, logs, linear)
    else:
        y = linear
    y = torch.where(inside, y, 0)

    # Normal equations of y = c + b t + a t^2, solved by Cramer's rule.
    n = inside.sum(1).to(y.dtype)
    t1, t2 = t.sum(1), t.square().sum(1)
    t3, t4 = t.pow(3).sum(1), t.pow(4).sum(1)
    y0s, y1, y2 = y.sum(1), (t * y).sum(1), (t.square() * y).sum(1)
    # Minors of [[n, t1, t2], [t1, t2, t3], [t2, t3, t4]] without the column of c.
    terms = (y0s * (t1 * t3 - t2 * t2), -y1 * (n * t3 - t1 * t2), y2 * (n * t2 - t1 * t1))
    a = terms[0] + terms[1] + terms[2]
    magnitude = terms[0].abs() + terms[1].abs() + terms[2].abs()
    b = -(y0s * (t1 * t4 - t2 * t3) - y1 * (n * t4 - t2 * t2) + y2 * (n * t3 - t1 * t2))
    bends = (n >= 3) & (a < -FLATNESS * magnitude) & peak.isfinite()
    vertex = torch.where(bends, -b / (2 * torch.where(bends, a, 1)), 0)

    before = columns.gather(1, (index - 1).clamp_min(0).unsqueeze(1)).squeeze(1)
    after = columns.gather(1, (index + 1).clamp_max(frames - 1).unsqueeze(1)).squeeze(1)
    low, high = torch.minimum(before, after), torch.maximum(before, after)
    return torch.minimum(torch.maximum(z0 + scale * vertex, low), high)


def _confidence(group_peaks: Tensor, peak: Tensor, winner: Tensor, log_scale: bool) -> Tensor:
    """How far the best group but ``winner`` stays below the peak."""
    group_of = torch.arange(group_peaks.shape[1], device=peak.device).view(1, -1, 1, 1)
    rivals = group_peaks.masked_fill(group_of == winner.unsqueeze(1), -torch.inf)
    runner_up = rivals.amax(1)
    if log_scale:
        confidence = 1 - (runner_up - peak).exp()
    else:
        confidence = 1 - runner_up.clamp_min(0) / peak
        confidence = torch.where(peak > 0, confidence, 0)
    return torch.where(peak.isfinite(), confidence.clamp(0, 1), 0)


def _batched_positions(focus_positions: Tensor | None, volume: Tensor) -> Tensor:
    if focus_positions is None:
        focus_positions = torch.arange(volume.shape[1], device=volume.device, dtype=volume.dtype)
    return focus_positions.expand(volume.shape[0], volume.shape[1])


def spline_smooth(images: Tensor, *, spacing: int = 1) -> Tensor:
    """[1, 4, 6, 4, 1] / 16 along both axes, mirrored at borders, from stock ops; differentiable."""
    return spline_along(spline_along(images, -1, spacing), -2, spacing)


def spline_along(images: Tensor, dim: int, spacing: int) -> Tensor:
    """The same along one axis, -1 or -2."""
    size = images.shape[dim]
    padded = mirror(images, 2 * spacing, dim)
    taps = [padded.narrow(dim, k * spacing, size) for k in range(5)]
    total = taps[0] + taps[4]
    total.add_(taps[1], alpha=4).add_(taps[3], alpha=4).add_(taps[2], alpha=6)
    return total.mul_(1 / 16)


def mirror(images: Tensor, count: int, dim: int) -> Tensor:
    """Extends axis ``dim`` (-1 or -2) by ``count`` mirrored pixels on both sides.

    The edge pixel is not repeated; an axis shorter than ``count`` is mirrored again and again.
    """
    size = images.shape[dim]
    if size > count:
        padding = (count, count, 0, 0) if dim == -1 else (0, 0, count, count)
        return F.pad(images, padding, mode="reflect")
    index = torch.arange(-count, size + count, device=images.device)
    if size == 1:
        return images.index_select(dim, torch.zeros_like(index))
    index = index.remainder(2 * (size - 1))
    return images.index_select(dim, torch.minimum(index, 2 * (size - 1) - index))


def symmetric_filter(images: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Correlation with a filter given by a quarter of it, from stock ops; differentiable.

    Sums of shifted images: for a few taps this is several times faster on a CPU than a convolution
    with one channel.
    """
    reach = len(weights) - 1
    height, width = images.shape[-2:]
    padded = mirror(mirror(images, reach, -1), reach, -2)

    def columns(offset: int) -> Tensor:
        return padded.narrow(-1, reach + offset, width)

    pairs = [columns(0)] + [columns(dx) + columns(-dx) for dx in range(1, reach + 1)]
    result = torch.zeros_like(images)
    for dy, row in enumerate(weights):
        terms = [(weight, pair) for weight, pair in zip(row, pairs, strict=True) if weight]
        if not terms:
            continue
        line = terms[0][1] * terms[0][0]
        for weight, pair in terms[1:]:
            line.add_(pair, alpha=weight)
        result.add_(line.narrow(-2, reach + dy, height))
        if dy:
            result.add_(line.narrow(-2, reach - dy, height))
    return result


def second_differences(images: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Second differences at several shifts, without signs, from stock ops; differentiable."""
    at = Shifted(images, max(max(abs(dy), abs(dx)) for dy, dx in shifts))
    total = torch.zeros_like(images)
    for dy, dx in shifts:
        total.add_((2 * images - at(dy, dx) - at(-dy, -dx)).abs_())
    return total


class Shifted:
    """Views of (C, H, W) images, mirrored at their borders, from ``dy, dx`` pixels away."""

    def __init__(self, images: Tensor, reach: int) -> None:
        self._padded = mirror(mirror(images, reach, -1), reach, -2)
        self._size, self._reach = images.shape[-2:], reach

    def __call__(self, dy: int, dx: int) -> Tensor:
        rows = self._padded.narrow(-2, self._reach + dy, self._size[0])
        return rows.narrow(-1, self._reach + dx, self._size[1])


def smooth_surface(depth: Tensor, *, limit: float) -> Tensor:
    """Bilateral filter: biweight of the difference, Gaussian of the distance; differentiable."""
    height, width = depth.shape
    reach = SURFACE_REACH
    columns = torch.arange(-reach, width + reach, device=depth.device).clamp(0, width - 1)
    rows = torch.arange(-reach, height + reach, device=depth.device).clamp(0, height - 1)
    padded = depth[rows][:, columns]
    change = torch.zeros_like(depth)
    total = torch.zeros_like(depth)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            distance = math.hypot(dy - reach, dx - reach)
            near = math.exp(-0.5 * (distance / _SURFACE_SIGMA) ** 2)
            difference = padded[dy : dy + height, dx : dx + width] - depth
            weight = (1 - (difference / limit) ** 2).clamp(min=0) ** 2 * near
            change = change + weight * difference
            total = total + weight
    return depth + change / total


def sample_surface(responses: Tensor, surface: Tensor, *, spacing: int = 1) -> SurfaceSamples:
    """Responses at a surface and at three places before and behind; differentiable."""
    n_frames = responses.shape[0]
    last = n_frames - 1.0
    farthest = (torch.minimum(surface, last - surface) / spacing).clamp(min=2)
    samples, distances, weights = [], [], []
    for k in range(-SURFACE_SAMPLES, SURFACE_SAMPLES + 1):
        # The first sample beyond an end is taken at the end.
        wanted = surface + k * spacing
        frame = wanted.clamp(0, last)
        weight = (1 - (wanted - frame).abs() / spacing).clamp(min=0)
        weights.append(weight * (farthest + 1 - abs(k)).clamp(0, 1))
        distances.append((frame - surface) / spacing)
        lower = frame.detach().floor().clamp(max=max(n_frames - 2, 0))
        index = lower.long()[None]
        before = responses.gather(0, index)[0]
        after = responses.gather(0, (index + 1).clamp(max=n_frames - 1))[0]
        samples.append(torch.lerp(before, after, frame - lower) * weights[-1])
    return SurfaceSamples(torch.stack(samples), torch.stack(distances), torch.stack(weights))


def fit_peak(
    values: Tensor,
    middle: Tensor | None = None,
    distances: Tensor | None = None,
    weights: Tensor | None = None,
) -> PeakFit:
    """Vertex of a weighted parabola through the logarithms of samples; differentiable."""
    places: Tensor | range = range(-SURFACE_SAMPLES, SURFACE_SAMPLES + 1)
    if middle is not None and distances is not None and weights is not None:
        values = values * values[SURFACE_SAMPLES] / middle.clamp(min=1e-20)
        places = distances / weights.clamp(min=1e-6)
    relative = (values / values.amax(0).clamp(min=1e-20)).clamp(min=LOG_FLOOR)
    logs = relative.log()
    shares = relative**2 if weights is None else relative**2 * weights
    s0 = s1 = s2 = s3 = s4 = y0 = y1 = y2 = torch.zeros_like(values[0])
    for share, t, log in zip(shares, places, logs, strict=True):
        s0, s1, s2 = s0 + share, s1 + share * t, s2 + share * t**2
        s3, s4 = s3 + share * t**3, s4 + share * t**4
        weighted = share * log
        y0, y1, y2 = y0 + weighted, y1 + weighted * t, y2 + weighted * t**2
    # Cramer's rule for the slope and curvature; a vertex needs their quotient only.
    slope = s0 * (y1 * s4 - s3 * y2) - y0 * (s1 * s4 - s3 * s2) + s2 * (s1 * y2 - y1 * s2)
    curvature = s0 * (s2 * y2 - y1 * s3) - s1 * (s1 * y2 - y1 * s2) + y0 * (s1 * s3 - s2 * s2)
    determinant = s0 * (s2 * s4 - s3 * s3) - s1 * (s1 * s4 - s3 * s2) + s2 * (s1 * s3 - s2 * s2)
    # Fewer than three samples (determinant 0 but for rounding) define no parabola.
    concave = (determinant > 1e-6 * s0**3) & (curvature < 0)
    vertex = -slope / (2 * torch.where(concave, curvature, -1.0))
    vertex = torch.where(concave, vertex, 0.0).clamp(-SURFACE_SAMPLES, SURFACE_SAMPLES)
    return PeakFit(vertex, concave)


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
    """Robust regularisation of depth maps (B, H, W), from stock ops; without derivatives."""
    with torch.no_grad():
        edges = [neighbour_difference(guide, offset) for offset in NEIGHBOURS]
        pairs = [
            strength / math.hypot(*offset) * similarity(edge, guide_scale)
            for offset, edge in zip(NEIGHBOURS, edges, strict=True)
        ]
        result = depth
        for _ in range(iterations):
            data = confidence * similarity(result - depth, data_scale)
            weights = [
                pair * similarity(neighbour_difference(result, offset), smoothness_scale)
                for pair, offset in zip(pairs, NEIGHBOURS, strict=True)
            ]
            result = solve_by_conjugate_gradients(data, depth, weights, result)
    return result


def similarity(difference: Tensor, scale: float) -> Tensor:
    """1 for no difference, towards 0 for one of several ``scale``."""
    return torch.exp(-0.5 * (difference / scale) ** 2)


def _parts(offset: tuple[int, int], height: int, width: int) -> tuple[tuple, tuple]:
    """Where the first and the second pixel of each pair ``offset`` apart lie in (..., H, W)."""
    dy, dx = offset
    rows, below = slice(0, height - dy), slice(dy, height)
    left, right = slice(0, width - abs(dx)), slice(abs(dx), width)
    if dx < 0:
        left, right = right, left
    return (..., rows, left), (..., below, right)


def neighbour_difference(image: Tensor, offset: tuple[int, int]) -> Tensor:
    """Second minus first pixel of each pair of neighbours ``offset`` apart."""
    first, second = _parts(offset, *image.shape[-2:])
    return image[second] - image[first]


def solve_by_conjugate_gradients(
    data: Tensor, target: Tensor, weights: list[Tensor], start: Tensor
) -> Tensor:
    """Minimum of ``sum data (d - target)^2 + sum weights (d_p - d_q)^2``, by conjugate gradients.

    Preconditioned by the diagonal, a fixed number of steps from ``start``: none of them raises the
    sum, and a GPU never has to wait for a test of convergence. They end where the residual is
    rounding: steps that follow it may run away where little holds the surface.
    """
    places = [_parts(offset, *start.shape[-2:]) for offset in NEIGHBOURS]

    def flows(x: Tensor) -> Iterator[Tensor]:
        """What goes from the second to the first pixel of each pair."""
        for weight, (first, second) in zip(weights, places, strict=True):
            yield weight * (x[second] - x[first])

    def spread(pairs: Iterable[Tensor], pixels: Tensor, sign: int) -> Tensor:
        """``pixels`` plus each value of a pair at its first, ``sign`` times it at its second."""
        for pair, (first, second) in zip(pairs, places, strict=True):
            pixels[first] += pair
            pixels[second] += sign * pair
        return pixels

    def inflow(x: Tensor) -> Tensor:
        return spread(flows(x), torch.zeros_like(x), -1)

    diagonal = spread(weights, data.clone(), 1).clamp(min=_LEAST_DIAGONAL)
    x = start.clone()
    pull = data * (target - x)
    residual = pull + inflow(x)
    terms = spread((flow.abs() for flow in flows(x)), pull.abs(), 1)
    least = torch.finfo(x.dtype).eps ** 2 * _dot(terms, terms / diagonal)
    scaled = residual / diagonal
    direction = scaled
    product = _dot(residual, scaled)
    for _ in range(_CONJUGATE_STEPS):
        moved = data * direction - inflow(direction)
        curvature = _dot(direction, moved)
        goes_on = (curvature > 0) & (product > least)
        step = torch.where(goes_on, product / curvature.clamp(min=1e-30), 0)
        x = x + step * direction
        residual = residual - step * moved
        scaled = residual / diagonal
        renewed = _dot(residual, scaled)
        turn = torch.where(product > 0, renewed / product.clamp(min=1e-30), 0)
        direction = scaled + turn * direction
        product = renewed
    return x


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each map of (..., H, W), (..., 1, 1)."""
    return (x * y).sum((-2, -1), keepdim=True)


def position_at(positions: Tensor, index: Tensor) -> Tensor:
    """Focus positions (N,) at fractional frame numbers (H, W), by linear interpolation."""
    last = positions.numel() - 1
    lower = index.detach().floor().clamp(max=max(last - 1, 0)).long()
    upper = (lower + 1).clamp(max=last)
    return torch.lerp(positions[lower], positions[upper], index - lower)


def frame_at(places: Tensor, place: Tensor) -> Tensor:
    """Fractional frame number of each ``place`` among rising ``places`` (N,), N >= 2.

    Beyond the ends the frames go on with the step at that end.
    """
    lower = torch.searchsorted(places, place.detach().contiguous()) - 1
    lower = lower.clamp(0, places.numel() - 2)
    return lower + (place - places[lower]) / (places[lower + 1] - places[lower])
