"""Errors of frames that moved, on one small scene."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import alignment


def test_every_case_has_its_error(call, tmp_path: Path) -> None:
    assert call(alignment, f"--scenes 1 --side 96 --methods rdf --out {tmp_path}") == ""
    rows = json.loads((tmp_path / "alignment.json").read_text())["rows"]
    assert len(rows) == 7 and all(len(row["errors"]) == 1 for row in rows)
    ratio = {(row["frames"], row["align"]): row["median_ratio"] for row in rows}
    assert ratio["still", "none"] == 1
    assert ratio["displaced", "translation"] < ratio["displaced", "none"]
