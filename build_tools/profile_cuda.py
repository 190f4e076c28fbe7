"""What the CUDA kernels of the network wait for, by Nsight Compute (``ncu``), as profile.md.

    python -m build_tools.profile_cuda FOLDER
    python -m build_tools.profile_cuda FOLDER --precision float32 --kernels 'search|up_conv3d'

For each kernel: how long it ran, where its warps stood (by what they waited for), which
instructions it executed, and the instructions that most samples stood at. FOLDER also gets the
report (profile.ncu-rep) and what ncu says of each instruction (profile.csv.gz).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTIONS = ("SpeedOfLight", "WarpStateStats", "SchedulerStats", "LaunchStats", "SourceCounters")
KERNELS = "conv3d|search"
SAMPLES, EXECUTED = "# Samples", "Instructions Executed"
# Opcodes of which the next part says what matters: where memory is and how wide.
DETAILED = re.compile(r"(LDS|STS|LDG|STG|LDL|STL|LDGSTS|LDSM|IMAD)\b")


@dataclass
class Instruction:
    """One instruction of a kernel.

    Attributes:
        text: as the disassembler has it.
        executed: by how many warps.
        samples: warps found there.
        stalls: samples by what the warp waited for.
    """

    text: str
    executed: float
    samples: float
    stalls: dict[str, float]

    @property
    def opcode(self) -> str:
        """Its name, with what tells kinds apart."""
        words = [word for word in self.text.split() if not word.startswith("@")]
        name = words[0].rstrip(";,") if words else "?"
        parts = name.split(".")
        return ".".join(parts[:2]) if DETAILED.match(name) else parts[0]


@dataclass
class Kernel:
    """A kernel that was profiled."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)


def kernels_of(lines: Iterable[str]) -> Iterator[Kernel]:
    """Read what ``ncu --page source --csv --print-source sass`` writes."""
    csv.field_size_limit(2**31 - 1)
    kernel: Kernel | None = None
    header: list[str] = []
    for row in csv.reader(lines):
        if row and row[0] == "Kernel Name":
            if kernel is not None:
                yield kernel
            kernel, header = Kernel(row[1]), []
        elif kernel is not None and not header:
            header = row
        elif kernel is not None and len(row) == len(header):
            kernel.instructions.append(_instruction(dict(zip(header, row, strict=True))))
    if kernel is not None:
        yield kernel


def _instruction(row: dict[str, str]) -> Instruction:
    def number(text: str) -> float:
        try:
            return float(text.replace(",", ""))
        except ValueError:
            return 0.0

    stalls = {
        name.removeprefix("stall_"): number(value)
        for name, value in row.items()
        if name.startswith("stall_") and "Not Issued" not in name
    }
    return Instruction(row["Source"], number(row[EXECUTED]), number(row[SAMPLES]), stalls)


def summary_of(kernel: Kernel, most: int = 12) -> str:
    """The paragraph on a kernel, in Markdown."""
    everything = kernel.instructions
    samples = sum(i.samples for i in everything) or 1.0
    executed = sum(i.executed for i in everything) or 1.0
    stalls: Counter[str] = Counter()
    opcodes: Counter[str] = Counter()
    for instruction in everything:
        stalls.update(instruction.stalls)
        opcodes[instruction.opcode] += instruction.executed  # type: ignore[assignment]
    lines = [
        f"## {short_name(kernel.name)}",
        "",
        f"{samples:.0f} samples, {executed / 1e6:.2f} million instructions of warps.",
        "",
        "* waited for: " + _shares(stalls, samples),
        "* instructions: " + _shares(opcodes, executed),
        "",
        "| samples | executed | instruction | waited for |",
        "|---|---|---|---|",
    ]
    for instruction in sorted(everything, key=lambda i: -i.samples)[:most]:
        waits = Counter(instruction.stalls)
        lines.append(
            f"| {instruction.samples:.0f} | {instruction.executed:.0f} "
            f"| `{' '.join(instruction.text.split())}` "
            f"| {_shares(waits, instruction.samples or 1.0, most=2)} |"
        )
    return "\n".join([*lines, ""])


def _shares(counts: Counter[str], total: float, most: int = 10) -> str:
    found = [(name, count / total) for name, count in counts.most_common(most) if count > 0]
    return ", ".join(f"{name} {share:.0%}" for name, share in found)


def short_name(name: str) -> str:
    """A kernel's name without namespaces and arguments, its template's arguments kept."""
    name = re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)\s*$", "", name)
    name = re.sub(r"(\(anonymous namespace\)|<unnamed>|unnamed>|\w+)::", "", name)
    return name.removeprefix("void ").strip()


def run_network(precision: str, shape: tuple[int, int, int]) -> None:
    """One pass of the network and of the focus search, which the profiler looks at."""
    import torch

    from benchmarks.networks import random_gplws
    from gplws.ops import focus_search

    network = random_gplws().fuse().to("cuda", getattr(torch, precision))
    stack = torch.rand(1, 3, *shape, device="cuda").to(getattr(torch, precision))

    def once() -> None:
        focus_search(network(stack), log_scale=True)

    with torch.inference_mode():
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        once()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def profile(folder: Path, precision: str, shape: str, kernels: str) -> Path:
    """Run the profiler on this module; returns profile.md.

    Raises:
        SystemExit: there is no ncu, or it failed.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("profile_cuda needs Nsight Compute's ncu in PATH")
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "profile.ncu-rep"
    sections = [word for name in SECTIONS for word in ("--section", name)]
    this = [sys.executable, "-m", "build_tools.profile_cuda", str(folder), "--run"]
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "-f"]
    command += ["-k", f"regex:{kernels}", *sections, "-o", str(report.with_suffix(""))]
    done = subprocess.run([*command, *this, "--precision", precision, "--shape", shape])
    if done.returncode != 0 or not report.exists():
        raise SystemExit(f"ncu ended with exit status {done.returncode}")
    source = [ncu, "-i", str(report), "--page", "source", "--csv", "--print-source", "sass"]
    listing = subprocess.run(source, check=True, capture_output=True, text=True).stdout
    with gzip.open(folder / "profile.csv.gz", "wt", encoding="utf-8") as file:
        file.write(listing)
    path = folder / "profile.md"
    # Some versions list each kernel once for every view.
    found = dict.fromkeys(summary_of(kernel) for kernel in kernels_of(listing.splitlines()))
    path.write_text("\n".join([f"# {precision}, {shape}", "", *found]), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--shape", default="10x512x512", metavar="NxHxW")
    parser.add_argument("--kernels", default=KERNELS, help="names, as a regular expression")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        frames, height, width = map(int, options.shape.split("x"))
        run_network(options.precision, (frames, height, width))
        return
    path = profile(options.folder, options.precision, options.shape, options.kernels)
    print(path.read_text(encoding="utf-8"))
    print(path)


if __name__ == "__main__":
    main()
