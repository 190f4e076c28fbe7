"""Compares sizes of blocks of the resident 16-bit convs on the GPU of this machine.

    python -m build_tools.tune_cuda FOLDER

Each candidate of csrc/cuda/group_pointwise_conv3d_resident_layers.h (rows of a warp, positions of
warps in W and in H, blocks on a multiprocessor) is compiled into a copy of the CUDA library, all at
once, and timed in a process of its own, in turns over several rounds. FOLDER gets tune.json, and
the header with the fastest sizes, which nobody has to take. Needs an installation in place
(``pip install -e .``), whose build folder tells how to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.clocks import CudaClock

ROOT = Path(__file__).resolve().parent.parent
STEM = "group_pointwise_conv3d_resident"
HEADER = Path(f"csrc/cuda/{STEM}_layers.h")
Sizes = tuple[int, int, int, int]
"""Rows of a warp, positions of warps in W and in H, blocks on a multiprocessor."""

# What may be faster on another GPU than what the header has. With a pointwise conv, rows times
# groups of channels out must be the warps of a position.
FINE: list[Sizes] = [(4, 2, 2, 1), (4, 1, 2, 2), (4, 1, 4, 1), (4, 1, 2, 1)]
CANDIDATES: dict[str, list[Sizes]] = {
    "kStem": [(4, 2, 4, 1), (4, 2, 4, 2), (2, 2, 4, 2), (4, 2, 2, 3), (4, 2, 2, 4)],
    "k12": FINE,
    "kHead": FINE,
    "k24": FINE,
    "k48": [(4, 1, 1, 1), (2, 1, 1, 1)],
    "k96": [(2, 1, 1, 1), (4, 1, 1, 1)],
    "kDown12": [(4, 1, 2, 2), (4, 2, 1, 2), (2, 2, 2, 1), (2, 2, 1, 2), (2, 1, 1, 4)],
    "kDown24": [(2, 1, 1, 2), (4, 1, 1, 2), (2, 2, 1, 1), (4, 2, 1, 1), (2, 1, 2, 1)],
    "kDown48": [(4, 1, 1, 1), (2, 1, 1, 1)],
}
LAYERS = {  # channels, level, channels of the middle, channels out, groups, stride
    "kStem": (3, 0, 3, 12, 1, 1),
    "k12": (12, 0, 12, 12, 4, 1),
    "kHead": (12, 0, 12, 1, 4, 1),
    "k24": (24, 1, 24, 24, 4, 1),
    "k48": (48, 2, 48, 48, 4, 1),
    "k96": (96, 3, 96, 96, 4, 1),
    "kDown12": (12, 0, 24, None, 1, 2),
    "kDown24": (24, 1, 48, None, 1, 2),
    "kDown48": (48, 2, 96, None, 1, 2),
}


def with_sizes(header: str, sizes: Mapping[str, Sizes]) -> str:
    """The text of the header with other sizes for some layers.

    Raises:
        ValueError: a layer is not found.
    """
    for layer, numbers in sizes.items():
        case = "default" if layer == "kDown48" else f"case {layer}"
        pattern = rf"({case}:\s*return \{{(?:[^,]*,){{7}}) (?:[^,]*, ){{3}}[^,]*,"
        text = ", ".join(map(str, numbers))
        header, count = re.subn(pattern, rf"\1 {text},", header)
        if count != 1:
            raise ValueError(f"{layer} was found {count} times in {HEADER}")
    return header


def variants() -> list[dict[str, Sizes]]:
    """What is compiled together: what the header has, then one candidate for each layer."""
    most = max(map(len, CANDIDATES.values()))
    rest = [
        {layer: given[i] for layer, given in CANDIDATES.items() if i < len(given)}
        for i in range(most)
    ]
    return [{}, *rest]


def fastest(times: Sequence[Mapping[str, float]], margin: float = 0.985) -> dict[str, Sizes]:
    """Sizes of the layers that are faster than with those of the header by more than chance."""
    found = {}
    for layer, given in CANDIDATES.items():
        best = min(range(len(given)), key=lambda i: times[i + 1].get(layer, float("inf")))
        if times[best + 1].get(layer, float("inf")) < margin * times[0][layer]:
            found[layer] = given[best]
    return found


def commands_of(build: Path, target: str) -> list[str]:
    """How the build made a file: the last of the commands that lead there."""
    ninja = [shutil.which("ninja") or "ninja", "-C", str(build), "-t", "commands", target]
    said = subprocess.run(ninja, check=True, capture_output=True, text=True).stdout
    return [line for line in said.splitlines() if line]


def compile_variant(build: Path, folder: Path, sizes: Mapping[str, Sizes]) -> subprocess.Popen:
    """Starts compiling a copy of the package in ``folder`` with a CUDA library of these sizes."""
    shutil.copytree(ROOT / "gplws", folder / "gplws", ignore=shutil.ignore_patterns("_cuda.so"))
    sources = folder / "csrc" / "cuda"
    sources.mkdir(parents=True)
    for path in (ROOT / "csrc/cuda").glob(f"{STEM}*"):
        shutil.copy(path, sources)
    header = sources / HEADER.name
    header.write_text(with_sizes(header.read_text(), sizes))
    (library,) = re.findall(r"^build (\S+/_cuda\.so): ", (build / "build.ninja").read_text(), re.M)
    lines, link = [], commands_of(build, library)[-1].replace(library, str(folder / "_cuda.so"))
    for source in sorted(sources.glob("*.cu")):
        target = f"csrc_cuda_{source.name}.o"
        made = str(folder / target)
        line = commands_of(build, target)[-1]
        line = line.replace(str(ROOT / "csrc/cuda" / source.name), str(source))
        line = re.sub(rf"\b{re.escape(target)}\b(?!\.d)", made, line)
        lines.append(line)
        link = re.sub(rf"(?<!\S){re.escape(target)}\b", made, link)
    # What is included first decides: the copy must come before the repository.
    first = f"-I{folder / 'csrc'}"
    lines = [line.replace(f"-I{ROOT / 'csrc'}", f"{first} -I{ROOT / 'csrc'}") for line in lines]
    script = " && ".join([*lines, link, f"mv {folder}/_cuda.so {folder}/gplws/_cuda.so"])
    log = (folder / "log.txt").open("w")
    return subprocess.Popen(script, shell=True, cwd=build, stdout=log, stderr=subprocess.STDOUT)


def time_layers(layers: Sequence[str], seconds: float) -> dict[str, float]:
    """Microseconds of each layer in bfloat16, on inputs that the L2 cache has lost."""
    from benchmarks.clocks import CudaClock

    clock = CudaClock()
    return {layer: _time_layer(clock, layer, seconds) for layer in layers}


def _time_layer(clock: CudaClock, layer: str, seconds: float) -> float:
    import torch

    from benchmarks.clocks import sets_beyond, take_turns
    from gplws.ops import group_pointwise_conv3d, pack_weights

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=clock.device).bfloat16()

    channels, level, middle, out, groups, stride = LAYERS[layer]
    side = 512 >> level
    result = (1, out or middle, 10, side // stride, side // stride)
    weight, bias = normal(middle, channels // groups, 3, 3, 3), normal(middle)
    pointwise = (normal(out, middle, 1, 1, 1), normal(out)) if out else (None, None)
    packed = pack_weights(weight, bias, *pointwise, groups=groups, stride=stride)
    count = sets_beyond(clock.cache_bytes, 2 * channels * 10 * side**2)
    last = torch.channels_last_3d
    xs = [normal(1, channels, 10, side, side) for _ in range(count)]
    if layer != "kStem":
        xs = [x.contiguous(memory_format=last) for x in xs]
    ys = [normal(*result).contiguous(memory_format=last) for _ in xs]

    def all_of_them() -> torch.Tensor:
        for x, y in zip(xs, ys, strict=True):
            group_pointwise_conv3d(
                x,
                weight,
                bias,
                *pointwise,
                groups=groups,
                stride=stride,
                relu=stride == 1,
                pointwise_relu=out != 1,
                packed=packed,
                out=y,
            )
        return ys[0]

    runs = {layer: clock.graph([all_of_them])}
    times, failed = take_turns(clock, runs, sets=1, seconds=seconds)
    assert not failed, failed
    return 1e6 * statistics.median(times[layer]) / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each layer and round")
    parser.add_argument("--time", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        print(json.dumps(time_layers(options.time, options.seconds)))
        return
    builds = sorted((ROOT / "build").glob("native-*"), key=lambda path: path.stat().st_mtime)
    if not builds:
        raise SystemExit("tune_cuda needs an installation in place: pip install -e .")
    options.folder.mkdir(parents=True, exist_ok=True)
    tried = variants()
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(i) for i in range(len(tried))]
        running = [
            compile_variant(builds[-1], folder, sizes)
            for folder, sizes in zip(folders, tried, strict=True)
        ]
        for process, folder in zip(running, folders, strict=True):
            if process.wait() != 0:
                raise SystemExit((folder / "log.txt").read_text()[-2000:])
        times: list[dict[str, float]] = [{} for _ in tried]
        for _ in range(options.rounds):
            for found, folder, sizes in zip(times, folders, tried, strict=True):
                for layer, microseconds in _measured(folder, sizes, options.seconds).items():
                    found[layer] = min(microseconds, found.get(layer, float("inf")))
    best = fastest(times)
    rows = [{"sizes": s, "microseconds": t} for s, t in zip(tried, times, strict=True)]
    (options.folder / "tune.json").write_text(json.dumps({"rows": rows, "best": best}, indent=1))
    (options.folder / HEADER.name).write_text(with_sizes((ROOT / HEADER).read_text(), best))
    for layer in LAYERS:
        print(layer, *(f"{found[layer]:.1f}" for found in times if layer in found))
    print("faster than what the header has:", best or "nothing")


def _measured(folder: Path, sizes: Mapping[str, Sizes], seconds: float) -> dict[str, float]:
    layers = list(sizes) or list(LAYERS)
    command = [sys.executable, "-m", "build_tools.tune_cuda", str(folder), "--time", *layers]
    command += ["--seconds", str(seconds)]
    # The copy of the package comes first, where Python runs as well; benchmarks are those of the
    # repository.
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    said = subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(said.splitlines()[-1])


if __name__ == "__main__":
    main()
