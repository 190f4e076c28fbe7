"""Memory for activations that one forward pass leaves to the next.

Large tensors on a CPU come fresh from the operating system each time, and writing to them for the
first time costs ten times as much as writing to memory that was used before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Workspace:
    """Buffers of one forward pass; each tensor taken is given back when it is no longer needed."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of this shape, dtype and device of ``like``."""
        size = math.prod(shape) * like.element_size()
        fitting = [b for b in self._free if b.device == like.device and b.numel() >= size]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [b for b in self._free if b is not buffer]
        else:
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        self._lent[buffer.data_ptr()] = buffer
        return buffer[:size].view(like.dtype).view(shape)

    def give_back(self, tensor: Tensor) -> None:
        """Let later calls of :meth:`take` have the memory of ``tensor``, if it was taken here."""
        buffer = self._lent.pop(tensor.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)


class WorkspacePool:
    """As many workspaces as there are forward passes at the same time."""

    def __init__(self) -> None:
        self._idle: deque[Workspace] = deque()  # its append and pop are atomic

    @contextmanager
    def borrow(self) -> Iterator[Workspace]:
        """A workspace that nobody else has; one that a failed pass had is dropped."""
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = Workspace()
        yield workspace
        self._idle.append(workspace)

    def clear(self) -> None:
        """Free the memory of all workspaces that are not in use."""
        self._idle.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WorkspacePool:
        return WorkspacePool()

    def __reduce__(self) -> tuple[type[WorkspacePool], tuple[()]]:
        return (WorkspacePool, ())


class Runner:
    """Runs modules one after the other, in the memory of a workspace or in fresh memory.

    Args:
        workspace: where results go; the modules must then have ``output_shape(x)`` and take
            ``out=``. None: modules are simply called.
    """

    def __init__(self, workspace: Workspace | None) -> None:
        self._workspace = workspace

    def __call__(self, module: nn.Module, x: Tensor, *others: Tensor, keep: bool = False) -> Tensor:
        """``module(x, *others)``; the inputs are not used again, but for ``x`` with ``keep``."""
        if self._workspace is None:
            return module(x, *others)
        output_shape: Callable[[Tensor], tuple[int, ...]] = module.output_shape  # type: ignore[assignment]
        y = self._workspace.take(output_shape(x), x)
        module(x, *others, out=y)
        for used in others if keep else (x, *others):
            self._workspace.give_back(used)
        return y

    def chain(self, modules: nn.Module, x: Tensor) -> Tensor:
        """The children of ``modules`` in turn."""
        for module in modules.children():
            x = self(module, x)
        return x

    def last(self, module: nn.Module, x: Tensor) -> Tensor:
        """``module(x)`` in memory of its own, which outlives the workspace."""
        y = module(x)
        if self._workspace is not None:
            self._workspace.give_back(x)
        return y
