"""What tests of training share: stacks that take no time to make, small networks, short runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from gplws.data import DepthSample, collate
from gplws.data.transforms import Augmentation, split
from gplws.losses import FocusLoss
from gplws.training_config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainingConfig,
)


class ToySource:
    """Tilted planes with a random texture, whose contrast falls off with the distance from focus.

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
        valid[:, : 1 + step % 3] = False  # batches differ in how many pixels count
        depth = torch.where(valid, 10 + 2 * index, torch.nan)
        positions = (10 + 2 * torch.arange(frames, dtype=torch.float32)).expand(batch, frames)
        return DepthSample(stack[:, None], positions, depth, valid, "um", "toy")


class StopAfter:
    """A source that sends this process a signal while a step is in the making."""

    def __init__(self, step: int, number: int) -> None:
        self.source, self.step, self.number = ToySource(), step, number

    def __call__(self, step: int) -> DepthSample:
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return self.source(step)


class PairedSource:
    """Batches of twice the size: those of two steps of another source."""

    def __init__(self, source: ToySource) -> None:
        self.source = source

    def __call__(self, step: int) -> DepthSample:
        return collate([*split(self.source(2 * step)), *split(self.source(2 * step + 1))])


class ConvNet(nn.Module):
    """Focus volume by two convs; without batch norm, so that samples do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        # Without bias: a softmax does not see one, so its gradient would be rounding alone.
        self.second = nn.Conv3d(4, 1, 3, padding=1, bias=False)

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        """(B, 1, N, H, W) -> (B, N, H, W)."""
        return self.second(self.first(stack).relu())[:, 0]


class Outputs(NamedTuple):
    """What :class:`TwoOutputs` returns."""

    depth: torch.Tensor
    other: torch.Tensor


class TwoOutputs(nn.Module):
    """A depth, and an output that no loss reads, so that a parameter has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = ConvNet()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, stack: torch.Tensor, focus_positions: torch.Tensor) -> Outputs:
        """(B, 1, N, H, W) and (B, N) -> (B, H, W) each."""
        p = self.volume(stack).softmax(1)
        depth = (p * focus_positions[:, :, None, None]).sum(1)
        return Outputs(depth, self.scale * depth)


def small_config(steps: int, **changes: Any) -> TrainingConfig:
    """A run that takes a second: a small GPLWSNet, no workers."""
    arguments = {"in_channels": 1, "widths": [4, 8], "depths": [1, 1], "middle": 1}
    values: dict[str, Any] = {
        "model": ModelConfig(arguments={**arguments, "decoder_depths": [1]}),
        "data": DataConfig(workers=0),
        "schedule": ScheduleConfig(steps=steps),
        "checkpoints": CheckpointConfig(log_steps=1, validate_steps=1000),
    }
    return TrainingConfig(**{**values, **changes})


def distributed_config(steps: int) -> TrainingConfig:
    """For a run whose result does not depend on how its batches are shared out."""
    return small_config(
        steps,
        augmentation=Augmentation.none(),
        optimiser=OptimiserConfig(average_decay=0.5),
        loss=FocusLoss(gradient_weight=0.1),
    )


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with the same weights each time."""
    torch.manual_seed(seed)
    return make()


def killed_at_two(step: int) -> int:
    """A job that ends its process at step 2, as the system does where memory is short."""
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step


def double(step: int) -> int:
    """A job for worker processes, which find it here and not in a test file."""
    return 2 * step
