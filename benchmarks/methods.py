"""Seconds of whole reconstructions, from frames in memory to maps in memory, by all methods.

The stack is the one that ``gplws benchmark`` renders. All methods take turns in one run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.summary import medians, shape_name
from benchmarks.timing import introduce, save, show
from gplws.benchmark import rendered_stack, time_methods
from gplws.classical import METHODS

SHAPES = ((10, 512, 512), (20, 1024, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "gplws"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each shape, roughly")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    options = parser.parse_args()
    introduce()
    rows: list[dict[str, Any]] = []
    for frames, height, width in SHAPES:
        stack = rendered_stack(frames, height, width, progress=True)
        times = time_methods(
            stack,
            options.methods,
            precisions=("float32", "bfloat16"),
            device=options.device,
            seconds=options.seconds,
            progress=True,
        )
        shape = shape_name((frames, height, width))
        rows.append({"shape": shape, "device": times.device, "seconds": times.seconds})
    columns = [f"{row['shape']}, s" for row in rows]
    found = [medians(row["seconds"]) for row in rows]
    show(
        ["method", *columns],
        [[name, *(f"{times[name]:.3f}" for times in found)] for name in found[0]],
    )
    print(f"\n{save('methods', {'rows': rows}, options.out)}")


if __name__ == "__main__":
    main()
