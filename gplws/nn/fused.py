"""Inference forms: one kernel call each, or stock ops in dtypes that the kernels do not have.

Made by ``fuse()``, not by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gplws.ops import reference
from gplws.ops.group_pointwise_conv3d import group_pointwise_conv3d, pack_weights
from gplws.ops.up_conv3d import up_conv3d


class _Packing(NamedTuple):
    key: list[Any]
    given: list[Tensor]  # their memory; nothing else can come to lie there
    packed: Tensor
    stream: torch.cuda.Stream  # whose memory it is


class _PackedWeights:
    """Weights and biases of a conv in the order of the tensor cores of a GPU, kept between calls.

    They are packed anew when one of them was changed or replaced. Changes by way of ``.data`` go
    unnoticed, as elsewhere in torch; a recorded CUDA graph keeps the weights of its recording.
    """

    def __init__(self) -> None:
        # One for each device: replicas of nn.DataParallel share this object, in threads.
        self._kept: dict[torch.device, _Packing] = {}
        self._recorded: list[Tensor] = []  # what graphs read at every replay

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackedWeights:
        return _PackedWeights()

    def __reduce__(self) -> tuple[type[_PackedWeights], tuple[()]]:
        return (_PackedWeights, ())

    def get(self, x: Tensor, *tensors: Tensor | None, groups: int, stride: int) -> Tensor | None:
        """What ``group_pointwise_conv3d`` takes as ``packed`` for ``x``, or None."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
            return None
        if not x.is_cuda or x.dtype == torch.float32 or torch.is_grad_enabled():
            if self._kept:  # the weights may have gone elsewhere
                self._kept = {}
            return None
        given = [tensor for tensor in tensors if tensor is not None]
        # Who changes an inference tensor leaves no trace.
        if any(tensor.is_inference() for tensor in given):
            return None
        key = [
            (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in given
        ]
        stream = torch.cuda.current_stream(x.device)
        is_recording = torch.cuda.is_current_stream_capturing()
        kept = self._kept.get(x.device)
        if kept is None or kept.key != key:
            if is_recording:
                return None  # what is recorded now is not there before it is replayed
            weight, *others = tensors
            assert weight is not None
            packed = pack_weights(weight, *others, groups=groups, stride=stride)
            kept = _Packing(key, [tensor.detach() for tensor in given], packed, stream)
            self._kept[x.device] = kept
        if is_recording:
            if not any(kept.packed is one for one in self._recorded):
                self._recorded.append(kept.packed)
        elif stream != kept.stream:
            kept.packed.record_stream(stream)  # may still be read there when it is given up here
        return kept.packed


def _has_kernels(weight: Tensor) -> bool:
    """Whether the kernels have the dtype of a weight on its device; stock ops do the others."""
    if weight.dtype == torch.float16:
        return weight.device.type != "cpu"
    return weight.dtype in (torch.float32, torch.bfloat16)


def _given(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)


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
        self._packed = _PackedWeights()

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(B, C, N, H, W) -> (B, M, N, ceil(H / stride), ceil(W / stride)), into ``out``."""
        if not _has_kernels(self.weight):
            y = reference.group_pointwise_conv3d(
                x, self.weight, self.bias, groups=self.groups, stride=self.stride, relu=self.relu
            )
            return _given(y, out)
        packed = self._packed.get(
            x, self.weight, self.bias, None, None, groups=self.groups, stride=self.stride
        )
        return group_pointwise_conv3d(
            x,
            self.weight,
            self.bias,
            groups=self.groups,
            stride=self.stride,
            relu=self.relu,
            packed=packed,
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
        self._packed = _PackedWeights()

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H, W), into ``out`` where it is given."""
        tensors = (self.weight, self.bias, self.pointwise_weight, self.pointwise_bias)
        if not _has_kernels(self.weight):
            y = reference.group_pointwise_conv3d(
                x, *tensors, groups=self.groups, pointwise_relu=self.pointwise_relu
            )
            return _given(y, out)
        packed = self._packed.get(x, *tensors, groups=self.groups, stride=1)
        return group_pointwise_conv3d(
            x,
            self.weight,
            self.bias,
            self.pointwise_weight,
            self.pointwise_bias,
            groups=self.groups,
            pointwise_relu=self.pointwise_relu,
            packed=packed,
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
        if not _has_kernels(self.weight):
            y = reference.up_conv3d(x, self.weight, self.bias, skip, groups=self.groups)
            return _given(y, out)
        return up_conv3d(x, self.weight, self.bias, skip, groups=self.groups, out=out)

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the result for ``x``."""
        batch, _, frames, height, width = x.shape
        return (batch, self.groups, frames, 2 * height, 2 * width)
