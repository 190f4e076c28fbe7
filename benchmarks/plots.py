"""Pictures of the results, next to their JSON: ``python -m benchmarks.plots`` draws them anew."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import RESULTS, gplws_beside, medians, quartiles, sizes, voxels

COLOURS = {
    "gplws": "#d1495b",
    "gplws, fresh results": "#e58a96",
    "eager": "#9aa5b1",
    "eager channels_last": "#5f6f81",
    "compile": "#8d6a9f",
    "onnxruntime": "#3d8c8c",
    "openvino": "#2e6f9e",
    "stock": "#9aa5b1",
    "stock channels_last": "#5f6f81",
    "torch.max alone": "#3d8c8c",
    "gplws graph": "#d1495b",
    "gplws channels_last": "#e58a96",
    "eager graph": "#b8c0c8",
    "eager channels_last graph": "#3f4c59",
    "compile max-autotune": "#8d6a9f",
}


def latency(path: Path) -> list[Path]:
    """Bars by shape and engine with ratios, and the peers; one PNG each."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if row["seconds"]]
    drawn = []
    ours = [row for row in rows if row["network"] == "gplws"]
    if ours:
        drawn.append(_latency_bars(ours, path.with_name("latency.png"), content["machine"]))
    if len(rows) > len(ours):
        drawn.append(_peers(rows, path.with_name("peers.png"), content["machine"]))
    return drawn


def ops(path: Path) -> Path:
    """Bars by op and candidate with ratios to gplws."""
    content = json.loads(path.read_text(encoding="utf-8"))
    precisions = list(dict.fromkeys(row["dtype"] for row in content["rows"]))
    groups = {
        precision: [
            (f"{row['op']}\n{row['case']}", row["seconds"], medians(row["seconds"])["gplws"])
            for row in content["rows"]
            if row["dtype"] == precision
        ]
        for precision in precisions
    }
    return _bars(groups, path.with_suffix(".png"), content["machine"], "ms", 1e3)


