"""Focus volumes with what a search may trip over."""

from __future__ import annotations

import torch


def random_volume(kind: str, size: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(size, generator=generator)
    special = torch.rand(size, generator=generator)
    if kind == "ties":
        volume = (volume * 3).round()
    elif kind == "nan":
        volume[special < 0.4] = torch.nan
    elif kind == "infinite":
        volume[special < 0.2] = -torch.inf
        volume[special > 0.97] = torch.inf
    elif kind == "negative":
        volume -= 0.6
    return volume
