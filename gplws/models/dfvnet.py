"""FVNet and DFVNet: a 2-D encoder per frame, then 3-D decoders over focus volumes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from gplws.models.peer import FocusVolumeNetwork, initialise
from gplws.nn.readout import expected_depth_and_deviation

FINEST = 3
"""Levels are 6 to 3, coarse to fine; level l works at 1 / 2^(l-1) of the image size."""


class FocusVolumeDepth(NamedTuple):
    """What :class:`FVNet` and :class:`DFVNet` return."""

    depth: Tensor
    """(B, H, W) expectation of the focus position, unit of ``focus_positions``."""
    std: Tensor
    """(B, H, W) standard deviation of the focus position, same unit."""
    volume: Tensor
    """(B, N, H, W) logits over the frames that both are read from."""
    coarser: tuple[Tensor, ...]
    """In training mode the volumes of the coarser decoders, (B, N, H, W) each, fine to coarse, to
    be supervised like ``volume``; empty in eval mode."""


# torch.export can then save programs that return it.
_pytree._register_namedtuple(
    FocusVolumeDepth, serialized_type_name="gplws.models.dfvnet.FocusVolumeDepth"
)


class FVNet(FocusVolumeNetwork):
    """Focus volume network: features of the frames, stacked and decoded at four scales.

    Notes:
        19,501,484 parameters, of which the 513,000 of the encoder's classifier are unused: they
        are there since published checkpoints hold them. Where the paper pools a map of one pixel
        or one frame (images below 64 pixels, stacks of one frame), the pool covers all of it.

    Source:
        Yang, Huang and Zhou, "Deep Depth from Focus with Differential Focus Volume", CVPR 2022,
        arXiv:2112.01712, section 3.

    Example:
        >>> model = FVNet().eval()
        >>> model(torch.rand(1, 3, 4, 50, 70), torch.linspace(0.1, 1, 4)).depth.shape
        torch.Size([1, 50, 70])
    """

    def __init__(self) -> None:
        super().__init__()
        self.feature_extraction = FeaturePyramid()
        self.decoder3 = FocusDecoder(32, 32, up=False, pooled=False)
        self.decoder4 = FocusDecoder(64, 32, up=True, pooled=False)
        self.decoder5 = FocusDecoder(128, 64, up=True, pooled=True)
        self.decoder6 = FocusDecoder(128, 128, up=True, pooled=True)
        initialise(self)

    def forward(self, stack: Tensor, focus_positions: Tensor | None = None) -> FocusVolumeDepth:
        """Depth of a stack.

        Args:
            stack: (B, 3, N, H, W) or (B, 1, N, H, W) float32 in 0..1; any N, H, W >= 1.
            focus_positions: (N,) or (B, N), any unit; default: frame numbers.

        Returns:
            Depth, its standard deviation and the focus volumes; differentiable.

        Raises:
            ValueError: a shape does not fit, or a batch of one in training mode.
            TypeError: ``stack`` does not hold floats.
        """
        if self.training:
            volume, *coarser = (self._leave(v, stack) for v in self._volumes(self._enter(stack)))
        else:
            volume, coarser = self.focus_volume(stack), []
        depth, std = expected_depth_and_deviation(volume, focus_positions)
        return FocusVolumeDepth(depth, std, volume, tuple(coarser))

    def _logits(self, x: Tensor) -> Tensor:
        """(B, 3, N, h, w) -> (B, N, h, w)."""
        return self._volumes(x)[0]

    def _volumes(self, x: Tensor) -> list[Tensor]:
        """Logits (B, N, h, w) of the finest decoder; in training mode of all, fine to coarse."""
        batch, _, frames, height, width = x.shape
        if self.training and batch == 1:
            raise ValueError(
                "stack: batch norm after the pool over everything needs B >= 2 in training mode, "
                "got B = 1"
            )
        features = self.feature_extraction(x.transpose(1, 2).flatten(0, 1))  # (B N, C, h, w)
        decoders = {6: self.decoder6, 5: self.decoder5, 4: self.decoder4, 3: self.decoder3}
        heads: list[Tensor] = []
        coarse: Tensor | None = None
        for level, decoder in decoders.items():
            own = features[level].unflatten(0, (batch, frames)).transpose(1, 2)  # (B, C, N, h, w)
            own = self._compare_frames(own)
            decoded = decoder(own if coarse is None else torch.cat([coarse, own], 1))
            if level == FINEST or self.training:
                logits = decoder.classify(decoded)[:, 0]  # (B, N, h, w)
                logits = F.interpolate(logits, (height, width), mode="bilinear")
                heads.append(logits)
            if level != FINEST:
                coarse = decoder.up(decoded)
        return heads[::-1]

    def _compare_frames(self, volume: Tensor) -> Tensor:
        """(B, C, N, h, w) features of the frames -> what the decoders see of them."""
        return volume


class DFVNet(FVNet):
    """Differential focus volume network: the decoders see how features change between frames.

    The parameters are those of :class:`FVNet`; each focus volume is replaced by the differences of
    neighbouring frames, the last frame kept as it is.

    Source:
        Yang, Huang and Zhou, "Deep Depth from Focus with Differential Focus Volume", CVPR 2022,
        arXiv:2112.01712, section 3.2.

    Example:
        >>> model = DFVNet().eval()
        >>> model(torch.rand(1, 3, 4, 50, 70), torch.linspace(0.1, 1, 4)).std.shape
        torch.Size([1, 50, 70])
    """

    def _compare_frames(self, volume: Tensor) -> Tensor:
        return torch.cat([volume[:, :, :-1] - volume[:, :, 1:], volume[:, :, -1:]], 2)


def pool_sizes(smallest: int) -> list[int]:
    """Four whole numbers evenly spread from 1 to half the smallest side, rounded down."""
    largest = max(smallest // 2, 1)
    return [1 + step * (largest - 1) // 3 for step in range(4)]


@torch.fx.wrap
def pool_windows(shape: tuple[int, ...], path: int) -> tuple[int, ...]:
    """Windows of one path of a pyramid pooling over a map of ``shape``; the largest comes first."""
    size = pool_sizes(min(shape))[path]
    return tuple(side // size for side in shape)


class ConvUnit(nn.Module):
    """2-D conv without bias, batch norm, leaky ReLU with slope 0.1."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.cbr_unit = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        return self.cbr_unit(x)


