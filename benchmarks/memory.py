"""Peak memory of a reconstruction, against a forward pass of its network on stock torch.

"gplws" is the network that ships, with its classical steps.

Each row is a process of its own. What is counted is resident memory at its peak, less what the
process held with everything imported, the network built and the frames (8 bits) in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gplws
from benchmarks import plots
from benchmarks.networks import in_channels_last
from benchmarks.summary import shape_name
from benchmarks.timing import introduce, save, show
from gplws.models import GPLWSNet

BUDGETS_MB = (2048, 1024, 640, 256)
STOCK = ("stock eager", "stock eager channels_last")


def candidates() -> list[dict[str, Any]]:
    """Arguments of each row."""
    rows: list[dict[str, Any]] = [
        {"candidate": method, "precision": precision, "memory_mb": budget}
        for method, precision in (("gplws", "float32"), ("gplws", "bfloat16"), ("rdf", "float32"))
        for budget in BUDGETS_MB
    ]
    rows += [
        {"candidate": name, "precision": precision, "memory_mb": None}
        for name in STOCK
        for precision in ("float32", "bfloat16")
    ]
    return rows


def measure(
    candidate: str, precision: str, memory_mb: float | None, shape: tuple[int, int, int]
) -> dict[str, float]:
    """Peak in MiB and seconds of one candidate, in this process."""
    dtype = getattr(torch, precision)
    frames = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    if candidate == "rdf":
        method: Any = "rdf"
    elif candidate == "gplws":
        method = gplws.load_model("gplws").to(dtype)
    else:
        trained = gplws.load_model("gplws", fused=False)
        assert isinstance(trained, GPLWSNet)
        model = trained.reparameterise().to(dtype)
        model = in_channels_last(model) if candidate == STOCK[1] else model
    before = _resident_mib()
    exact = _forget_peak()
    started = time.perf_counter()
    if candidate in STOCK:
        with torch.inference_mode():
            stack = torch.from_numpy(frames).to(dtype).div(255)[None, None]
            if candidate == STOCK[1]:
                stack = stack.contiguous(memory_format=torch.channels_last_3d)
            model(stack)
    else:
        assert memory_mb is not None
        gplws.reconstruct(frames, method=method, memory_mb=memory_mb)
    seconds = time.perf_counter() - started
    peak = _status_mib("VmHWM") if exact else _highest_mib()
    return {"peak_mib": peak - before, "seconds": seconds}


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def _highest_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _resident_mib() -> float:
    return _status_mib("VmRSS") if Path("/proc/self/status").exists() else _highest_mib()


def _forget_peak() -> bool:
    """Let the highest resident memory count from now on; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def shares(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its peak as share of either stock row of its precision."""
    for row in rows:
        for name in STOCK:
            for stock in rows:
                if (stock["candidate"], stock["precision"]) == (name, row["precision"]):
                    row[share_key(name)] = row["peak_mib"] / stock["peak_mib"]


def share_key(stock: str) -> str:
    """Where a row has its share of a stock candidate."""
    return f"share_of_{stock.replace(' ', '_')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.frames, options.side, options.side)
    if options.one:
        print(json.dumps(measure(**options.one, shape=shape)))
        return
    introduce()
    rows = []
    sizes = ["--frames", str(options.frames), "--side", str(options.side)]
    for row in candidates():
        command = [sys.executable, "-m", "benchmarks.memory", *sizes, "--one", json.dumps(row)]
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        rows.append({**row, "shape": shape_name(shape), **found})
        print(f"{row}: {found['peak_mib']:.0f} MiB, {found['seconds']:.1f} s", flush=True)
    shares(rows)
    path = save("memory", {"rows": rows}, options.out)
    keys = [share_key(name) for name in STOCK]
    show(
        [
            "candidate",
            "precision",
            "memory_mb",
            "peak, MiB",
            "seconds",
            *(f"of {n}" for n in STOCK),
        ],
        [
            [
                row["candidate"],
                row["precision"],
                str(row["memory_mb"] or ""),
                f"{row['peak_mib']:.0f}",
                f"{row['seconds']:.1f}",
                *(f"{100 * row[key]:.0f}%" for key in keys),
            ]
            for row in rows
        ],
    )
    plots.memory(path)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
