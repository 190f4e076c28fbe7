"""What has to be known about a run, and its results on disk."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gplws
from benchmarks.summary import RESULTS, load
from gplws.files import new_file


def machine() -> dict[str, Any]:
    """Machine, instruction set, threads, versions and commits of this run.

    ``commit`` is that of the Python that runs, ``compiled`` that of the compiled parts; both end in
    ``-dirty`` where files differed from it.
    """
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    build = gplws.build_info()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": build["cpu_isa"],
        "avx512_bf16": build["avx512_bf16"],
        "torch": torch.__version__,
        "gplws": gplws.__version__,
        "commit": _commit() or build["commit"],
        "compiled": build["commit"],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """Commit of the sources around the imported package; None where it lies in no work tree."""
    root = Path(gplws.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    sources = ["gplws", "csrc", "benchmarks/*.py"]  # results are written while benchmarks run
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources]).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("" if same else "-dirty")


def introduce() -> None:
    """Print the facts of this run."""
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


def save(name: str, content: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write ``<name>.json`` with the facts of the run."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **content}, indent=1)
    with new_file(path, overwrite=True) as file:  # a long run may be stopped at any time
        file.write((text + "\n").encode())
    return path


def when() -> dict[str, str]:
    """Commit and date, for rows of results that several runs may add to."""
    facts = machine()
    return {key: facts[key] for key in ("commit", "date")}


def resumed_rows(name: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Rows of an earlier run that was stopped; none where there was none.

    Raises:
        SystemExit: that run was made on another machine, with other versions, or, unless each of
            its rows says its commit, on another commit.
    """
    before = load(name, folder)
    if before is None:
        return []
    now, then = machine(), before["machine"]
    free = {"date"}
    if all("commit" in row for row in before["rows"]):
        free |= {"commit", "compiled"}
    differing = [key for key in now if key not in free and now[key] != then.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {then.get(key)}, is {now[key]}" for key in differing)
        raise SystemExit(f"{name}.json cannot be resumed: {changes}; run without --resume")
    return before["rows"]


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    sys.stdout.flush()
