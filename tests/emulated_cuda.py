"""The CUDA kernels, compiled as C++ and run on the CPU: see cuda_emulation/emulation.cpp."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gplws.ops.reference import FocusSearchResult

_SOURCES = ("csrc/cuda/*.cu", "tests/cuda_emulation/*.cpp")
_FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"),
    "-U_FORTIFY_SOURCE",  # its longjmp takes a jump between fibers for an error
    *("-DGPLWS_CUDA_EMULATION", "-Icsrc", "-Itests/cuda_emulation"),
]
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GUARD = 64  # elements around a result that nothing may touch


class ConvPlan(NamedTuple):
    """How a conv in 16 bits was cut; the members of HalfPlan that tests look at."""

    weights: int  # 0 in registers, 1 in shared memory, 2 in global memory
    granule: int
    store_bytes: int
    stages: int
    segments: int
    blocks: int
    warps: int
    tile_columns: int
    tile_rows: int
    tiles: int
    chunks: int
    slabs: int
    shared_bytes: int


class Device(NamedTuple):
    """What a kernel's launcher asks a GPU about."""

    major: int = 9
    minor: int = 0
    processors: int = 132
    shared_bytes: int = 227 << 10  # of one block
    shared_memory: int = 228 << 10  # of a multiprocessor


H200 = Device()


def find_compiler() -> list[str] | None:
    """Command of a C++20 compiler that knows 16-bit floats, or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in ([named] if named else []) + [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]) is None:
            continue
        probe = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        text = "#include <ucontext.h>\n_Float16 half(float x) { return static_cast<_Float16>(x); }"
        if subprocess.run(probe, input=text, text=True, capture_output=True).returncode == 0:
            return command
    return None


def build(compiler: Sequence[str], repository: Path, folder: Path, *flags: str) -> Path:
    """Compiles the kernels and the emulation into a shared object in ``folder``."""
    objects = []
    for source in sorted(p for pattern in _SOURCES for p in repository.glob(pattern)):
        target = folder / f"{source.stem}.o"
        command = [*compiler, *_FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, cwd=repository, check=True)
        objects.append(str(target))
    library = folder / "emulated_cuda.so"
    subprocess.run([*compiler, "-shared", *flags, *objects, "-o", str(library)], check=True)
    return library


class EmulatedCuda:
    """The launchers of the CUDA kernels, on CPU tensors.

    Args:
        library: made by :func:`build`.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.plan: ConvPlan | None = None  # of the last conv in 16 bits
        self.use(H200)

    def use(self, device: Device, seed: int = 0) -> None:
        """Emulates this device from now on; warps run in an order that depends on ``seed``."""
        self._library.set_emulated_device((ctypes.c_int * 5)(*device), seed)

    @property
    def blocks(self) -> int:
        """Blocks of the last launch."""
        return int(self._library.emulated_blocks())

    def group_pointwise_conv3d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        pointwise_weight: Tensor | None = None,
        pointwise_bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        groups: int = 1,
        stride: int = 1,
        relu: bool = True,
        pointwise_relu: bool = True,
        residual_relu: bool = False,
    ) -> Tensor | None:
        """As the op; None where the kernels for 16 bits cannot do it."""
        middle = weight.shape[0]
        channels_out = middle if pointwise_weight is None else pointwise_weight.shape[0]
        batch, channels, frames, height, width = x.shape
        size = (batch, channels_out, frames, -(-height // stride), -(-width // stride))
        y, flat = _guarded(size, x)
        tensors = (x, weight, bias, pointwise_weight, pointwise_bias, residual, y)
        sizes = (batch, channels, frames, height, width, middle, channels_out, *size[3:])
        flags = (pointwise_weight is not None, relu, pointwise_relu, residual_relu)
        numbers = (*_strides(x), *_strides(residual), *_strides(y), *sizes, groups, stride, *flags)
        if x.dtype == torch.float32:
            code = self._call("emulate_group_pointwise_conv3d", tensors, numbers)
        else:
            facts = (ctypes.c_int64 * len(ConvPlan._fields))()
            name = "emulate_group_pointwise_conv3d_half"
            code = self._call(name, tensors, numbers, _TYPES[x.dtype], facts)
            self.plan = ConvPlan(*facts)
        if code == -1:
            return None
        assert code == 0, f"CUDA error {code}"
        _assert_guard(flat)
        return y

    def up_conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int
    ) -> Tensor:
        """As the op."""
        batch, channels, frames, height, width = x.shape
        y, flat = _guarded((batch, groups, frames, 2 * height, 2 * width), x)
        sizes = (batch, channels, groups, frames, height, width)
        numbers = (*_strides(x), *_strides(residual), *_strides(y), *sizes)
        tensors = (x, weight, bias, residual, y)
        assert self._call("emulate_up_conv3d", tensors, numbers, _TYPES[x.dtype]) == 0
        _assert_guard(flat)
        return y

    def focus_search(
        self,
        volume: Tensor,
        positions: Tensor,
        *,
        groups: int = 4,
        refinement: str = "parabola",
        radius: int = 1,
        log_scale: bool = False,
    ) -> FocusSearchResult:
        """As the op."""
        batch, frames, height, width = volume.shape
        depth, peak, confidence = (torch.full((batch, height, width), 7.0) for _ in range(3))
        index = torch.full((batch, height, width), -1)
        position_stride = frames if positions.dim() == 2 else 0
        kind = ("none", "parabola", "gaussian").index(refinement)
        options = (-(-frames // groups), min(radius, frames), kind, log_scale)
        numbers = (*volume.stride(), position_stride, batch, frames, height, width, *options)
        tensors = (volume, positions, depth, index, peak, confidence)
        assert self._call("emulate_focus_search", tensors, numbers, _TYPES[volume.dtype]) == 0
        return FocusSearchResult(depth, index, peak, confidence)

    def _call(
        self, name: str, tensors: Sequence[Tensor | None], numbers: Sequence[int], *rest: Any
    ) -> int:
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        return getattr(self._library, name)(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(numbers))(*(int(number) for number in numbers)),
            *rest,
        )


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if tensor is None else tensor.stride()


def _guarded(size: tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """An uninitialised result in the layout that follows ``x``, and all memory around it."""
    count = math.prod(size)
    flat = torch.full((count + 2 * _GUARD,), 3.0, dtype=x.dtype)
    inner = flat[_GUARD : _GUARD + count].fill_(torch.nan)
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    if not last:
        return inner.view(size), flat
    batch, channels, frames, height, width = size
    return inner.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3), flat


def _assert_guard(flat: Tensor) -> None:
    assert (flat[:_GUARD] == 3).all() and (flat[-_GUARD:] == 3).all()
