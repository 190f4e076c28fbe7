"""Single layers: which are replaced, by what, and why others have to stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gplws.nn.blocks import ConvBN3d, GroupParallel3d, RepConv3d, UpConv3d, fold_bn, why_not_fused
from gplws.nn.inference import DTYPES, FoldedConv
from gplws.nn.layer_report import ModelReport
from gplws.nn.stock import has_hooks, is_stock

CONVS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
BLOCKS = (GroupParallel3d, UpConv3d, RepConv3d, ConvBN3d)
FORWARD_REPLACED = "its forward was replaced"


def is_of(module: nn.Module, packages: str | tuple[str, ...]) -> bool:
    """Whether the ``forward`` of a module is written in one of the packages."""
    where = type(module).forward.__module__  # None: code that torch.fx has written
    return where is not None and where.startswith(packages)


def is_stock_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch.nn, and not what holds other layers."""
    return is_of(module, "torch.nn") and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule
    )


def why_not_block(block: nn.Module) -> str:
    """Why a block of this package has to stay; empty: it need not."""
    if any(module.training for module in block.modules()):
        return "it is in training mode"
    if "forward" in vars(block):
        return FORWARD_REPLACED
    weight = next(block.parameters())
    # Elsewhere than on the CPU there are kernels for float16 as well.
    known = (*DTYPES, torch.float16) if weight.device.type != "cpu" else DTYPES
    return why_not_fused(block) or _why_not_dtype(weight, known)


def _why_not_dtype(weight: Tensor, known: Sequence[torch.dtype] = DTYPES) -> str:
    if weight.dtype in known:
        return ""
    return f"weights of {str(weight.dtype).removeprefix('torch.')}"


def why_not_conv(conv: nn.Module) -> str:
    """Why a conv has to stay; empty: it need not."""
    if not is_stock(conv, CONVS):
        return "a class of its own"
    if "forward" in vars(conv):
        return FORWARD_REPLACED
    if has_hooks(conv):
        return "a hook is attached"
    if conv.training:
        return "it is in training mode"
    weight, mode = cast(Tensor, conv.weight), cast(str, conv.padding_mode)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its shape is not known yet"
    if mode != "zeros":
        return f"padding_mode {mode}"
    return _why_not_dtype(weight)


def folds_norm(norm: nn.Module | None, conv: Any) -> bool:
    """Whether a layer is a batch norm over what a conv gives, with fixed statistics."""
    if norm is None or not is_stock(norm, NORMS) or has_hooks(norm) or norm.training:
        return False
    found = cast(nn.BatchNorm3d, norm)
    return (
        found.running_mean is not None
        and found.running_var is not None
        and found.num_features == conv.out_channels
        and len(conv.kernel_size) == (2 if isinstance(norm, nn.BatchNorm2d) else 3)
    )


def with_norm(
    conv: Any, weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm3d
) -> tuple[Tensor, Tensor]:
    """Weight and bias with a batch norm folded in, also of a transposed conv."""
    with torch.no_grad():
        if not conv.transposed:
            return fold_bn(weight, bias, norm)
        # (C, K / groups, ...) -> (K, C / groups, ...), as of a conv, and back.
        turned = weight.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)
        turned, bias = fold_bn(turned, bias, norm)
        back = turned.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)
        return back.contiguous(), bias


def describe(conv: FoldedConv, folded: Sequence[str]) -> str:
    """What computes a conv, and what it does beside it, for the report."""
    device = conv.weight.device.type
    if device != "cpu":
        engine = "stock conv"
    elif conv.fits_kernel:
        engine = "kernel or oneDNN" if not conv.transposed else "kernel"
    elif conv.axes == 3 and not conv.transposed:
        engine = "oneDNN"
    else:
        engine = "stock conv in channels_last"
    return " + ".join((engine, *folded))


def fast_layer(module: nn.Module, path: str, report: ModelReport) -> nn.Module:
    """A single layer of torch.nn in its fast form."""
    if isinstance(module, CONVS):
        why = why_not_conv(module)
        if not why and isinstance(module, nn.ConvTranspose3d):
            why = "it may be called with an output size"
        if not why and (module.weight.device.type != "cpu" or not isinstance(module, nn.Conv3d)):
            why = "nothing to fuse it with"
        if why:
            report.add(path, module, why, swapped=False)
            return module
        conv = FoldedConv(module, module.weight, module.bias).eval()
        report.add(path, module, describe(conv, ()), swapped=True)
        return conv
    if isinstance(module, NORMS):
        report.add(path, module, "no conv known before it", swapped=False)
    return module
