"""Memory for activations: one block that a forward pass leaves to the next.

Large tensors on a CPU come fresh from the operating system each time, and writing to them for the
first time costs ten times as much as writing to memory that was used before. Where each tensor of a
pass lies in the block is planned beforehand, from a pass that computes shapes only: tensors that
are not needed at the same time share memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ALIGNMENT = 64  # bytes; one cache line


class MemoryPlan(NamedTuple):
    """Where the tensors of a pass lie in a block of memory."""

    offsets: tuple[int, ...]
    """Byte of the block that each tensor begins at, in the order in which they are taken."""
    size: int
    """Bytes of the block."""


@dataclass
class _Life:
    """From which step to which a tensor is needed."""

    size: int  # bytes
    first: int
    last: int | None = None  # None: to the end

    def meets(self, other: _Life) -> bool:
        return (other.last is None or self.first <= other.last) and (
            self.last is None or other.first <= self.last
        )


class Recorder:
    """Notes when the tensors of a pass are needed; they have shapes, but no memory."""

    computes = False

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._lives: list[_Life] = []
        self._step = 0

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor without memory, needed from now on."""
        tensor = torch.empty(shape, dtype=like.dtype, device="meta")
        self._step += 1
        self._taken.append(tensor)
        size = -(-math.prod(shape) * like.element_size() // _ALIGNMENT) * _ALIGNMENT
        self._lives.append(_Life(size, self._step))
        return tensor

    def give_back(self, tensor: Tensor) -> None:
        """``tensor`` is needed no longer, if it was taken here."""
        for taken, life in zip(self._taken, self._lives, strict=True):
            if taken is tensor:
                life.last = self._step

    def plan(self) -> MemoryPlan:
        """Large tensors first, each at the lowest offset that is free as long as it is needed.

        Source: "greedy by size" of Pisarchyk and Lee, "Efficient memory management for deep neural
        net inference", 2020, arXiv:2001.03288.
        """
        offsets = [0] * len(self._lives)
        placed: list[int] = []
        for index in sorted(range(len(offsets)), key=lambda i: -self._lives[i].size):
            life, offset = self._lives[index], 0
            for other in sorted(placed, key=lambda i: offsets[i]):
                end = offsets[other] + self._lives[other].size
                if life.meets(self._lives[other]) and end > offset:
                    if offsets[other] >= offset + life.size:
                        break
                    offset = end
            offsets[index] = offset
            placed.append(index)
        ends = [o + life.size for o, life in zip(offsets, self._lives, strict=True)]
        return MemoryPlan(tuple(offsets), max(ends, default=0))


class Workspace:
    """The block of one forward pass at a time, which grows as needed."""

    computes = True

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._plans: dict[Any, MemoryPlan] = {}
        self._offsets: Iterator[int] = iter(())

    def begin(self, key: Any, make_plan: Callable[[], MemoryPlan]) -> None:
        """Make ready for a pass; its tensors are then taken in the order of the plan.

        Args:
            key: passes with the same key have the same plan.
            make_plan: called for a key that the last pass did not have.
        """
        if key not in self._plans:
            self._plans = {key: make_plan()}
        plan = self._plans[key]
        if self._block.numel() < plan.size + _ALIGNMENT:
            self._block = torch.empty(0, dtype=torch.uint8)  # free it before there is another
            self._block = torch.empty(plan.size + _ALIGNMENT, dtype=torch.uint8)
        self._offsets = iter(plan.offsets)

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The next tensor of the plan, contiguous and uninitialised, of the dtype of ``like``."""
        first = -self._block.data_ptr() % _ALIGNMENT + next(self._offsets)
        size = math.prod(shape) * like.element_size()
        return self._block[first : first + size].view(like.dtype).view(shape)

    def give_back(self, tensor: Tensor) -> None:
        """Nothing to be done: the plan knows."""


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
            ``out=``. A recorder: modules are not called. None: modules are simply called.
    """

    def __init__(self, workspace: Workspace | Recorder | None) -> None:
        self._workspace = workspace

    def __call__(self, module: nn.Module, x: Tensor, *, keep: bool = False) -> Tensor:
        """``module(x)``; ``x`` is not used again, but with ``keep``."""
        if self._workspace is None:
            return module(x)
        output_shape: Callable[[Tensor], tuple[int, ...]] = module.output_shape  # type: ignore[assignment]
        y = self._workspace.take(output_shape(x), x)
        if self._workspace.computes:
            module(x, out=y)
        if not keep:
            self._workspace.give_back(x)
        return y

    def onto(self, module: nn.Module, x: Tensor, other: Tensor) -> Tensor:
        """``module(x, other)``, with a workspace in the place of ``other``; neither is used again.

        The module reads each element of ``other`` where it writes one.
        """
        if self._workspace is None:
            return module(x, other)
        if self._workspace.computes:
            module(x, other, out=other)
        self._workspace.give_back(x)
        return other

    def dense(self, x: Tensor) -> Tensor:
        """``x`` with elements of its own, as the kernels read them: an expanded tensor has none."""
        if self._workspace is None or x.is_contiguous():
            return x
        y = self._workspace.take(tuple(x.shape), x)
        return y.copy_(x) if self._workspace.computes else y

    def chain(self, modules: nn.Module, x: Tensor) -> Tensor:
        """``modules(x)``; with a workspace an ``nn.Sequential``, its modules in turn."""
        if self._workspace is None:
            return modules(x)
        assert isinstance(modules, nn.Sequential)
        return self.all(modules, x)

    def all(self, modules: Iterable[nn.Module], x: Tensor) -> Tensor:
        """``modules`` in turn."""
        for module in modules:
            x = self(module, x)
        return x

    def last(self, module: nn.Module, x: Tensor) -> Tensor:
        """``module(x)`` in memory of its own, which outlives the workspace."""
        if self._workspace is None or self._workspace.computes:
            return module(x)
        return x
