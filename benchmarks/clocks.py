"""Timing on a device, in turns; inputs take turns as well, so that no cache holds the next one."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

FEWEST_ROUNDS, MOST_ROUNDS = 10, 200
FEWEST_SETS, MOST_SETS = 2, 256
# Cycles that the GPU is kept busy before each turn, some 50 us: the host then is ahead with its
# launches, and the time of the first is not counted.
LEAD_CYCLES = 100_000

Run = Callable[[int], Any]
"""A candidate: computes the result for the input of this number."""


class Clock(Protocol):
    """A device, and how time is taken on it."""

    device: torch.device
    cache_bytes: int
    """What may stay in its last cache from one turn to the next."""

    def seconds(self, work: Callable[[], object]) -> float:
        """How long ``work`` keeps the device busy."""

    def graph(self, works: Sequence[Callable[[], Tensor]]) -> Run:
        """Each of ``works`` recorded; what is returned does the one of a number again."""

    def wait(self) -> None:
        """Until all is done; errors of the device are raised."""

    def lost(self) -> bool:
        """Whether the device does no more work for this process, after an error that stays."""

    def forget(self) -> None:
        """Give memory that nothing uses back, so that the next candidate finds all of it."""

    def facts(self) -> dict[str, Any]:
        """What has to be known about the device."""


class CudaClock:
    """Events of the current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = self._properties.L2_cache_size

    def seconds(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(LEAD_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def graph(self, works: Sequence[Callable[[], Tensor]]) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels before they are recorded
                works[0]()
        torch.cuda.current_stream().wait_stream(side)
        # One pool: intermediate results of all graphs lie in the same memory.
        pool = torch.cuda.graph_pool_handle()
        graphs, results = [], []
        for work in works:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                results.append(work())
            graphs.append(graph)

        # What the works refer to lives as long as the graphs: these read the memory of their inputs
        # again, and cuDNN hands all free memory back whenever it has tried its kernels.
        kept = list(works)

        def replay(number: int, kept: Sequence[object] = kept) -> Tensor:
            graphs[number].replay()
            return results[number]

        return replay

    def wait(self) -> None:
        torch.cuda.synchronize()

    def lost(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def forget(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        known = self._properties
        return {
            "gpu": known.name,
            "compute_capability": f"{known.major}.{known.minor}",
            "multiprocessors": known.multi_processor_count,
            "l2_mib": round(known.L2_cache_size / 2**20),
            "memory_gib": round(known.total_memory / 2**30),
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }


def driver() -> str:
    """Version of the NVIDIA driver; "unknown" where nothing says it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True)
    lines = said.stdout.strip().splitlines()
    return lines[0].strip() if said.returncode == 0 and lines else "unknown"


def sets_beyond(cache_bytes: int, set_bytes: int) -> int:
    """How many inputs must take turns, so that the cache has lost one when it comes again."""
    wanted = cache_bytes // max(set_bytes, 1) + 2
    return max(FEWEST_SETS, min(MOST_SETS, wanted))


def reason_of(error: BaseException) -> str:
    """One line that says why a candidate is left out."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def take_turns(
    clock: Clock, candidates: Mapping[str, Run], *, sets: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times of each candidate; in each round every candidate has one turn, on the next input.

    Args:
        clock: of the device.
        candidates: by name.
        sets: number of inputs.
        seconds: how long all of it may take, roughly.

    Returns:
        times: seconds by name, in the order of the rounds; where one candidate broke the device,
            the others have what they had until then, if that is enough.
        left_out: why others failed while they were timed.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    left_out: dict[str, str] = {}

    def round_(number: int) -> bool:
        """Whether the device can do another one."""
        for name, run in candidates.items():
            if name not in left_out:
                try:
                    times[name].append(clock.seconds(partial(run, number % sets)))
                except Exception as error:  # the others shall be measured all the same
                    left_out[name] = reason_of(error)
                    if clock.lost():
                        return False
        return True

    begin = time.perf_counter()
    works = round_(0)
    once = time.perf_counter() - begin
    for values in times.values():
        values.clear()  # a round to warm up
    number, count = 0, max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(once, 1e-9))))
    while works and number < count:
        number += 1
        works = round_(number)
        if time.perf_counter() - begin > 2 * seconds and number >= FEWEST_ROUNDS:
            break
    enough = 1 if works else FEWEST_ROUNDS
    whole = {name: v for name, v in times.items() if name not in left_out and len(v) >= enough}
    return whole, left_out
