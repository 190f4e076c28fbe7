"""Devices by name."""

from __future__ import annotations

import torch


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine and this build of torch can allocate on it.

    Args:
        device: as torch names it: "cpu", "cuda", "cuda:1", ...

    Raises:
        ValueError: it cannot be used.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error
    return place
