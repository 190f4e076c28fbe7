"""The observer who knows all but the depth finds it, and its figures are those of its maps."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import oracle
from benchmarks.accuracy import CALM, Level
from benchmarks.oracle import by_total_variation, by_window, denoised, differences, scenes

# Smooth and shallow, so that blurring all at one depth is what the lens does, nearly.
SHALLOW = replace(
    CALM,
    surfaces=("waves",),
    relief=(0.3, 0.3),
    second_surface=0.0,
    blur_per_frame_px=(1, 1.5),
    textures=("grain",),
    texture_contrast=(0.8, 1.0),
    two_materials=0.0,
    roughness=(0.0005, 0.0005),
)


def test_the_observer_finds_the_depth() -> None:
    (scene,) = scenes(Level(SHALLOW), 1, 96, 9)
    candidates, total = differences(scene)
    assert candidates[:6].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert total.shape == (33, 96, 96)
    truth = scene.sample.depth_index()[0][12:-12, 12:-12]
    for found in (
        by_window(candidates, total, 3.0),
        by_total_variation(candidates, total, 9, 0.3),
    ):
        assert (found[12:-12, 12:-12] - truth).abs().nanmean() < 0.15


def test_noise_beside_a_step_is_taken_away() -> None:
    step = torch.where(torch.arange(20) < 10, 1.0, 4.0).repeat(20, 1)
    noisy = step + 0.3 * torch.randn(20, 20)
    assert (denoised(noisy, 0.4) - step).abs().mean() < 0.5 * (noisy - step).abs().mean()


def test_the_best_reading_is_that_of_least_mean() -> None:
    rows = [
        {"net": 0.2, "window 3 px": 0.5, "window 8 px": 0.3, "smooth 1": 0.1},
        {"net": 0.4, "window 3 px": 0.2, "window 8 px": 0.8, "smooth 1": 0.7},
    ]
    found = oracle.summary(rows, "net")
    assert found["means"]["window 3 px"] == pytest.approx(0.35)
    assert found["best"] == {"window": "window 3 px", "smooth": "smooth 1"}
    assert found["better"] == pytest.approx((0.2 + 0.2) / 2)  # the window of the least mean


def test_it_runs_from_the_command_line(call, tmp_path, capsys) -> None:
    options = "--levels easy --network sml --methods rdf --count 2 --side 64 --frames 5"
    assert call(oracle, f"{options} --out {tmp_path}") == ""
    assert "mean errors, frames" in capsys.readouterr().out
    content = json.loads((tmp_path / "oracle.json").read_text())
    (row,) = content["rows"]
    assert row["level"] == "easy" and len(row["stacks"]) == 2 and content["count"] == 2
    assert set(row["means"]) == set(row["stacks"][0]) >= {"sml", "rdf", "window 3 px", "smooth 1"}
    assert row["better"] <= row["means"]["sml"]
