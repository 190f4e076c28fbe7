"""Depth maps of several methods beside each other, for real stacks without truth.

    python -m benchmarks.side_by_side STACK... --methods gplws rdf rr --out FOLDER

Each STACK is what gplws.reconstruct takes: a folder of frames or a file; of a folder with a
stack.json the frames named there. FOLDER gets NAME.png (PARENT_NAME.png, with the folder that each
lies in, where stacks have one name) with the all-in-focus image and, of each method, depth (same
colours, white where not valid), confidence and the difference from the first method, and
side_by_side.json with what can be counted without truth:

    valid      share of the pixels that the method calls valid
    speckle    share of those more than one frame away from the median of 7 x 7 pixels around
    roughness  median of that distance, frames
    apart      share of the pixels valid in both that lie more than one frame from the first method

A small share of speckle is no proof: a method that smooths everything has none. Look at the edges.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import gplws
from benchmarks.timing import save, show
from gplws.data import FocalStack
from gplws.datasets.folder_stacks import read_json
from gplws.io import read_stack

_WINDOW = 7


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stacks", nargs="+", type=Path, metavar="STACK")
    add("--methods", nargs="+", default=["gplws", "rdf", "rr"])
    add("--crop", type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"))
    add("--device", default="auto")
    add("--out", type=Path, default=Path("side_by_side"), metavar="FOLDER")
    given = parser.parse_args(arguments)
    names = [path.stem for path in given.stacks]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}_{path.stem}" for path in given.stacks]
    if len(set(names)) < len(names):
        parser.error("several STACKs have the same name and folder: look at them one by one")
    rows: list[dict[str, Any]] = []
    for name, path in zip(names, given.stacks, strict=True):
        stack = stack_of(path)
        if given.crop:
            stack = cropped(stack, *given.crop)
        found = {}
        for method in given.methods:
            started = time.perf_counter()
            found[method] = gplws.reconstruct(stack, method=method, device=given.device)
            seconds = time.perf_counter() - started
            index, reference = (found[m].depth_index for m in (method, given.methods[0]))
            figures = counted(np.asarray(index), np.asarray(reference))
            rows.append({"stack": name, "method": method} | figures | {"seconds": seconds})
        save_picture(given.out / f"{name}.png", name, found)
    table = [
        [
            row["stack"],
            row["method"],
            f"{row['valid']:.1%}",
            f"{row['speckle']:.2%}",
            f"{row['roughness']:.3f}",
            f"{row['apart']:.1%}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    show(["stack", "method", "valid", "speckle", "roughness", "apart", "s"], table)
    print(f"\n{save('side_by_side', {'results': rows}, given.out)}")


def stack_of(path: Path) -> FocalStack:
    """Stack of a file or folder; of the frames that its stack.json names, if it has one."""
    names = read_json(path / "stack.json").get("frames") if path.is_dir() else None
    return read_stack([path / str(name) for name in names] if names else path)


def cropped(stack: FocalStack, top: int, left: int, height: int, width: int) -> FocalStack:
    frames = stack.frames[:, top : top + height, left : left + width]
    return FocalStack(
        frames, focus_positions_um=stack.focus_positions_um, pixel_size_um=stack.pixel_size_um
    )


def counted(index: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Figures of a depth map (H, W) in frames, NaN where not valid, beside that of another."""
    valid = np.isfinite(index)
    apart = np.abs(index - reference)[valid & np.isfinite(reference)]
    distance = np.abs(index - _median_around(index))[valid]
    known = distance.size > 0
    return {
        "valid": float(valid.mean()),
        "speckle": float((distance > 1).mean()) if known else float("nan"),
        "roughness": float(np.median(distance)) if known else float("nan"),
        "apart": float((apart > 1).mean()) if apart.size else float("nan"),
    }


def _median_around(values: np.ndarray) -> np.ndarray:
    """Median of the finite values of 7 x 7 pixels around each pixel, borders repeated."""
    padded = F.pad(torch.from_numpy(values)[None, None], (_WINDOW // 2,) * 4, "replicate")[0, 0]
    rows = []
    for row in range(values.shape[0]):  # all at once takes 49 times the memory of the map
        windows = padded[row : row + _WINDOW].unfold(1, _WINDOW, 1)  # (7, W, 7)
        rows.append(windows.permute(1, 0, 2).flatten(1).nanmedian(1).values)
    return torch.stack(rows).numpy()


def save_picture(path: Path, title: str, found: dict[str, gplws.Reconstruction]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(found.values()))
    low, high = _span(np.stack([one.depth_index for one in found.values()]))
    figure = Figure(figsize=(5 * (len(found) + 1), 12), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(found) + 1, squeeze=False)
    picture = np.asarray(first.all_in_focus, dtype=np.float32)
    axes[0, 0].imshow(picture / max(float(picture.max()), 1e-9), cmap="gray")
    axes[0, 0].set_title(f"{title}, in focus everywhere")
    for column, (name, one) in enumerate(found.items(), 1):
        panels = (
            (f"{name}: frame", one.depth_index, "viridis", low, high),
            (f"{name}: confidence", one.confidence, "magma", 0.0, 1.0),
            (
                f"{name} - {next(iter(found))}",
                one.depth_index - first.depth_index,
                "bwr",
                -3.0,
                3.0,
            ),
        )
        for row, (label, image, colours, bottom, top) in enumerate(panels):
            axes[row, column].imshow(image, cmap=colours, vmin=bottom, vmax=top)
            axes[row, column].set_title(label)
    for one_axes in axes.flat:
        one_axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=60)


def _span(index: np.ndarray) -> tuple[float, float]:
    finite = index[np.isfinite(index)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(finite, [1, 99])
    return float(low), float(high)


if __name__ == "__main__":
    main()
