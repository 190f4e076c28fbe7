"""What a network is shown in place of raw frames: features that exposure does not change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gplws.classical.aggregation import aggregation_reach, smooth
from gplws.classical.focus_measures import chunks, ring_difference_filter

# Aggregation levels: standard deviations of 2.2 and 4.6 px for the responses, 9.2 px for the
# surroundings that brightness and contrast are measured in.
_FINE, _COARSE, _SURROUNDINGS = 2, 3, 4
_FILTER_REACH = 3
_DARK = 0.02  # brightness below which contrast is not trusted, of full scale
_FLAT = 0.01  # deviation below which texture counts as flat, of full scale
_FAINT = 3e-4  # relative response below which differences are noise of quantisation
_LIMIT = 4.0  # of the normalised frames, in deviations

FEATURES = 3
"""Channels of :func:`focus_features`."""


class FocusFeatures(NamedTuple):
    """What :func:`focus_features` returns."""

    channels: Tensor
    """(B, 3, N, H, W) float32: frames of local mean 0 and deviation 1; the two ``responses``."""
    responses: Tensor
    """(B, 2, N, H, W) float32: logarithms of the focus response in a narrow and a wide window, less
    its mean over the frames; a view of ``channels``."""


def features_reach() -> int:
    """Pixels on each side that a feature depends on."""
    responses = _FILTER_REACH + aggregation_reach(_COARSE)
    return max(responses, aggregation_reach(_SURROUNDINGS))


def focus_features(stack: Tensor) -> FocusFeatures:
    """Locally normalised frames and their ring difference responses at two scales.

    Brightness of the scene, gain of single frames and slow changes across the image cancel. Windows
    are mirrored at the borders.

    Args:
        stack: (B, N, H, W) float32 gray frames in 0..1.

    Returns:
        Three channels; not differentiable.

    Raises:
        ValueError: ``stack`` is not 4-D.
        TypeError: ``stack`` is not float32.
    """
    if stack.dim() != 4:
        raise ValueError(f"stack: expected (B, N, H, W), got {tuple(stack.shape)}")
    if stack.dtype != torch.float32:
        raise TypeError(f"stack: expected float32, got {stack.dtype}")
    batch, frames, height, width = stack.shape
    channels = stack.new_empty((batch, FEATURES, frames, height, width))
    with torch.no_grad():
        for images, result in zip(stack, channels, strict=True):
            for part in chunks(images):
                frame = images[part]
                mean = smooth(frame, 0, _SURROUNDINGS)
                variance = (smooth(frame.square(), 0, _SURROUNDINGS) - mean.square()).clamp_(min=0)
                normal = (frame - mean) / variance.add_(_FLAT**2).sqrt_()
                result[0, part] = normal.clamp_(-_LIMIT, _LIMIT)
                brightness = mean.add_(_DARK)
                fine = smooth(ring_difference_filter(frame).abs_(), 0, _FINE)
                coarse = smooth(fine, _FINE, _COARSE)
                result[1, part] = fine.div_(brightness).add_(_FAINT).log_()
                result[2, part] = coarse.div_(brightness).add_(_FAINT).log_()
    responses = channels[:, 1:]
    responses -= responses.mean(2, keepdim=True)
    return FocusFeatures(channels, responses)