def memory(path: Path) -> Path:
    """Bars of peak memory, with the share of the smaller stock candidate."""
    plt = _pyplot()
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content["rows"]
    labels = [
        f"{row['candidate']}, {row['precision']}"
        + (f", memory_mb={row['memory_mb']}" if row["memory_mb"] else "")
        for row in rows
    ]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.2), layout="constrained")
    stock = ["stock" in row["candidate"] for row in rows]
    axes.barh(
        labels,
        [row["peak_mib"] for row in rows],
        color=[COLOURS["eager"] if s else COLOURS["gplws"] for s in stock],
    )
    for place, row in enumerate(rows):
        share = row["share_of_stock_eager"], row["share_of_stock_eager_channels_last"]
        note = f" {row['peak_mib']:.0f} MiB ({100 * share[0]:.0f}%, {100 * share[1]:.0f}%)"
        axes.text(row["peak_mib"], place, note, va="center", fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlabel("peak memory, MiB (share of stock eager, of stock eager in channels_last)")
    return _finish(figure, path.with_suffix(".png"), content["machine"])


def gpu(path: Path) -> list[Path]:
    """Networks, and layers as shares of their limits, on a GPU; one PNG each."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, shape = content["rows"], content["shape"]
    machine = {**content["machine"], **content["device"]}
    drawn = []
    groups: dict[str, list[tuple[str, dict[str, list[float]], float]]] = {}
    networks = [r for r in rows if r["part"] in ("network", "compile", "peers") and r["seconds"]]
    for row in networks:
        if row["shape"] != shape:
            continue
        same = [r for r in networks if r["part"] == "network" and r["shape"] == shape]
        ours = [
            seconds
            for r in (row, *same)
            if r["precision"] == row["precision"]
            for name, seconds in medians(r["seconds"]).items()
            if name.startswith("gplws")
        ]
        reference = min(ours) if ours else min(medians(row["seconds"]).values())
        label = row["what"] + ("\ncompile" if row["part"] == "compile" else "")
        groups.setdefault(row["precision"], []).append((label, row["seconds"], reference))
    if groups:
        drawn.append(_bars(groups, path.with_name("gpu_network.png"), machine, "ms", 1e3))
    layers = [r for r in rows if r["part"] == "ops" and r["share_of_copy"] is not None]
    if layers:
        drawn.append(_shares(layers, path.with_name("gpu_ops.png"), machine))
    return drawn


def _shares(rows: list[dict[str, Any]], path: Path, machine: dict[str, Any]) -> Path:
    """For each precision and layer, what it reaches of the copy and of its roofline."""
    plt = _pyplot()
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    most = max(sum(row["precision"] == precision for row in rows) for precision in precisions)
    figure, panels = plt.subplots(
        1,
        len(precisions),
        figsize=(6.5 * len(precisions), 0.32 * most + 1.2),
        squeeze=False,
        layout="constrained",
    )
    for axes, precision in zip(panels[0], precisions, strict=True):
        own = [row for row in rows if row["precision"] == precision]
        for number, row in enumerate(own):
            for shift, key, colour in (
                (-0.2, "share_of_copy", COLOURS["gplws"]),
                (0.2, "share_of_roofline", COLOURS["eager channels_last"]),
            ):
                share = 100 * row[key]
                axes.barh(number + shift, share, 0.38, color=colour)
                axes.text(share, number + shift, f" {share:.0f}%", va="center", fontsize=6)
        labels = [f"{row['what']}\n{row['case']}" for row in own]
        axes.set_yticks(range(len(own)), labels, fontsize=6)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("% of the copy (red), of the roofline (gray)")
        axes.set_title(precision)
    return _finish(figure, path, machine)


def _latency_bars(rows: list[dict[str, Any]], path: Path, machine: dict[str, Any]) -> Path:
    groups = {
        precision: [
            (row["shape"], row["seconds"], medians(row["seconds"])["gplws"])
            for row in sorted(rows, key=lambda r: voxels(r["shape"]))
            if row["precision"] == precision and "gplws" in row["seconds"]
        ]
        for precision in dict.fromkeys(row["precision"] for row in rows)
    }
    return _bars(groups, path, machine, "s", 1.0)


def _bars(
    groups: dict[str, list[tuple[str, dict[str, list[float]], float]]],
    path: Path,
    machine: dict[str, Any],
    unit: str,
    scale: float,
) -> Path:
    """A panel for each group; in it, for each label, bars with quartiles and ratios."""
    plt = _pyplot()
    most = max(sum(len(times) + 1 for _, times, _ in group) for group in groups.values())
    figure, panels = plt.subplots(
        1,
        len(groups),
        figsize=(6.5 * len(groups), 0.16 * most + 1.2),
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, group) in zip(panels[0], groups.items(), strict=True):
        place, ticks = 0.0, []
        for _, times, ours in group:
            ticks.append(place + (len(times) - 1) / 2)
            for engine, seconds in medians(times).items():
                low, high = quartiles(times[engine])
                spread = [[scale * (seconds - low)], [scale * (high - seconds)]]
                colour = COLOURS.get(engine, "#777777")
                axes.barh(place, scale * seconds, color=colour, xerr=spread, ecolor="#333333")
                note = f"  {engine} {seconds / ours:.2g}x"
                axes.text(scale * max(seconds, high), place, note, va="center", fontsize=6)
                place += 1
            place += 1
        axes.set_yticks(ticks, [label for label, _, _ in group], fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.25)
        axes.set_xlabel(unit)
        axes.set_title(title)
    return _finish(figure, path, machine)


def flatness(path: Path) -> Path:
    """Cost per voxel over frames and over sizes, for each precision."""
    plt = _pyplot()
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content["rows"]
    figure, grid = plt.subplots(
        1, len(rows), figsize=(3.4 * len(rows), 3.2), squeeze=False, layout="constrained"
    )
    titles = {"frames": "frames of 256 x 256", "size": "side of 10 frames, pixels"}
    for axes, row in zip(grid[0], rows, strict=True):
        points = sorted(
            (sizes(shape)[0 if row["over"] == "frames" else 1], cost)
            for shape, cost in row["ns_per_voxel"].items()
        )
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS["gplws"])
        axes.axhline(row["median_ns_per_voxel"], color=COLOURS["eager"], linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.5 * row["median_ns_per_voxel"])
        axes.set_xlabel(titles[row["over"]])
        axes.set_ylabel("ns per voxel")
        axes.set_title(f"{row['precision']}, up to {100 * row['largest_deviation']:.0f}% off")
    return _finish(figure, path.with_suffix(".png"), content["machine"])


def _peers(rows: list[dict[str, Any]], path: Path, machine: dict[str, Any]) -> Path:
    """Each network in its settings, for shapes that more than one was measured at."""
    groups: dict[str, list[tuple[str, dict[str, list[float]], float]]] = {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        for shape in dict.fromkeys(row["shape"] for row in rows):
            same = [r for r in rows if (r["precision"], r["shape"]) == (precision, shape)]
            for row in same if len(same) > 1 else ():
                ours = gplws_beside(rows, row)
                if ours is not None:
                    label = f"{row['network']}\n{shape}"
                    groups.setdefault(precision, []).append((label, row["seconds"], ours))
    return _bars(groups, path, machine, "s", 1.0)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _finish(figure: Any, path: Path, machine: dict[str, Any]) -> Path:
    if "gpu" in machine:
        place = [machine["gpu"], f"driver {machine['driver']}", f"CUDA {machine['cuda']}"]
    else:
        place = [machine["processor"], f"{machine['threads']} threads", machine["cpu_isa"]]
    note: Sequence[str] = [
        *place,
        f"torch {machine['torch']}",
        f"commit {machine['commit']}",
        machine["date"],
    ]
    figure.supxlabel(", ".join(note), fontsize=6, color="#555555")
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    return path


DRAWN: dict[str, Callable[[Path], Path | list[Path]]] = {
    "latency": latency,
    "flatness": flatness,
    "ops": ops,
    "memory": memory,
    "gpu": gpu,
}


def main() -> None:
    argparse.ArgumentParser(
        description="Draw the plots beside the JSON files of benchmarks/results anew."
    ).parse_args()
    for name, draw in DRAWN.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            print(draw(path))


if __name__ == "__main__":
    main()
