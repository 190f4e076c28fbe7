"""Luminance of colour images."""

from __future__ import annotations

from torch import Tensor

# Rec. ITU-R BT.709-6, item 3.2: luminance of linear RGB.
LUMINANCE = (0.2126, 0.7152, 0.0722)


def luminance(stack: Tensor) -> Tensor:
    """(..., 1 or 3, N, H, W) -> (..., 1, N, H, W); a gray stack is returned as it is.

    Raises:
        ValueError: another number of channels, or of dimensions.
    """
    if stack.dim() < 4 or stack.shape[-4] not in (1, 3):
        raise ValueError(f"stack: expected (..., 1 or 3, N, H, W), got {tuple(stack.shape)}")
    if stack.shape[-4] == 1:
        return stack
    red, green, blue = (
        weight * channel for weight, channel in zip(LUMINANCE, stack.split(1, -4), strict=True)
    )
    return red + green + blue
