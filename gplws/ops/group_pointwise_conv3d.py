"""Grouped 3x3x3 conv and pointwise conv in one pass."""

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
from gplws.ops.conv3d_input_gradient import conv3d_input_gradient
from gplws.ops.conv3d_weight_gradient import conv3d_weight_gradient

_NAME = "gplws::group_pointwise_conv3d"
_OP = torch.ops.gplws.group_pointwise_conv3d


def group_pointwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    groups: int = 1,
    stride: int = 1,
    relu: bool = True,
    pointwise_relu: bool = True,
    residual_relu: bool = False,
    packed: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Grouped 3x3x3 conv, then pointwise (1x1x1) conv, without storing what lies between.

    The frames, rows and columns are padded with one zero on each side. Equal to
    :func:`gplws.ops.reference.group_pointwise_conv3d` within 1e-5 (float32) of the sum of the
    magnitudes of the weights times the largest input they meet, on every instruction set and
    device; on one of them, bitwise equal for every number of threads. NaN passes through, as in
    ``torch.relu``; on the CPU what depends on an infinite input may be NaN, as products along the
    frames are saved by Winograd's scheme there. In 16 bits on CUDA what is not finite, in ``x``
    or in a middle result beyond float16, may make NaN of what shares a product of matrices with
    it: of other groups within its reach, and of one pixel beyond its reach in W.

    bfloat16 and float16 are summed in float32; the middle result is rounded to them. Autocast makes
    all tensors bfloat16 on the CPU and float32 on CUDA, whatever dtype it was given. Forward-mode
    derivatives and the transforms of ``torch.func`` other than ``vmap`` go through stock ops.

    Args:
        x: (B, C, N, H, W) float32 or bfloat16, on CUDA also float16; N = frames. Any strides;
            contiguous is fastest on the CPU, channels_last_3d on CUDA.
        weight: (M, C / groups, 3, 3, 3), of the dtype of ``x`` as all below.
        bias: (M,).
        pointwise_weight: (K, M, 1, 1, 1). Without it, K = M and the grouped conv is all.
        pointwise_bias: (K,); only with ``pointwise_weight``.
        residual: shape of the result; added after the last activation.
        groups: groups of the 3x3x3 conv; divides C and M.
        stride: 1 or 2, in H and W; frames are never strided.
        relu: apply ReLU after the 3x3x3 conv.
        pointwise_relu: apply ReLU after the pointwise conv.
        residual_relu: apply ReLU after adding ``residual``.
        packed: what :func:`pack_weights` made of these weights and biases; saves packing them
            again. Then nothing is differentiable, and there is no ``residual``.
        out: tensor of the result's shape and dtype to write into, contiguous or, on CUDA,
            channels_last_3d; apart from all operands but ``residual``; not differentiable.

    Returns:
        (B, K, N, ceil(H / stride), ceil(W / stride)), dtype of ``x``, channels_last_3d if ``x``
        is, else contiguous; differentiable, any number of times, with respect to all tensors.

    Raises:
        ValueError: a shape, a device, ``groups`` or ``stride`` does not fit, or ``out`` lies over
            an operand or requires gradients.
        TypeError: a tensor is not float32, bfloat16 or (on CUDA) float16, or dtypes differ.

    Source:
        The group parallel module of GPLWS-Net, Journal of Software, 2024, section 2. Winograd's
        scheme: A. Lavin, S. Gray, CVPR 2016, doi:10.1109/CVPR.2016.435.

    Example:
        >>> x = torch.rand(1, 12, 10, 64, 64)
        >>> weight, pointwise_weight = torch.rand(12, 3, 3, 3, 3), torch.rand(12, 12, 1, 1, 1)
        >>> gplws.ops.group_pointwise_conv3d(
        ...     x, weight, pointwise_weight=pointwise_weight, groups=4).shape
        torch.Size([1, 12, 10, 64, 64])
    """
    op = "group_pointwise_conv3d"
    others = {
        "weight": weight,
        "bias": bias,
        "pointwise_weight": pointwise_weight,
        "pointwise_bias": pointwise_bias,
        "residual": residual,
    }
    require_float(op, has_autocast=out is None and packed is None, x=x, **others)
    require_one_device(op, x=x, **others, out=out)
    if x.dim() != 5:
        raise ValueError(f"{op}: x must be (B, C, N, H, W), got shape {tuple(x.shape)}")
    if stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {stride}")
    if weight.dim() != 5:
        raise ValueError(
            f"{op}: weight must be (M, C / groups, 3, 3, 3), got shape {tuple(weight.shape)}"
        )
    channels, middle = x.shape[1], weight.shape[0]
    require_positive(op, groups=groups)
    if channels % groups or middle % groups:
        raise ValueError(
            f"{op}: groups must divide the {channels} channels of x and the {middle} of weight, "
            f"got {groups}"
        )
    shape: tuple[int, ...] = (middle, channels // groups, 3, 3, 3)
    require_shape(op, "weight", weight, shape, "(M, C / groups, 3, 3, 3)")
    if bias is not None:
        require_shape(op, "bias", bias, (middle,), "(M,)")
    if pointwise_weight is not None:
        if pointwise_weight.dim() != 5:
            raise ValueError(
                f"{op}: pointwise_weight must be (K, M, 1, 1, 1), "
                f"got shape {tuple(pointwise_weight.shape)}"
            )
        shape = (pointwise_weight.shape[0], middle, 1, 1, 1)
        require_shape(op, "pointwise_weight", pointwise_weight, shape, "(K, M, 1, 1, 1)")
        if pointwise_bias is not None:
            require_shape(op, "pointwise_bias", pointwise_bias, (shape[0],), "(K,)")
    elif pointwise_bias is not None:
        raise ValueError(f"{op}: pointwise_bias needs pointwise_weight")
    shape = _output_shape(x, weight, pointwise_weight, stride)
    if residual is not None:
        require_shape(op, "residual", residual, shape, "the shape of the result")
    tensors = (x, weight, bias, pointwise_weight, pointwise_bias)
    options = (groups, stride, relu, pointwise_relu)
    if goes_to_reference(op, *tensors, residual, into=packed if out is None else out):
        return reference.group_pointwise_conv3d(
            *tensors,
            residual,
            groups=groups,
            stride=stride,
            relu=relu,
            pointwise_relu=pointwise_relu,
            residual_relu=residual_relu,
        )
    if out is None and packed is None:
        return _OP.default(*tensors, residual, *options, residual_relu)
    if out is None:
        layout = torch.channels_last_3d if follows_channels_last(x) else torch.contiguous_format
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        inputs = None
    else:
        inputs = {"x": x, **others}
    require_out(op, out, shape, x.dtype, channels_last=out.is_cuda, inputs=inputs, same=residual)
    if packed is None:
        _OP.out(*tensors, residual, *options, residual_relu, out)
    elif residual is None:
        _OP.packed(*tensors, packed, *options, out)
    else:
        raise ValueError(f"{op}: packed weights come without residual")
    note_change(out)
    return out


def pack_weights(
    weight: Tensor,
    bias: Tensor | None = None,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    *,
    groups: int = 1,
    stride: int = 1,
) -> Tensor:
    """Weights and biases of :func:`group_pointwise_conv3d` as the tensor cores of a GPU read them.

    Without them each call packs anew. They are complete when this returns.

    Args:
        weight: as for :func:`group_pointwise_conv3d`, on CUDA; so are the others.
        bias: likewise, or None.
        pointwise_weight: likewise, or None.
        pointwise_bias: likewise, or None.
        groups: of the 3x3x3 conv.
        stride: of the 3x3x3 conv.

    Returns:
        (bytes,) uint8; empty where no kernel reads packed weights: then nothing is to be saved.

    Raises:
        ValueError: ``weight`` is not on CUDA.
    """
    if not weight.is_cuda:
        raise ValueError(f"pack_weights: weight must be on CUDA, got {weight.device}")
    tensors = (weight, bias, pointwise_weight, pointwise_bias)
    packed = torch.ops.gplws.pack_group_pointwise_conv3d(*tensors, groups, stride)
    # Kernels read them without waiting for the stream that they were made on.
    torch.cuda.current_stream(weight.device).synchronize()
    return packed


def _output_shape(
    x: Tensor, weight: Tensor, pointwise_weight: Tensor | None, stride: int
) -> tuple[int, ...]:
    channels = (weight if pointwise_weight is None else pointwise_weight).shape[0]
    batch, _, frames, height, width = x.shape
    return (batch, channels, frames, -(-height // stride), -(-width // stride))


@torch.library.register_fake(_NAME)
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: int,
    relu: bool,
    pointwise_relu: bool,
    residual_relu: bool,
) -> Tensor:
    require_one_device(
        "group_pointwise_conv3d",
        x=x,
        weight=weight,
        bias=bias,
        pointwise_weight=pointwise_weight,
        pointwise_bias=pointwise_bias,
        residual=residual,
    )
    y = x.new_empty(_output_shape(x, weight, pointwise_weight, stride))
    if follows_channels_last(x):
        y = y.contiguous(memory_format=torch.channels_last_3d)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, residual = inputs[:6]
    ctx.groups, ctx.stride, ctx.relu, ctx.pointwise_relu, residual_relu = inputs[6:]
    ctx.has_residual = residual is not None
    ctx.residual_relu = ctx.has_residual and residual_relu
    # Its gradient is that of the result, whatever its values are, but behind a ReLU.
    ctx.save_for_backward(*tensors, residual if ctx.residual_relu else None)


@without_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recomputes the activations, then walks back through them."""
    x, weight, bias, pointwise_weight, pointwise_bias, residual = ctx.saved_tensors
    needs = ctx.needs_input_grad
    own = has_gradient_kernels(x, grad)
    pointwise_relu = pointwise_weight is not None and ctx.pointwise_relu
    residual_relu = ctx.residual_relu
    middle: Any = None  # recomputed only where something below reads it
    if pointwise_weight is not None or ctx.relu or residual_relu:
        middle = _middle(ctx, own, x, weight, bias)
    y = middle
    if pointwise_weight is not None and (pointwise_relu or residual_relu):
        y = _pointwise(own, middle, pointwise_weight, pointwise_bias)

    grad_residual = None
    if ctx.has_residual:
        if residual_relu:
            grad = _relu_backward(grad, (y.relu() if pointwise_relu else y) + residual)
        grad_residual = grad if needs[5] else None

    grad_pointwise_weight = grad_pointwise_bias = None
    if pointwise_weight is not None:
        if pointwise_relu:
            grad = _relu_backward(grad, y)
        needs_pointwise = (any(needs[:3]), needs[3], needs[4] and pointwise_bias is not None)
        grad, grad_pointwise_weight, grad_pointwise_bias = _pointwise_backward(
            own, grad, middle, pointwise_weight, needs_pointwise
        )
    grad_x = grad_weight = grad_bias = None
    if any(needs[:3]):
        if ctx.relu:
            grad = _relu_backward(grad, middle)
        needs_conv = (needs[0], needs[1], needs[2] and bias is not None)
        grad_x, grad_weight, grad_bias = _conv_backward(ctx, own, grad, x, weight, needs_conv)
    grads = (grad_x, grad_weight, grad_bias, grad_pointwise_weight, grad_pointwise_bias)
    return (*grads, grad_residual, None, None, None, None, None)


