"""Time-frequency transform of a focal stack: what each octave of texture says about the focus.

A stack is one signal over frames, rows and columns. Texture stands still while the focus moves
through it, noise changes from frame to frame. So each octave of spatial frequencies is cut out of
the frames and averaged over a few frames *before* its magnitude is taken: texture adds up with its
sign, noise cancels. The coarser the octave, the slower it loses contrast out of focus, so the
farther it is averaged over the frames, as the windows of a time-frequency transform grow with the
wavelength.

Source:
    After the method of Yan et al., Scientia Sinica Informationis, doi:10.1360/ssi-2021-0386: a
    three-dimensional time-frequency transform of the stack, whose depth maps at several scales are
    fused by texture. Its transform and its clustering are not known to this package in detail;
    octaves, windows and the fusion by the confidence in each octave's texture are its own, chosen
    by measurement.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gplws.classical.aggregation import aggregation_reach, smooth
from gplws.classical.focus_measures import chunks
from gplws.classical.focus_volume import FocusMeasure, half_gaussian

OCTAVES = 2
"""How many octaves are looked at, from the finest."""

# Deviation of the finest octave's window over the frames, for each frame that the focus peaks are
# wider than the second number. Narrow peaks would be flattened, and in a stack whose frames are
# displaced against each other texture does not stand still.
_FRAMES_PER_WIDTH = 0.25
_NARROW_PEAK = 4.0
_GROWTH = 1.3  # of the window from octave to octave; a peak's width grows more slowly than by 2
_LEAST_FRAMES = 0.3  # a window narrower than this holds one frame

# Of each octave: mean response to white noise over that of the ring difference filter, and the
# deviations of :class:`FocusMeasure` (simulated).
_NOISE = ((1.785, 0.099, 0.048), (0.402, 0.184, 0.095))

_AGREEMENT = 0.5  # octaves agree if their depths differ by less than about this, frames
_LEAST_RELIABILITY = 1e-6


def octave(frames: Tensor, number: int) -> Tensor:
    """Band-pass: what the window of ``number`` B-splines still shows and the next does not.

    Args:
        frames: (C, H, W) images.
        number: 0 for the finest octave.

    Returns:
        (C, H, W) signed details, zero for a constant image.
    """
    result = torch.empty_like(frames, memory_format=torch.contiguous_format)
    for part in chunks(frames):
        before = smooth(frames[part], 0, number)
        result[part] = before - smooth(before, number, number + 1)
    return result


def octave_reach(number: int) -> int:
    """How far a detail of :func:`octave` reaches, px."""
    return aggregation_reach(number + 1)


def octave_measure(number: int, peak_width: float) -> FocusMeasure:
    """Magnitude of one octave of a stack, averaged over frames before the magnitude is taken.

    Unlike other measures this one looks at all frames (N, H, W) of a stack at once.

    Args:
        number: 0 .. OCTAVES - 1, from the finest.
        peak_width: of the focus peaks, full width at half maximum, frames; 0 where unknown.
    """
    weights = _frame_window(number, peak_width)
    gain, fine, medium = _NOISE[number]
    share = math.sqrt(weights[0] ** 2 + 2 * sum(weight**2 for weight in weights[1:]))
    return FocusMeasure(
        respond=lambda frames: _average_frames(octave(frames, number), weights).abs(),
        reach=octave_reach(number),
        pre_blur=0.0,
        noise_gain=gain * share,
        fine_deviation=fine,
        medium_deviation=medium,
    )


def fuse_by_texture(depths: Tensor, reliabilities: Tensor) -> Tensor:
    """One depth map from those of all octaves, finest first.

    The texture around a pixel decides: octaves in which it stands clear of the noise count. The
    weighted median of the octaves says where the surface is, and the mean of the octaves that agree
    with it, where exactly.

    Args:
        depths: (K, ...) frames, finite.
        reliabilities: (K, ...) weights >= 0.

    Returns:
        (...) frames; all octaves count alike where none is reliable.
    """
    weights = reliabilities + _LEAST_RELIABILITY
    order = depths.argsort(0)
    ranked = depths.gather(0, order)
    shares = weights.gather(0, order).cumsum(0)
    half = shares[-1:] / 2
    # Two depths where the weights below and above are equal: their mean, whatever their order.
    below, above = ((shares < half).sum(0, keepdim=True), (shares <= half).sum(0, keepdim=True))
    median = (ranked.gather(0, below) + ranked.gather(0, above)) / 2
    weights = weights * _agreement(depths, median)
    total = weights.sum(0)
    mean = (weights * depths).sum(0) / total.clamp(min=1e-30)
    return torch.where(total > 1e-30, mean, median[0])


def agreement_of_octaves(depths: Tensor, reliabilities: Tensor, fused: Tensor) -> Tensor:
    """Share (...), 0..1, of the reliabilities whose depths agree with the fused one.

    Args:
        depths: (K, ...) frames.
        reliabilities: (K, ...) weights >= 0.
        fused: (...) frames, what :func:`fuse_by_texture` made of them.
    """
    weights = reliabilities + _LEAST_RELIABILITY
    return (weights * _agreement(depths, fused)).sum(0) / weights.sum(0)


def _agreement(depths: Tensor, depth: Tensor) -> Tensor:
    """1 where two depths are the same, towards 0 for differences of several frames."""
    return torch.exp(-0.5 * ((depths - depth) / _AGREEMENT) ** 2)


def _frame_window(number: int, peak_width: float) -> list[float]:
    """Half of the window over the frames, from its centre."""
    sigma = _FRAMES_PER_WIDTH * (peak_width - _NARROW_PEAK) * _GROWTH**number
    if sigma < _LEAST_FRAMES:
        return [1.0]
    return half_gaussian(sigma, math.ceil(2.5 * sigma))


def _average_frames(details: Tensor, weights: list[float]) -> Tensor:
    """(N, H, W) averaged along N; beyond the ends the frames are mirrored."""
    n_frames = details.shape[0]
    if len(weights) == 1 or n_frames == 1:
        return details
    result = torch.empty_like(details, memory_format=torch.contiguous_format)
    for here in range(n_frames):
        total = details[here] * weights[0]
        for k, weight in enumerate(weights[1:], 1):
            for there in (here - k, here + k):
                total = total + details[_mirrored(there, n_frames)] * weight
        result[here] = total
    return result


def _mirrored(frame: int, n_frames: int) -> int:
    frame = frame % (2 * (n_frames - 1))
    return min(frame, 2 * (n_frames - 1) - frame)
