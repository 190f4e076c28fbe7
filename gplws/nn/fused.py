"""Inference forms: one kernel call each. Made by ``fuse()``, not by hand."""

from __future__ import annotations

from torch import Tensor, nn

from gplws.ops.group_pointwise_conv3d import group_pointwise_conv3d
from gplws.ops.up_conv3d import up_conv3d


class FusedConv3d(nn.Module):
    """3x3x3 conv, stride 1 or 2 in H and W, zero padding 1, optional ReLU, on the kernels.

    Args:
        weight: (M, C / groups, 3, 3, 3) float32.
        bias: (M,) float32 or None.
        groups: groups of the conv.
        stride: 1 or 2.
        relu: apply ReLU to the result.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, groups: int, stride: int, relu: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.groups, self.stride, self.relu = groups, stride, relu

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(B, C, N, H, W) -> (B, M, N, ceil(H / stride), ceil(W / stride)), into ``out``."""
        return group_pointwise_conv3d(
            x,
            self.weight,
            self.bias,
            groups=self.groups,
            stride=self.stride,
            relu=self.relu,
            out=out,
        )

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the result for ``x``."""
        batch, _, frames, height, width = x.shape
        step = self.stride
        return (batch, self.weight.shape[0], frames, -(-height // step), -(-width // step))


class FusedGroupParallel3d(nn.Module):
    """Grouped 3x3x3 conv, ReLU, pointwise conv, optional ReLU, in one kernel call.

    Args:
        weight: (C, C / groups, 3, 3, 3) float32.
        bias: (C,) float32.
        pointwise_weight: (K, C, 1, 1, 1) float32.
        pointwise_bias: (K,) float32.
        groups: groups of the 3x3x3 conv.
        pointwise_relu: apply ReLU to the result.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        pointwise_weight: Tensor,
        pointwise_bias: Tensor,
        *,
        groups: int,
        pointwise_relu: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.pointwise_weight = nn.Parameter(pointwise_weight)
        self.pointwise_bias = nn.Parameter(pointwise_bias)
        self.groups, self.pointwise_relu = groups, pointwise_relu

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H, W), into ``out`` where it is given."""
        return group_pointwise_conv3d(
            x,
            self.weight,
            self.bias,
            self.pointwise_weight,
            self.pointwise_bias,
            groups=self.groups,
            pointwise_relu=self.pointwise_relu,
            out=out,
        )

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the result for ``x``."""
        return (x.shape[0], self.pointwise_weight.shape[0], *x.shape[2:])


class FusedUpConv3d(nn.Module):
    """Transposed depthwise 3x3x3 conv that doubles H and W, plus a skip, in one kernel call.

    Args:
        weight: (C, 1, 3, 3, 3) float32.
        bias: (groups,) float32 or None.
        groups: channels of the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.groups = groups

    def forward(
        self, x: Tensor, skip: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """(B, C, N, H, W) -> (B, groups, N, 2 H, 2 W) plus ``skip``, into ``out``."""
        return up_conv3d(x, self.weight, self.bias, skip, groups=self.groups, out=out)

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the result for ``x``."""
        batch, _, frames, height, width = x.shape
        return (batch, self.groups, frames, 2 * height, 2 * width)
