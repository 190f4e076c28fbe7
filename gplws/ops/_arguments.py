"""Checks that the op wrappers share."""

from __future__ import annotations

import torch
from torch import Tensor


def require_float32(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError for the first tensor that is not float32; under autocast all are cast."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype == torch.float32:
            continue
        if torch.is_autocast_enabled(tensor.device.type) and tensor.is_floating_point():
            continue
        raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}")


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless ``tensor`` has this shape; ``meaning`` spells its axes."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{op}: {name} must be {meaning} = {shape}, got shape {tuple(tensor.shape)}"
        )
