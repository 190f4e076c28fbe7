"""Focus measures from transforms that split an image by scale and direction.

Like those of :mod:`gplws.classical.local_measures` they are magnitudes, with mirrored borders.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from gplws.classical.aggregation import aggregation_reach
from gplws.classical.focus_measures import check_images, in_chunks
from gplws.ops.reference import mirror, spline_along

SHEARLET_REACH = 10
"""How far a shearlet reaches, px; its tails beyond are cut off."""

# The shearlets are drawn on a grid of frequencies of this size, fine enough that what wraps around
# at its edge is nothing.
_SHEARLET_GRID = 64
# Octaves below half the sampling rate, and shears -1, 0, 1 times 2^j / _SHEARS of each cone.
_SHEARLET_SCALES = 2
_SHEARS = 2


def wavelet_energy(frames: Tensor, *, levels: int = 2) -> Tensor:
    """Magnitudes of the details of a wavelet transform without decimation, summed over its bands.

    Each level splits an image into a smoother one (cubic B-spline) and details along rows, along
    columns and along both; the next level does so with the smoother one and twice the spacing.

    Args:
        frames: (..., H, W) float32 or float64 images.
        levels: how many octaves of details are summed, >= 1.

    Returns:
        (..., H, W) responses >= 0, unit of ``frames``.

    Raises:
        ValueError: ``levels`` is below 1, or ``frames`` has no H and W.
        TypeError: ``frames`` is not of a floating dtype.

    Source:
        Sum of wavelet coefficients as focus measure: Yang and Nelson, "Wavelet-based autofocusing
        and unsupervised segmentation of microscopic images", IROS 2003; transform: Starck and
        Murtagh, Astronomical Image and Data Analysis, Springer, 2006,
        doi:10.1007/978-3-540-33025-7.
    """
    check_images("frames", frames)
    if levels < 1:
        raise ValueError(f"levels: expected at least 1, got {levels}")
    return in_chunks(lambda chunk: _wavelet_details(chunk, levels), frames)


def wavelet_reach(levels: int = 2) -> int:
    """How far a coefficient of :func:`wavelet_energy` reaches, px."""
    return aggregation_reach(levels)


def shearlet_energy(frames: Tensor) -> Tensor:
    """Root of the summed squares of shearlet coefficients: details by scale and direction.

    A cone-adapted bank: in the cone of frequencies around each axis, smooth octave bands times
    windows over the slope of the frequency, sheared in even steps. Each shearlet is a small filter
    (cut off at :data:`SHEARLET_REACH` pixels, zero mean), applied by FFT, so that a pixel depends
    on its surroundings only and not on the size of the image.

    Args:
        frames: (..., H, W) float32 or float64 images.

    Returns:
        (..., H, W) responses >= 0, unit of ``frames``.

    Raises:
        ValueError: ``frames`` has no H and W.
        TypeError: ``frames`` is not of a floating dtype.

    Source:
        Cone-adapted discrete shearlets with Meyer windows: Haeuser and Steidl, "Fast finite
        shearlet transform", arXiv:1202.1773. Number of scales and shears are this package's.
    """
    check_images("frames", frames)
    return in_chunks(_shearlet_magnitude, frames)


def _wavelet_details(images: Tensor, levels: int) -> Tensor:
    total = torch.zeros_like(images)
    for level in range(levels):
        along_rows = spline_along(images, -1, 2**level)
        smooth = spline_along(along_rows, -2, 2**level)
        along_columns = spline_along(images, -2, 2**level)
        horizontal, vertical = along_columns - smooth, along_rows - smooth
        total.add_(horizontal.abs()).add_(vertical.abs())
        total.add_((images - along_rows - horizontal).abs_())
        images = smooth
    return total


def _shearlet_magnitude(images: Tensor) -> Tensor:
    reach = SHEARLET_REACH
    height, width = images.shape[-2:]
    # What is constant passes no shearlet; without it rounding is relative to the contrast.
    images = images - images.detach().mean((-2, -1), keepdim=True).nan_to_num(0)
    padded = mirror(mirror(images, reach, -1), reach, -2)
    size = [_fast_size(n) for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=size)
    total = torch.zeros_like(images)
    for kernel in _shearlets(images.dtype, images.device):
        transfer = torch.fft.rfft2(kernel, s=size)
        filtered = torch.fft.irfft2(spectrum * transfer, s=size)
        total = total + filtered[..., 2 * reach :, 2 * reach :][..., :height, :width].square()
    return total.clamp(min=1e-20).sqrt()


def _fast_size(least: int) -> int:
    """Smallest size of at least ``least`` without prime factors above 5."""
    size = least
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept may be used later where gradients are taken
def _shearlets(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The bank: filters (K, K), K = 2 SHEARLET_REACH + 1, of zero mean."""
    grid = _SHEARLET_GRID
    frequency = torch.fft.fftfreq(grid, dtype=torch.float64) * 2  # 1 at half the sampling rate
    vertical, horizontal = torch.meshgrid(frequency, frequency, indexing="ij")
    place = torch.arange(-SHEARLET_REACH, SHEARLET_REACH + 1)
    angle = math.pi * place.double() / (SHEARLET_REACH + 1)
    taper = 0.5 + 0.5 * torch.cos(angle)
    window = taper[:, None] * taper
    kernels = []
    for along, across in ((horizontal, vertical), (vertical, horizontal)):
        for scale in range(_SHEARLET_SCALES):
            shears = _SHEARS if scale == 0 else _SHEARS // 2
            band = _octave(along.abs() * 2**scale)
            slope = across / torch.where(along == 0, torch.inf, along)
            for shear in range(-shears, shears + 1):
                kernel = torch.fft.ifft2(band * _bump(slope * shears - shear)).real
                kernel = kernel[place][:, place] * window
                kernel -= window * (kernel.sum() / window.sum())
                kernels.append(kernel.to(device, dtype))
    return tuple(kernels)


def _meyer(x: Tensor) -> Tensor:
    """Meyer's auxiliary function: 0 below 0, 1 above 1, smooth and symmetric between."""
    x = x.clamp(0, 1)
    return x**4 * (35 - 84 * x + 70 * x**2 - 20 * x**3)


def _octave(frequency: Tensor) -> Tensor:
    """Band of frequencies (1: half the sampling rate) around 1/2, from 1/4 to 1."""
    rising = torch.sin(math.pi / 2 * _meyer(4 * frequency - 1))
    falling = torch.cos(math.pi / 2 * _meyer(2 * frequency - 1))
    return torch.where(frequency < 0.5, rising, falling)


def _bump(x: Tensor) -> Tensor:
    """Window over -1..1; the squares of its copies one apart sum to one."""
    return torch.cos(math.pi / 2 * _meyer(x.abs()))
