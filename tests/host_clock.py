"""The benchmark for GPUs where there is none: its clock is that of the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class HostClock:
    """The host's own clock: what is measured can be rehearsed where there is no GPU."""

    def __init__(self, cache_bytes: int = 2**16) -> None:
        self.device, self.cache_bytes = torch.device("cpu"), cache_bytes

    def seconds(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def graph(self, works: Sequence[Callable[[], Tensor]]) -> Callable[[int], Tensor]:
        return lambda number: works[number]()

    def wait(self) -> None:
        pass

    def lost(self) -> bool:
        return False

    def forget(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none, rehearsed on the CPU", "driver": "none", "cuda": torch.version.cuda}
