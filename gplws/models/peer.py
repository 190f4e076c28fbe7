"""What the published networks share: the way in and out, reading of depth, first weights.

Source: the papers are named in the modules of the networks. The code is written anew from the
published architectures; the names of parameters are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplws.nn.readout import batch_positions
from gplws.ops.focus_search import focus_search
from gplws.ops.reference import FocusSearchResult


class PeerNetwork(nn.Module):
    """A published network behind the interface of the package.

    ``forward(stack, focus_positions)`` is the network of its paper: what it returns has ``depth``
    (B, H, W) in the unit that the network was trained in. ``predict`` does the same in the unit of
    the focus positions, for :func:`gplws.reconstruct`.

    Pixel values are used as they come: weights trained on images normalised in some way need images
    normalised in the same way.
    """

    coarsest: ClassVar[int] = 32
    """H and W are padded to multiples of it."""
    core: ClassVar[str]
    """Method with all layers in it, and no question about values or shapes:
    :func:`gplws.accelerate` replaces it as a whole."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config: dict[str, Any] = config  # arguments of the constructor, for save_weights

    @classmethod
    def config_of_weights(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the constructor that fit published weights, which do not name them."""
        return {}

    def _enter(self, stack: Tensor) -> Tensor:
        """A stack checked, spread over RGB and padded to (B, 3, N, h, w) by its border pixels."""
        if stack.dim() != 5 or stack.shape[1] not in (1, 3) or 0 in stack.shape:
            raise ValueError(
                f"stack must be (B, 3, N, H, W) or (B, 1, N, H, W) and not empty, "
                f"got shape {tuple(stack.shape)}"
            )
        if not stack.dtype.is_floating_point:
            raise TypeError(f"stack must hold floats in 0..1, got {stack.dtype}")
        height, width = stack.shape[-2:]
        x = stack.expand(-1, 3, -1, -1, -1)
        margins = (0, -width % self.coarsest, 0, -height % self.coarsest, 0, 0)
        return F.pad(x, margins, "replicate") if any(margins) else x

    @staticmethod
    def _leave(x: Tensor, stack: Tensor) -> Tensor:
        """(..., h, w) cropped to the size of the stack."""
        return x[..., : stack.shape[-2], : stack.shape[-1]]


class FocusVolumeNetwork(PeerNetwork):
    """A peer that rates each frame of each pixel."""

    core: ClassVar[str] = "_logits"

    def focus_volume(self, stack: Tensor) -> Tensor:
        """Focus volume of a stack (B, 3 or 1, N, H, W): (B, N, H, W) logits; differentiable."""
        return self._leave(self._logits(self._enter(stack)), stack)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, 3, N, h, w) -> (B, N, h, w)."""
        raise NotImplementedError

    @torch.inference_mode()
    def predict(self, stack: Tensor, focus_positions: Tensor | None = None) -> FocusSearchResult:
        """Depth and confidence by focus search in the focus volume.

        Args:
            stack: (B, 3, N, H, W) or (B, 1, N, H, W) float32 in 0..1.
            focus_positions: (N,) or (B, N), any unit; default: frame numbers.

        Returns:
            What :func:`gplws.ops.focus_search` returns, (B, H, W) each.
        """
        return focus_search(self.focus_volume(stack).float(), focus_positions, log_scale=True)


class RegressedDepth(NamedTuple):
    """What a network that regresses depth says of each pixel."""

    depth: Tensor
    """(B, H, W) unit of ``focus_positions``, kept within them."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """(B, H, W) int64, frame whose position is nearest to ``depth``."""
    confidence: Tensor
    """(B, H, W) NaN: the network gives none."""


class RegressionNetwork(PeerNetwork):
    """A peer that gives depth directly, without a focus volume.

    Args:
        focus_range: focus positions of the first and the last frame as the network knows them from
            its training. :meth:`predict` maps those of a stack to them, and depth back.
        config: further arguments of the constructor.

    Raises:
        ValueError: both ends of ``focus_range`` are the same, or not finite.
    """

    core: ClassVar[str] = "_maps"

    def __init__(self, focus_range: tuple[float, float], **config: Any) -> None:
        first, last = focus_range
        if not math.isfinite(first - last) or first == last:
            raise ValueError(
                f"focus_range must be two different finite positions, got {focus_range}"
            )
        super().__init__(focus_range=[first, last], **config)
        self.focus_range = (float(first), float(last))

    @torch.inference_mode()
    def predict(self, stack: Tensor, focus_positions: Tensor | None = None) -> RegressedDepth:
        """Depth in the unit of the focus positions.

        Args:
            stack: (B, 3, N, H, W) or (B, 1, N, H, W) float32 in 0..1.
            focus_positions: (N,) or (B, N), strictly monotonic, any unit; default: frame numbers.

        Returns:
            Depth, its nearest frame and a confidence of NaN, (B, H, W) each.
        """
        frames_first = stack.transpose(1, 2)  # (B, N, ...)
        positions = batch_positions(focus_positions, frames_first, name=type(self).__name__)
        first, last = positions[:, :1], positions[:, -1:]  # (B, 1)
        begin, end = self.focus_range
        span = torch.where(last == first, torch.ones_like(last), last - first)  # of one frame: any
        found = self(stack, begin + (positions - first) / span * (end - begin)).depth.float()
        first, last, span = first[..., None], last[..., None], span[..., None]  # (B, 1, 1)
        depth = first + (found - begin) / (end - begin) * span
        depth = depth.clamp(torch.minimum(first, last), torch.maximum(first, last))
        index = (positions[:, :, None, None] - depth[:, None]).abs().argmin(1)
        return RegressedDepth(depth, index, torch.full_like(depth, torch.nan))


@torch.no_grad()
def initialise(network: nn.Module, negative_slope: float = 0.0) -> None:
    """First weights that keep the variance of the activations from layer to layer; biases 0.

    Without this, a network without batch norm starts with a signal that fades from conv to conv.

    Args:
        network: all its convs, also transposed ones, are drawn anew.
        negative_slope: of the leaky ReLU after the convs.

    Source: He et al., "Delving deep into rectifiers", ICCV 2015, arXiv:1502.01852, equation 15.
    """
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            inputs = conv.in_channels // conv.groups * math.prod(conv.kernel_size)
            if conv.transposed:
                inputs //= math.prod(conv.stride)  # so many of the products meet in one pixel
            conv.weight.normal_(0.0, math.sqrt(2 / (1 + negative_slope**2) / inputs))
            if conv.bias is not None:
                conv.bias.zero_()
