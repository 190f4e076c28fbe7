"""What follows from measured rows; needs nothing but Python, so that it can check the README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
BESIDE = "gplws_beside"  # in a row of another network: times of GPLWS-Net in its turns
NAMES_OF_NETWORKS = {
    "gplws": "GPLWS-Net",
    "fvnet": "FVNet",
    "dfvnet": "DFVNet",
    "aifdepthnet": "AiFDepthNet",
    "ddffnet": "DDFFNet",
    "defocusnet": "DefocusNet",
}
FEATURES = "gplws_features"
"""GPLWS-Net as the package trains it, beside that of the paper."""
NAMES_OF_TRAINED = {**NAMES_OF_NETWORKS, FEATURES: "GPLWS-Net, focus features"}


def load(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """Content of ``<name>.json``; None where there is none."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def with_interval(found: Mapping[str, Any], digits: int) -> str:
    """A ``share`` and, where there is one, its ``interval``."""
    text = f"{found['share']:.{digits}f}"
    if found["interval"] is None:
        return text
    low, high = found["interval"]
    return f"{text} ({low:.2f} to {high:.2f})"


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


def gplws_beside(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float | None:
    """Seconds of GPLWS-Net on the kernels for the work of a row.

    Those that took turns with the row, or else those of its own row of the same run.

    Args:
        rows: of ``latency.json``.
        row: one of them.
    """
    if row.get(BESIDE):
        return statistics.median(row[BESIDE])
    for other in rows:
        same = all(other[key] == row[key] for key in ("precision", "shape"))
        if same and other["network"] == "gplws" and "gplws" in other["seconds"]:
            return statistics.median(other["seconds"]["gplws"])
    return None


def times_gplws(rows: Sequence[Mapping[str, Any]], precision: str) -> dict[str, dict[str, float]]:
    """How many times as long as GPLWS-Net on the kernels each network takes in its fastest setting.

    Args:
        rows: of ``latency.json``.
        precision: "float32" or "bfloat16".

    Returns:
        Ratios by shape and network, where both were measured.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        ours = gplws_beside(rows, row)
        if row["precision"] == precision and row["seconds"] and ours:
            best = min(medians(row["seconds"]).values())
            ratio = 1.0 if row["network"] == "gplws" else best / ours
            found.setdefault(row["shape"], {})[row["network"]] = ratio
    return found


def lower_by(ratio: float) -> float:
    """Percent of the time that is saved where the other takes ``ratio`` times as long."""
    return 100 * (1 - 1 / ratio)


def sizes(shape: str) -> tuple[int, int, int]:
    """Frames, height and width of a shape such as ``10x512x512``."""
    frames, height, width = map(int, shape.split("x"))
    return frames, height, width


def voxels(shape: str) -> int:
    """Pixels of all frames."""
    frames, height, width = sizes(shape)
    return frames * height * width


def flatness(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How far the cost per voxel strays from its median over the shapes.

    Args:
        times: seconds by shape.

    Returns:
        Costs by shape and their median in ns, and the largest deviation as a share of it.
    """
    costs = {shape: 1e9 * s / voxels(shape) for shape, s in medians(times).items()}
    middle = statistics.median(costs.values())
    return {
        "ns_per_voxel": costs,
        "median_ns_per_voxel": middle,
        "largest_deviation": max(abs(cost / middle - 1) for cost in costs.values()),
    }
