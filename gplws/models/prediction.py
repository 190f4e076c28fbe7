"""How networks are asked and their answers read, in training, inference and evaluation alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gplws.ops.focus_search import focus_search
from gplws.positions import frame_index


def predicted(model: nn.Module, stack: Tensor, focus_positions: Tensor) -> Any:
    """Depth as it is read at inference: what ``model.predict`` says, or the focus search.

    Args:
        model: has ``predict(stack, focus_positions)``, as the networks of :mod:`gplws.models`, or
            maps a stack to a focus volume of logits (B, N, H, W), or to something with ``depth``
            (B, H, W) in the unit of the positions.
        stack: (B, C, N, H, W).
        focus_positions: (B, N), of any unit.

    Returns:
        ``depth`` (B, H, W) in the unit of the positions and, where there is one, ``confidence``.
    """
    if callable(getattr(type(model), "predict", None)):
        predict: Callable[..., Any] = model.predict  # type: ignore[assignment]
        return predict(stack, focus_positions)
    output = network_output(model, stack, focus_positions)
    if isinstance(output, Tensor):
        return focus_search(output.float().contiguous(), focus_positions, log_scale=True)
    return output


def predicted_index(model: nn.Module, stack: Tensor, focus_positions: Tensor) -> Tensor:
    """The depth of :func:`predicted` as (B, H, W) float32 frame numbers."""
    return index_of(predicted(model, stack, focus_positions).depth.float(), focus_positions)


def network_output(model: nn.Module, stack: Tensor, focus_positions: Tensor) -> Any:
    """What a network returns, given the focus positions if its ``forward`` asks for them.

    Args:
        model: the network.
        stack: (B, C, N, H, W).
        focus_positions: (B, N).
    """
    if "focus_positions" in inspect.signature(model.forward).parameters:
        return model(stack, focus_positions)
    return model(stack)


def known_positions(model: nn.Module, focus_positions: Tensor) -> Tensor:
    """Focus positions (B, N) as a network knows them: over its ``focus_range``, if it has one.

    Networks that regress depth cannot be told the unit; they learn the range of their training.
    """
    known = getattr(model, "focus_range", None)
    if known is None:
        return focus_positions
    begin, end = known
    first, last = focus_positions[:, :1], focus_positions[:, -1:]
    return begin + (focus_positions - first) / (last - first) * (end - begin)


def index_of(depth: Tensor, focus_positions: Tensor) -> Tensor:
    """Frame number of a depth: linear between the focus positions, and beyond the ends.

    Unlike ``DepthSample.depth_index`` it is finite and differentiable everywhere.

    Args:
        depth: (B, H, W), unit of ``focus_positions``.
        focus_positions: (B, N) strictly monotonic, N >= 2.

    Returns:
        (B, H, W) frames.
    """
    pairs = zip(depth, focus_positions, strict=True)
    return torch.stack([frame_index(*pair, extrapolate=True) for pair in pairs])
