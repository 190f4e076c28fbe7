"""Predicts, without a GPU, how long the resident 16-bit convs take for a frame of their tiles.

    python build_tools/model_cuda.py [SOURCES...] [--layers k12 k24] [--sizes 'k12=4,2,2,1']

Compiles the kernels of SOURCES (trees that have csrc/cuda; default: this one) for compute
capability 9.0, reads the machine code (stalls, barriers and all), and runs the loop over frames of
as many warps as share a multiprocessor through model_cuda.cpp: in-order issue, four schedulers that
let their warps take turns, tensor cores, one pipe to shared memory, memory by its bandwidth. Prints
cycles for a frame of all blocks together, how busy the parts are, and what warps wait for.

Beginnings and ends of tiles, weights and launches are not modelled: docs/kernels.md holds the model
against what an H200 took. Needs nvcc, g++ and nvdisasm (``pip install nvidia-cuda-nvdisasm``).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import tune_cuda

ROOT = Path(__file__).resolve().parent.parent
CAPABILITY = "sm_90"
TURNS = 8
"""Turns of the loop, each of three frames; the second half counts."""
PROCESSORS = 132
FRAMES = 10


class Kind(IntEnum):
    """Kinds of instructions, as model_cuda.cpp numbers them."""

    ARITHMETIC = 0
    PRODUCT = 1
    SHARED = 2
    COPY = 3
    STORE = 4
    BARRIER = 5
    COMMIT = 6
    WAIT = 7
    OTHER = 8


_KINDS = {
    "HMMA": Kind.PRODUCT,
    **dict.fromkeys(("LDS", "LDSM", "STS", "LDL", "STL"), Kind.SHARED),
    "LDGSTS": Kind.COPY,
    "STG": Kind.STORE,
    "BAR": Kind.BARRIER,
    "LDGDEPBAR": Kind.COMMIT,
    "DEPBAR": Kind.WAIT,
    **dict.fromkeys(("S2R", "S2UR", "LDC", "MUFU", "POPC", "SHFL"), Kind.OTHER),
}


@dataclass
class Instruction:
    """One instruction of a kernel.

    Attributes:
        opcode: with all that follows its name.
        predicated: whether a condition precedes it.
        operands: as the disassembler has them.
        control: 21 bits that tell the scheduler what to wait for.
        target: of a branch: number of an instruction.
    """

    opcode: str
    predicated: bool
    operands: str
    control: int
    target: int | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> Kind:
        never = self.operands.startswith("RZ, [RZ]")  # stands before copies and does nothing
        return Kind.ARITHMETIC if never else _KINDS.get(self.name, Kind.ARITHMETIC)

    @property
    def bytes(self) -> int:
        """What one lane reads or writes."""
        found = re.search(r"\.(64|128)\b", self.opcode)
        return int(found.group(1)) // 8 if found else 4


@dataclass(frozen=True)
class Layer:
    """What of a layer's geometry matters here.

    Attributes:
        warps: of a block.
        blocks: of a multiprocessor.
        rows: of a tile of the result.
        columns: the same.
        stride: 1 or 2.
        input_bytes: of a pixel of x.
        side: of the image of the result, for a stack of 512 x 512.
        parts: of the channels out, by different blocks.
        turns: of shared memory that a copy of four bytes a lane takes.
    """

    warps: int
    blocks: int
    rows: int
    columns: int
    stride: int
    input_bytes: int
    side: int
    parts: int
    turns: int

    @property
    def steps(self) -> int:
        """Frames that the busiest multiprocessor walks through, for ten frames of 512 x 512."""
        tiles = math.ceil(self.side / self.rows) * math.ceil(self.side / self.columns)
        slots = PROCESSORS * self.blocks // self.parts

        def cost(segments: int) -> tuple[int, int]:
            frames = math.ceil(FRAMES / segments)
            count = math.ceil(FRAMES / frames)
            rounds = math.ceil(tiles * count / slots)
            return rounds * (frames + 1), rounds * (frames + (count > 1))

        return min(cost(segments) for segments in range(1, FRAMES + 1))[1]


_FACTS = r"""
#include <cstdio>
#include "cuda/group_pointwise_conv3d_resident.h"
#include "cuda/group_pointwise_conv3d_resident_layers.h"
using namespace gplws::cuda;
template <ResidentLayer kLayer>
void tell(const char* name) {
  using G = LayerGeometry<kLayer>;
  std::printf("%s %d %d %d %d %d %d %d %d\n", name, G::kWarps, G::kSizes.blocks, G::kTileRows,
              G::kTileColumns, G::kStride, 2 * G::kSizes.inputs, G::kSizes.parts, G::kWords);
}
int main() {
#define TELL(layer) tell<ResidentLayer::layer>(#layer);
  ALL_LAYERS
}
"""


def run(*command: str | Path, text: str | None = None) -> str:
    """What a program prints.

    Raises:
        SystemExit: it is not there, or it fails.
    """
    try:
        done = subprocess.run(
            [str(word) for word in command], input=text, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise SystemExit(f"model_cuda needs {command[0]}") from None
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def layers_of(sources: Path, folder: Path) -> dict[str, Layer]:
    """The geometry of all layers, from the header itself."""
    text = _FACTS.replace("ALL_LAYERS", " ".join(f"TELL({name})" for name in tune_cuda.LAYERS))
    program = folder / "facts"
    emulation = ROOT / "tests/cuda_emulation"
    flags = ["-std=c++20", "-w", "-DGPLWS_CUDA_EMULATION", f"-I{sources / 'csrc'}"]
    run("g++", *flags, f"-I{emulation}", "-x", "c++", "-", "-o", program, text=text)
    found = {}
    for line in run(program).splitlines():
        name, *numbers = line.split()
        warps, blocks, rows, columns, stride, size, parts, words = map(int, numbers)
        level = tune_cuda.LAYERS[name][1]
        side = (512 >> level) // stride
        # Words of a pixel that become neighbours: 32 of them meet a bank twice.
        turns = 1 if words else 2
        found[name] = Layer(warps, blocks, rows, columns, stride, size, side, parts, turns)
    return found


def compile_kernels(sources: Path, folder: Path) -> Path:
    """The machine code of the resident kernels in bfloat16."""
    cubin = folder / "kernels.cubin"
    flags = ["-cubin", f"-arch={CAPABILITY}", "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    source = sources / f"csrc/cuda/{tune_cuda.STEM}_bfloat16.cu"
    run("nvcc", *flags, f"-I{sources / 'csrc'}", source, "-o", cubin)
    return cubin


def find_disassembler() -> str:
    """nvdisasm: of the toolkit, or of the package nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    for place in map(Path, sys.path):
        for program in sorted(place.glob("nvidia/*/bin/nvdisasm")):
            return str(program)
    raise SystemExit("model_cuda needs nvdisasm: pip install nvidia-cuda-nvdisasm")


