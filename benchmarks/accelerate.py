"""Seconds for one stack on the CPU: networks on stock torch, and after gplws.accelerate.

Both memory formats of stock torch take turns with the accelerated network; the ratio is to the
faster of them. Results are compared in float32 before they are timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gplws
from benchmarks.networks import NETWORKS, in_channels_last, random_gplws, random_peer
from benchmarks.summary import medians
from benchmarks.timing import introduce, resumed_rows, save, show
from gplws.benchmark import FEWEST_ROUNDS, take_turns

SIZES = (256, 512)
FRAMES = 10


def network(name: str) -> nn.Module:
    """A network with random weights, the same each time."""
    return random_gplws() if name == "gplws" else random_peer(name, FRAMES)


def measure(name: str, size: int, seconds: float, fewest: int) -> dict[str, Any]:
    """One row: times of each candidate, error and what was replaced."""
    torch.manual_seed(1)
    stack = torch.rand(1, 3, FRAMES, size, size)
    last = stack.contiguous(memory_format=torch.channels_last_3d)
    stock, stock_last = network(name), in_channels_last(network(name))
    fast, report = gplws.accelerate(stock)
    errors: dict[str, float] = {}

    def compare(results: dict[str, torch.Tensor]) -> None:
        expected = results["eager"]
        for candidate, result in results.items():
            errors[candidate] = ((result - expected).abs().max() / expected.abs().max()).item()

    with torch.inference_mode():
        times = take_turns(
            {
                "eager": lambda: stock(stack),
                "eager channels_last": lambda: stock_last(last),
                "accelerated": lambda: fast(stack),
            },
            seconds=seconds,
            fewest=fewest,
            check=compare,
        )
    found = medians(times)
    best = min(found["eager"], found["eager channels_last"])
    return {
        "network": name,
        "shape": f"{FRAMES}x{size}x{size}",
        "seconds": times,
        "ratio": best / found["accelerated"],
        "error": errors["accelerated"],
        "error_of_channels_last": errors["eager channels_last"],
        "swapped": len(report.swapped),
        "kept": len(report.kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each row, roughly")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, help="at least")
    parser.add_argument("--resume", action="store_true", help="keep other rows of an earlier run")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    options = parser.parse_args()
    introduce()
    rows = resumed_rows("accelerate", options.out) if options.resume else []
    for size in options.sizes:
        for name in options.networks:
            row = measure(name, size, options.seconds, options.rounds)
            rows = [r for r in rows if (r["network"], r["shape"]) != (name, row["shape"])]
            rows.append(row)
            path = save("accelerate", {"rows": rows}, options.out)
    table = [
        [
            row["network"],
            row["shape"],
            *(f"{seconds:.2f}" for seconds in medians(row["seconds"]).values()),
            f"{row['ratio']:.2f}",
            f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    header = ["network", "shape", "eager", "channels_last", "accelerated", "ratio", "error"]
    show(header, table)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
