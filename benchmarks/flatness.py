"""Cost per voxel of the network on the kernels, over the number of frames and the size.

The shapes of a row take turns, so that a machine that slows down slows all of them: 5 to 100 frames
of 256 x 256, and 10 frames of 256 x 256 to 2048 x 2048.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks import plots
from benchmarks.latency import SHAPES
from benchmarks.networks import random_gplws
from benchmarks.summary import flatness, shape_name
from benchmarks.timing import introduce, save, show
from gplws.benchmark import take_turns

OVER = {"frames": SHAPES["frames"], "size": SHAPES["sizes"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each row, roughly")
    parser.add_argument("--over", nargs="+", choices=list(OVER), default=list(OVER))
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    options = parser.parse_args()
    introduce()

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        network = random_gplws().fuse().to(dtype)
        for over in options.over:
            stacks = {shape_name(s): torch.rand(1, 3, *s).to(dtype) for s in OVER[over]}
            runs = {shape: partial(network, stack) for shape, stack in stacks.items()}
            with torch.inference_mode():
                times = take_turns(runs, seconds=options.seconds)
            precision = str(dtype).removeprefix("torch.")
            rows.append({"precision": precision, "over": over, "seconds": times, **flatness(times)})
    path = save("flatness", {"rows": rows}, options.out)
    show(
        ["precision", "over", "ns per voxel by shape", "deviation"],
        [
            [
                row["precision"],
                row["over"],
                ", ".join(f"{shape} {cost:.0f}" for shape, cost in row["ns_per_voxel"].items()),
                f"{100 * row['largest_deviation']:.0f}%",
            ]
            for row in rows
        ],
    )
    plots.flatness(path)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
