"""The logic of the CUDA kernels, on the CPU: right results from any device and order of warps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_cases import CONV_CASES, MORE_CONV_CASES, ConvCase
from emulated_cuda import H200, Device, EmulatedCuda, build, find_compiler
from torch import Tensor
from volumes import random_volume

from gplws.ops import Refinement, reference

pytestmark = pytest.mark.no_cpu_kernels

HALF = (torch.bfloat16, torch.float16)
# In 16 bits the middle of the two convs is rounded, and then the result.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
NO_SHARED_MEMORY = Device(7, 5, 40, 0, 0)  # beyond what every launch is granted
OTHER_DEVICES = (
    Device(8, 0, 108, 163 << 10, 164 << 10),
    Device(8, 6, 2, 99 << 10, 100 << 10),
    Device(9, 0, 1),
)  # which plan otherwise than the H200 that every test begins with
LAYOUTS = (torch.channels_last_3d, torch.contiguous_format)
NETWORK = {  # name: case, place of the weights (0 registers, 1 shared memory), bytes of a copy
    "stem": (ConvCase((1, 3, 10, 64, 64), 3, 12), 0, 2),
    "12 channels": (ConvCase((1, 12, 10, 64, 64), 12, 12, groups=4), 0, 4),
    "24 channels": (ConvCase((1, 24, 10, 64, 64), 24, 24, groups=4), 0, 4),
    "48 channels": (ConvCase((1, 48, 10, 64, 64), 48, 48, groups=4), 1, 8),
    "96 channels": (ConvCase((1, 96, 10, 64, 64), 96, 96, groups=4), 1, 16),
    "down 12": (ConvCase((1, 12, 10, 64, 64), 24, stride=2), 1, 8),
    "down 24": (ConvCase((1, 24, 10, 64, 64), 48, stride=2), 1, 16),
    "down 48": (ConvCase((1, 48, 10, 64, 64), 96, stride=2), 1, 16),
    "head": (ConvCase((1, 12, 10, 64, 64), 12, 1, groups=4), 0, 4),
}


@pytest.fixture(scope="session")
def library(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++20 compiler with ucontext.h and _Float16")
    return build(compiler, repository, tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture
def cuda(library: Path) -> EmulatedCuda:
    return EmulatedCuda(library)


def in_double(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def operands(
    case: ConvCase, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[Tensor | None, ...]:
    x, *others = (None if t is None else t.to(dtype) for t in case.tensors())
    assert x is not None
    return x.contiguous(memory_format=layout), *others


def assert_close(got: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    assert got is not None and got.dtype == dtype and got.shape == expected.shape
    error = (got.double() - expected).abs().max()
    assert error <= ROUNDING[dtype] * expected.abs().max(), error


@pytest.mark.parametrize("case", CONV_CASES + MORE_CONV_CASES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_half_conv_agrees_with_the_float64_reference(
    cuda: EmulatedCuda, case: ConvCase, dtype: torch.dtype
) -> None:
    tensors = operands(case, dtype, LAYOUTS[dtype == torch.float16])
    expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options)
    got = cuda.group_pointwise_conv3d(*tensors, **case.options)
    if case.middle == 300:  # more middle channels than a block holds
        assert got is None
        return
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("case", CONV_CASES + MORE_CONV_CASES, ids=str)
@pytest.mark.parametrize("device", [H200, NO_SHARED_MEMORY], ids=["H200", "general kernel"])
def test_the_float32_conv_agrees_with_the_float64_reference(
    cuda: EmulatedCuda, case: ConvCase, device: Device
) -> None:
    cuda.use(device)
    tensors = operands(case, torch.float32, torch.contiguous_format)
    expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options)
    assert_close(cuda.group_pointwise_conv3d(*tensors, **case.options), expected, torch.float32)
    assert cuda.quads_plan is not None
    few = case.middle // case.groups < 3 or case.middle == 300
    assert (cuda.quads_plan.frames == 0) == (few or device != H200)


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_float32_layers_of_the_network_take_the_fast_way(
    cuda: EmulatedCuda, name: str, layout: torch.memory_format
) -> None:
    full = NETWORK[name][0]
    case = ConvCase((1, full.size[1], 5, 9, 64), full.middle, full.channels_out, full.groups,
                    full.stride)  # fmt: skip
    cuda.use(Device(9, 0, 1))  # one multiprocessor is busy enough to take the large tiles
    tensors = operands(case, torch.float32, layout)
    expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options)
    assert_close(cuda.group_pointwise_conv3d(*tensors, **case.options), expected, torch.float32)
    plan = cuda.quads_plan
    assert plan is not None
    planar = layout == torch.contiguous_format
    assert (plan.frames, plan.quads) == (5, 8)
    assert plan.slot_channels == (
        3 if case.middle // case.groups in (3, 6) or name == "stem" else 4
    )
    assert plan.out_channels == (0 if case.channels_out is None else 4 if name == "head" else 12)
    assert plan.input_vectors == plan.column_vectors == planar
    assert plan.channel_vectors == (not planar and name != "head")


@pytest.mark.parametrize(
    "case",
    [
        ConvCase((1, 12, 7, 9, 40), 12, 12, groups=4, residual=True),
        ConvCase((1, 24, 5, 9, 48), 48, stride=2),
        ConvCase((2, 96, 6, 5, 20), 96, 96, groups=4),
        ConvCase((1, 10, 6, 7, 36), 14, 5, groups=2),  # slots of which the last is not full
    ],
    ids=str,
)
def test_the_float32_result_depends_on_neither_device_nor_layout_nor_order(
    cuda: EmulatedCuda, case: ConvCase
) -> None:
    tensors = operands(case, torch.float32, torch.contiguous_format)
    expected = cuda.group_pointwise_conv3d(*tensors, **case.options)
    assert expected is not None
    plans = {cuda.quads_plan}
    for seed, device in enumerate(OTHER_DEVICES):
        cuda.use(device, seed)
        got = cuda.group_pointwise_conv3d(*tensors, **case.options)
        assert got is not None and torch.equal(got, expected)
        plans.add(cuda.quads_plan)
    assert len(plans) > 1
    x, *others = tensors
    assert x is not None
    wide = torch.full([2 * size for size in x.shape], torch.nan)
    strided = wide[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
    misaligned = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    for view in (strided, misaligned, last):
        got = cuda.group_pointwise_conv3d(view, *others, **case.options)
        assert got is not None and torch.equal(got, expected)


@pytest.mark.parametrize("options", range(16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_each_activation_comes_where_it_belongs(
    cuda: EmulatedCuda, options: int, dtype: torch.dtype
) -> None:
    case = ConvCase((1, 4, 2, 5, 21), 8, 6, groups=2, residual=bool(options & 8))
    activations = {
        "relu": bool(options & 1),
        "pointwise_relu": bool(options & 2),
        "residual_relu": bool(options & 4),
    }
    tensors = operands(case, dtype, torch.channels_last_3d)
    expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options, **activations)
    got = cuda.group_pointwise_conv3d(*tensors, **case.options, **activations)
    assert_close(got, expected, dtype)


@pytest.mark.parametrize(
    "size",
    [
        (2, 12, 3, 40, 50),  # several tiles of pixels, the last one not full
        (1, 12, 2, 3, 7),  # an odd number of pixels: no pairs
        (1, 13, 2, 6, 23),  # pairs over two pixels
        (1, 96, 1, 9, 20),
        (1, 130, 2, 4, 18),  # two tiles of channels
        (1, 131, 1, 4, 18),  # of an odd number: no pairs
        (1, 300, 1, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 1])
def test_memory_formats_are_changed_without_a_bit_lost(
    cuda: EmulatedCuda, size: tuple[int, ...], offset: int
) -> None:
    bits = torch.randint(-(2**15), 2**15, (math.prod(size) + offset,), dtype=torch.int16)
    x = bits[offset:].view(size)  # a word or half of one
    last = cuda.change_format(x.view(torch.bfloat16))
    assert last.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(last.view(torch.int16), x)
    moved = torch.empty(math.prod(size) + offset, dtype=torch.bfloat16)
    batch, channels, *rest = size
    view = moved[offset:].view(batch, *rest, channels).permute(0, 4, 1, 2, 3).copy_(last)
    if view.is_contiguous():  # of one pixel: both formats are the same
        return
    assert torch.equal(cuda.change_format(view).view(torch.int16), x)


@pytest.mark.parametrize("name", NETWORK)
def test_layers_of_the_network_take_the_fast_ways(cuda: EmulatedCuda, name: str) -> None:
    case, place, granule = NETWORK[name]
    case = ConvCase((1, case.size[1], 2, 9, 33), case.middle, case.channels_out, case.groups,
                    case.stride)  # fmt: skip
    tensors = operands(case, torch.bfloat16, torch.channels_last_3d)
    assert cuda.group_pointwise_conv3d(*tensors, **case.options) is not None
    assert cuda.plan is not None
    assert (cuda.plan.weights, cuda.plan.granule) == (place, granule)
    assert cuda.plan.shared_bytes <= H200.shared_bytes


@pytest.mark.parametrize(
    "case",
    [
        ConvCase((1, 12, 7, 9, 40), 12, 12, groups=4, residual=True),
        ConvCase((1, 24, 5, 9, 20), 48, stride=2),
        ConvCase((1, 96, 5, 5, 17), 96, 96, groups=4),
    ],
    ids=str,
)
def test_the_result_depends_on_neither_device_nor_layout_nor_order(
    cuda: EmulatedCuda, case: ConvCase
) -> None:
    tensors = operands(case, torch.bfloat16, torch.channels_last_3d)
    expected = cuda.group_pointwise_conv3d(*tensors, **case.options)
    assert expected is not None
    plans = {cuda.plan}
    for seed, device in enumerate(OTHER_DEVICES):
        cuda.use(device, seed)
        got = cuda.group_pointwise_conv3d(*tensors, **case.options)
        assert got is not None and torch.equal(got, expected)
        plans.add(cuda.plan)
    assert len(plans) > 1
    x, *others = tensors
    assert x is not None
    wide = torch.full([2 * size for size in x.shape], torch.nan, dtype=x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
    got = cuda.group_pointwise_conv3d(view, *others, **case.options)
    assert got is not None and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_reaches_as_far_as_the_kernel_and_no_further(
    cuda: EmulatedCuda, dtype: torch.dtype
) -> None:
    case = ConvCase((1, 12, 5, 12, 40), 12, 12, groups=4)
    x, *others = operands(case, dtype, torch.channels_last_3d)
    assert x is not None
    x[0, 4, 2, 5, 17] = torch.nan
    got = cuda.group_pointwise_conv3d(x, *others, **case.options)
    assert got is not None
    expected = torch.zeros_like(got, dtype=torch.bool)
    expected[..., 1:4, 4:7, 16:19] = True
    assert torch.equal(got.isnan(), expected)


def test_old_devices_and_too_many_channels_are_left_to_float32(cuda: EmulatedCuda) -> None:
    case = ConvCase((1, 4, 1, 3, 3), 8, 5, groups=2)
    tensors = operands(case, torch.float16, torch.channels_last_3d)
    cuda.use(Device(7, 5, 40, 64 << 10, 64 << 10))
    assert cuda.group_pointwise_conv3d(*tensors, **case.options) is None
    cuda.use(H200)
    case = ConvCase((1, 5000, 1, 1, 1), 2, groups=2)
    tensors = operands(case, torch.float16, torch.channels_last_3d)
    assert cuda.group_pointwise_conv3d(*tensors, **case.options) is None


ONE_BLOCK = Device(processors=0)  # which walks through all frames of all tiles


def resident_case(name: str, size: tuple[int, int, int, int], bias: bool = True) -> ConvCase:
    full = NETWORK[name][0]
    batch, frames, height, width = size
    shape = (batch, full.size[1], frames, full.stride * height, full.stride * width)
    return ConvCase(
        shape, full.middle, full.channels_out, full.groups, full.stride, False, bias
    )  # fmt: skip


def resident_call(
    name: str, case: ConvCase, dtype: torch.dtype
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """Operands as the network has them, and its options."""
    layout = torch.contiguous_format if name == "stem" else torch.channels_last_3d
    activations = {"relu": case.channels_out is not None, "pointwise_relu": name != "head"}
    return operands(case, dtype, layout), {**case.options, **activations}


def resident_tile(cuda: EmulatedCuda, name: str) -> tuple[int, int]:
    """Rows and columns of the result in one tile of a layer."""

    def is_one(height: int, width: int) -> bool:
        tensors, options = resident_call(name, resident_case(name, (1, 1, height, width)), HALF[0])
        assert cuda.resident_conv3d(*tensors, **options, launch=False) is not None
        return cuda.resident_plan is not None and cuda.resident_plan.tiles == 1

    cuda.use(ONE_BLOCK)
    height = next(h for h in range(1, 99) if not is_one(h + 1, 2))
    width = next(w for w in range(16, 999, 16) if not is_one(1, w + 2))
    return height, width


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_resident_layers_agree_with_the_float64_reference(
    cuda: EmulatedCuda, name: str, dtype: torch.dtype
) -> None:
    height, width = resident_tile(cuda, name)
    sizes = [
        (2, 1, height - 1, width - 2),
        (1, 2, height, width),
        (1, 3, height + 1, width + 2),
        (1, 4, 1, 2),
        (1, 7, 2, 14),
    ]
    for seed, size in enumerate(sizes):
        tensors, options = resident_call(name, resident_case(name, size, seed % 3 != 1), dtype)
        expected = reference.group_pointwise_conv3d(*in_double(tensors), **options)
        cuda.use(H200 if seed % 2 else ONE_BLOCK, seed)
        assert_close(cuda.resident_conv3d(*tensors, **options), expected, dtype)
        plan = cuda.resident_plan
        assert plan is not None
        assert plan.tiles == size[0] * plan.segments * (4 if size[3] > width else 1)


@pytest.mark.parametrize("name", NETWORK)
def test_resident_layers_depend_on_neither_device_nor_order(cuda: EmulatedCuda, name: str) -> None:
    case = resident_case(name, (1, 5, 2, resident_tile(cuda, name)[1] + 2))
    tensors, options = resident_call(name, case, torch.bfloat16)
    expected = cuda.resident_conv3d(*tensors, **options)
    plan = cuda.resident_plan
    assert expected is not None and plan is not None
    assert (plan.segments, plan.blocks, plan.tiles) == (1, 1, 2)
    devices = [Device(9, 0, 1), H200, Device(8, 0, 3, 163 << 10, 164 << 10)]
    for seed, device in enumerate(devices, 1):
        cuda.use(device, seed)
        got = cuda.resident_conv3d(*tensors, **options)
        if device.major == 9 or got is not None:  # where shared memory does
            assert got is not None and torch.equal(got, expected)
        if device == H200:
            assert cuda.resident_plan is not None and cuda.resident_plan.segments > 1


@pytest.mark.parametrize("name", NETWORK)
def test_resident_layers_read_and_write_parts_of_larger_tensors(
    cuda: EmulatedCuda, name: str
) -> None:
    case = resident_case(name, (2, 2, 3, 10))
    (x, *others), options = resident_call(name, case, torch.float16)
    assert x is not None
    cuda.use(ONE_BLOCK)
    expected = cuda.resident_conv3d(x, *others, **options)
    assert expected is not None

    def wide(tensor: Tensor, planes: bool) -> tuple[Tensor, Tensor]:
        batch, channels, frames, height, width = tensor.shape
        shape = (batch, frames + 2, height + 2, width + 4, channels)
        if planes:
            memory = torch.full((batch, channels, *shape[1:4]), torch.nan, dtype=tensor.dtype)
            view = memory
        else:
            memory = torch.full(shape, torch.nan, dtype=tensor.dtype)
            view = memory.permute(0, 4, 1, 2, 3)
        return memory, view[:, :, 1:-1, 1:-1, 2:-2]

    view = wide(x, name == "stem")[1].copy_(x)
    memory, y = wide(expected, False)
    assert cuda.resident_conv3d(view, *others, **options, out=y) is not None
    assert torch.equal(y, expected)
    y.fill_(torch.nan)
    assert memory.isnan().all()  # nothing was written beside it


def test_the_resident_stem_reads_one_plane_for_all_channels(cuda: EmulatedCuda) -> None:
    case = resident_case("stem", (2, 4, 5, 34))
    (x, *others), options = resident_call("stem", case, torch.bfloat16)
    assert x is not None
    gray = x[:, :1].expand(-1, 3, -1, -1, -1)
    assert gray.stride(1) == 0
    expected = cuda.resident_conv3d(gray.contiguous(), *others, **options)
    got = cuda.resident_conv3d(gray, *others, **options)
    assert expected is not None and got is not None and torch.equal(got, expected)


def test_the_resident_head_writes_one_channel_in_any_format(cuda: EmulatedCuda) -> None:
    case = resident_case("head", (1, 3, 5, 34))
    tensors, options = resident_call("head", case, torch.bfloat16)
    expected = cuda.resident_conv3d(*tensors, **options)
    assert expected is not None
    dense = torch.empty(expected.shape, dtype=expected.dtype)
    assert cuda.resident_conv3d(*tensors, **options, out=dense) is not None
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("name", NETWORK)
def test_odd_widths_are_done_right_or_refused(cuda: EmulatedCuda, name: str) -> None:
    full = NETWORK[name][0]
    case = ConvCase((1, full.size[1], 3, 5, 20), full.middle, full.channels_out, full.groups,
                    full.stride)  # fmt: skip
    (x, *others), options = resident_call(name, case, torch.bfloat16)
    assert x is not None
    x[..., 19] = torch.nan
    part = x[..., :19]  # its lines are as far apart as even ones
    dense = part.contiguous(
        memory_format=torch.contiguous_format if name == "stem" else torch.channels_last_3d
    )
    expected = reference.group_pointwise_conv3d(*in_double((dense, *others)), **options)
    for view in (dense, part):
        got = cuda.resident_conv3d(view, *others, **options)
        assert (got is not None) == (name in ("24 channels", "96 channels", "down 24", "down 48"))
        if got is not None:
            assert_close(got, expected, torch.bfloat16)


@pytest.mark.parametrize("name", NETWORK)
def test_resident_kernels_refuse_what_they_are_not_made_for(cuda: EmulatedCuda, name: str) -> None:
    case = resident_case(name, (1, 2, 3, 10))
    (x, *others, _), options = resident_call(name, case, torch.bfloat16)
    assert x is not None
    y = cuda.resident_conv3d(x, *others, **options)
    assert y is not None

    def refused(*tensors: Tensor | None, **changes: Any) -> bool:
        return cuda.resident_conv3d(*tensors, **{**options, **changes}) is None

    last = torch.channels_last_3d
    # Layouts: planes for the stem alone, all results with their channels side by side.
    other = x.contiguous(memory_format=last) if name == "stem" else x.contiguous()
    assert refused(other, *others)
    if name != "head":
        assert refused(x, *others, out=torch.empty_like(y).contiguous())
    # Every other element, and rows or pointers that copies of several do not meet.
    spread = torch.stack([x, x], -1)[..., 0]
    assert refused(spread, *others)
    for tensor, pointer in ((x, True), (x, False), (y, True), (y, False)):
        view = misaligned(tensor, pointer)
        assert torch.equal(view, tensor)
        assert refused(view, *others) if tensor is x else refused(x, *others, out=view)
    # Lines so far apart that a tile beyond the image would leave 32 bits.
    one_line = x[..., :1, :]
    far = one_line.as_strided(one_line.shape, (*x.stride()[:3], 2**28, x.stride(4)))
    assert not refused(one_line, *others) and refused(far, *others)
    # Activations, residual, stride.
    assert refused(x, *others, relu=not options["relu"])
    if case.channels_out is not None:
        assert refused(x, *others, pointwise_relu=not options["pointwise_relu"])
    assert refused(x, *others, torch.zeros_like(y))
    assert refused(x, *others, stride=3 - case.stride)
    # Devices.
    for device in (Device(7, 5, 40, 64 << 10, 64 << 10), Device(8, 6, 84, 8 << 10, 100 << 10)):
        cuda.use(device)
        assert refused(x, *others)


@pytest.mark.parametrize(
    ("case", "waits"),
    [
        (ConvCase((1, 24, 3, 5, 20), 24, 24, groups=24, residual=True), True),
        (ConvCase((1, 4, 3, 5, 20), 4, 6, groups=4, residual=True), False),  # in one pass
        (ConvCase((1, 12, 3, 5, 20), 12, 12, groups=4, residual=True), False),  # four columns
        (ConvCase((1, 24, 3, 5, 20), 24, groups=24, residual=True), False),  # no pointwise conv
    ],
    ids=str,
)
def test_the_result_may_take_the_place_of_the_residual_unless_sums_wait_there(
    cuda: EmulatedCuda, case: ConvCase, waits: bool
) -> None:
    tensors = case.tensors()
    expected = cuda.group_pointwise_conv3d(*tensors, **case.options)
    assert expected is not None
    *others, residual = tensors
    assert residual is not None
    got = cuda.group_pointwise_conv3d(*others, residual, **case.options, out=residual)
    assert got is residual
    assert cuda.quads_plan is not None and bool(cuda.quads_plan.sums_wait) == waits
    assert torch.equal(got, expected) != waits


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.parametrize("pointer", [False, True])
def test_what_is_copied_in_words_need_not_be_aligned_to_more(
    cuda: EmulatedCuda, name: str, pointer: bool
) -> None:
    (x, *others), options = resident_call(name, resident_case(name, (1, 3, 5, 34)), torch.bfloat16)
    assert x is not None
    expected = cuda.resident_conv3d(x, *others, **options)
    got = cuda.resident_conv3d(misaligned(x, pointer, by=2), *others, **options)
    assert expected is not None
    if name in ("stem", "12 channels", "head", "24 channels"):
        assert got is not None and torch.equal(got, expected)
    else:
        assert got is None


def misaligned(tensor: Tensor, pointer: bool, by: int = 1) -> Tensor:
    """The same values and order of strides at an odd place; or with an odd step between rows.

    Odd multiples of ``by`` elements.
    """
    batch, channels, frames, height, width = tensor.shape
    planes = tensor.stride(4) == 1 and channels > 1
    shape = (batch, channels, frames, height) if planes else (batch, frames, height)
    line = width if planes else width * channels
    memory = torch.empty(math.prod(shape) * (line + by) + by, dtype=tensor.dtype)
    if pointer:
        flat = memory[by : by + tensor.numel()].view(*shape, line)
    else:
        flat = memory[:-by].view(*shape, line + by)[..., :line]
    view = flat if planes else flat.unflatten(-1, (width, channels)).permute(0, 4, 1, 2, 3)
    return view.copy_(tensor)


@pytest.mark.parametrize(
    "case",
    [
        ConvCase((1, 12, 2, 3, 4), 12, 12, groups=2),
        ConvCase((1, 12, 2, 3, 4), 12, 24, groups=4),
        ConvCase((1, 12, 2, 3, 4), 24, 12, groups=4),
        ConvCase((1, 12, 2, 3, 4), 12, groups=4),
        ConvCase((1, 16, 2, 3, 4), 16, 16, groups=4),
        ConvCase((1, 12, 2, 3, 4), 24),
        ConvCase((1, 12, 2, 4, 4), 24, 24, stride=2),
    ],
    ids=str,
)
def test_other_layers_are_left_to_the_general_kernels(cuda: EmulatedCuda, case: ConvCase) -> None:
    tensors = operands(case, torch.float16, torch.channels_last_3d)
    for relu in (False, True):
        assert cuda.resident_conv3d(*tensors, **case.options, relu=relu) is None


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_reaches_a_pixel_further_at_most(
    cuda: EmulatedCuda, name: str, value: float
) -> None:
    width = resident_tile(cuda, name)[1]
    case = resident_case(name, (1, 6, 3, width + 4))
    (x, *others), options = resident_call(name, case, torch.bfloat16)
    assert x is not None
    reached = torch.zeros(6, 3, width + 4, dtype=torch.bool)
    allowed = reached.clone()
    for frame, column in ((1, case.stride * width - 1), (4, case.stride * width)):
        # With 12 channels, what shares a word with a channel of the group before.
        x[0, x.shape[1] // 4, frame, case.stride, column] = value
        if case.stride == 1:
            rows, first, last = slice(0, 3), column - 1, column + 1
        else:
            rows, first, last = slice(1, 2), column // 2, (column + 1) // 2
        reached[frame - 1 : frame + 2, rows, first : last + 1] = True
        allowed[frame - 1 : frame + 2, rows, first - 1 : last + 2] = True
    got = cuda.resident_conv3d(x, *others, **options)
    assert got is not None
    assert got[0, :, ~allowed].isfinite().all()
    if math.isnan(value):
        assert got[0, :, reached].isnan().all()


@pytest.mark.parametrize("name", [name for name in NETWORK if not name.startswith("down")])
def test_a_middle_result_beyond_float16_reaches_the_next_pixel_at_most(
    cuda: EmulatedCuda, name: str
) -> None:
    case = resident_case(name, (1, 3, 5, 12))
    (x, weight, bias, pointwise_weight, *others), options = resident_call(name, case, torch.float16)
    assert x is not None and weight is not None and pointwise_weight is not None
    weight.zero_()
    weight[:, :, 1, 1, 1] = 10
    for column in (4, 5):
        x.zero_()
        x[..., column] = 30000
        got = cuda.resident_conv3d(x, weight, bias, pointwise_weight.abs(), *others, **options)
        assert got is not None
        finite = got.isfinite()
        assert not finite[..., column].any()
        assert finite[..., : column - 1].all() and finite[..., column + 2 :].all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("size", "groups"), [((1, 24, 5, 7, 9), 12), ((2, 6, 1, 5, 1), 3), ((1, 8, 3, 6, 33), 2)]
)
def test_the_way_up_agrees_with_the_float64_reference(
    cuda: EmulatedCuda,
    size: tuple[int, ...],
    groups: int,
    layout: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    batch, channels, frames, height, width = size
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(channels, 1, 3, 3, 3).to(dtype), torch.randn(groups).to(dtype)
    skip = torch.randn(batch, groups, frames, 2 * height, 2 * width).to(dtype)
    tensors = (x, weight, bias, skip)
    expected = reference.up_conv3d(*(t.double() for t in tensors), groups=groups)
    assert_close(cuda.up_conv3d(*tensors, groups), expected, dtype)


@pytest.mark.parametrize("refinement", ["none", "parabola", "gaussian"])
@pytest.mark.parametrize("kind", ["plain", "ties", "nan", "infinite", "negative"])
def test_the_search_agrees_with_the_float64_reference(
    cuda: EmulatedCuda, kind: str, refinement: Refinement
) -> None:
    sizes = [(1, 1, 1, 1), (3, 15, 2, 1), (10, 257, 4, 1), (17, 33, 3, 2)]
    for seed, (frames, width, groups, radius) in enumerate(sizes):
        for dtype in ROUNDING:
            volume = random_volume(kind, (2, frames, 2, width), seed).to(dtype)
            options = {"groups": groups, "refinement": refinement, "radius": radius}
            expected = reference.focus_search(volume.double(), **options)
            got = cuda.focus_search(volume, torch.arange(float(frames)), **options)
            assert torch.equal(got.index, expected.index)
            assert torch.equal(got.peak.double(), expected.peak)
            for part, name, tolerance in (
                (got.depth, "depth", 2e-3),
                (got.confidence, "confidence", 1e-5),
            ):
                torch.testing.assert_close(
                    part.double(), getattr(expected, name), rtol=0, atol=tolerance, equal_nan=True
                )


MANY_PIXELS = Device(processors=0)  # small images are enough for several pixels a thread
ONE_PIXEL = Device(processors=1 << 20)


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "refinement"),
    [("plain", "none"), ("ties", "parabola"), ("nan", "gaussian"), ("infinite", "gaussian"),
     ("negative", "parabola")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_search_is_the_same_for_every_number_of_pixels_a_thread(
    cuda: EmulatedCuda, dtype: torch.dtype, kind: str, refinement: Refinement
) -> None:
    cases = [(1, 1, 2), (4, 3, 1), (5, 4, 1), (6, 6, 1), (9, 2, 3), (10, 4, 1), (11, 1, 1),
             (15, 4, 1), (17, 3, 1), (23, 5, 2)]  # fmt: skip
    for seed, (frames, groups, radius) in enumerate(cases):
        volume = random_volume(kind, (2, frames, 4, 256), seed).to(dtype)
        positions = (torch.rand(2, frames) ** 4 + 1e-3).cumsum(1)  # gaps of up to 1 : 1000
        options = {"groups": groups, "refinement": refinement, "radius": radius}
        cuda.use(ONE_PIXEL)
        expected = cuda.focus_search(volume, positions, **options)
        assert cuda.blocks == 16
        wide = torch.full((2, frames, 4, 514), torch.nan, dtype=dtype)
        cuda.use(MANY_PIXELS, seed)
        for view, blocks in (
            (volume, 4),  # rows follow one another; four pixels a thread
            (wide[..., 8 : 8 + 256], 8),  # rows of an odd number of pairs apart: two
            (wide[..., 1 : 1 + 256], 16),  # misaligned
            (wide[..., ::2][..., :256], 16),  # not dense
        ):
            view.copy_(volume)
            found = cuda.focus_search(view, positions, **options)
            assert cuda.blocks == blocks
            assert same_bits(found, expected)
        right = reference.focus_search(volume.double(), positions.double(), **options)
        assert torch.equal(expected.index, right.index)
        torch.testing.assert_close(
            expected.confidence.double(), right.confidence, rtol=0, atol=1e-5
        )
        finite = right.peak.isfinite()
        assert torch.equal(expected.depth.isnan(), right.depth.isnan())
        error = (expected.depth.double() - right.depth)[finite].abs()
        assert error.numel() == 0 or error.max() <= 2e-3 * frames


def test_the_search_finds_positions_beyond_its_table(cuda: EmulatedCuda) -> None:
    volume = torch.rand(1, 2100, 1, 8)
    positions = torch.arange(2100.0)
    expected = reference.focus_search(volume.double(), positions.double())
    for device in (ONE_PIXEL, MANY_PIXELS):
        cuda.use(device)
        found = cuda.focus_search(volume, positions)
        assert torch.equal(found.index, expected.index)
        torch.testing.assert_close(found.depth.double(), expected.depth, rtol=0, atol=2e-3)


HALF_WAY_UP = [  # size of x, channels of the result
    ((1, 24, 10, 7, 9), 12),  # as the network; part of a tile
    ((1, 24, 3, 3, 33), 12),  # several tiles, and rows behind the last
    ((1, 48, 4, 2, 17), 24),
    ((1, 96, 5, 2, 16), 48),  # a block of twelve warps
    ((2, 8, 1, 7, 5), 4),  # one warp for a row
    ((1, 16, 6, 5, 18), 8),
    ((1, 128, 2, 1, 3), 64),  # the widest block
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("size", "groups"), HALF_WAY_UP, ids=str)
def test_the_half_way_up_does_not_depend_on_layout_device_or_order(
    cuda: EmulatedCuda, size: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    batch, channels, frames, height, width = size
    x, weight = torch.randn(size).to(dtype), torch.randn(channels, 1, 3, 3, 3).to(dtype)
    bias = torch.randn(groups).to(dtype)
    skip = torch.randn(batch, groups, frames, 2 * height, 2 * width).to(dtype)
    last = torch.channels_last_3d
    for with_bias, with_skip in ((True, True), (False, False)):
        others = (bias if with_bias else None, skip if with_skip else None)
        expected = reference.up_conv3d(*in_double((x, weight, *others)), groups=groups)
        cuda.use(H200)
        got = cuda.up_conv3d(x.contiguous(memory_format=last), weight, *in_last(others), groups)
        assert_close(got, expected, dtype)
        blocks = cuda.blocks
        cuda.use(Device(processors=1), 1)  # no segments
        whole = cuda.up_conv3d(x.contiguous(memory_format=last), weight, *in_last(others), groups)
        assert torch.equal(whole, got)
        assert frames == 1 or cuda.blocks < blocks
        cuda.use(H200, 2)
        dense = cuda.up_conv3d(x, weight, *others, groups)
        assert torch.equal(dense, got)
        assert torch.equal(cuda.up_conv3d(in_last((x,))[0], weight, *others, groups), got)
        # A place that granules do not meet, and strides that are no whole granules.
        for wide in (
            torch.full((batch, frames, height, width, channels + 1), torch.nan, dtype=dtype),
            torch.full((batch, frames, height, width, channels + 8), torch.nan, dtype=dtype),
        ):
            view = wide[..., -channels:].permute(0, 4, 1, 2, 3)
            view.copy_(x)
            assert torch.equal(cuda.up_conv3d(view, weight, *in_last(others), groups), got)


def in_last(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    last = torch.channels_last_3d
    return [
        None if t is None else t.contiguous(memory_format=last) if t.dim() == 5 else t
        for t in tensors
    ]


def test_nan_on_the_half_way_up_stays_in_its_product(cuda: EmulatedCuda) -> None:
    x, weight = torch.randn(1, 24, 5, 7, 20).half(), torch.randn(24, 1, 3, 3, 3).half()
    x[0, 4, 2, 3, 5] = torch.nan
    for tensor in (x, *in_last((x,))):
        assert tensor is not None
        found = cuda.up_conv3d(tensor, weight, None, None, 12).isnan()
        assert found[0, 2, 1:4, 5:8, 9:12].all()  # where it belongs
        found[0, 2:4, 1:4, 4:8, 8:12] = False
        assert not found.any()


def test_the_half_way_up_is_left_to_float32_sums_on_old_devices(cuda: EmulatedCuda) -> None:
    x, weight = torch.randn(1, 24, 4, 5, 6).half(), torch.randn(24, 1, 3, 3, 3).half()
    expected = reference.up_conv3d(x.double(), weight.double(), groups=12)
    for device in (Device(7, 5, 40, 64 << 10, 64 << 10), H200):
        cuda.use(device)
        for tensor in (x, *in_last((x,))):
            assert tensor is not None
            assert_close(cuda.up_conv3d(tensor, weight, None, None, 12), expected, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "groups"),  # groups no multiple of four are left to these kernels in 16 bits as well
    [((1, 12, 10, 7, 9), 6), ((2, 4, 1, 20, 33), 2), ((1, 4, 2, 5, 1), 2), ((1, 12, 5, 6, 8), 2)],
    ids=str,
)
def test_the_way_up_does_not_depend_on_layout_device_or_order(
    cuda: EmulatedCuda, size: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    batch, channels, frames, height, width = size
    x, weight = torch.randn(size).to(dtype), torch.randn(channels, 1, 3, 3, 3).to(dtype)
    bias = torch.randn(groups).to(dtype)
    skip = torch.randn(batch, groups, frames, 2 * height, 2 * width).to(dtype)
    odd = torch.empty(skip.numel() + 1, dtype=dtype)[1:].view_as(skip).copy_(skip)  # no pairs
    for seed, others in enumerate([(bias, skip), (bias, odd), (None, None)]):
        expected = reference.up_conv3d(*in_double((x, weight, *others)), groups=groups)
        cuda.use(H200, seed)
        got = cuda.up_conv3d(x, weight, *others, groups)
        assert_close(got, expected, dtype)
        blocks = cuda.blocks
        last, *others_last = in_last((x, *others))
        assert last is not None
        assert torch.equal(cuda.up_conv3d(last, weight, *others_last, groups), got)
        cuda.use(Device(processors=0))  # no segments
        assert torch.equal(cuda.up_conv3d(x, weight, *others, groups), got)
        assert cuda.blocks < blocks or frames == 1 or height * width * frames < 256
        assert torch.equal(cuda.up_conv3d(last, weight, *others_last, groups), got)
