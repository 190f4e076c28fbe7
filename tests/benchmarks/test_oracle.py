"""The observer who knows all but the depth finds it, and its figures are those of its maps."""

import json

import pytest
from repository_runs import run, run_main

FIND = """
import json
from dataclasses import replace
import torch
from benchmarks.accuracy import CALM, Level
from benchmarks.oracle import by_total_variation, by_window, denoised, differences, scenes

# Smooth and shallow, so that blurring all at one depth is what the lens does, nearly.
settings = replace(
    CALM, surfaces=("waves",), relief=(0.3, 0.3), second_surface=0.0, blur_per_frame_px=(1, 1.5),
    textures=("grain",), texture_contrast=(0.8, 1.0), two_materials=0.0, roughness=(0.0005, 0.0005),
)
(scene,) = scenes(Level(settings), 1, 96, 9)
candidates, total = differences(scene)
truth = scene.sample.depth_index()[0][12:-12, 12:-12]
maps = {
    "window": by_window(candidates, total, 3.0),
    "smooth": by_total_variation(candidates, total, 9, 0.3),
}
step = torch.where(torch.arange(20) < 10, 1.0, 4.0).repeat(20, 1)
noisy = step + 0.3 * torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
print(json.dumps({
    "candidates": candidates[:6].tolist(),
    "shape": list(total.shape),
    "errors": {k: float((m[12:-12, 12:-12] - truth).abs().nanmean()) for k, m in maps.items()},
    "before": float((noisy - step).abs().mean()),
    "after": float((denoised(noisy, 0.4) - step).abs().mean()),
}))
"""

SUMMARY = """
import json
from benchmarks.oracle import summary

rows = [
    {"net": 0.2, "window 3 px": 0.5, "window 8 px": 0.3, "smooth 1": 0.1},
    {"net": 0.4, "window 3 px": 0.2, "window 8 px": 0.8, "smooth 1": 0.7},
]
print(json.dumps(summary(rows, "net")))
"""


def test_the_observer_finds_the_depth(repository) -> None:
    ended = run(repository, "-c", FIND)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["candidates"] == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert found["shape"] == [33, 96, 96]
    assert found["errors"]["window"] < 0.15 and found["errors"]["smooth"] < 0.15
    assert found["after"] < 0.5 * found["before"]


def test_the_best_reading_is_that_of_least_mean(repository) -> None:
    ended = run(repository, "-c", SUMMARY)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["means"]["window 3 px"] == pytest.approx(0.35)
    assert found["best"] == {"window": "window 3 px", "smooth": "smooth 1"}
    assert found["better"] == pytest.approx((0.2 + 0.2) / 2)  # the window of the least mean


def test_it_runs_from_the_command_line(repository, tmp_path) -> None:
    options = "--levels easy --network sml --methods rdf --count 2 --side 64 --frames 5"
    ended, ends = run_main(repository, "benchmarks.oracle", f"{options} --out {tmp_path}")
    assert ends == [""] and "mean errors, frames" in ended.stdout
    content = json.loads((tmp_path / "oracle.json").read_text())
    (row,) = content["rows"]
    assert row["level"] == "easy" and len(row["stacks"]) == 2 and content["count"] == 2
    assert set(row["means"]) == set(row["stacks"][0]) >= {"sml", "rdf", "window 3 px", "smooth 1"}
    assert row["better"] <= row["means"]["sml"]
