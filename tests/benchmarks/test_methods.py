"""Seconds of whole reconstructions, on a stack of no size."""

from __future__ import annotations

import json
from pathlib import Path

from repository_runs import run

SCRIPT = """
import sys
from benchmarks import methods
methods.SHAPES = ((5, 48, 40), (6, 40, 40))
sys.argv = ["methods", "--methods", "sml", "gplws", "--seconds", "0.1", "--out", sys.argv[1]]
methods.main()
"""


def test_every_method_is_timed_at_every_shape(repository: Path, tmp_path: Path) -> None:
    ended = run(repository, "-c", SCRIPT, str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "methods.json").read_text())
    assert [row["shape"] for row in found["rows"]] == ["5x48x40", "6x40x40"]
    for row in found["rows"]:
        assert list(row["seconds"]) == ["sml", "gplws", "gplws, bfloat16"]
        assert all(len(times) >= 3 and min(times) > 0 for times in row["seconds"].values())
    assert "5x48x40, s" in ended.stdout and "commit" in found["machine"]
