"""AiFDepthNet: one attention over the frames gives depth and the all-in-focus image."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplws.models.peer import FocusVolumeNetwork, initialise
from gplws.nn.readout import expected_depth


class AllInFocusDepth(NamedTuple):
    """What :class:`AiFDepthNet` returns."""

    depth: Tensor
    """(B, H, W) expectation of the focus position, unit of ``focus_positions``."""
    all_in_focus: Tensor
    """(B, 3, H, W) the frames weighted by the same attention; can be supervised without depth."""
    volume: Tensor
    """(B, N, H, W) logits over the frames; their softmax is the attention."""


class AiFDepthNet(FocusVolumeNetwork):
    """3-D conv network whose attention over the frames weighs focus positions and pixels alike.

    The encoder follows Inception-I3D, but halves H and W only, so that any number of frames goes
    through; the decoder joins five of its stages.

    Notes:
        16,533,873 parameters. Names of the stages are those of the published checkpoints, which
        keep Inception's.

    Source:
        Wang et al., "Bridging Unsupervised and Supervised Depth from Focus via All-in-Focus
        Supervision", ICCV 2021, arXiv:2108.10843, section 3. Encoder: Carreira and Zisserman,
        "Quo vadis, action recognition?", CVPR 2017, arXiv:1705.07750, figure 3.

    Example:
        >>> model = AiFDepthNet().eval()
        >>> model(torch.rand(1, 3, 4, 40, 32)).all_in_focus.shape
        torch.Size([1, 3, 40, 32])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv3d_1a = ConvUnit3d(3, 64, 7, stride=2)
        self.conv3d_2b = ConvUnit3d(64, 64, 1)
        self.conv3d_2c = ConvUnit3d(64, 192, 3)
        self.Mixed_3b = Mixed(192, 64, (96, 128), (16, 32), 32)
        self.Mixed_3c = Mixed(256, 128, (128, 192), (32, 96), 64)
        self.Mixed_4b = Mixed(480, 192, (96, 208), (16, 48), 64)
        self.Mixed_4c = Mixed(512, 160, (112, 224), (24, 64), 64)
        self.Mixed_4d = Mixed(512, 128, (128, 256), (24, 64), 64)
        self.Mixed_4e = Mixed(512, 112, (144, 288), (32, 64), 64)
        self.Mixed_4f = Mixed(528, 256, (160, 320), (32, 128), 128)
        self.Mixed_5b = Mixed(832, 256, (160, 320), (32, 128), 128)
        self.Mixed_5c = Mixed(832, 384, (192, 384), (48, 128), 128)
        self.up_5c = UpUnit3d(1024, 64, 64)
        self.up_4f = ConvUnit3d(832, 64, 1)
        self.up_5c4f = UpUnit3d(128, 64, 64)
        self.up_3c = ConvUnit3d(480, 64, 1)
        self.up_5c4f3c = UpUnit3d(128, 32, 32)
        self.up_2c = ConvUnit3d(192, 32, 1)
        self.up_5c4f3c2c = UpUnit3d(64, 32, 16)
        self.up_1a = ConvUnit3d(64, 16, 1)
        self.final_up = up_conv(32, 32)
        self.out = nn.Conv3d(32, 1, 3, padding=1)
        initialise(self)

    def forward(self, stack: Tensor, focus_positions: Tensor | None = None) -> AllInFocusDepth:
        """Depth and all-in-focus image of a stack.

        Args:
            stack: (B, 3, N, H, W) or (B, 1, N, H, W) float32 in 0..1; any N, H, W >= 1.
            focus_positions: (N,) or (B, N), any unit; default: frame numbers.

        Returns:
            Depth, all-in-focus image and the focus volume; differentiable.

        Raises:
            ValueError: a shape does not fit.
            TypeError: ``stack`` does not hold floats.
        """
        volume = self.focus_volume(stack)
        depth = expected_depth(volume, focus_positions)
        frames = stack.expand(-1, 3, -1, -1, -1)
        all_in_focus = (volume.softmax(1)[:, None] * frames).sum(2)  # (B, 3, H, W)
        return AllInFocusDepth(depth, all_in_focus, volume)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, 3, N, h, w) -> (B, N, h, w)."""
        f1a = self.conv3d_1a(x)  # 1/2
        f2c = self.conv3d_2c(self.conv3d_2b(halve(f1a)))  # 1/4
        f3c = self.Mixed_3c(self.Mixed_3b(halve(f2c)))  # 1/8
        f4d = self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(halve(f3c))))  # 1/16
        f4f = self.Mixed_4f(self.Mixed_4e(f4d))
        f5c = self.Mixed_5c(self.Mixed_5b(F.max_pool3d(f4f, (1, 2, 2))))  # 1/32

        x = torch.cat([self.up_5c(f5c), self.up_4f(f4f)], 1)
        x = torch.cat([self.up_5c4f(x), self.up_3c(f3c)], 1)
        x = torch.cat([self.up_5c4f3c(x), self.up_2c(f2c)], 1)
        x = torch.cat([self.up_5c4f3c2c(x), self.up_1a(f1a)], 1)
        return self.out(self.final_up(x))[:, 0]


def halve(x: Tensor) -> Tensor:
    """Largest of 3x3 pixels at every second one: (B, C, N, H, W) -> (B, C, N, H/2, W/2)."""
    return F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


def up_conv(in_channels: int, out_channels: int) -> nn.ConvTranspose3d:
    """(B, C, N, H, W) -> (B, K, N, 2 H, 2 W)."""
    return nn.ConvTranspose3d(in_channels, out_channels, (3, 4, 4), stride=(1, 2, 2), padding=1)


class ConvUnit3d(nn.Module):
    """3-D conv with bias, batch norm, ReLU; the stride is that of H and W."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv3d = nn.Sequential(
            nn.Conv3d(
                in_channels,
                out_channels,
                kernel_size,
                stride=(1, stride, stride),
                padding=kernel_size // 2,
            ),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H / stride, W / stride)."""
        return self.conv3d(x)


class UpUnit3d(nn.Module):
    """Transposed conv that doubles H and W, batch norm, ReLU, then a conv unit."""

    def __init__(self, in_channels: int, middle: int, out_channels: int) -> None:
        super().__init__()
        self.trans3d = nn.Sequential(
            up_conv(in_channels, middle),
            nn.BatchNorm3d(middle),
            nn.ReLU(),
            ConvUnit3d(middle, out_channels, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, 2 H, 2 W)."""
        return self.trans3d(x)


