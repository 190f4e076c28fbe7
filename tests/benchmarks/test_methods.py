"""Seconds of whole reconstructions, on a stack of no size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import methods


def test_every_method_is_timed_at_every_shape(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(methods, "SHAPES", ((5, 48, 40), (6, 40, 40)))
    assert call(methods, f"--methods sml gplws --seconds 0.1 --out {tmp_path}") == ""
    found = json.loads((tmp_path / "methods.json").read_text())
    assert [row["shape"] for row in found["rows"]] == ["5x48x40", "6x40x40"]
    for row in found["rows"]:
        assert list(row["seconds"]) == ["sml", "gplws", "gplws, bfloat16"]
        assert all(len(times) >= 3 and min(times) > 0 for times in row["seconds"].values())
    assert "5x48x40, s" in capsys.readouterr().out and "commit" in found["machine"]