def _middle(ctx: Any, own: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The result of the 3x3x3 conv, after its activation."""
    if own or x.numel() == 0:  # stock convs take no tensors without elements
        return _own_conv(x, weight, bias, ctx.groups, ctx.stride, ctx.relu)
    return reference.group_pointwise_conv3d(
        x, weight, bias, groups=ctx.groups, stride=ctx.stride, relu=ctx.relu
    )


def _own_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, stride: int, relu: bool
) -> Tensor:
    return _OP.default(x, weight, bias, None, None, None, groups, stride, relu, False, False)


def _relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, y, 0)


def _pointwise(own: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if own or x.numel() == 0:
        return reference.pointwise_conv3d(x, weight, bias)
    return torch.nn.functional.conv3d(x, weight, bias)


def _pointwise_backward(
    own: bool, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Any, ...]:
    """Gradients of input, weight and bias of the pointwise conv, None where not needed."""
    if not own:
        return stock_backward(grad, x, weight, needs)
    grad_x = grad_weight = None
    flat = grad.flatten(2)
    if needs[0]:
        matrices = weight.flatten(1).t().expand(x.shape[0], -1, -1)
        grad_x = torch.bmm(matrices, flat).unflatten(2, x.shape[2:])
    if needs[1]:
        grad_weight = torch.bmm(flat, x.flatten(2).mT).sum(0).view(weight.shape)
    return grad_x, grad_weight, grad.sum((0, 2, 3, 4)) if needs[2] else None


def _conv_backward(
    ctx: Any, own: bool, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Any, ...]:
    """Gradients of input, weight and bias of the 3x3x3 conv, None where not needed."""
    groups, stride = ctx.groups, ctx.stride
    if not own:
        return stock_backward(grad, x, weight, needs, stride=stride, padding=1, groups=groups)
    grad_x = grad_weight = None
    if needs[0]:
        grad_x = conv3d_input_gradient(
            grad, weight, size=(x.shape[3], x.shape[4]), groups=groups, stride=stride
        )
    if needs[1]:
        grad_weight = conv3d_weight_gradient(x, grad, groups=groups, stride=stride)
    return grad_x, grad_weight, grad.sum((0, 2, 3, 4)) if needs[2] else None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
register_conv_autocast(_NAME)


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return vmap_by_batch(_OP.default, info.batch_size, in_dims, args, tensors=6, batched=(0, 5))
