"""What the camera makes of the light: illumination, drift, noise, bits and compression.

Tensors are irradiances (B, C, N, H, W) with 1 = full scale of the sensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rec. ITU-T T.81, table K.1: quantisation of luminance at quality 50.
_JPEG_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def vignetting(
    shape: tuple[int, int],
    strength: Tensor,
    center: Tensor,
) -> Tensor:
    """Fall-off of the light towards the corners, ``1 / (1 + strength r^2)^2`` (cos^4 law).

    Args:
        shape: rows and columns H, W.
        strength: (B,) squared tangent of the angle at ``r = 1``, >= 0.
        center: (B, 2) optical axis (row, column) in units where the image spans -1..1.

    Returns:
        (B, H, W) factor; 1 on the axis.
    """
    rows = torch.linspace(-1, 1, shape[0], dtype=torch.float32, device=strength.device)[
        None, :, None
    ]
    columns = torch.linspace(-1, 1, shape[1], dtype=torch.float32, device=strength.device)[
        None, None
    ]
    squared = (rows - center[:, 0, None, None]) ** 2 + (columns - center[:, 1, None, None]) ** 2
    return (1 + strength[:, None, None] * squared) ** -2


def add_noise(
    signal: Tensor,
    full_well_electrons: Tensor,
    read_noise_electrons: Tensor,
    generator: torch.Generator,
    *,
    exact: bool = True,
) -> Tensor:
    """Photon and read noise.

    Args:
        signal: (B, ...) irradiance, 1 = full scale.
        full_well_electrons: (B,) electrons at full scale.
        read_noise_electrons: (B,) standard deviation of the read noise, electrons.
        generator: on the device of ``signal``.
        exact: draw photons from the Poisson distribution; else from a Gaussian of the same mean and
            variance, which is many times faster and the same from some 20 electrons on.

    Returns:
        Shape of ``signal``; not clipped, so the mean is kept.
    """
    shape = (-1, *(1,) * (signal.ndim - 1))
    full_well, read_noise = full_well_electrons.view(shape), read_noise_electrons.view(shape)
    expected = signal.clamp(min=0) * full_well
    normal = torch.randn(
        signal.shape, generator=generator, device=signal.device, dtype=signal.dtype
    )
    if exact:
        return (torch.poisson(expected, generator) + read_noise * normal) / full_well
    return (expected + torch.sqrt(expected + read_noise**2) * normal) / full_well


def quantise(signal: Tensor, bit_depth: Tensor) -> Tensor:
    """Values clipped to 0..1 and rounded to ``2 ** bit_depth`` levels.

    Args:
        signal: (B, ...).
        bit_depth: (B,) bits of the sensor or the file.
    """
    levels = 2.0 ** bit_depth.to(signal).view(-1, *(1,) * (signal.ndim - 1)) - 1
    return (signal.clamp(0, 1) * levels).round_() / levels


def jpeg_like(images: Tensor, quality: int, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Loss of JPEG compression: cosine coefficients of 8 x 8 blocks rounded as for luminance.

    Args:
        images: (..., H, W) in 0..1; channels are compressed one by one.
        quality: 1..100 as common encoders count it.
        offset: rows and columns by which the blocks' grid starts before the image, 0..7.

    Returns:
        Shape of ``images``, in 0..1.

    Raises:
        ValueError: a quality outside 1..100.

    Source: Rec. ITU-T T.81, annex A.3.3 (transform) and K.1 (table).
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1..100, got {quality}")
    *leading, height, width = images.shape
    top, left = (int(value) % 8 for value in offset)
    bottom, right = -(height + top) % 8, -(width + left) % 8
    flat = images.reshape(1, -1, height, width)
    padded = torch.nn.functional.pad(flat, (left, right, top, bottom), mode="replicate")
    tall, wide = padded.shape[-2:]
    blocks = padded.view(-1, tall // 8, 8, wide // 8, 8).transpose(2, 3) * 255 - 128
    index = torch.arange(8, device=images.device, dtype=images.dtype)
    cosine = torch.cos((2 * index + 1) * index[:, None] * (torch.pi / 16)) / 2
    cosine[0] *= 0.5**0.5
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    table = torch.tensor(_JPEG_LUMINANCE, device=images.device, dtype=images.dtype)
    table = ((table * percent + 50) / 100).floor().clamp(1, 255)
    coefficients = cosine @ blocks @ cosine.T
    restored = cosine.T @ ((coefficients / table).round() * table) @ cosine
    image = ((restored + 128) / 255).clamp(0, 1).transpose(2, 3).reshape(-1, tall, wide)
    return image[:, top : top + height, left : left + width].reshape(*leading, height, width)
