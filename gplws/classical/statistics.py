"""What has to be known about a whole stack before any part of it can be searched."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gplws.classical.aggregation import aggregation_reach, smooth
from gplws.classical.focus_measures import chunks, ring_difference_filter

# Responses are looked at through this window when noise is measured: wide enough to average over
# many pixels, narrow enough to find places without texture.
_LEVELS = 3
_FILTER_REACH = 3
STATISTICS_REACH = _FILTER_REACH + aggregation_reach(_LEVELS)

# Responses of noise average 1; seen through the window their lowest 5% lie below these values
# (simulated with white noise). The minimum over N frames sinks slowly with N.
_LOW_SHARE = 0.05
_LOW_OF_ONE = 0.885
_LOW_PER_LOG_FRAMES = 0.0225

# Histogram of responses, evenly spaced logarithms; responses below are taken as no response at all
# (a constant, saturated or masked area tells nothing about noise).
_BINS = 512
_LOWEST_RESPONSE = 1e-6
_HIGHEST_RESPONSE = 10.0
# A response counts as a focus peak, for the sake of measuring its width, if it rises to this many
# times its own minimum; noise does not.
_CLEAR_PEAK = 4.0
# Frames whose mean is less than this many of their deviations have had a background taken off:
# their means say nothing of the light. Of pictures with one bright pixel in a hundred it is 0.1.
_LEAST_MEAN = 0.05
# No lamp drifts by more than this between frames; a darker frame is broken, and stays dark.
_GAIN_LIMIT = 8.0


@dataclass(frozen=True)
class StackStatistics:
    """Brightness, noise and peak width of a focal stack, as sums and histograms.

    Attributes:
        n_frames: number of frames.
        n_pixels: pixels of a frame.
        brightness: (N,) float64, sum of each frame's pixels.
        power: (N,) float64, sum of their squares.
        lowest: (512,) int64 histogram of each pixel's lowest response over the frames.
        flicker: (512,) int64 histogram of second differences of the response from frame to frame.
        widths: (N + 1,) int64 histogram of how many frames lie above half of each clear peak.
    """

    n_frames: int
    n_pixels: int
    brightness: Tensor = field(repr=False)
    power: Tensor = field(repr=False)
    lowest: Tensor = field(repr=False)
    flicker: Tensor = field(repr=False)
    widths: Tensor = field(repr=False)

    def __add__(self, other: StackStatistics) -> StackStatistics:
        """Statistics of two parts of the frames together."""
        return StackStatistics(
            self.n_frames,
            self.n_pixels + other.n_pixels,
            self.brightness + other.brightness,
            self.power + other.power,
            self.lowest + other.lowest,
            self.flicker + other.flicker,
            self.widths + other.widths,
        )

    def gains(self) -> Tensor:
        """(N,) float32 factors that bring all frames to the same mean brightness; their mean is 1.

        Limited to a factor of 8; 1 for frames without light. All are 1 where the mean of a frame is
        not clearly positive, as that of frames without their background.
        """
        means = self.brightness / self.n_pixels
        deviations = (self.power / self.n_pixels - means.square()).clamp(min=0).sqrt()
        mean = self.brightness.mean()
        if not bool(mean > 0) or bool((means < _LEAST_MEAN * deviations).any()):
            return torch.ones_like(self.brightness, dtype=torch.float32)
        gains = mean / self.brightness.clamp(min=1e-12)
        gains = gains.clamp(1 / _GAIN_LIMIT, _GAIN_LIMIT)
        gains = torch.where(self.brightness > 0, gains, 1.0)
        return (gains / gains.mean()).to(torch.float32)

    def noise(self) -> float:
        """Mean absolute response of the ring difference filter to the noise; 0 if there is none.

        The smaller of two estimates that can only be too large: the lowest responses anywhere
        (right if some of the surface is out of focus in some frame) and the smallest changes from
        frame to frame (right if the focus moves in small steps).
        """
        frames = max(self.n_frames, 1)
        estimates = [
            _low_value(self.lowest) / (_LOW_OF_ONE - _LOW_PER_LOG_FRAMES * math.log(frames)),
            _low_value(self.flicker) / _LOW_OF_ONE,
        ]
        return min((value for value in estimates if value > 0), default=0.0)

    def peak_width(self) -> float:
        """Median full width at half maximum of the focus peaks, frames; 0 if none is clear."""
        total = int(self.widths.sum())
        if total == 0:
            return 0.0
        return float((self.widths.cumsum(0) * 2 < total).sum())


def stack_statistics(frames: Tensor) -> StackStatistics:
    """Brightness, noise and peak width of a stack.

    Args:
        frames: (N, H, W) float32 gray frames, 0..1.

    Returns:
        The statistics, on the device of ``frames``.

    Raises:
        ValueError: another number of axes, or no pixel.
        TypeError: ``frames`` is not float32.

    Example:
        >>> frames = torch.rand(5, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> stack_statistics(0.1 * frames).noise() < stack_statistics(frames).noise()
        True
    """
    if frames.dtype != torch.float32:
        raise TypeError(f"frames: expected float32, got {frames.dtype}")
    if frames.dim() != 3 or frames.numel() == 0:
        raise ValueError(f"frames: expected (N, H, W), not empty, got {tuple(frames.shape)}")
    return part_statistics(frames, (slice(None), slice(None)))


def part_statistics(frames: Tensor, inner: tuple[slice, slice]) -> StackStatistics:
    """Statistics of a rectangle; the sum over rectangles that form a stack is that of the stack.

    Args:
        frames: (N, h, w) float32 gray frames, 0..1: the rectangle and up to ``STATISTICS_REACH``
            pixels around it, as far as the frames reach.
        inner: rows and columns of the rectangle in them.

    Returns:
        The statistics, on the device of ``frames``.
    """
    everywhere = (slice(None), *inner)
    n_frames = frames.shape[0]
    response = ring_difference_filter(frames)
    seen = torch.empty_like(response[everywhere], memory_format=torch.contiguous_format)
    for part in chunks(response):
        seen[part] = smooth(response[part].abs(), 0, _LEVELS)[everywhere]
    flicker = torch.zeros(_BINS, dtype=torch.int64, device=frames.device)
    if n_frames >= 3:
        for here in range(1, n_frames - 1):
            change = response[here - 1] - 2 * response[here] + response[here + 1]
            change = change.abs_().mul_(1 / math.sqrt(6))  # noise keeps its deviation
            flicker += _histogram(smooth(change[None], 0, _LEVELS)[0][inner])
    lowest, highest = seen.amin(0), seen.amax(0)
    half = (lowest + highest) / 2
    above_half = torch.zeros_like(half, dtype=torch.int32)
    for one in seen:
        above_half += one > half
    clear = (highest > _CLEAR_PEAK * lowest) & (highest > _LOWEST_RESPONSE)
    measured = frames[everywhere]
    return StackStatistics(
        n_frames=n_frames,
        n_pixels=measured[0].numel(),
        # float64 for the sums of rows alone: ten times as fast.
        brightness=measured.sum(2).sum(1, dtype=torch.float64),
        power=torch.linalg.vector_norm(measured, dim=2).double().square().sum(1),
        lowest=_histogram(lowest),
        flicker=flicker,
        widths=torch.bincount(above_half[clear], minlength=n_frames + 1),
    )


def _histogram(responses: Tensor) -> Tensor:
    """Counts over ``_BINS`` logarithmic bins; responses that are zero or NaN are not counted."""
    scale = _BINS / math.log(_HIGHEST_RESPONSE / _LOWEST_RESPONSE)
    places = (responses / _LOWEST_RESPONSE).log_().mul_(scale)
    # Bin 0 is for what is not counted: a selection of the others would take longer than the rest.
    bins = places.add_(1).nan_to_num_(nan=0, posinf=_BINS).clamp_(0, _BINS).int()
    return torch.bincount(bins.flatten(), minlength=1 + _BINS)[1:]


def _low_value(histogram: Tensor) -> float:
    """Response that ``_LOW_SHARE`` of the counted ones lie below; 0 if none was counted."""
    counts = histogram.double().cpu()
    total = float(counts.sum())
    if total == 0:
        return 0.0
    below = counts.cumsum(0)
    bin_ = int((below < _LOW_SHARE * total).sum())
    share = float((_LOW_SHARE * total - (below[bin_] - counts[bin_])) / counts[bin_])
    ratio = _HIGHEST_RESPONSE / _LOWEST_RESPONSE
    return _LOWEST_RESPONSE * ratio ** ((bin_ + share) / _BINS)
