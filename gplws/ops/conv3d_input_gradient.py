"""Gradient of the input of a grouped 3x3x3 conv, for the backward passes of the convs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops.arguments import (
    autocast_off,
    needs_stock,
    require_float32,
    require_one_device,
    require_positive,
    require_shape,
    vmap_by_batch,
    without_autocast,
)
from gplws.ops.conv3d_weight_gradient import conv3d_weight_gradient

_NAME = "gplws::conv3d_input_gradient"
_OP = torch.ops.gplws.conv3d_input_gradient


def conv3d_input_gradient(
    grad: Tensor, weight: Tensor, *, size: tuple[int, int], groups: int = 1, stride: int = 1
) -> Tensor:
    """Gradient of ``(grad * conv3d(x, weight, ...)).sum()`` with respect to ``x``.

    The conv is that of :func:`gplws.ops.group_pointwise_conv3d`: 3x3x3, padding 1, stride
    (1, s, s). So this is a transposed conv, for any number of channels. On the CPU only; bitwise
    equal for every number of threads.

    Args:
        grad: (B, M, N, ceil(H / s), ceil(W / s)) float32, gradient of the result of the conv; N =
            frames. Contiguous is fastest.
        weight: (M, C / groups, 3, 3, 3) float32, of the conv.
        size: (H, W) of ``x``.
        groups: groups of the conv; divides M.
        stride: s, 1 or 2.

    Returns:
        (B, C, N, H, W) float32, also under autocast, within 1e-5 of its largest element;
        differentiable, any number of times. What depends on an infinite input may be NaN.

    Raises:
        ValueError: a shape, a device, ``size``, ``groups`` or ``stride`` does not fit.
        TypeError: a tensor is not float32.

    Source:
        Winograd's scheme along the frames: A. Lavin, S. Gray, CVPR 2016,
        doi:10.1109/CVPR.2016.435.

    Example:
        >>> grad, weight = torch.rand(1, 24, 10, 32, 32), torch.rand(24, 12, 3, 3, 3)
        >>> gplws.ops.conv3d_input_gradient(grad, weight, size=(64, 63), stride=2).shape
        torch.Size([1, 12, 10, 64, 63])
    """
    op = "conv3d_input_gradient"
    require_float32(op, grad=grad, weight=weight)
    require_one_device(op, grad=grad, weight=weight)
    if grad.dim() != 5:
        raise ValueError(
            f"{op}: grad must be (B, M, N, ceil(H / s), ceil(W / s)), got shape {tuple(grad.shape)}"
        )
    if weight.dim() != 5:
        raise ValueError(
            f"{op}: weight must be (M, C / groups, 3, 3, 3), got shape {tuple(weight.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {stride}")
    batch, channels_out, frames = grad.shape[:3]
    require_positive(op, groups=groups)
    if channels_out % groups:
        raise ValueError(
            f"{op}: groups must divide the {channels_out} channels of grad, got {groups}"
        )
    height, width = size
    shape = (batch, channels_out, frames, -(-height // stride), -(-width // stride))
    require_shape(op, "grad", grad, shape, "(B, M, N, ceil(H / s), ceil(W / s))")
    inputs = weight.shape[1]
    require_shape(op, "weight", weight, (channels_out, inputs, 3, 3, 3), "(M, C / groups, 3, 3, 3)")
    if needs_stock(grad, weight):
        with autocast_off(grad.device.type):
            return reference.conv3d_input_gradient(
                grad, weight, size=(height, width), groups=groups, stride=stride
            )
    if stride == 2:
        return _OP.default(grad, weight, groups, bool(height % 2 == 0), bool(width % 2 == 0))
    # (groups, M / groups, C / groups, taps): in and out change places, taps their order.
    swapped = weight.unflatten(0, (groups, channels_out // groups)).flatten(3).transpose(1, 2)
    swapped = swapped.flip(3).reshape(groups * inputs, channels_out // groups, 3, 3, 3)
    with autocast_off(grad.device.type):
        return _conv(grad, swapped, groups, 1)


def _conv(x: Tensor, weight: Tensor, groups: int, stride: int) -> Tensor:
    if needs_stock(x, weight):
        return reference.group_pointwise_conv3d(x, weight, groups=groups, stride=stride, relu=False)
    return torch.ops.gplws.group_pointwise_conv3d.default(
        x, weight, None, None, None, None, groups, stride, False, False, False
    )


@torch.library.register_fake(_NAME)
def _fake(grad: Tensor, weight: Tensor, groups: int, even_height: bool, even_width: bool) -> Tensor:
    require_one_device("conv3d_input_gradient", grad=grad, weight=weight)
    batch, _, frames, height, width = grad.shape
    height = 2 * height - (0 if even_height else 1)  # torch 2.11 takes no bool from a size
    width = 2 * width - (0 if even_width else 1)
    return grad.new_empty((batch, weight.shape[1] * groups, frames, height, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, ctx.groups = inputs[:3]
    ctx.save_for_backward(grad, weight)


@without_autocast
def _backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear in ``grad`` and in ``weight``: a conv of ``grad_x``, and its gradient."""
    grad, weight = ctx.saved_tensors
    grad_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_grad = _conv(grad_x, weight, ctx.groups, 2)
    if ctx.needs_input_grad[1]:
        grad_weight = conv3d_weight_gradient(grad_x, grad, groups=ctx.groups, stride=2)
    return grad_grad, grad_weight, None, None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return vmap_by_batch(_OP.default, info.batch_size, in_dims, args, tensors=2, batched=(0,))
