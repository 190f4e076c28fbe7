"""Frames that differ too little for a network: several of them are averaged into one."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from gplws.classical import StackStatistics

# Measured on simulated stacks of 25 to 97 frames: the error is least where a focus peak is this
# many bins wide at half its height.
_BINS_PER_PEAK = 5.5
# No fewer of them, and as many where noise hides the peaks.
_FEWEST_BINS, _BINS_WITHOUT_PEAKS = 8, 24


class FrameBins(NamedTuple):
    """Frames of a stack divided into runs of ``size`` neighbours.

    What is left over goes to the first and the last one. None of them is smaller than the others:
    with more noise than they have, it would look sharper.
    """

    n_frames: int
    size: int

    @property
    def edges(self) -> list[int]:
        """First frame of each bin, and the number of frames."""
        count = max(self.n_frames // self.size, 1)
        first = (self.n_frames - count * self.size) // 2
        return [0, *(first + number * self.size for number in range(1, count)), self.n_frames]

    def average(self, frames: Tensor) -> Tensor:
        """(..., N, H, W) -> (..., bins, H, W): the mean of each bin; no copy where nothing is."""
        if self.size == 1:
            return frames
        pairs = itertools.pairwise(self.edges)
        return torch.stack([frames[..., a:b, :, :].mean(-3) for a, b in pairs], -3)

    def frame_number(self, bin_number: Tensor) -> Tensor:
        """Frame numbers at (...) fractional bin numbers: linear between the centres of the bins."""
        edges = self.edges
        last = len(edges) - 2
        # Nothing is copied from the host, so that a CUDA graph can hold it.
        centres = torch.arange(last + 1, dtype=bin_number.dtype, device=bin_number.device)
        centres = centres * self.size + (self.n_frames - (last + 1) * self.size) // 2
        centres += (self.size - 1) / 2
        centres[0] = (edges[1] - 1) / 2
        centres[-1] = (edges[-2] + edges[-1] - 1) / 2
        lower = bin_number.floor().long().clamp(0, max(last - 1, 0))
        upper = (lower + 1).clamp(max=last)
        return torch.lerp(centres[lower], centres[upper], bin_number - lower)


def bin_size(statistics: StackStatistics) -> int:
    """How many frames of a stack one bin should hold: more than one where focus moves by little.

    A network that is trained on stacks whose focus peaks are a few frames wide misses peaks that
    are much wider, and averages over less noise than it could.
    """
    frames, width = statistics.n_frames, statistics.peak_width()
    wanted = width / _BINS_PER_PEAK if width > 0 else frames / _BINS_WITHOUT_PEAKS
    return max(min(round(wanted), frames // _FEWEST_BINS), 1)