class ResidualBlock2d(nn.Module):
    """Two 3x3 convs with batch norm, and the input added; a strided 1x1 conv where it differs."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + identity).relu()


class ResNet18(nn.Module):
    """The encoder: ResNet-18 with its four stages as outputs.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, arXiv:1512.03385.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(64, 64, stride=1)
        self.layer2 = self._stage(64, 128, stride=2)
        self.layer3 = self._stage(128, 256, stride=2)
        self.layer4 = self._stage(256, 512, stride=2)
        self.fc = nn.Linear(512, 1000)  # in every checkpoint of a ResNet-18, and unused here

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            ResidualBlock2d(in_channels, out_channels, stride),
            ResidualBlock2d(out_channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> 64, 128, 256 and 512 channels at 1/4, 1/8, 1/16 and 1/32 of the size."""
        quarter = self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu()))
        eighth = self.layer2(quarter)
        sixteenth = self.layer3(eighth)
        return quarter, eighth, sixteenth, self.layer4(sixteenth)


class PyramidPooling2d(nn.Module):
    """The map averaged over windows of four sizes, each mixed by a 1x1 conv, added to itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.path_module_list = nn.ModuleList(ConvUnit(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        total = torch.zeros_like(x)
        for number, path in enumerate(self.path_module_list):
            pooled = path(F.avg_pool2d(x, pool_windows((height, width), 3 - number)))
            total = total + F.interpolate(pooled, (height, width), mode="bilinear")
        return ((x + 0.25 * total) / 2).relu()


class FeaturePyramid(nn.Module):
    """Features of one frame at 1/32, 1/16, 1/8 and 1/4 of its size, coarse ones carried up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNet18()
        self.pyramid_pooling = PyramidPooling2d(512)

        def up(in_channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Upsample(scale_factor=2), ConvUnit(in_channels, out_channels, 3)
            )

        self.upconv6, self.iconv5 = up(512, 256), ConvUnit(512, 256, 3)
        self.upconv5, self.iconv4 = up(256, 128), ConvUnit(256, 128, 3)
        self.upconv4, self.iconv3 = up(128, 64), ConvUnit(128, 64, 3)
        self.proj6 = ConvUnit(512, 128, 1)
        self.proj5 = ConvUnit(256, 64, 1)
        self.proj4 = ConvUnit(128, 32, 1)
        self.proj3 = ConvUnit(64, 16, 1)

    def forward(self, frames: Tensor) -> dict[int, Tensor]:
        """(B, 3, H, W) -> by level (6: coarsest) 128, 64, 32 and 16 channels."""
        conv3, conv4, conv5, conv6 = self.encoder(frames)
        conv6 = self.pyramid_pooling(conv6)
        conv5 = self.iconv5(torch.cat([conv5, self.upconv6(conv6)], 1))
        conv4 = self.iconv4(torch.cat([conv4, self.upconv5(conv5)], 1))
        conv3 = self.iconv3(torch.cat([conv3, self.upconv4(conv4)], 1))
        return {
            6: self.proj6(conv6),
            5: self.proj5(conv5),
            4: self.proj4(conv4),
            3: self.proj3(conv3),
        }


def conv_bn_3d(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """3-D conv without bias, batch norm."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm3d(out_channels),
    )


class FramewiseProjection(nn.Module):
    """1x1x1 conv and batch norm, kept as a 2-D conv over (N, H W) by the published weights."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H, W)."""
        return self.bn(self.conv1(x.flatten(3))).unflatten(3, x.shape[3:])


class ResidualBlock3d(nn.Module):
    """Two 3x3x3 convs with batch norm, and the input added."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.downsample: nn.Module | None = None
        if in_channels != out_channels:
            self.downsample = FramewiseProjection(in_channels, out_channels)
        self.conv1 = conv_bn_3d(in_channels, out_channels, 3)
        self.conv2 = conv_bn_3d(out_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H, W)."""
        identity = x if self.downsample is None else self.downsample(x)
        return (self.conv2(self.conv1(x).relu()) + identity).relu()


class FocusDecoder(nn.Module):
    """3-D decoder of one scale.

    Args:
        in_channels: of the focus volume together with the up-sampled features.
        channels: width of the decoder.
        up: has an ``up`` to the next finer scale, with half the channels.
        pooled: ends in pyramid pooling over frames and pixels.
    """

    def __init__(self, in_channels: int, channels: int, *, up: bool, pooled: bool) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ResidualBlock3d(in_channels, channels), ResidualBlock3d(channels, channels)
        )
        self.classify = nn.Sequential(
            conv_bn_3d(channels, channels, 3),
            nn.ReLU(),
            nn.Sequential(nn.Conv3d(channels, 1, 3, padding=1)),
        )
        if up:
            self.up = nn.Sequential(
                nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear"),
                conv_bn_3d(channels, channels // 2, 3),
                nn.ReLU(),
            )
        self.pool_convs: nn.ModuleList | None = None
        if pooled:
            self.pool_convs = nn.ModuleList(conv_bn_3d(channels, channels, 1) for _ in range(4))

    def forward(self, volume: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H, W)."""
        x = self.convs(volume)
        if self.pool_convs is None:
            return x
        shape = x.shape[2:]
        total = torch.zeros_like(x)
        for number, conv in enumerate(self.pool_convs):
            pooled = conv(F.avg_pool3d(x, pool_windows(shape, number)))
            total = total + F.interpolate(pooled, shape, mode="trilinear")
        return ((x + 0.25 * total) / 2).relu()
