"""Inference forms: one kernel call each. Made by ``fuse()``, not by hand."""

from __future__ import annotations

from torch import Tensor, nn

from gplws.ops.group_pointwise_conv3d import group_pointwise_conv3d


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, M, N, ceil(H / stride), ceil(W / stride))."""
        return group_pointwise_conv3d(
            x, self.weight, self.bias, groups=self.groups, stride=self.stride, relu=self.relu
        )


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H, W)."""
        return group_pointwise_conv3d(
            x,
            self.weight,
            self.bias,
            self.pointwise_weight,
            self.pointwise_bias,
            groups=self.groups,
            pointwise_relu=self.pointwise_relu,
        )
