"""What the classical methods add to the depth that a network found.

A network settles what a focus measure cannot: weak texture, noise, edges, highlights. Where the
frames speak clearly a focus measure needs no training, and it measures below one frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gplws.classical import (
    StackStatistics,
    depth_from_focus,
    floats_per_pixel,
    receptive_radius,
    refine_depth,
    refining_radius,
)
from gplws.nn.readout import LEAST_DEVIATION, deviation_of

# A network that deviates by more than so many frames, and more than so many widths of the focus
# peaks, is in doubt; a classical depth is believed from such a confidence on, if it lies within so
# many deviations. Chosen on 48 simulated stacks of eight kinds: a lower first number gains more at
# easy and steep scenes, a lower second one loses more where many frames look alike.
_DOUBT, _DOUBT_PER_WIDTH = 1.6, 0.16
_CLASSICAL_CONFIDENCE, _PLAUSIBLE_DEVIATIONS = 0.5, 3.0
_CHECKING_METHOD = "rdf"

# What the network deviates beyond the least, times this, is how far the refinement may move depth.
_LIMIT_PER_DEVIATION = 0.7


class ClassicalStep(NamedTuple):
    """A step, and what it takes to apply it to tiles of an image."""

    apply: Callable[[Tensor, Tensor, Tensor, Tensor, StackStatistics], Tensor]
    """Frames (N, H, W) float32, depth in frames and confidence (H, W), focus positions (N,) and
    statistics of the whole stack -> depth in frames (H, W), NaN where the surface lies beyond the
    stack."""
    reach: int
    """How far away a pixel can influence the result, in pixels."""
    floats_per_pixel: Callable[[int], float]
    """Working memory for each pixel, all N frames together, in float32 values."""


def check_against_classical(
    frames: Tensor,
    depth_index: Tensor,
    confidence: Tensor,
    positions: Tensor,
    statistics: StackStatistics,
) -> Tensor:
    """Classical depth where a network hesitates between frames and the classical method does not.

    Args:
        frames: (N, H, W) float32 gray frames in 0..1, in focus order.
        depth_index: (H, W), frames, what the network found.
        confidence: (H, W) of the network, 0..1.
        positions: (N,), strictly monotonic, any unit.
        statistics: of the whole stack.

    Returns:
        (H, W) frames: ``depth_index``, but classical depth where that is valid and confident, the
        network's own deviation exceeds 1.6 frames and a sixth of the width of the focus peaks, and
        the two are within three deviations.
    """
    deviation = deviation_of(confidence)
    in_doubt = deviation > max(_DOUBT, _DOUBT_PER_WIDTH * statistics.peak_width())
    if not in_doubt.any():
        return depth_index
    found = depth_from_focus(frames, positions, method=_CHECKING_METHOD, statistics=statistics)
    clear = found.valid & (found.confidence > _CLASSICAL_CONFIDENCE)
    distance = (found.depth_index - depth_index).abs()
    taken = in_doubt & clear & (distance < _PLAUSIBLE_DEVIATIONS * deviation)
    return found.depth_index.where(taken, depth_index)


def refine_by_classical(
    frames: Tensor,
    depth_index: Tensor,
    confidence: Tensor,
    positions: Tensor,
    statistics: StackStatistics,
) -> Tensor:
    """:func:`gplws.classical.refine_depth` within limits that the network's confidence sets.

    Arguments and result are those of :func:`check_against_classical`. The depth moves little where
    the network is sure and where the blur differs a lot from frame to frame, more where many frames
    look alike. NaN where it lies at an end and the frames say that the surface lies beyond it: a
    network knows no depth outside the stack.
    """
    limit = _LIMIT_PER_DEVIATION * (deviation_of(confidence) - LEAST_DEVIATION).clamp(min=0)
    return refine_depth(
        frames, depth_index, positions, limit, statistics=statistics, leave_out_beyond=True
    )


def _refining_floats(n_frames: int) -> float:
    return max(190.0, 90.0 + 2.5 * n_frames)  # measured with 5 to 100 frames


CLASSICAL_STEPS = (
    ClassicalStep(check_against_classical, receptive_radius(_CHECKING_METHOD), floats_per_pixel),
    ClassicalStep(refine_by_classical, refining_radius(), _refining_floats),
)
"""In this order. Each reaches about as far as a network: tiles of its own overlap less than tiles
that do all at once."""
