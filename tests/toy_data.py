"""Focal stacks that take no time to make: a tilted plane, sharp where the focus is near."""

from __future__ import annotations

import torch

from gplws.data import DepthSample


class ToySource:
    """Noise whose contrast falls off with the distance from focus; a batch for each step.

    Args:
        batch_size: B.
        frames: N.
        side: H and W.
        seed: other seeds give other stacks.
    """

    def __init__(self, batch_size: int = 2, frames: int = 5, side: int = 16, seed: int = 0) -> None:
        self.batch_size, self.frames, self.side, self.seed = batch_size, frames, side, seed

    def __call__(self, step: int) -> DepthSample:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator)

        batch, frames, side = self.batch_size, self.frames, self.side
        ramp = torch.linspace(0, 1, side)
        tilt = uniform(batch, 2, 1, 1) - 0.5
        plane = tilt[:, 0] * ramp[:, None] + tilt[:, 1] * ramp + uniform(batch, 1, 1)
        plane = plane - plane.amin((1, 2), keepdim=True)
        index = plane / plane.amax((1, 2), keepdim=True) * (frames - 1)
        distance = torch.arange(frames)[:, None, None] - index[:, None]
        texture = uniform(batch, 1, side, side) - 0.5
        stack = 0.5 + texture * torch.exp(-(distance**2) / 2)
        valid = torch.ones(batch, side, side, dtype=torch.bool)
        valid[:, :2] = False
        depth = torch.where(valid, 10 + 2 * index, torch.nan)
        positions = (10 + 2 * torch.arange(frames, dtype=torch.float32)).expand(batch, frames)
        return DepthSample(stack[:, None], positions, depth, valid, "um", "toy")
