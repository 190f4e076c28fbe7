"""DDFFNet (CC3): an auto-encoder scores each frame, a 1x1 conv joins the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplws.models.peer import RegressionNetwork, initialise

STAGES = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512,) * 4)
"""Channels before and after each conv of VGG-16, stage by stage."""

DROPOUT = 0.5
DROPPED_STAGES = (3, 4, 5)
"""Stages with dropout, at training, behind their end in the encoder and in the decoder."""

SKIP_STAGE = 3
"""The CC3 variant concatenates the encoder's features of this stage."""


class RegressedDisparity(NamedTuple):
    """What :class:`DDFFNet` returns."""

    depth: Tensor
    """(B, H, W) what the network was trained to regress; by its authors: disparity, px."""

    @property
    def disparity(self) -> Tensor:
        """``depth`` under the name that the paper gives it."""
        return self.depth


class DDFFNet(RegressionNetwork):
    """VGG-16 auto-encoder with shared weights over the frames, and a learned sum of its maps.

    Args:
        n_frames: frames of a stack; the weights are made for this number and no other.
        focus_range: see :class:`~gplws.models.peer.RegressionNetwork`; the network itself never
            sees focus positions.

    Raises:
        ValueError: ``n_frames`` < 1, or a ``focus_range`` without extent.

    Notes:
        39,790,343 parameters for 5 frames. The authors train on stacks of 10 frames.

    Source:
        Hazirbas et al., "Deep Depth From Focus", ACCV 2018, arXiv:1704.01085, section 4; the
        variant DDFFNet-CC3 of its table 1.

    Example:
        >>> model = DDFFNet(n_frames=4).eval()
        >>> model(torch.rand(1, 3, 4, 40, 32)).disparity.shape
        torch.Size([1, 40, 32])
    """

    def __init__(self, n_frames: int = 10, focus_range: tuple[float, float] = (0.0, 1.0)) -> None:
        if n_frames < 1:
            raise ValueError(f"n_frames must be at least 1, got {n_frames}")
        super().__init__(focus_range, n_frames=n_frames)
        self.n_frames = n_frames
        self.autoencoder = VGGAutoencoder()
        self.scoring = nn.Conv2d(n_frames, 1, 1, bias=False)
        initialise(self)

    @classmethod
    def config_of_weights(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The number of frames, from the shape of the weights that join them."""
        return {"n_frames": state["scoring.weight"].shape[1]} if "scoring.weight" in state else {}

    def forward(self, stack: Tensor, focus_positions: Tensor | None = None) -> RegressedDisparity:
        """Disparity of a stack.

        Args:
            stack: (B, 3, N, H, W) or (B, 1, N, H, W) float32 in 0..1; N = ``n_frames``.
            focus_positions: not used.

        Returns:
            The map in the unit of the training; differentiable.

        Raises:
            ValueError: a shape does not fit, or N is not ``n_frames``.
            TypeError: ``stack`` does not hold floats.
        """
        x = self._enter(stack)
        if x.shape[2] != self.n_frames:
            raise ValueError(
                f"stack must have N = {self.n_frames} frames, the number that the weights of "
                f"DDFFNet are made for, got N = {x.shape[2]}"
            )
        return RegressedDisparity(self._leave(self._maps(x), stack))

    def _maps(self, x: Tensor) -> Tensor:
        """(B, 3, N, h, w) -> (B, h, w)."""
        scores = self.autoencoder(x.transpose(1, 2).flatten(0, 1))  # (B N, 1, h, w)
        return self.scoring(scores[:, 0].unflatten(0, (x.shape[0], x.shape[2])))[:, 0]


class VGGAutoencoder(nn.ModuleDict):
    """VGG-16 and its mirror image, layers by the names of the published checkpoints.

    ``conv<stage>_<number>`` is a conv of the encoder, with ``_D`` its mirror image in the decoder;
    ``upconv<stage>`` leads up to the resolution of a stage. All convs go with batch norm and ReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        for stage, widths in enumerate(STAGES, 1):
            for number in range(1, len(widths)):
                self._add_conv(f"conv{stage}_{number}", widths[number - 1], widths[number])
        for stage, widths in reversed(list(enumerate(STAGES, 1))):
            top = widths[-1]
            self[f"upconv{stage}"] = nn.ConvTranspose2d(top, top, 4, 2, padding=1, bias=False)
            for number in range(len(widths) - 1, 0, -1):
                joined = stage == SKIP_STAGE and number == len(widths) - 1
                out_channels = 1 if (stage, number) == (1, 1) else widths[number - 1]
                self._add_conv(
                    f"conv{stage}_{number}_D", widths[number] * (1 + joined), out_channels
                )

    def _add_conv(self, name: str, in_channels: int, out_channels: int) -> None:
        self[name] = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self[f"{name}_bn"] = nn.BatchNorm2d(out_channels, eps=1e-3)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return self[f"{name}_bn"](self[name](x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        """Frames (B, 3, H, W) -> scores (B, 1, H, W); H and W are multiples of 32."""
        skip = x
        for stage, widths in enumerate(STAGES, 1):
            for number in range(1, len(widths)):
                x = self._conv(f"conv{stage}_{number}", x)
            if stage == SKIP_STAGE:
                skip = x
            x = self._drop(stage, F.max_pool2d(x, 2))
        for stage, widths in reversed(list(enumerate(STAGES, 1))):
            x = self[f"upconv{stage}"](x)
            if stage == SKIP_STAGE:
                x = torch.cat([x, skip], 1)
            for number in range(len(widths) - 1, 0, -1):
                x = self._conv(f"conv{stage}_{number}_D", x)
            x = self._drop(stage, x)
        return x

    def _drop(self, stage: int, x: Tensor) -> Tensor:
        return F.dropout(x, DROPOUT, self.training) if stage in DROPPED_STAGES else x