_SECTION = re.compile(r"\.text\.(\S+):")
_LABEL = re.compile(r"(\.L_x_\d+):")
_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?(\S+)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/")
_HIGH = re.compile(r"/\* (0x[0-9a-f]+) \*/")


def kernels_of(listing: str) -> dict[int, list[Instruction]]:
    """Read what ``nvdisasm -c -hex`` writes: the resident kernels by the number of their layer."""
    kernels: dict[int, list[Instruction]] = {}
    current: list[Instruction] | None = None
    labels: dict[str, int] = {}
    wanted: list[tuple[Instruction, str]] = []
    for line in map(str.strip, listing.splitlines()):
        if section := _SECTION.match(line):
            for instruction, name in wanted:
                instruction.target = labels.get(name)
            number = re.search(r"conv3d_resident_kernel.*ResidentLayerE(\d+)E", section.group(1))
            current = kernels.setdefault(int(number.group(1)), []) if number else None
            labels, wanted = {}, []
        elif current is None:
            continue
        elif label := _LABEL.match(line):
            labels[label.group(1)] = len(current)
        elif code := _CODE.match(line):
            instruction = Instruction(code.group(2), bool(code.group(1)), code.group(3), 0)
            current.append(instruction)
            if branch := re.search(r"`\((\.L_x_\d+)\)", code.group(3)):
                wanted.append((instruction, branch.group(1)))
        elif (high := _HIGH.match(line)) and current:
            # The upper half of 128 bits; bits 105 to 125 speak to the scheduler.
            current[-1].control = int(high.group(1), 16) >> 41
    for instruction, name in wanted:
        instruction.target = labels.get(name)
    return kernels


