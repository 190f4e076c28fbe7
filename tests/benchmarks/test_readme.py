"""What the README says of speed and memory is what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUMMARY = """
import json, sys
from benchmarks.summary import flatness, quartiles
rows = json.load(sys.stdin)
print(json.dumps([flatness(rows), quartiles([4.0, 1.0, 3.0, 2.0, 5.0])]))
"""


def run(repository: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    # benchmarks is no part of the installed package.
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=repository, input=given, capture_output=True, text=True)


def test_the_figures_of_the_readme_are_those_of_the_results(repository: Path) -> None:
    ended = run(repository, "-m", "benchmarks.readme", "--check")
    assert ended.returncode == 0, ended.stderr


def test_the_fastest_setting_and_the_ratios_come_from_the_medians(repository, tmp_path) -> None:
    machine = {"processor": "Z80", "threads": 1, "cpu_isa": "avx2"}
    seconds = {"gplws": [9.0, 1.0, 2.0], "eager": [8.0, 8.0, 8.0], "openvino": [3.0]}
    peers = {"eager": [10.0], "eager channels_last": [6.0]}
    shape = {"precision": "float32", "shape": "10x512x512"}
    rows = [
        {"network": "gplws", "seconds": seconds, **shape},
        {"network": "fvnet", "seconds": peers, **shape},
        {"network": "gplws", "seconds": {"gplws": [99.0]}, **shape, "shape": "5x256x256"},
    ]
    (tmp_path / "latency.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    script = (
        f"from pathlib import Path; from benchmarks.readme import section; "
        f"print(section(Path({str(tmp_path)!r})))"
    )
    shown = run(repository, "-c", script).stdout
    assert "one core of an Z80 with AVX2" in shown
    assert "| | gplws | torch eager | OpenVINO |" in shown
    assert "| float32 | **2.00** | 8.00 (4.0x) | 3.00 (1.5x) |" in shown
    assert "| FVNet | 6.00 (3.0x) |" in shown
    assert "99" not in shown


def test_flatness_is_the_largest_deviation_from_the_median_cost_per_voxel(repository) -> None:
    rows = [
        {
            "network": "gplws",
            "precision": "float32",
            "shape": f"{frames}x256x256",
            "seconds": {"gplws": [cost * 1e-9 * frames * 256 * 256]},
        }
        for frames, cost in ((5, 100), (10, 120), (50, 90))
    ]
    ended = run(repository, "-c", SUMMARY, given=json.dumps(rows))
    (found,), middle = json.loads(ended.stdout)
    assert found["over"] == "frames" and found["median_ns_per_voxel"] == pytest.approx(100)
    assert found["largest_deviation"] == pytest.approx(0.2)
    assert middle == [2.0, 4.0]
