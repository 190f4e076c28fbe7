"""How a depth map is read out of a focus volume."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_depth(volume: Tensor, focus_positions: Tensor | None = None) -> Tensor:
    """Expectation of the focus position under a softmax over the frames; for training.

    Args:
        volume: (B, N, H, W) logits.
        focus_positions: (N,) or (B, N), any unit; default: frame numbers.

    Returns:
        (B, H, W) depth, unit of ``focus_positions``; differentiable.

    Raises:
        ValueError: ``focus_positions`` has another shape.
    """
    batch, frames = volume.shape[:2]
    if focus_positions is None:
        focus_positions = torch.arange(frames, device=volume.device, dtype=volume.dtype)
    if tuple(focus_positions.shape) not in ((frames,), (batch, frames)):
        raise ValueError(
            f"expected_depth: focus_positions must be (N,) or (B, N) with N = {frames}, "
            f"got shape {tuple(focus_positions.shape)}"
        )
    positions = focus_positions.to(volume).expand(batch, frames)
    return (volume.softmax(1) * positions[:, :, None, None]).sum(1)
