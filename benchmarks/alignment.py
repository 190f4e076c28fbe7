"""Errors of reconstructions of frames that moved, with and without ``align``.

Eight simulated scenes without movement are displaced here, by known amounts, then photon noise is
added. The same frames, never moved, are what errors are compared with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

import gplws
from benchmarks.timing import introduce, save, show
from gplws.data import SceneSettings, simulate_stack

FRAMES, SIDE = 14, 380
SCENES = (  # surface, texture, electrons at full scale (None: no noise)
    ("fractal", "grain", None),
    ("holes", "specks", 3000),
    ("spheres", "patches", 1000),
    ("grooves", "brushed", 5000),
    ("steps", "grain", 2000),
    ("fractal", "patches", 800),
    ("holes", "grain", 20000),
    ("spheres", "specks", 1500),
)
LARGEST_SHIFT_PX, GROWTH = 3.0, 0.002
CASES = (  # how frames move, and what is done about it
    ("still", "none"),
    ("still", "translation"),
    ("still", "similarity"),
    ("displaced", "none"),
    ("displaced", "translation"),
    ("growing", "none"),
    ("growing", "similarity"),
)


def moved(frames: np.ndarray, movement: str, rng: np.random.Generator) -> np.ndarray:
    """Frames (N, H, W) in 0..1, each displaced or magnified against the middle one."""
    count, height, width = frames.shape
    shifts = rng.uniform(-LARGEST_SHIFT_PX, LARGEST_SHIFT_PX, (count, 2))
    shifts -= shifts[count // 2]
    result = []
    for number, frame in enumerate(frames):
        scale = 1 + GROWTH * (number - count // 2) * (movement == "growing")
        x, y = shifts[number] if movement == "displaced" else (0.0, 0.0)
        middle = (width - 1) / 2, (height - 1) / 2
        there = [[scale, 0, middle[0] * (1 - scale) + x], [0, scale, middle[1] * (1 - scale) + y]]
        image = cv2.warpAffine(
            frame, np.array(there), (width, height),
            flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT,
        )  # fmt: skip
        result.append(image)
    return np.stack(result)


def photographed(frames: np.ndarray, electrons: int | None, rng: np.random.Generator) -> np.ndarray:
    """Frames (N, H, W) uint8 with photon noise."""
    if electrons is not None:
        deviation = np.sqrt(np.maximum(frames, 0) / electrons)
        frames = frames + rng.normal(0, 1, frames.shape) * deviation
    return (255 * frames).clip(0, 255).round().astype(np.uint8)


def error(frames: np.ndarray, depth: np.ndarray, method: str, align: str) -> float:
    """Mean error in frames where all frames see the scene."""
    result = gplws.reconstruct(frames, method=method, align=align)
    found = result.metadata.get("alignment", {"window": (0, 0, *depth.shape)})
    top, left, height, width = found["window"]
    seen = depth[top : top + height, left : left + width]
    return float(np.nanmean(np.abs(result.depth_index - seen)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["rdf", "gplws"])
    parser.add_argument("--scenes", type=int, default=len(SCENES), help="the first so many")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    options = parser.parse_args()
    introduce()
    errors: dict[tuple[str, str, str], list[float]] = {}
    for seed, (surface, texture, electrons) in enumerate(tqdm(SCENES[: options.scenes])):
        scene = SceneSettings(
            surface=surface, texture=texture, height=options.side, width=options.side,
            frames=FRAMES, seed=seed, full_well_electrons=None,
        )  # fmt: skip
        stack = simulate_stack(scene)
        sharp, depth = stack.frames.numpy().astype(np.float32) / 255, stack.depth_index.numpy()
        for movement, align in CASES:
            rng = np.random.default_rng(seed)
            frames = photographed(moved(sharp, movement, rng), electrons, rng)
            for method in options.methods:
                of_case = errors.setdefault((movement, align, method), [])
                of_case.append(error(frames, depth, method, align))
    rows: list[dict[str, Any]] = []
    for (movement, align, method), values in errors.items():
        ratios = np.array(values) / errors["still", "none", method]
        rows.append(
            {
                "frames": movement,
                "align": align,
                "method": method,
                "mean_error": float(np.mean(values)),
                "median_ratio": float(np.median(ratios)),
                "errors": values,
            }
        )
    show(
        ["frames", "align", "method", "mean error, frames", "times still, median"],
        [
            [*list(row.values())[:3], f"{row['mean_error']:.3f}", f"{row['median_ratio']:.2f}"]
            for row in rows
        ],
    )
    print(f"\n{save('alignment', {'rows': rows}, options.out)}")


if __name__ == "__main__":
    main()
