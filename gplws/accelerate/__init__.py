"""Any network, for inference, with layers replaced by faster ones that compute the same.

A network is traced symbolically where that is possible, layer after layer from the inside: what
depends on values or shapes in Python stays the Python that it is, and the parts in it are replaced.

``gplws.accelerate`` is the function, not this package: what else is in it is imported by
``from gplws.accelerate import ...``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gplws.accelerate.builder import Builder
from gplws.accelerate.layers import BLOCKS, why_not_block
from gplws.accelerate.trial import BFLOAT16_TOLERANCE, TOLERANCE, tried
from gplws.accelerate.wrapped import Accelerated, class_of, keep_stock
from gplws.models.gplws_net import GPLWSNet
from gplws.nn.blocks import copied
from gplws.nn.layer_report import ModelReport
from gplws.nn.stock import has_hooks

__all__ = ["BFLOAT16_TOLERANCE", "TOLERANCE", "accelerate"]


def accelerate(
    model: nn.Module, example: Tensor | Sequence[Any] | None = None
) -> tuple[nn.Module, ModelReport]:
    """A copy of a network for inference, faster, with the same results to rounding.

    Batch norm is folded into convs; 3-D convs go to the kernels of this package or to oneDNN,
    together with activations, sums with residuals and pointwise convs behind; a conv to few
    channels joins the transposed conv before it; 3-D max-pools are computed one axis after the
    other; 2-D convs behind a doubling of pixels see the small map; 2-D parts run in channels_last,
    few frames at a time. The network works as before otherwise, also under ``torch.compile`` and
    ``torch.export``, and gradients flow to its inputs. ``train()`` turns it back into the network
    that it was made from.

    A layer stays as it is where a hook is attached to it, where its ``forward`` was replaced, where
    it is scripted, of another dtype than float32 and bfloat16, or where nothing is faster; a module
    whose Python depends on values or shapes stays, with its parts replaced. Batch norm is not
    folded into a conv then if the two meet only in that Python.

    Args:
        model: any module in eval mode on the CPU; it is not changed. On other devices only batch
            norms are folded.
        example: input, or sequence of inputs. With it, the fastest way for its shapes is measured
            for each layer, arguments that it leaves out are fixed at their defaults, and the result
            is compared with that of ``model``: if it differs by more than ``TOLERANCE`` or is
            not faster, the copy is of the network as it was, and the report says so.

    Returns:
        The new network, of a class derived from that of ``model``, and the report.

    Raises:
        TypeError: ``model`` is no module, or one that was scripted or compiled.
        ValueError: ``model`` is in training mode.

    Example:
        >>> model = gplws.models.FVNet().eval()
        >>> fast, report = gplws.accelerate(model)
        >>> fast(torch.rand(1, 3, 5, 64, 64)).depth.shape
        torch.Size([1, 64, 64])
        >>> print(report)  # doctest: +SKIP
    """
    _check(model)
    inputs = _inputs(example)
    report = ModelReport()
    if isinstance(model, Accelerated):
        report.add("", model, "is accelerated already", swapped=False)
        fast: nn.Module = copied(model)
    elif isinstance(model, GPLWSNet):
        fast = _fused_gplws(model, report)
    else:
        fast = Builder(copied(model), report, given=len(inputs)).build()
    if isinstance(fast, Accelerated) and not isinstance(model, Accelerated):
        keep_stock(fast, model)
    places = {name: index for index, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda layer: places.get(layer.name, len(places)))
    if not inputs:
        return fast, report
    return tried(model, fast, inputs, report), report


def _check(model: object) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected the module before it was scripted or traced")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise TypeError("model: expected the module before torch.compile; compile what comes out")
    if model.training:
        raise ValueError("model: expected a module in eval mode, got training mode; call eval()")


def _inputs(example: Tensor | Sequence[Any] | None) -> tuple[Any, ...]:
    if example is None:
        return ()
    return (example,) if isinstance(example, Tensor) else tuple(example)


def _fused_gplws(model: GPLWSNet, report: ModelReport) -> nn.Module:
    modules = dict(model.named_modules())
    blocks = {name: module for name, module in modules.items() if isinstance(module, BLOCKS)}
    if not blocks:
        report.add("", model, "is on the kernels already", swapped=False)
        return copied(model)
    for name, module in modules.items():
        states = {
            "another forward of": "forward" in vars(module),
            "hooks on": has_hooks(module),
            "training mode of": module.training,
        }
        if why := next((state for state, holds in states.items() if holds), ""):
            report.add("", model, f"{why} {name or 'itself'}", swapped=False)
            return copied(model)
    for name, module in blocks.items():
        why = why_not_block(module)
        report.add(name, module, why or "kernel", swapped=not why)
    if not report.swapped:
        return copied(model)
    fast = model.fuse()
    fast.__class__ = class_of(type(fast), None)
    return fast
