"""How a depth map is read out of a focus volume."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_positions(focus_positions: Tensor | None, like: Tensor, *, name: str) -> Tensor:
    """Focus positions of each stack of a batch.

    Args:
        focus_positions: (N,) or (B, N), any unit; default: frame numbers.
        like: (B, N, ...) tensor whose batch, frames, dtype and device they are for.
        name: the caller, for messages.

    Returns:
        (B, N), dtype and device of ``like``.

    Raises:
        ValueError: ``focus_positions`` has another shape.
    """
    batch, frames = like.shape[:2]
    if focus_positions is None:
        focus_positions = torch.arange(frames)
    if tuple(focus_positions.shape) not in ((frames,), (batch, frames)):
        raise ValueError(
            f"{name}: focus_positions must be (N,) or (B, N) with N = {frames}, "
            f"got shape {tuple(focus_positions.shape)}"
        )
    return focus_positions.to(like).expand(batch, frames)


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
    positions = batch_positions(focus_positions, volume, name="expected_depth")
    return (volume.softmax(1) * positions[:, :, None, None]).sum(1)


def expected_depth_and_deviation(
    volume: Tensor, focus_positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the focus position under a softmax over the frames.

    Args:
        volume: (B, N, H, W) logits.
        focus_positions: (N,) or (B, N), any unit; default: frame numbers.

    Returns:
        depth: (B, H, W), unit of ``focus_positions``; differentiable.
        std: (B, H, W), same unit; differentiable, with zero gradient where it is 0.

    Raises:
        ValueError: ``focus_positions`` has another shape.
    """
    positions = batch_positions(focus_positions, volume, name="expected_depth_and_deviation")
    probability, positions = volume.softmax(1), positions[:, :, None, None]
    depth = (probability * positions).sum(1, keepdim=True)  # (B, 1, H, W)
    variance = (probability * (depth - positions).square()).sum(1)
    # The slope of the root is infinite at 0; below the floor no gradient goes through.
    return depth[:, 0], variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
