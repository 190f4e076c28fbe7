"""Tensors at the edge of memory that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Edge = Literal["before", "behind"]


class GuardedMemory:
    """Places tensors so that the process dies where one byte before or behind them is accessed.

    The memory lives as long as the object does.

    Args:
        edge: on which side of each tensor the forbidden page lies.
    """

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._maps: list[mmap.mmap] = []

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of the shape and dtype of ``tensor``, all bits set (NaN)."""
        size = tensor.numel() * tensor.element_size()
        page = mmap.PAGESIZE
        inside = -(-size // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        self._maps.append(memory)
        whole = np.frombuffer(memory, np.uint8)
        whole[:] = 0xFF
        for start in (0, page + inside):
            _forbid(whole.ctypes.data + start, page)
        first = page if self._edge == "before" else page + inside - size
        return torch.from_numpy(whole[first : first + size]).view(tensor.dtype).view(tensor.shape)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` at the edge; None stays None."""
        return None if tensor is None else self.empty_like(tensor).copy_(tensor)


def _forbid(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
