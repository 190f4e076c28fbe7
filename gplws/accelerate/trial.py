"""The trial of a fast network on an example: is it right, and is it faster."""

from __future__ import annotations

import math
import time
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from gplws.accelerate.tracing import first_line
from gplws.nn.blocks import copied
from gplws.nn.inference import FoldedConv
from gplws.nn.layer_report import LayerReport, ModelReport

TOLERANCE = 1e-4
"""Largest difference that :func:`gplws.accelerate` accepts on an example, of the largest value; for
float32."""
BFLOAT16_TOLERANCE = 0.1
"""The same where anything given or expected is bfloat16."""


@torch.no_grad()
def tried(
    model: nn.Module, fast: nn.Module, inputs: tuple[Any, ...], report: ModelReport
) -> nn.Module:
    """``fast`` tuned for the inputs; a copy of ``model`` where it is not better."""

    def given_back(why: str) -> nn.Module:
        report.layers = [
            LayerReport(layer.name, layer.kind, False, why if layer.swapped else layer.note)
            for layer in report.layers
        ]
        return copied(model)

    def given() -> tuple[Any, ...]:  # networks may change what they are given
        return cast(tuple[Any, ...], _pytree.tree_map_only(Tensor, torch.clone, inputs))

    expected = model(*given())
    convs = [module for module in fast.modules() if isinstance(module, FoldedConv)]
    for conv in convs:
        conv.tuning = True
    try:
        got = fast(*given())
    except Exception as error:  # such as of Python that asks for strides
        return given_back(f"fails on the example: {first_line(error)}")
    finally:
        for conv in convs:
            conv.tuning = False
    report.error = _difference(got, expected)
    seconds = [math.inf, math.inf]
    for _ in range(3):
        for index, candidate in enumerate((model, fast)):
            arguments = given()
            _wait_for(arguments)
            start = time.perf_counter()
            _wait_for(candidate(*arguments))
            seconds[index] = min(seconds[index], time.perf_counter() - start)
    report.seconds = (seconds[0], seconds[1])
    narrow = any(t.dtype == torch.bfloat16 for t in _tensors((inputs, expected)))
    wrong = not report.error <= (BFLOAT16_TOLERANCE if narrow else TOLERANCE)
    if not wrong and seconds[1] <= seconds[0]:
        return fast
    return given_back(
        f"results differ by {report.error:.1e}" if wrong else "no faster on the example"
    )


def _wait_for(tree: Any) -> None:
    """Until GPUs have computed the tensors of a tree."""
    for device in {tensor.device for tensor in _tensors(tree) if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _difference(got: Any, expected: Any) -> float:
    """Largest difference of two trees of tensors, each as a share of its largest value."""
    first, second = _tensors(got), _tensors(expected)
    if [t.shape for t in first] != [t.shape for t in second]:
        return math.inf
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        same = a.isfinite() == b.isfinite()
        if not bool(same.all()):
            return math.inf
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item())
    return worst
