"""DefocusNet: defocus maps of the frames first, then depth from them."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplws.models.peer import RegressionNetwork, initialise
from gplws.nn.readout import batch_positions

LEVELS = 4
NEGATIVE_SLOPE = 0.2


class DefocusDepth(NamedTuple):
    """What :class:`DefocusNet` returns."""

    depth: Tensor
    """(B, H, W) unit of the training."""
    defocus: Tensor
    """(B, N, H, W) defocus of each frame, unit of the training."""


class DefocusNet(RegressionNetwork):
    """Two U-nets shared by the frames, which know of each other by the maximum over all frames.

    The first turns each frame into a defocus map; the second reads depth from defocus maps and
    focus positions, with the first one's features of the image. Any number of frames goes through,
    and their order does not matter.

    Args:
        focus_range: see :class:`~gplws.models.peer.RegressionNetwork`.
        filters: channels of the finest level; each level doubles them.

    Raises:
        ValueError: ``filters`` < 1, or a ``focus_range`` without extent.

    Notes:
        3,729,042 parameters. Names of the layers are those of the published checkpoints: those of
        the second U-net have a 2. ``conv_joint2_4`` (6,928 of them) is unused: the maximum over
        the frames is taken before it, but published checkpoints hold it.

    Source:
        Maximov, Galim and Leal-Taixé, "Focus on defocus: bridging the synthetic to real domain gap
        for depth estimation", CVPR 2020, doi:10.1109/CVPR42600.2020.00115, section 4.

    Example:
        >>> model = DefocusNet().eval()
        >>> model(torch.rand(1, 3, 4, 40, 30), torch.linspace(0.1, 1, 4)).defocus.shape
        torch.Size([1, 4, 40, 30])
    """

    coarsest: ClassVar[int] = 2**LEVELS

    def __init__(self, focus_range: tuple[float, float] = (0.0, 1.0), filters: int = 16) -> None:
        if filters < 1:
            raise ValueError(f"filters must be at least 1, got {filters}")
        super().__init__(focus_range, filters=filters)
        self._add_unet("", in_channels=3, filters=filters, joined=2)
        self._add_unet("2", in_channels=2, filters=filters, joined=3)
        initialise(self, NEGATIVE_SLOPE)

    def _add_unet(self, unet: str, in_channels: int, filters: int, joined: int) -> None:
        """Layers of one U-net; ``joined`` maps meet in each stage of its way up."""
        for level in range(LEVELS):
            width = filters << level
            self.add_module(
                f"conv_down{unet}_{level}",
                nn.Sequential(*conv(width if level else in_channels, width), *conv(width, width)),
            )
        top = filters << LEVELS
        self.add_module(f"bridge{unet}", nn.Sequential(*conv(top, top)))
        for stage in range(1, LEVELS + 1):
            width = top >> stage
            up = nn.Upsample(scale_factor=2, mode="bilinear")
            self.add_module(f"conv_up{unet}_{stage}", nn.Sequential(up, *conv(2 * width, width)))
            self.add_module(
                f"conv_joint{unet}_{stage}", nn.Sequential(*conv(joined * width, width))
            )
        self.add_module(f"conv_end{unet}", nn.Sequential(*conv(filters, filters)))
        self.add_module(f"conv_out{unet}", nn.Sequential(nn.Conv2d(filters, 1, 3, padding=1)))

    def forward(self, stack: Tensor, focus_positions: Tensor | None = None) -> DefocusDepth:
        """Depth and defocus maps of a stack.

        Args:
            stack: (B, 3, N, H, W) or (B, 1, N, H, W) float32 in 0..1; any N, H, W >= 1.
            focus_positions: (N,) or (B, N), unit of the training; default: frame numbers.

        Returns:
            Depth and defocus in the unit of the training; differentiable.

        Raises:
            ValueError: a shape does not fit.
            TypeError: ``stack`` does not hold floats.
        """
        frames = self._enter(stack).transpose(1, 2)  # (B, N, 3, h, w)
        positions = batch_positions(focus_positions, frames, name="DefocusNet")
        depth, defocus = self._maps(frames, positions)
        return DefocusDepth(self._leave(depth, stack), self._leave(defocus, stack))

    def _maps(self, frames: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 3, h, w) and (B, N) -> depth (B, h, w) and defocus (B, N, h, w)."""
        features, x = self._way_down("", frames)
        for stage, feature in enumerate(reversed(features), 1):
            x = self._each(f"conv_up_{stage}", x)
            x = self._each(f"conv_joint_{stage}", torch.cat([x, feature], 2))
        defocus = self._each("conv_out", self._each("conv_end", x))  # (B, N, 1, h, w)

        position_maps = positions[:, :, None, None, None].expand_as(defocus)
        _, x = self._way_down("2", torch.cat([defocus, position_maps], 2))
        for stage, feature in enumerate(reversed(features), 1):
            x = self._each(f"conv_up2_{stage}", x)
            if stage < LEVELS:
                x = self._each(f"conv_joint2_{stage}", torch.cat([with_maximum(x), feature], 2))
        strongest = x.amax(1, keepdim=True)
        depth = self._each("conv_out2", self._each("conv_end2", strongest))  # (B, 1, 1, h, w)
        return depth[:, 0, 0], defocus[:, :, 0]

    def _way_down(self, unet: str, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, N, C, h, w) -> maps of the levels, fine to coarse, and the bridge at h/16, w/16."""
        features = []
        for level in range(LEVELS):
            x = self._each(f"conv_down{unet}_{level}", x)
            features.append(x)
            x = with_maximum(F.max_pool3d(x, (1, 2, 2)))
        return features, self._each(f"bridge{unet}", x)

    def _each(self, name: str, x: Tensor) -> Tensor:
        """A layer applied to each frame of (B, N, C, h, w)."""
        return self.get_submodule(name)(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv(in_channels: int, out_channels: int) -> list[nn.Module]:
    """3x3 conv with bias, leaky ReLU."""
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.LeakyReLU(NEGATIVE_SLOPE)]


def with_maximum(x: Tensor) -> Tensor:
    """(B, N, C, h, w) -> (B, N, 2 C, h, w): each frame's map, then the maximum over all frames."""
    return torch.cat([x, x.amax(1, keepdim=True).expand_as(x)], 2)
