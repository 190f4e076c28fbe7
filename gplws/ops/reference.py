"""The ops in plain torch: slow, obvious, and what the kernels are tested against.

Each function takes the arguments of the op of the same name and works in the dtype of its inputs,
so a float64 call gives the truth that float32 kernels are measured by.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Refinement = Literal["none", "parabola", "gaussian"]

LOG_FLOOR = 1e-6
"""Smallest share of the peak that enters the logarithm of the gaussian refinement."""

FLATNESS = 1e-5
"""A curvature below this share of the terms that it sums is rounding, not a peak."""


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

    winner = index // size
    group_of = torch.arange(group_peaks.shape[1], device=v.device).view(1, -1, 1, 1)
    rivals = group_peaks.masked_fill(group_of == winner.unsqueeze(1), -torch.inf)
    runner_up = rivals.amax(1)
    if log_scale:
        confidence = 1 - (runner_up - peak).exp()
    else:
        confidence = 1 - runner_up.clamp_min(0) / peak
        confidence = torch.where(peak > 0, confidence, 0)
    confidence = torch.where(peak.isfinite(), confidence.clamp(0, 1), 0)

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
