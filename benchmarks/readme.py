"""Writes the figures of benchmarks/results into README.md; with --check only compares.

The text between the two comments of the README is made from the JSON files and nothing else.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.summary import NAMES_OF_NETWORKS, load, medians, voxels

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- made by python -m benchmarks.readme -->"
END = "<!-- end of what it made -->"
SHAPE = "10x512x512"
DEFAULT_MB = 640  # of reconstruct
NAMES = {
    "gplws": "gplws",
    "eager": "torch eager",
    "eager channels_last": "torch eager, channels_last",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
ISAS = {"baseline": "no AVX", "avx2": "AVX2", "avx512": "AVX-512"}


def section(folder: Path | None = None) -> str:
    """The part of the README that comes from the results of ``folder``."""
    parts = []
    latency = load("latency", folder)
    if latency:
        rows = [row for row in latency["rows"] if row["shape"] == SHAPE and row["seconds"]]
        ours = [row for row in rows if row["network"] == "gplws"]
        machine = latency["machine"]
        parts.append(
            f"One stack of {SHAPE.replace('x', ' x ')} through the network of 540,273 parameters, "
            f"{_words(machine)}; seconds, median of candidates taking turns in one run, and times "
            "gplws:"
        )
        parts.append(_engines_table(ours))
        if len(rows) > len(ours):
            parts.append("Published networks, each in the fastest of its settings, seconds:")
            parts.append(_networks_table(rows))
        parts += _flatness_sentence(latency)
    memory = load("memory", folder)
    if memory:
        parts.append(_memory_sentence(memory))
    # Neither tables nor shapes are broken.
    wrap = textwrap.TextWrapper(100, break_on_hyphens=False, break_long_words=False)
    return "\n\n".join(p if p.startswith("|") else wrap.fill(p) for p in parts)


def _words(machine: dict[str, Any]) -> str:
    threads = "one core" if machine["threads"] == 1 else f"{machine['threads']} cores"
    return f"{threads} of an {machine['processor']} with {ISAS[machine['cpu_isa']]}"


def _engines_table(rows: list[dict[str, Any]]) -> str:
    engines = [name for name in NAMES if any(name in row["seconds"] for row in rows)]
    lines = [["", *(NAMES[engine] for engine in engines)]]
    for row in rows:
        found = medians(row["seconds"])
        cells = [row["precision"]]
        for engine in engines:
            cells.append(_cell(found.get(engine), found["gplws"]))
        lines.append(cells)
    return _table(lines)


def _networks_table(rows: list[dict[str, Any]]) -> str:
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        found = medians(row["seconds"])
        key = (row["network"], row["precision"])
        best[key] = found.get("gplws", min(found.values()))
    lines = [["", *precisions]]
    for network, name in NAMES_OF_NETWORKS.items():
        cells = [_cell(best.get((network, p)), best["gplws", p]) for p in precisions]
        if any(cells):
            lines.append([name + (" on gplws" if network == "gplws" else ""), *cells])
    return _table(lines)


def _cell(seconds: float | None, ours: float) -> str:
    if seconds is None:
        return ""
    return f"**{seconds:.2f}**" if seconds == ours else f"{seconds:.2f} ({seconds / ours:.1f}x)"


def _table(lines: list[list[str]]) -> str:
    header, *body = ("| " + " | ".join(line).lstrip() + " |" for line in lines)
    return "\n".join([header, "|---" * len(lines[0]) + "|", *body])


def _flatness_sentence(latency: dict[str, Any]) -> list[str]:
    found = [
        f
        for f in latency.get("flatness", [])
        if (f["network"], f["engine"], f["precision"]) == ("gplws", "gplws", "float32")
    ]
    if not found:
        return []
    what = {"frames": "number of frames", "size": "size"}
    said = [f"{100 * f['largest_deviation']:.0f}% over {what[f['over']]}" for f in found]
    shapes = [sorted(f["ns_per_voxel"], key=voxels) for f in found]
    measured = "; ".join(f"{s[0]} to {s[-1]}" for s in shapes)
    return [
        f"The cost per voxel (float32) strays from its median by at most {' and '.join(said)} "
        f"({measured})."
    ]


def _memory_sentence(memory: dict[str, Any]) -> str:
    rows = [row for row in memory["rows"] if row["precision"] == "float32"]
    parts = [
        f"{row['candidate']} {row['peak_mib']:.0f} MiB"
        + (f" with `memory_mb={row['memory_mb']}`" if row["memory_mb"] else "")
        for row in rows
        if row["memory_mb"] in (DEFAULT_MB, None)
    ]
    return (
        f"Peak memory of `reconstruct` at {rows[0]['shape'].replace('x', ' x ')}, against one "
        f"forward pass of the same network on stock torch: {', '.join(parts)}."
    )


def with_section(text: str, made: str) -> str:
    """``text`` of the README with what is between the comments replaced."""
    before, found, rest = text.partition(BEGIN)
    old, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"README.md must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the README differs")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    made = with_section(text, section())
    if options.check:
        sys.exit(0 if made == text else "README.md differs: run python -m benchmarks.readme")
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
