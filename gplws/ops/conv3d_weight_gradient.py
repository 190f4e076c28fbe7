"""Gradient of the weight of a grouped 3x3x3 conv, for the backward passes of the convs."""

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

_NAME = "gplws::conv3d_weight_gradient"
_OP = torch.ops.gplws.conv3d_weight_gradient


def conv3d_weight_gradient(x: Tensor, grad: Tensor, *, groups: int = 1, stride: int = 1) -> Tensor:
    """Gradient of ``(grad * conv3d(x, weight, ...)).sum()`` with respect to ``weight``.

    The conv is that of :func:`gplws.ops.group_pointwise_conv3d`: 3x3x3, padding 1, stride
    (1, s, s). On the CPU only; bitwise equal for every number of threads.

    Args:
        x: (B, C, N, H, W) float32, input of the conv; N = frames. Contiguous is fastest.
        grad: (B, M, N, ceil(H / s), ceil(W / s)) float32, gradient of its result.
        groups: groups of the conv; divides C and M.
        stride: s, 1 or 2.

    Returns:
        (M, C / groups, 3, 3, 3) float32, within 1e-5 of its largest element; differentiable, any
        number of times. What depends on an infinite input may be NaN.

    Raises:
        ValueError: a shape, a device, ``groups`` or ``stride`` does not fit.
        TypeError: a tensor is not float32.

    Source:
        Winograd's scheme along the frames: A. Lavin, S. Gray, CVPR 2016,
        doi:10.1109/CVPR.2016.435.
    """
    op = "conv3d_weight_gradient"
    require_float32(op, x=x, grad=grad)
    require_one_device(op, x=x, grad=grad)
    if x.dim() != 5:
        raise ValueError(f"{op}: x must be (B, C, N, H, W), got shape {tuple(x.shape)}")
    if grad.dim() != 5:
        raise ValueError(
            f"{op}: grad must be (B, M, N, ceil(H / s), ceil(W / s)), got shape {tuple(grad.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {stride}")
    batch, channels, frames, height, width = x.shape
    require_positive(op, groups=groups)
    if channels % groups or grad.shape[1] % groups:
        raise ValueError(
            f"{op}: groups must divide the {channels} channels of x and the {grad.shape[1]} of "
            f"grad, got {groups}"
        )
    shape = (batch, grad.shape[1], frames, -(-height // stride), -(-width // stride))
    require_shape(op, "grad", grad, shape, "(B, M, N, ceil(H / s), ceil(W / s))")
    if needs_stock(x, grad):
        with autocast_off(x.device.type):
            return reference.conv3d_weight_gradient(x, grad, groups=groups, stride=stride)
    return _OP.default(x, grad, groups, stride)


@torch.library.register_fake(_NAME)
def _fake(x: Tensor, grad: Tensor, groups: int, stride: int) -> Tensor:
    require_one_device("conv3d_weight_gradient", x=x, grad=grad)
    return x.new_empty((grad.shape[1], x.shape[1] // groups, 3, 3, 3))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, ctx.groups, ctx.stride = inputs
    ctx.save_for_backward(x, grad)


@without_autocast
def _backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear in ``x`` and in ``grad``: both gradients are convs with ``grad_weight``."""
    x, grad = ctx.saved_tensors
    stride = [1, ctx.stride, ctx.stride]
    grad_x = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.aten.convolution_backward(
            grad,
            x,
            grad_weight,
            None,
            stride,
            [1, 1, 1],
            [1, 1, 1],
            False,
            [0, 0, 0],
            ctx.groups,
            [True, False, False],
        )[0]
    if ctx.needs_input_grad[1]:
        grad_grad = torch.nn.functional.conv3d(
            x, grad_weight, stride=stride, padding=1, groups=ctx.groups
        )
    return grad_x, grad_grad, None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return vmap_by_batch(_OP.default, info.batch_size, in_dims, args, tensors=2, batched=())
