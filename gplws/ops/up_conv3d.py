"""Transposed 3x3x3 conv that doubles H and W, with the skip connection added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops.arguments import (
    follows_channels_last,
    goes_to_reference,
    has_gradient_kernels,
    note_change,
    register_conv_autocast,
    require_float,
    require_one_device,
    require_out,
    require_positive,
    require_shape,
    stock_backward,
    vmap_by_batch,
    without_autocast,
)
from gplws.ops.conv3d_weight_gradient import conv3d_weight_gradient
from gplws.ops.group_pointwise_conv3d import group_pointwise_conv3d

_NAME = "gplws::up_conv3d"
_OP = torch.ops.gplws.up_conv3d


def up_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    groups: int,
    out: Tensor | None = None,
) -> Tensor:
    """Transposed 3x3x3 conv with stride (1, 2, 2), one channel out per group, plus a residual.

    Equal to ``conv_transpose3d(x, weight, bias, stride=(1, 2, 2), padding=1,
    output_padding=(0, 1, 1), groups=groups) + residual``, to rounding.

    Args:
        x: (B, C, N, H, W) float32 or bfloat16, on CUDA also float16; N = frames. Contiguous is
            fastest on the CPU, channels_last_3d on CUDA.
        weight: (C, 1, 3, 3, 3), dtype of ``x``.
        bias: (groups,), dtype of ``x``.
        residual: shape and dtype of the result; added to it.
        groups: channels of the result; divides C.
        out: tensor of the result's shape and dtype to write into, contiguous or, on CUDA,
            channels_last_3d; apart from all operands but ``residual``; not differentiable.

    Returns:
        (B, groups, N, 2 H, 2 W), dtype of ``x``, channels_last_3d if ``x`` is, else contiguous;
        differentiable with respect to all tensors. ``out`` where it is given.

    Raises:
        ValueError: a shape, a device or ``groups`` does not fit, or ``out`` lies over an operand or
            requires gradients.
        TypeError: a dtype does not fit.
    """
    op = "up_conv3d"
    others = {"weight": weight, "bias": bias, "residual": residual}
    require_float(op, has_autocast=out is None, x=x, **others)
    require_one_device(op, x=x, **others, out=out)
    if x.dim() != 5:
        raise ValueError(f"{op}: x must be (B, C, N, H, W), got shape {tuple(x.shape)}")
    channels = x.shape[1]
    require_positive(op, groups=groups)
    if channels % groups:
        raise ValueError(f"{op}: groups must divide the {channels} channels of x, got {groups}")
    require_shape(op, "weight", weight, (channels, 1, 3, 3, 3), "(C, 1, 3, 3, 3)")
    if bias is not None:
        require_shape(op, "bias", bias, (groups,), "(groups,)")
    shape = _output_shape(x, groups)
    if residual is not None:
        require_shape(op, "residual", residual, shape, "the shape of the result")
    if goes_to_reference(op, x, weight, bias, residual, into=out):
        return reference.up_conv3d(x, weight, bias, residual, groups=groups)
    if out is None:
        return _OP.default(x, weight, bias, residual, groups)
    inputs = {"x": x, **others}
    require_out(op, out, shape, x.dtype, channels_last=out.is_cuda, inputs=inputs, same=residual)
    _OP.out(x, weight, bias, residual, groups, out)
    note_change(out)
    return out


def _output_shape(x: Tensor, groups: int) -> tuple[int, ...]:
    batch, _, frames, height, width = x.shape
    return (batch, groups, frames, 2 * height, 2 * width)


@torch.library.register_fake(_NAME)
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int
) -> Tensor:
    require_one_device("up_conv3d", x=x, weight=weight, bias=bias, residual=residual)
    y = x.new_empty(_output_shape(x, groups))
    if follows_channels_last(x):
        y = y.contiguous(memory_format=torch.channels_last_3d)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.groups = inputs
    ctx.save_for_backward(x, weight, bias)


@without_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    groups = ctx.groups
    needs = ctx.needs_input_grad
    needs_bias = needs[2] and bias is not None
    grad_residual = grad if needs[3] else None
    if has_gradient_kernels(x, grad):
        # The transpose of a conv with stride 2 from the result to x.
        grad_x = grad_weight = None
        if needs[0]:
            grad_x = group_pointwise_conv3d(grad, weight, groups=groups, stride=2, relu=False)
        if needs[1]:
            grad_weight = conv3d_weight_gradient(grad, x, groups=groups, stride=2)
        grad_bias = grad.sum((0, 2, 3, 4)) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_residual, None
    needs_conv = (bool(needs[0]), bool(needs[1]), bool(needs_bias))
    grads = stock_backward(
        grad, x, weight, needs_conv, stride=2, padding=1, groups=groups, transposed=True
    )
    return (*grads, grad_residual, None)


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
register_conv_autocast(_NAME)


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return vmap_by_batch(_OP.default, info.batch_size, in_dims, args, tensors=4, batched=(0, 3))
