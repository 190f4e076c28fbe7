"""How long methods take on this machine."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gplws import _extension
from gplws.classical import METHODS as CLASSICAL_METHODS
from gplws.data import FocalStack, SceneSettings, simulate_stack
from gplws.reconstruct import (
    Precision,
    engine_of,
    network_of_file,
    reconstruct,
    resolve_device,
)
from gplws.tiling import DEFAULT_MEMORY_MB

FEWEST_ROUNDS, MOST_ROUNDS = 3, 30


@dataclass(frozen=True)
class Times:
    """Times of methods on one stack, from frames in memory to maps in memory.

    Attributes:
        shape: of the frames, (N, H, W) or (N, H, W, 3).
        dtype: of the frames.
        device: where they were computed.
        seconds: of each call of each method.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    seconds: dict[str, list[float]]

    def table(self) -> str:
        """Median, fastest call, and what follows from the median, as text."""
        head = ("method", "median s", "fastest s", "stacks/s", "Mpixel/s", "runs")
        pixels = math.prod(self.shape[:3])
        rows: list[tuple[str, ...]] = [head]
        for method, seconds in self.seconds.items():
            median = statistics.median(seconds)
            figures = (median, min(seconds), 1 / median, 1e-6 * pixels / median)
            rows.append((method, *(f"{value:.4g}" for value in figures), str(len(seconds))))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [f"{' x '.join(map(str, self.shape))} {self.dtype}, device {self.device}"]
        for name, *cells in rows:
            right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *right]))
        return "\n".join(lines)

    def as_json(self) -> str:
        """The same with every call, and what was built for which machine."""
        build = _extension.build_info()
        content = {**asdict(self), "threads": torch.get_num_threads(), "build": build}
        return json.dumps(content, indent=2) + "\n"


def rendered_stack(
    frames: int = 10, height: int = 512, width: int = 512, *, progress: bool = False
) -> FocalStack:
    """A stack to be timed with: what `gplws.data.simulate_stack` renders by default.

    Args:
        frames, height, width: N, H, W.
        progress: show a progress bar on stderr.

    Returns:
        uint8 frames with their positions and pixel size.

    Raises:
        ValueError: fewer than two frames, or less than 8 x 8 pixels.
    """
    from tqdm import tqdm

    settings = SceneSettings(frames=frames, height=height, width=width)
    with tqdm(
        desc="rendering", total=frames, unit="frame", disable=not progress, leave=False
    ) as bar:
        made = simulate_stack(settings, progress=lambda done, total: bar.update(done - bar.n))
    return FocalStack(made.frames.numpy(), made.focus_positions_um.numpy(), settings.pixel_size_um)


def time_methods(
    stack: FocalStack,
    methods: Sequence[str],
    *,
    precisions: Sequence[Precision] = ("float32",),
    device: str | torch.device = "auto",
    memory_mb: float = DEFAULT_MEMORY_MB,
    seconds: float = 6.0,
    progress: bool = False,
) -> Times:
    """Times of `gplws.reconstruct`, the methods taking turns.

    The first call of each, which loads weights and fills caches, does not count.

    Args:
        stack: what is reconstructed.
        methods: names, see `gplws.reconstruct`.
        precisions: of the networks among them, each of which is timed in all; the name of one in
            16 bits says so: "gplws, bfloat16".
        device, memory_mb: see there.
        seconds: how long all of it may take, roughly; each method has three turns at least.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: no method, or one that is unknown; a device that cannot be used.
    """
    for argument, given in (("methods", methods), ("precisions", precisions)):
        if not given:
            raise ValueError(f"{argument}: expected at least one")
    place = resolve_device(device, stack)
    options: dict[str, Any] = {"device": place, "memory_mb": memory_mb}
    runs = {}
    for name in methods:
        is_network = name not in ("auto", *CLASSICAL_METHODS)
        for precision in precisions if is_network else (None,):
            method: str | nn.Module = name
            own: dict[str, Any] = {"precision": precision}
            if name.endswith(".safetensors"):
                # Networks that ship are read once for all calls, files would be read in each.
                method, own = network_of_file(name, place, precision), {}
            # An unknown name is an error before any work.
            engine_of(method, place, shared=True, **own)
            label = name if precision in (None, "float32") else f"{name}, {precision}"
            runs[label] = partial(reconstruct, stack, method=method, **own, **options)
    times = take_turns(runs, seconds=seconds, progress=progress)
    return Times(tuple(stack.frames.shape), str(stack.frames.dtype), str(place), times)


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 6.0,
    fewest: int = FEWEST_ROUNDS,
    once: float | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
    between: Callable[[], object] | None = None,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Times of each candidate, in seconds; in each round every candidate has one turn.

    Args:
        candidates: functions without arguments, by name.
        seconds: how long all of it may take, roughly.
        fewest: rounds, also where they take longer.
        once: how long a round took that the caller has run; by default one is run here first.
        check: is given the results of that first round, by name, before anything is timed.
        between: called before each turn and not timed, such as what clears the caches.
        progress: show a progress bar on stderr.

    Returns:
        The times, by name, in the order of the rounds.
    """
    from tqdm import tqdm

    with tqdm(desc="gplws benchmark", unit="run", file=sys.stderr, disable=not progress) as bar:
        if once is None:
            start = time.perf_counter()
            results = {}
            for name, run in candidates.items():  # compiles, fills caches
                results[name] = run()
                bar.update()
            once = time.perf_counter() - start
            if check is not None:
                check(results)
            del results
        count = max(fewest, min(MOST_ROUNDS, int(seconds / once)))
        bar.total = bar.n + count * len(candidates)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(count):
            for name, run in candidates.items():
                if between is not None:
                    between()
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
                bar.update()
    return times
