"""Focus measures: how sharp each pixel of each frame is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gplws.ops.arguments import has_plain_kernel
from gplws.ops.local_filters import symmetric_filter

# Elements that are filtered at a time: on a CPU as many as its cache holds, on a GPU enough to
# keep it busy. This bounds the memory of intermediate results, whatever the number of frames.
_CHUNK_ELEMENTS = {"cpu": 2**18}
_CHUNK_ELEMENTS_ACCELERATOR = 2**26


def ring_difference_filter(
    frames: Tensor,
    *,
    disk_radius: float = 1.0,
    ring_inner_radius: float = 2.0,
    ring_outer_radius: float = 3.0,
) -> Tensor:
    """Mean over a disk minus mean over a ring around it, for each pixel.

    The gap between disk and ring makes it respond to a wider band of details than a Laplacian of
    the same size, and the means over several pixels keep noise down. The weights sum to zero, so a
    constant image gives 0. Borders are mirrored without repeating the edge pixel, also where the
    image is smaller than the filter. NaN spreads over the filter's reach.

    Args:
        frames: (..., H, W) float32 or float64 images.
        disk_radius: pixels up to this distance from the centre form the disk, >= 0.
        ring_inner_radius: distance where the ring begins, above ``disk_radius``, px.
        ring_outer_radius: distance where it ends, px.

    Returns:
        (..., H, W) signed response, dtype and unit of ``frames``; differentiable.

    Raises:
        ValueError: the radii are not ordered, or ``frames`` has no H and W.
        TypeError: ``frames`` is not of a floating dtype.

    Source:
        Jeon et al., "Ring difference filter for fast and noise robust depth from focus", IEEE
        Transactions on Image Processing 29, 2020, doi:10.1109/TIP.2019.2937064.

    Example:
        >>> ring_difference_filter(torch.ones(2, 8, 8)).abs().max().item() < 1e-6
        True
    """
    check_images("frames", frames)
    if not 0 <= disk_radius < ring_inner_radius <= ring_outer_radius:
        raise ValueError(
            "expected 0 <= disk_radius < ring_inner_radius <= ring_outer_radius, got "
            f"{disk_radius}, {ring_inner_radius}, {ring_outer_radius}"
        )
    weights = _ring_weights(disk_radius, ring_inner_radius, ring_outer_radius)
    return in_chunks(lambda chunk: symmetric_filter(chunk, weights), frames, by_kernel=True)


def _ring_weights(disk: float, inner: float, outer: float) -> list[list[float]]:
    """Weight at offset (dy, dx) >= 0; the filter is symmetric in both and under their exchange."""
    reach = math.floor(outer)
    distances = [[math.hypot(dy, dx) for dx in range(reach + 1)] for dy in range(reach + 1)]

    def copies(dy: int, dx: int) -> int:  # pixels that share this weight
        return (2 if dy else 1) * (2 if dx else 1)

    offsets = [(dy, dx) for dy in range(reach + 1) for dx in range(reach + 1)]
    in_disk = sum(copies(dy, dx) for dy, dx in offsets if distances[dy][dx] <= disk)
    in_ring = sum(copies(dy, dx) for dy, dx in offsets if inner <= distances[dy][dx] <= outer)
    if in_ring == 0:
        raise ValueError(
            f"ring_inner_radius, ring_outer_radius: no pixel lies between {inner} and {outer}"
        )
    return [
        [
            1 / in_disk if distance <= disk else -1 / in_ring if inner <= distance <= outer else 0.0
            for distance in row
        ]
        for row in distances
    ]


def check_images(name: str, images: Tensor) -> None:
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {images.dtype}")
    if images.dim() < 2:
        raise ValueError(f"{name}: expected (..., H, W), got shape {tuple(images.shape)}")


def chunks(images: Tensor) -> Iterator[slice]:
    """Ranges of C of (C, H, W) that are small enough to be filtered at a time."""
    limit = _CHUNK_ELEMENTS.get(images.device.type, _CHUNK_ELEMENTS_ACCELERATOR)
    step = max(1, limit // max(1, images.shape[-2] * images.shape[-1]))
    for first in range(0, images.shape[0], step):
        yield slice(first, min(first + step, images.shape[0]))


def in_chunks(
    function: Callable[[Tensor], Tensor], images: Tensor, *, by_kernel: bool = False
) -> Tensor:
    """``function`` over the leading axes of (..., H, W), a few images at a time.

    With ``by_kernel`` all at once where a kernel computes it, which needs no intermediate results.
    """
    if images.numel() == 0:
        return images.clone()
    flat = images.reshape(-1, *images.shape[-2:])  # (C, H, W)
    if by_kernel and has_plain_kernel(flat):
        return function(flat).view(images.shape)
    result = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for part in chunks(flat):
        result[part] = function(flat[part])
    return result.view(images.shape)
