"""Shapes below, at and above one vector, one row chunk and one tile, and odd primes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvCase:
    """One call of group_pointwise_conv3d."""

    size: tuple[int, int, int, int, int]  # (B, C, N, H, W)
    middle: int
    channels_out: int | None = None  # None: no pointwise conv
    groups: int = 1
    stride: int = 1
    residual: bool = False
    bias: bool = True

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor | None, ...]:
        """x, weight, bias, pointwise_weight, pointwise_bias, residual."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        batch, channels, frames, height, width = self.size
        x = normal(*self.size)
        weight = normal(self.middle, channels // self.groups, 3, 3, 3)
        bias = normal(self.middle) if self.bias else None
        pointwise_weight = pointwise_bias = residual = None
        if self.channels_out is not None:
            pointwise_weight = normal(self.channels_out, self.middle, 1, 1, 1)
            pointwise_bias = normal(self.channels_out) if self.bias else None
        if self.residual:
            residual = normal(
                batch,
                self.channels_out or self.middle,
                frames,
                -(-height // self.stride),
                -(-width // self.stride),
            )
        return x, weight, bias, pointwise_weight, pointwise_bias, residual

    @property
    def options(self) -> dict[str, int]:
        return {"groups": self.groups, "stride": self.stride}


CONV_CASES = [
    ConvCase((1, 3, 10, 20, 33), 3, 12),  # the network's stem
    ConvCase((2, 12, 5, 17, 130), 12, 12, groups=4, residual=True),
    ConvCase((1, 12, 3, 31, 67), 24, stride=2, residual=True),
    ConvCase((1, 24, 2, 7, 64), 24, 24, groups=4),
    ConvCase((1, 48, 2, 5, 31), 48, 48, groups=4),
    ConvCase((1, 96, 3, 8, 16), 96, 96, groups=4),
    ConvCase((1, 48, 2, 9, 10), 96, stride=2),
    ConvCase((1, 12, 10, 40, 140), 12, 1, groups=4),  # the network's head
    ConvCase((1, 24, 1, 1, 1), 24, 24, groups=4, residual=True),  # one voxel
    ConvCase((1, 24, 1, 1, 1), 24, groups=4, stride=2),
    ConvCase((1, 5, 2, 3, 1), 5, 7, groups=5, residual=True),  # depthwise, one column
    ConvCase((3, 5, 4, 2, 3), 10, 1, groups=5, bias=False),
    ConvCase((1, 7, 2, 5, 257), 14, 5, groups=7),
    ConvCase((1, 7, 2, 6, 258), 14, groups=7, stride=2, bias=False),
    ConvCase((1, 8, 2, 37, 15), 8, 23, groups=2),
    ConvCase((1, 1, 30, 3, 17), 1, 1),
    ConvCase((1, 2, 3, 45, 19), 11, groups=1),
    ConvCase((1, 160, 2, 3, 5), 40, 13, groups=1),  # scratch rows beyond the usual tile
]

MORE_CONV_CASES = [  # for the CUDA kernels
    ConvCase((1, 8, 3, 9, 40), 16, 16, groups=1),  # slots of 8 channels
    ConvCase((2, 32, 3, 9, 40), 32, 32, groups=2, stride=2, residual=True),
    ConvCase((1, 6, 2, 8, 33), 48, 30),  # several passes over one group
    ConvCase((1, 130, 2, 5, 6), 65, 130, groups=5, residual=True),
    ConvCase((1, 64, 3, 3, 5), 64, 64, groups=64),
    ConvCase((1, 4, 1, 3, 3), 300, 5, groups=2),
    ConvCase((1, 2, 3, 70, 3), 2, 5),  # all warps on one slot
]
