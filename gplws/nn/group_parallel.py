"""Dense 3-D conv blocks of any network rebuilt as group parallel modules, to be trained anew."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import nn

from gplws.nn.blocks import (
    ConvForm,
    DownConv3d,
    GroupParallel3d,
    RepConv3d,
    UpConv3d,
    copied,
)
from gplws.nn.layer_report import ModelReport
from gplws.nn.stock import has_hooks, is_stock


def to_group_parallel(
    model: nn.Module, groups: int = 4, *, form: ConvForm = "reparameterised"
) -> tuple[nn.Module, ModelReport]:
    """A copy of a network whose dense 3x3x3 convs are group parallel modules with random weights.

    A conv becomes a :class:`gplws.nn.GroupParallel3d` of the same channels; in an
    ``nn.Sequential`` it takes the batch norm and the ReLU behind it along; ``nn.Identity`` stays.
    A strided conv becomes an average over as many pixels, then the module: shapes stay.

    Args:
        model: any module; it is not changed.
        groups: groups of the 3x3x3 convs; where it does not divide the channels in, the greatest
            common divisor of both.
        form: of the modules at training.

    Returns:
        The copy, in the mode, dtype and on the device of ``model``, to be trained, and the report.

    Raises:
        ValueError: ``groups`` < 1.

    Example:
        >>> block = nn.Sequential(nn.Conv3d(8, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
        >>> lighter, report = to_group_parallel(block)
        >>> print(report)
        1 layers replaced, 0 kept
        + 0 (Conv3d): GroupParallel3d with 4 groups + batch norm + relu
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    report = ModelReport()
    root = nn.Sequential(copied(model))
    _rebuild(root, "", groups, form, report, {}, root=True)
    return root[0], report


def _rebuild(
    module: nn.Module,
    path: str,
    groups: int,
    form: ConvForm,
    report: ModelReport,
    done: dict[int, nn.Module],
    *,
    root: bool = False,
) -> None:
    """Replace the convs among the children of a module, and of theirs."""
    children = list(module._modules.items())
    for index, (name, child) in enumerate(children):
        if child is None or module._modules[name] is not child:
            continue  # nothing, or taken along by the conv before it
        full = "" if root else f"{path}.{name}" if path else name
        if id(child) in done:
            module._modules[name] = done[id(child)]
            continue
        if isinstance(child, GroupParallel3d | RepConv3d | UpConv3d):
            report.add(full, child, "is of this kind already", swapped=False)
            continue
        if not isinstance(child, nn.Conv3d):
            done[id(child)] = child
            _rebuild(child, full, groups, form, report, done)
            continue
        why = _why_not(child)
        if why:
            report.add(full, child, why, swapped=False)
            continue
        followers: list[str] = []
        if isinstance(module, nn.Sequential) and not root:
            followers = _followers(children[index + 1 :], child.out_channels)
        relu = any(isinstance(module._modules[name], nn.ReLU) for name in followers)
        common = math.gcd(groups, child.in_channels)
        new: nn.Module = GroupParallel3d(
            child.in_channels, child.out_channels, common, form=form, final_relu=relu
        )
        note = f"GroupParallel3d with {common} groups"
        for follower in followers:
            taken = module._modules[follower]
            note += " + relu" if isinstance(taken, nn.ReLU) else " + batch norm"
            module._modules[follower] = nn.Identity().train(child.training)
        if child.stride != (1, 1, 1):
            # Of the same size as a conv with padding 1: N / stride, rounded up.
            pool = nn.AvgPool3d(cast(Any, child.stride), ceil_mode=True, count_include_pad=False)
            new = nn.Sequential(pool, new)
            note += f" behind a mean over {child.stride} pixels"
        new = new.to(child.weight.device, child.weight.dtype).train(child.training)
        module._modules[name] = done[id(child)] = new
        report.add(full, child, note, swapped=True)


def _why_not(conv: nn.Conv3d) -> str:
    """Why a conv has to stay; empty: it need not."""
    if not is_stock(conv, (nn.Conv3d, DownConv3d)):
        return "a class of its own"
    if has_hooks(conv):
        return "a hook is attached"
    if conv.kernel_size != (3, 3, 3) or conv.padding not in ((1, 1, 1), "same"):
        return f"kernel {conv.kernel_size}, padding {conv.padding}"
    if conv.dilation != (1, 1, 1) or conv.padding_mode != "zeros":
        return f"dilation {conv.dilation}, padding_mode {conv.padding_mode}"
    if conv.groups != 1:
        return f"has {conv.groups} groups already"
    return ""


def _followers(rest: list[tuple[str, nn.Module | None]], channels: int) -> list[str]:
    """Names of the batch norm and the ReLU that come right behind a conv."""
    names: list[str] = []
    for kind in (nn.BatchNorm3d, nn.ReLU):
        if len(names) < len(rest):
            name, layer = rest[len(names)]
            if layer is not None and is_stock(layer, (kind,)) and not has_hooks(layer):
                if isinstance(layer, nn.BatchNorm3d) and layer.num_features != channels:
                    continue
                names.append(name)
    return names