class Mixed(nn.Module):
    """Inception module: four branches of different reach side by side.

    Args:
        in_channels: channels in.
        point: channels of the 1x1x1 branch.
        first: channels of the first 3x3x3 branch, after its 1x1x1 and 3x3x3 conv.
        second: likewise of the second.
        pooled: channels of the branch behind the max-pool.
    """

    def __init__(
        self,
        in_channels: int,
        point: int,
        first: tuple[int, int],
        second: tuple[int, int],
        pooled: int,
    ) -> None:
        super().__init__()
        self.branch0 = ConvUnit3d(in_channels, point, 1)
        self.branch1_0 = ConvUnit3d(in_channels, first[0], 1)
        self.branch1_1 = ConvUnit3d(*first, 3)
        self.branch2_0 = ConvUnit3d(in_channels, second[0], 1)
        self.branch2_1 = ConvUnit3d(*second, 3)
        self.branch3_1 = ConvUnit3d(in_channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, point + first + second + pooled, N, H, W)."""
        branches = [
            self.branch0(x),
            self.branch1_1(self.branch1_0(x)),
            self.branch2_1(self.branch2_0(x)),
            self.branch3_1(F.max_pool3d(x, 3, stride=1, padding=1)),
        ]
        return torch.cat(branches, 1)