def loop_of(code: Sequence[Instruction]) -> tuple[int, int]:
    """First and last instruction of the loop over frames: the shortest with most products.

    Raises:
        ValueError: there is none.
    """
    loops = []
    for last, instruction in enumerate(code):
        first = instruction.target
        if instruction.name == "BRA" and first is not None and first < last:
            products = sum(i.kind is Kind.PRODUCT for i in code[first:last])
            loops.append((products, first, last))
    most = max((products for products, _, _ in loops), default=0)
    if most == 0:
        raise ValueError("no loop with products of matrices was found")
    _, first, last = min(
        (loop for loop in loops if loop[0] > 0.6 * most), key=lambda loop: loop[2] - loop[1]
    )
    return first, last


def path_of(code: Sequence[Instruction], conv_first: bool | None) -> Iterator[Instruction]:
    """The instructions of one turn, in the middle of a tile, of a warp that has work to do.

    Branches over what is optional are not taken. Where a step has what surrounds its conv both
    before and behind it, ``conv_first`` says which of the two is done; None: all is.
    """
    first, last = loop_of(code)
    at, products = first, math.inf  # since the last barrier
    for _ in range(2 * len(code)):
        here = code[at]
        yield here
        if at == last:
            return
        products = 0 if here.kind is Kind.BARRIER else products + (here.kind is Kind.PRODUCT)
        at += 1
        if here.name == "BRA" and here.target is not None:
            if not here.predicated:
                at = here.target
            elif here.target > at and conv_first is not None:
                kinds = {i.kind for i in code[at : here.target]}
                if Kind.COMMIT in kinds and Kind.BARRIER not in kinds:
                    before = products < 12  # those of a pointwise conv at most
                    if before == conv_first:
                        at = here.target
    raise ValueError("the loop over frames does not end")


