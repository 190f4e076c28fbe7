"""The CUDA kernels, compiled as C++ and run on the CPU: see cuda_emulation/emulation.cpp."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
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


class ResidentPlan(NamedTuple):
    """How a conv of the layers whose sizes are compiled in was shared out."""

    layer: int
    segments: int
    blocks: int
    tiles: int
    parts: int


class QuadsPlan(NamedTuple):
    """How a conv in float32 was cut; the members of the plan of that name that tests look at."""

    frames: int  # of a thread; 0: the general kernel did it
    slot_channels: int
    out_channels: int
    quads: int
    rows: int
    block_slots: int
    sets: int
    threads: int
    shared_bytes: int
    tiles: int
    column_vectors: int
    channel_vectors: int
    input_vectors: int
    sums_wait: int  # in the result, between passes of the general kernel


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
        self.resident_plan: ResidentPlan | None = None
        self.quads_plan: QuadsPlan | None = None  # of the last conv in float32
        self.use(H200)

    def use(self, device: Device, seed: int = 0) -> None:
        """Emulates this device from now on.

        Warps run in an order that depends on ``seed``. Asynchronous copies happen when they are
        waited for, or, with a seed other than 0, some of them at once.
        """
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
        out: Tensor | None = None,
    ) -> Tensor | None:
        """As the op; None where the kernels for 16 bits cannot do it. ``out`` has no guards."""
        call = _ConvCall(
            x,
            (weight, bias, pointwise_weight, pointwise_bias, residual),
            (groups, stride, pointwise_weight is not None, relu, pointwise_relu, residual_relu),
            _guarded_like(x) if out is None else _given(out),
        )
        if x.dtype == torch.float32:
            facts = (ctypes.c_int64 * len(QuadsPlan._fields))()
            code = self._call("emulate_group_pointwise_conv3d", *call.arguments, facts)
            self.quads_plan = QuadsPlan(*facts)
            return call.result(code)
        facts = (ctypes.c_int64 * len(ConvPlan._fields))()
        name = "emulate_group_pointwise_conv3d_half"
        code = self._call(name, *call.arguments, _TYPES[x.dtype], facts)
        self.plan = ConvPlan(*facts)
        return call.result(code)

    def resident_conv3d(
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
        out: Tensor | None = None,
        launch: bool = True,
    ) -> Tensor | None:
        """As the op, in channels_last_3d; None where the kernels of compiled sizes cannot do it.

        ``out`` takes the result in other layouts; it has no guards. Without ``launch`` nothing is
        written, but there is a plan.
        """
        call = _ConvCall(
            x,
            (weight, bias, pointwise_weight, pointwise_bias, residual),
            (groups, stride, pointwise_weight is not None, relu, pointwise_relu, False),
            _guarded_last if out is None else _given(out),
        )
        facts = (ctypes.c_int64 * len(ResidentPlan._fields))()
        name, options = "emulate_resident_conv3d", (_TYPES[x.dtype], int(launch))
        code = self._call(name, *call.arguments, *options, facts)
        self.resident_plan = ResidentPlan(*facts)
        return call.result(code)

    def change_format(self, x: Tensor) -> Tensor:
        """``x`` of 16-bit floats in the other memory format: contiguous, or channels_last_3d."""
        batch, channels, frames, height, width = x.shape
        to_last = x.is_contiguous()
        y, flat = (_guarded_last if to_last else _guarded)(tuple(x.shape), x.dtype)
        numbers = (batch, channels, frames, height * width)
        assert self._call("emulate_change_format", (x, y), numbers, int(to_last)) == 0
        _assert_guard(flat)
        return y

    def up_conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int
    ) -> Tensor:
        """As the op."""
        batch, channels, frames, height, width = x.shape
        y, flat = _guarded_like(x)((batch, groups, frames, 2 * height, 2 * width), x.dtype)
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


class _ConvCall:
    """Flat arguments of a conv, and its result."""

    def __init__(
        self,
        x: Tensor,
        others: tuple[Tensor | None, ...],
        options: tuple[int, ...],
        make: Callable[[tuple[int, ...], torch.dtype], tuple[Tensor, Tensor]],
    ) -> None:
        weight, _, pointwise_weight, _, residual = others
        assert weight is not None
        middle, stride = weight.shape[0], options[1]
        channels_out = middle if pointwise_weight is None else pointwise_weight.shape[0]
        batch, channels, frames, height, width = x.shape
        size = (batch, channels_out, frames, -(-height // stride), -(-width // stride))
        self._y, self._flat = make(size, x.dtype)
        sizes = (batch, channels, frames, height, width, middle, channels_out, *size[3:])
        strides = (*_strides(x), *_strides(residual), *_strides(self._y))
        self.arguments = ((x, *others, self._y), (*strides, *sizes, *options))

    def result(self, code: int) -> Tensor | None:
        """What was written, after the launcher's answer; None where it cannot do it."""
        if code == -1:
            return None
        assert code == 0, f"CUDA error {code}"
        _assert_guard(self._flat)
        return self._y


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if tensor is None else tensor.stride()


def _guarded(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An uninitialised contiguous result, and all memory around it."""
    count = math.prod(size)
    flat = torch.full((count + 2 * _GUARD,), 3.0, dtype=dtype)
    return flat[_GUARD : _GUARD + count].fill_(torch.nan).view(size), flat


def _guarded_last(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same in channels_last_3d."""
    batch, channels, frames, height, width = size
    inner, flat = _guarded((batch, frames, height, width, channels), dtype)
    return inner.permute(0, 4, 1, 2, 3), flat


def _guarded_like(
    x: Tensor,
) -> Callable[[tuple[int, ...], torch.dtype], tuple[Tensor, Tensor]]:
    """Whichever of both follows the layout of ``x``."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return _guarded_last if last else _guarded


def _given(out: Tensor) -> Callable[[tuple[int, ...], torch.dtype], tuple[Tensor, Tensor]]:
    """A result that is there already, without guards of its own."""
    return lambda _, dtype: (out, _guarded((0,), dtype)[1])


def _assert_guard(flat: Tensor) -> None:
    assert (flat[:_GUARD] == 3).all() and (flat[-_GUARD:] == 3).all()
