"""What follows from measured rows; needs nothing but Python, so that it can check the README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
NAMES_OF_NETWORKS = {
    "gplws": "GPLWS-Net",
    "fvnet": "FVNet",
    "dfvnet": "DFVNet",
    "aifdepthnet": "AiFDepthNet",
    "ddffnet": "DDFFNet",
    "defocusnet": "DefocusNet",
}


def load(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """Content of ``<name>.json``; None where there is none."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of each candidate's times."""
    return {name: statistics.median(values) for name, values in times.items()}


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed, between neighbours by interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    lower = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (place - lower) * (ordered[upper] - ordered[lower])


def shape_name(size: Sequence[int]) -> str:
    """Frames, height and width as ``10x512x512``."""
    return "x".join(map(str, size))


def fastest(rows: Sequence[Mapping[str, Any]], precision: str) -> dict[str, dict[str, float]]:
    """Seconds of each network at each shape: of the kernels where it has them, else the fastest.

    Args:
        rows: of ``latency.json``.
        precision: "float32" or "bfloat16".

    Returns:
        Medians by shape and network.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["precision"] == precision and row["seconds"]:
            engines = medians(row["seconds"])
            seconds = engines.get("gplws", min(engines.values()))
            found.setdefault(row["shape"], {})[row["network"]] = seconds
    return found


def lower_by(ours: float, theirs: float) -> float:
    """Percent that ``ours`` needs less than ``theirs``, as the paper's Table 7 prints it."""
    return 100 * (1 - ours / theirs)


def sizes(shape: str) -> tuple[int, int, int]:
    """Frames, height and width of a shape such as ``10x512x512``."""
    frames, height, width = map(int, shape.split("x"))
    return frames, height, width


def voxels(shape: str) -> int:
    """Pixels of all frames."""
    frames, height, width = sizes(shape)
    return frames * height * width


def flatness(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How far the cost per voxel strays over frames (256 x 256) and over sizes (10 frames, square).

    For each network, precision and candidate with three shapes or more: the median of its costs per
    voxel, and the largest deviation from it, as share.
    """
    costs: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        frames, height, width = sizes(row["shape"])
        for over, belongs in (
            ("frames", (height, width) == (256, 256)),
            ("size", frames == 10 and height == width),
        ):
            for engine, seconds in medians(row["seconds"]).items() if belongs else ():
                key = (row["network"], row["precision"], engine, over)
                costs.setdefault(key, {})[row["shape"]] = 1e9 * seconds / voxels(row["shape"])
    found = []
    for (network, precision, engine, over), by_shape in costs.items():
        if len(by_shape) < 3:
            continue
        middle = statistics.median(by_shape.values())
        found.append(
            {
                "network": network,
                "engine": engine,
                "precision": precision,
                "over": over,
                "ns_per_voxel": by_shape,
                "median_ns_per_voxel": middle,
                "largest_deviation": max(abs(c / middle - 1) for c in by_shape.values()),
            }
        )
    return found
