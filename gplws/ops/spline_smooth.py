"""Smoothing of images by a cubic B-spline, the averaging of all focus measures."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops.arguments import (
    MOST_REACH,
    goes_to_reference,
    note_change,
    require_float32,
    require_one_device,
    require_out,
    vmap_by_batch,
    without_autocast,
)

_NAME = "gplws::spline_smooth"
_OP = torch.ops.gplws.spline_smooth


def spline_smooth(images: Tensor, *, spacing: int = 1, out: Tensor | None = None) -> Tensor:
    """Weighted mean with the weights [1, 4, 6, 4, 1] / 16 along both axes, ``spacing`` px apart.

    Applied with the spacings 1, 2, 4, ... in turn it is the smoothing of the "a trous" B-spline
    transform: a bell whose width doubles from level to level at the same cost. On the CPU only;
    the same to the bit for every number of threads and every instruction set.

    Args:
        images: (C, H, W) float32. Beyond the borders they are mirrored, without repeating the edge.
            Contiguous is fastest.
        spacing: distance of neighbouring taps, px, 1 to 4096.
        out: contiguous tensor of the result's shape to write into, apart from ``images``; not
            differentiable.

    Returns:
        (C, H, W) float32, within the range of ``images``; NaN spreads over 2 ``spacing`` pixels;
        differentiable. ``out`` where it is given.

    Raises:
        ValueError: a shape, a device or ``spacing`` does not fit, or ``out`` lies over
            ``images`` or requires gradients.
        TypeError: a tensor is not float32.

    Source:
        Starck and Murtagh, Astronomical Image and Data Analysis, Springer, 2006,
        doi:10.1007/978-3-540-33025-7.
    """
    op = "spline_smooth"
    require_float32(op, images=images)
    require_one_device(op, images=images, out=out)
    if images.dim() != 3:
        raise ValueError(f"{op}: images must be (C, H, W), got shape {tuple(images.shape)}")
    if not 1 <= spacing <= MOST_REACH:
        raise ValueError(f"{op}: spacing must be 1 to {MOST_REACH}, got {spacing}")
    if goes_to_reference(op, images, into=out):
        return reference.spline_smooth(images, spacing=spacing)
    if out is None:
        return _OP.default(images, spacing)
    require_out(op, out, tuple(images.shape), images.dtype, inputs={"images": images})
    _OP.out(images, spacing, out)
    note_change(out)
    return out


@torch.library.register_fake(_NAME)
def _fake(images: Tensor, spacing: int) -> Tensor:
    return torch.empty_like(images, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ctx.spacing = inputs
    ctx.shape = images.shape


@without_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """The op is linear: its gradient is that of the stock ops, wherever it is taken."""
    smooth = functools.partial(reference.spline_smooth, spacing=ctx.spacing)
    return torch.func.vjp(smooth, grad.new_zeros(ctx.shape))[1](grad)[0], None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return vmap_by_batch(_OP.default, info.batch_size, in_dims, args, tensors=1, batched=(0,))
