"""The tests on instrumented kernels: which package they are run on."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import check_sanitizers
import pytest

pytestmark = pytest.mark.no_cpu_kernels

# Stands in for a Python 3.10, which cannot be told to leave the folder that it runs in alone; says
# which package pytest would import there.
PYTHON_310 = """#!/bin/sh
unset PYTHONSAFEPATH
case "$1" in
  -P) exit 2 ;;
  -c) exec {python} "$@" ;;
  -m) exec {python} -c "import gplws; print('pytest on', gplws.__file__)" ;;
esac
"""
PACKAGE = "import os\ndef build_info(): return {'cpu_isa': os.environ['GPLWS_CPU_ISA']}\n"


def test_the_instrumented_package_is_tested_and_not_that_of_the_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def build(folder: Path, options: list[str]) -> None:
        (folder / "gplws").mkdir()
        (folder / "gplws/__init__.py").write_text(PACKAGE)

    def environment(folder: Path, isa: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(folder), "GPLWS_CPU_ISA": isa}

    python = tmp_path / "python3.10"
    python.write_text(PYTHON_310.format(python=shlex.quote(sys.executable)))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["check_sanitizers.py"])
    monkeypatch.setattr(check_sanitizers, "build", build)
    monkeypatch.setattr(check_sanitizers, "instrumented_environment", environment)
    check_sanitizers.main()
    tested = [line for line in capfd.readouterr().out.splitlines() if line.startswith("pytest on ")]
    assert len(tested) == len(check_sanitizers.ISAS)
    assert not any(str(check_sanitizers.ROOT) in line for line in tested)