def operations_of(path: Sequence[Instruction], layer: Layer) -> list[tuple[int, ...]]:
    """What the model is told of each instruction."""
    copies = sum(i.kind is Kind.COPY for i in path)
    # All that a tile covers comes from memory once, what surrounds it from the L2 cache.
    pixels = layer.rows * layer.columns * layer.stride**2
    copied = 3 * pixels * layer.input_bytes / (copies * layer.warps) if copies else 0.0
    operations: list[tuple[int, ...]] = []
    for i in path:
        stall, write, read = i.control & 15, i.control >> 5 & 7, i.control >> 8 & 7
        awaited = i.control >> 11 & 63
        cost, size = 0, 0
        kind = i.kind
        if kind is Kind.PRODUCT:
            cost = 8 if ".1688" in i.opcode else 16
        elif kind is Kind.SHARED:
            matrices = re.search(r"\.(\d)$", i.opcode) if i.name == "LDSM" else None
            cost = int(matrices.group(1)) if matrices else i.bytes // 4
        elif kind is Kind.COPY:
            cost = layer.turns if i.bytes == 4 else i.bytes // 4
            size = round(copied)
        elif kind is Kind.STORE:
            cost, size = max(4, i.bytes // 4), 32 * i.bytes
        elif kind is Kind.WAIT:
            pending = re.search(r"0x([0-9a-f]+)", i.operands)
            cost = int(pending.group(1), 16) if pending else 0
        if kind in (Kind.ARITHMETIC, Kind.BARRIER, Kind.COMMIT, Kind.WAIT):
            write = read = 7
        operations.append((int(kind), stall, write, read, awaited, cost, size))
    return operations


@dataclass(frozen=True)
class Prediction:
    """What the model says of a layer.

    Attributes:
        cycles: for a frame of all blocks of a multiprocessor.
        busy: shares of the time: schedulers, tensor cores, shared memory.
        waits: what warps wait for, as shares.
        instructions: of a warp for a frame.
    """

    cycles: float
    busy: dict[str, float]
    waits: dict[str, float]
    instructions: float


def predict(code: Sequence[Instruction], layer: Layer, model: Path) -> Prediction:
    """Run the loop of a kernel through the model."""
    frames = sum(i.kind is Kind.BARRIER for i in path_of(code, None))
    # The halves of a block differ in what they do first, where the code has both.
    paths = [list(path_of(code, conv_first)) for conv_first in (False, True)]
    traces = [operations_of(path, layer) for path in paths]
    words = [f"{layer.blocks} {layer.warps} {TURNS} {len(traces)}"]
    for trace in traces:
        words.append(str(len(trace)))
        words += [" ".join(map(str, numbers)) for numbers in trace]
    words += [str(int(warp >= layer.warps // 2)) for warp in range(layer.warps)]
    cycles, issue, tensor, shared, *rest = run(model, text="\n".join(words)).split()
    waits = {reason: float(share) for reason, share in zip(rest[::2], rest[1::2], strict=True)}
    busy = {"issue": float(issue), "tensor": float(tensor), "shared": float(shared)}
    length = sum(map(len, paths)) / len(paths) / frames
    return Prediction(float(cycles) / frames, busy, waits, length)


def predict_all(
    sources: Path, sizes: Mapping[str, tune_cuda.Sizes], names: Sequence[str]
) -> dict[str, tuple[Layer, Prediction]]:
    """The layers of a tree, some of them with other sizes of blocks."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copied = folder / "tree"
        shutil.copytree(sources / "csrc/cuda", copied / "csrc/cuda")
        header = copied / tune_cuda.HEADER
        header.write_text(tune_cuda.with_sizes(header.read_text(), sizes))
        model = folder / "model"
        run("g++", "-O2", "-std=c++20", ROOT / "build_tools/model_cuda.cpp", "-o", model)
        layers = layers_of(copied, folder)
        listing = run(find_disassembler(), "-c", "-hex", compile_kernels(copied, folder))
        kernels = kernels_of(listing)
        return {
            name: (layers[name], predict(kernels[1 + number], layers[name], model))
            for number, name in enumerate(_ORDER)
            if name in names
        }


_ORDER = tuple(tune_cuda.LAYERS)
"""As enum ResidentLayer has them."""


def _sizes(text: str) -> tuple[str, tune_cuda.Sizes]:
    name, _, numbers = text.partition("=")
    try:
        rows, wide, high, blocks = map(int, numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER=ROWS,WIDE,HIGH,BLOCKS") from None
    return name, (rows, wide, high, blocks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="*", default=[ROOT])
    parser.add_argument("--layers", nargs="+", choices=_ORDER, default=_ORDER)
    parser.add_argument(
        "--sizes", type=_sizes, nargs="+", default=[], help="of blocks, to be tried"
    )
    parser.add_argument("--json", type=Path, help="a file for all figures")
    options = parser.parse_args(arguments)
    rows = []
    for sources in options.sources:
        found = predict_all(sources, dict(options.sizes), options.layers)
        print(f"{sources}\nlayer    cycles  frames  instr.  issue tensor shared  waits")
        for name, (layer, said) in found.items():
            shares = " ".join(f"{said.busy[part]:6.0%}" for part in ("issue", "tensor", "shared"))
            waits = ", ".join(
                f"{reason} {share:.0%}"
                for reason, share in sorted(said.waits.items(), key=lambda item: -item[1])[:4]
            )
            print(
                f"{name:8s} {said.cycles:6.0f}  {layer.steps:6d}  {said.instructions:6.0f} "
                f"{shares}  {waits}"
            )
            rows.append(
                {"sources": str(sources), "layer": name, **vars(layer), "steps": layer.steps}
                | vars(said)
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
