"""The scripts of examples/ do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gplws.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, *words, folder):
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_frames_are_measured(tmp_path):
    scene = ["--surface", "fractal", "--height", "96", "--width", "96", "--frames", "8"]
    drift = ["--jitter-px", "1.5", "--format", "png", "--quiet"]
    assert main(["simulate", str(tmp_path / "scene"), *scene, *drift]) == 0
    calibration = ["--z-step", 2, "--pixel-size", 0.5]
    shown = run("measure.py", "scene/frames", "out", *calibration, folder=tmp_path)
    assert "pixels measured" in shown and "plane Sa" in shown and "quadratic Sa" in shown
    assert (tmp_path / "out/mesh.ply").is_file()
    assert "alignment" in json.loads((tmp_path / "out/info.json").read_text())


def test_an_own_network_is_trained_and_made_fast(tmp_path):
    shown = run("own_network.py", "--steps", 1, "--side", 32, folder=tmp_path)
    assert "6 layers replaced, 0 kept" in shown
    assert "height map of (32, 32) in frames" in shown


def test_parts_are_judged_one_after_the_other(tmp_path):
    lines = run("stream.py", "--parts", 3, folder=tmp_path).splitlines()
    assert [("REJECT" in line) for line in lines] == [False, False, True]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_example_says_how_it_is_run(path):
    assert f"python examples/{path.name}" in path.read_text(encoding="utf-8")
