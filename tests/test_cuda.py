"""What only a GPU shows: streams, devices, graphs, huge tensors, memory, and the CUDA kernels."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from conv_cases import CONV_CASES, MORE_CONV_CASES, ConvCase
from torch import Tensor
from volumes import random_volume

import gplws
from gplws.models.gplws_net import GPLWSNet
from gplws.nn.fused import FusedGroupParallel3d
from gplws.ops import (
    FocusSearchResult,
    Refinement,
    focus_search,
    group_pointwise_conv3d,
    pack_weights,
    reference,
    up_conv3d,
)

pytestmark = pytest.mark.cuda

CONV_RELATIVE = 1e-5  # of the largest result, against float64
NETWORK_RELATIVE = 1e-4  # of the largest logit, against the stock network in float64
# One rounding to 16 bits, of the largest result; inputs and weights are given in 16 bits.
HALF_RELATIVE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
HALF = tuple(HALF_RELATIVE)
DEPTH = 2e-3  # frames; a nearly flat fit magnifies rounding
CONFIDENCE = 1e-5

GIB = 2**30
NETWORK_WIDTHS = (12, 24, 48, 96)
FORMATS = (torch.contiguous_format, torch.channels_last_3d)
NETWORK = {  # its layers
    "stem": ConvCase((1, 3, 10, 131, 198), 3, 12),
    **{
        f"{channels} channels": ConvCase((1, channels, 10, 131, 198), channels, channels, groups=4)
        for channels in NETWORK_WIDTHS
    },
    **{
        f"down {channels}": ConvCase((1, channels, 10, 131, 198), 2 * channels, stride=2)
        for channels in NETWORK_WIDTHS[:-1]
    },
    "head": ConvCase((1, 12, 10, 131, 198), 12, 1, groups=4),
}


def on_gpu(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def in_half(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """On the GPU, the first one with its channels side by side."""
    x, *others = (None if t is None else t.to("cuda", dtype) for t in tensors)
    assert x is not None
    return [x.contiguous(memory_format=torch.channels_last_3d), *others]


def in_double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_conv_close(got: Tensor, expected: Tensor, relative: float = CONV_RELATIVE) -> None:
    assert got.is_cuda
    assert got.shape == expected.shape
    assert (got.cpu() - expected.cpu()).abs().max() <= relative * expected.abs().max()


def rounding(case: ConvCase, dtype: torch.dtype) -> float:
    """What a conv in 16 bits may be off by, of the largest result.

    The result is rounded, and before it the middle where a pointwise conv follows.
    """
    return HALF_RELATIVE[dtype] * (1 if case.channels_out is None else 2)


def network_layer(
    name: str, dtype: torch.dtype
) -> tuple[list[Tensor | None], functools.partial[Tensor]]:
    """Operands as the network has them, and the op with its options.

    A result in channels_last_3d is what the kernels whose sizes are compiled in make.
    """
    case = NETWORK[name]
    x, *others = in_half(case.tensors(), dtype)
    assert x is not None
    activations = {"relu": case.channels_out is not None, "pointwise_relu": name != "head"}
    op = functools.partial(group_pointwise_conv3d, **case.options, **activations)
    return [x.contiguous() if name == "stem" else x, *others], op


def not_yet(y: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A place for a result like ``y`` that is NaN as yet."""
    return torch.full_like(y, torch.nan, memory_format=memory_format)


def assert_search_close(got: FocusSearchResult, expected: FocusSearchResult) -> None:
    assert all(part.is_cuda for part in got)
    assert torch.equal(got.index.cpu(), expected.index.cpu())
    for part, name, tolerance in (
        (got.peak, "peak", 0.0),
        (got.confidence, "confidence", CONFIDENCE),
        (got.depth, "depth", DEPTH),
    ):
        torch.testing.assert_close(
            part.cpu().double(),
            getattr(expected, name).cpu().double(),
            rtol=0,
            atol=tolerance,
            equal_nan=True,
        )


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("size", "groups"), [((1, 24, 10, 7, 9), 12), ((2, 6, 1, 33, 1), 3), ((1, 4, 3, 20, 65), 4)]
)
def test_the_way_up_agrees_with_the_reference(size: tuple[int, ...], groups: int) -> None:
    batch, channels, frames, height, width = size
    x, weight, bias = torch.randn(size), torch.randn(channels, 1, 3, 3, 3), torch.randn(groups)
    skip = torch.randn(batch, groups, frames, 2 * height, 2 * width)
    tensors = (x, weight, bias, skip)
    expected = reference.up_conv3d(*(t.double() for t in tensors), groups=groups)
    assert_conv_close(up_conv3d(*(t.cuda() for t in tensors), groups=groups), expected)
    misaligned = torch.empty(skip.numel() + 1, device="cuda")[1:].view_as(skip).copy_(skip)
    got = up_conv3d(x.cuda(), weight.cuda(), bias.cuda(), misaligned, groups=groups)
    assert_conv_close(got, expected)


@pytest.fixture
def free_memory() -> Iterator[int]:
    """Bytes free on the GPU; what a test allocates is handed back."""
    torch.cuda.empty_cache()
    yield torch.cuda.mem_get_info()[0]
    torch.cuda.empty_cache()


@pytest.fixture
def exact_stock_convs() -> Iterator[None]:
    """Stock convs without TensorFloat-32, as gradients use them."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("op", ["group_pointwise_conv3d", "up_conv3d", "focus_search"])
def test_the_compiled_cuda_kernels_are_registered(op: str) -> None:
    assert gplws.build_info()["cuda"]
    dump = torch._C._dispatch_dump(f"gplws::{op}")
    registered = next(line for line in dump.splitlines() if line.startswith("CUDA:"))
    assert ".py" not in registered, registered


@pytest.mark.parametrize("case", CONV_CASES + MORE_CONV_CASES, ids=str)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str
)
def test_the_conv_agrees_with_the_float64_reference(
    case: ConvCase, memory_format: torch.memory_format
) -> None:
    tensors = case.tensors()
    expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options)
    x, *others = on_gpu(tensors)
    x = x.contiguous(memory_format=memory_format)
    got = group_pointwise_conv3d(x, *others, **case.options)
    assert_conv_close(got, expected)
    if not x.is_contiguous():
        assert got.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("case", CONV_CASES + MORE_CONV_CASES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_half_conv_agrees_with_the_float64_reference(
    case: ConvCase, dtype: torch.dtype
) -> None:
    last = in_half(case.tensors(), dtype)
    expected = reference.group_pointwise_conv3d(
        *in_double([None if t is None else t.cpu() for t in last]), **case.options
    )
    got = group_pointwise_conv3d(*last, **case.options)
    assert got.dtype == dtype
    assert_conv_close(got, expected, rounding(case, dtype))
    # In this layout other kernels may do it, whose sums run in another order.
    dense = group_pointwise_conv3d(last[0].contiguous(), *last[1:], **case.options)
    assert dense.is_contiguous()
    assert_conv_close(dense, expected, rounding(case, dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_half_conv_is_right_on_many_tiles_at_the_widths_of_the_network(
    stride: int, dtype: torch.dtype
) -> None:
    for channels in NETWORK_WIDTHS:
        more = {"channels_out": channels, "groups": 4} if stride == 1 else {"stride": 2}
        case = ConvCase((1, channels, 10, 131, 197), channels * stride, **more)
        tensors = in_half(case.tensors(), dtype)
        expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options)
        got = group_pointwise_conv3d(*tensors, **case.options)
        assert_conv_close(got, expected, rounding(case, dtype))


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_layers_of_the_network_agree_with_the_float64_reference_in_every_layout(
    name: str, dtype: torch.dtype
) -> None:
    (x, *others), op = network_layer(name, dtype)
    assert x is not None
    expected = reference.group_pointwise_conv3d(*in_double((x, *others)), **op.keywords)
    tolerance = rounding(NETWORK[name], dtype)
    first: Tensor | None = None
    for layout in FORMATS:
        view = x.contiguous(memory_format=layout)
        got = op(view, *others)
        assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
        assert_conv_close(got, expected, tolerance)
        for format_of_result in FORMATS:
            out = not_yet(got, format_of_result)
            assert op(view, *others, out=out) is out
            assert_conv_close(out, expected, tolerance)
            if format_of_result == layout:
                assert torch.equal(out, got)
            if name != "stem":  # of three channels, which are read as they lie
                first = out if first is None else first
                assert torch.equal(out, first)


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_layers_of_the_network_give_the_same_bits_beside_other_work(
    name: str, dtype: torch.dtype
) -> None:
    tensors, op = network_layer(name, dtype)
    expected = not_yet(op(*tensors), torch.channels_last_3d)
    op(*tensors, out=expected)
    noise = torch.rand(2048, 2048, device="cuda")
    busy = torch.cuda.Stream()
    busy.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(busy):
            noise @ noise  # blocks finish in another order
        y = not_yet(expected, torch.channels_last_3d)
        op(*tensors, out=y)
        assert torch.equal(y, expected)
    busy.synchronize()


@pytest.mark.parametrize("name", NETWORK)
def test_weights_packed_before_give_the_same_bits(name: str) -> None:
    tensors, op = network_layer(name, torch.bfloat16)
    x, *weights, residual = tensors
    assert x is not None and residual is None
    expected, got = (not_yet(op(*tensors), torch.channels_last_3d) for _ in range(2))
    op(*tensors, out=expected)
    packed = pack_weights(*weights, groups=op.keywords["groups"], stride=op.keywords["stride"])
    op(*tensors, packed=packed, out=got)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_fused_layers_see_that_their_weights_were_changed() -> None:
    layer = GPLWSNet().eval().fuse().cuda().bfloat16().middle[0]
    x = torch.rand(1, 96, 4, 12, 40, device="cuda").bfloat16()
    x = x.contiguous(memory_format=torch.channels_last_3d)

    def computed_anew() -> Tensor:
        return copy.deepcopy(layer)(x)

    before = layer(x)
    assert torch.equal(before, computed_anew())
    layer.weight.mul_(0.5)
    halved = layer(x)
    assert torch.equal(halved, computed_anew()) and not torch.equal(halved, before)
    layer.load_state_dict({name: -value for name, value in layer.state_dict().items()})
    assert torch.equal(layer(x), computed_anew())
    layer.pointwise_weight = torch.nn.Parameter(torch.ones_like(layer.pointwise_weight))
    assert torch.equal(layer(x), computed_anew())


@pytest.mark.parametrize("name", NETWORK)
def test_half_layers_of_the_network_do_not_depend_on_how_the_image_is_cut(name: str) -> None:
    (x, *others), op = network_layer(name, torch.bfloat16)
    assert x is not None
    whole, part = (
        op(view, *others, out=not_yet(op(view, *others), torch.channels_last_3d))
        for view in (x, x[:, :, 1:, 4:34, 6:90])  # pairs of columns stay pairs
    )
    step = NETWORK[name].stride
    rows, columns = slice(4 // step + 1, 34 // step - 1), slice(6 // step + 1, 90 // step - 1)
    assert torch.equal(part[:, :, 1:, 1:-1, 1:-1], whole[:, :, 2:, rows, columns])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("size", "groups"), [((1, 24, 10, 7, 9), 12), ((2, 6, 1, 33, 1), 3), ((1, 4, 3, 20, 65), 4)]
)
def test_the_half_way_up_agrees_with_the_reference(
    size: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    batch, channels, frames, height, width = size
    weight, bias = torch.randn(channels, 1, 3, 3, 3), torch.randn(groups)
    skip = torch.randn(batch, groups, frames, 2 * height, 2 * width)
    tensors = in_half((torch.randn(size), weight, bias, skip), dtype)
    expected = reference.up_conv3d(*in_double(tensors), groups=groups)
    got = up_conv3d(*tensors, groups=groups)
    assert_conv_close(got, expected, HALF_RELATIVE[dtype])
    if not tensors[0].is_contiguous():
        assert got.is_contiguous(memory_format=torch.channels_last_3d)
    # In this layout the sums run in another order.
    dense = up_conv3d(tensors[0].contiguous(), *tensors[1:], groups=groups)
    assert_conv_close(dense, expected, HALF_RELATIVE[dtype])
    for layout in FORMATS:
        out = not_yet(got, layout)
        assert up_conv3d(*tensors, groups=groups, out=out) is out
        assert_conv_close(out, expected, HALF_RELATIVE[dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "nan", "infinite", "negative"])
def test_the_search_in_half_precision_sees_the_same_as_in_float32(
    kind: str, dtype: torch.dtype
) -> None:
    volume = random_volume(kind, (2, 17, 9, 67), 0).to("cuda", dtype)
    found = focus_search(volume, refinement="gaussian")
    assert found.depth.dtype == found.peak.dtype == found.confidence.dtype == torch.float32
    assert same_bits(found, focus_search(volume.float(), refinement="gaussian"))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_ops_run_on_the_current_stream_and_in_graphs_with_the_same_bits(
    dtype: torch.dtype,
) -> None:
    model = GPLWSNet().eval().cuda().to(dtype).fuse()
    stack = torch.rand(1, 3, 6, 40, 56, device="cuda", dtype=dtype)
    with torch.inference_mode():
        expected = model(stack).clone()
        late = torch.zeros_like(stack)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            late.copy_(stack)
            volume = model(late)
        side.synchronize()
        assert torch.equal(volume, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(late)
        late.zero_()
        graph.replay()
        assert not torch.equal(captured, expected)
        for _ in range(3):
            late.copy_(stack)
            graph.replay()
            assert torch.equal(captured, expected)


def test_packed_weights_live_as_long_as_the_graph_that_reads_them() -> None:
    model = GPLWSNet().eval().cuda().to(torch.bfloat16).fuse()
    stack = torch.rand(1, 3, 6, 40, 56, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(stack).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(stack)
    model(stack)  # with gradients: what was packed is dropped
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1)  # and packed anew
    with torch.inference_mode():
        model(stack)
    noise = [torch.full((size,), 1e9, device="cuda") for size in (256, 1024, 4096, 2**14) * 200]
    graph.replay()
    assert torch.equal(captured, expected) and len(noise) == 800


def test_packed_weights_live_until_another_stream_has_read_them() -> None:
    x, *weights = in_half(ConvCase((1, 48, 6, 40, 56), 48, 48, groups=4).tensors(), torch.bfloat16)
    assert weights[-1] is None  # the residual
    layer = FusedGroupParallel3d(*weights[:4], groups=4, pointwise_relu=True)
    with torch.inference_mode():
        expected = layer(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        layer(x)  # packed on the stream before, used on this one
        torch.cuda._sleep(200_000_000)
        late = layer(x)
    layer(x)  # with gradients: what was packed is dropped
    noise = [torch.full((size,), 1e9, device="cuda") for size in (256, 1024, 4096, 2**14) * 200]
    side.synchronize()
    assert torch.equal(late, expected) and len(noise) == 800


def test_two_threads_launch_layers_that_need_unlike_shared_memory() -> None:
    model = GPLWSNet().eval().cuda().fuse()
    stack = torch.rand(1, 3, 10, 96, 96, device="cuda")
    with torch.inference_mode():
        expected = model(stack)
    failures: list[BaseException] = []

    def work(network: torch.nn.Module) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(200):
                    volume = network(stack)
                torch.cuda.current_stream().synchronize()
                assert torch.equal(volume, expected)
        except BaseException as error:
            failures.append(error)

    torch.cuda.synchronize()
    copies = [copy.deepcopy(model) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(network,)) for network in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", range(28, 37))
def test_the_conv_is_right_at_every_width_around_a_warp(width: int, stride: int) -> None:
    for height in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17):
        case = ConvCase((1, 4, 3, height, width), 4, 3, groups=2, stride=stride, residual=True)
        tensors = case.tensors(seed=height)
        expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options)
        assert_conv_close(group_pointwise_conv3d(*on_gpu(tensors), **case.options), expected)


@pytest.mark.parametrize("channels", NETWORK_WIDTHS)
def test_the_conv_is_right_on_many_tiles_at_the_widths_of_the_network(channels: int) -> None:
    case = ConvCase((1, channels, 10, 131, 197), channels, channels, groups=4, residual=True)
    tensors = on_gpu(case.tensors())
    expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options)
    assert_conv_close(group_pointwise_conv3d(*tensors, **case.options), expected)


@pytest.mark.parametrize("options", range(16))
def test_the_conv_applies_each_activation_where_it_belongs(options: int) -> None:
    case = ConvCase((1, 4, 3, 5, 21), 8, 6, groups=2, residual=bool(options & 8))
    activations = {
        "relu": bool(options & 1),
        "pointwise_relu": bool(options & 2),
        "residual_relu": bool(options & 4),
    }
    tensors = case.tensors()
    expected = reference.group_pointwise_conv3d(*in_double(tensors), **case.options, **activations)
    got = group_pointwise_conv3d(*on_gpu(tensors), **case.options, **activations)
    assert_conv_close(got, expected)


@pytest.mark.parametrize("channels", [12, 24])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_result_may_take_the_place_of_the_residual(dtype: torch.dtype, channels: int) -> None:
    for groups in (4, channels):  # in the latter, float32 sums would wait in the result
        case = ConvCase((1, channels, 3, 9, 40), channels, channels, groups=groups, residual=True)
        *tensors, residual = (None if t is None else t.to(dtype) for t in on_gpu(case.tensors()))
        assert residual is not None
        expected = group_pointwise_conv3d(*tensors, residual, **case.options)
        group_pointwise_conv3d(*tensors, residual, **case.options, out=residual)
        assert torch.equal(residual, expected)


def test_strided_inputs_give_the_same_bits_as_dense_ones() -> None:
    case = ConvCase((2, 4, 3, 9, 40), 4, 6, groups=2, residual=True)
    tensors = on_gpu(case.tensors())
    expected = group_pointwise_conv3d(*tensors, **case.options)
    views = []
    for tensor in tensors:
        wide = torch.full([2 * size for size in tensor.shape], torch.nan, device="cuda")
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        views.append(view.copy_(tensor))
    assert torch.equal(group_pointwise_conv3d(*views, **case.options), expected)

    volume = torch.rand(2, 9, 20, 70, device="cuda")
    positions = torch.rand(9, 2, device="cuda").cumsum(0).t()
    found = focus_search(volume, positions)
    for view in (
        volume.transpose(2, 3).contiguous().transpose(2, 3),
        volume.contiguous(memory_format=torch.channels_last),
        torch.stack([volume, volume], -1)[..., 0],
    ):
        assert same_bits(focus_search(view, positions), found)


def test_the_result_does_not_depend_on_how_the_image_is_cut() -> None:
    case = ConvCase((1, 48, 5, 40, 100), 48, 48, groups=4)
    x, *others = on_gpu(case.tensors())
    whole = group_pointwise_conv3d(x, *others, **case.options)
    part = group_pointwise_conv3d(x[:, :, 1:, 3:33, 5:91], *others, **case.options)
    assert torch.equal(part[:, :, 1:, 1:-1, 1:-1], whole[:, :, 2:, 4:32, 6:90])


@pytest.mark.parametrize("refinement", ["none", "parabola", "gaussian"])
@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ties", "nan", "infinite", "negative"])
def test_the_search_agrees_with_the_float64_reference(
    kind: str, log_scale: bool, refinement: Refinement
) -> None:
    sizes = [(1, 1, 1, 1), (2, 3, 4, 1), (3, 15, 2, 1), (7, 16, 3, 2), (8, 255, 3, 2)]
    sizes += [(9, 257, 1, 2), (10, 17, 4, 1), (41, 33, 4, 3), (13, 65, 20, 2), (5, 7, 1, 9)]
    for seed, (frames, width, groups, radius) in enumerate(sizes):
        volume = random_volume(kind, (2, frames, 3, width), seed)
        expected = reference.focus_search(
            volume.double(),
            groups=groups,
            refinement=refinement,
            radius=radius,
            log_scale=log_scale,
        )
        got = focus_search(
            volume.cuda(), groups=groups, refinement=refinement, radius=radius, log_scale=log_scale
        )
        assert_search_close(got, expected)


def test_the_search_honours_irregular_positions_of_each_image() -> None:
    volume = torch.rand(2, 12, 5, 40)
    rising = (torch.rand(12) + 0.2).cumsum(0)
    positions = torch.stack([rising, -2 * rising])
    expected = reference.focus_search(volume.double(), positions.double(), radius=2)
    assert_search_close(focus_search(volume.cuda(), positions.cuda(), radius=2), expected)


@pytest.mark.parametrize(
    "size", [(0, 4, 3, 5, 6), (1, 4, 0, 5, 6), (1, 4, 3, 0, 6), (1, 4, 3, 5, 0)]
)
def test_empty_inputs_give_empty_results_on_the_gpu(size: tuple[int, ...]) -> None:
    case = ConvCase(size, 4, 6, groups=2)
    result = group_pointwise_conv3d(*on_gpu(case.tensors()), **case.options)
    assert result.is_cuda
    assert result.shape == (size[0], 6, *size[2:])
    volume = torch.rand((size[0], 3, *size[3:]), device="cuda")
    if volume.numel() == 0:
        assert all(part.is_cuda and part.numel() == 0 for part in focus_search(volume))


def test_no_channels_leave_the_bias() -> None:
    bias = torch.tensor([1.0, -2.0, 3.0], device="cuda")
    y = group_pointwise_conv3d(
        torch.rand(1, 4, 2, 3, 5, device="cuda"),
        torch.rand(0, 4, 3, 3, 3, device="cuda"),
        None,
        torch.rand(3, 0, 1, 1, 1, device="cuda"),
        bias,
        pointwise_relu=False,
    )
    assert torch.equal(y, bias.view(1, 3, 1, 1, 1).expand(1, 3, 2, 3, 5))


def test_gradients_agree_with_those_of_the_cpu(exact_stock_convs: None) -> None:
    case = ConvCase((1, 4, 3, 5, 6), 4, 6, groups=2, residual=True)

    def gradients(device: str) -> tuple[Tensor, ...]:
        tensors = [t.requires_grad_() for t in case.tensors(device)]
        loss = group_pointwise_conv3d(*tensors, **case.options).square().sum()
        volume = case.tensors(device, seed=1)[0][0].requires_grad_()
        found = focus_search(volume, radius=1)
        loss = loss + found.depth.sum() + found.peak.square().sum()
        return torch.autograd.grad(loss, [*tensors, volume])

    for got, expected in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_opcheck_finds_nothing_on_the_gpu() -> None:
    case = ConvCase((1, 4, 3, 5, 6), 4, 6, groups=2, residual=True)
    tensors = [t.requires_grad_() for t in case.tensors("cuda")]
    torch.library.opcheck(
        torch.ops.gplws.group_pointwise_conv3d.default,
        (*tensors, case.groups, case.stride, True, True, False),
    )
    volume = torch.rand(1, 7, 4, 5, device="cuda", requires_grad=True)
    positions = torch.arange(7.0, device="cuda")
    torch.library.opcheck(torch.ops.gplws.focus_search.default, (volume, positions, 2, 1, 1, False))


def test_autocast_computes_in_float32_on_the_gpu() -> None:
    case = ConvCase((1, 4, 3, 5, 6), 4, 6, groups=2)
    x, *others = on_gpu(case.tensors())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = group_pointwise_conv3d(x.bfloat16(), *others, **case.options)
    assert got.dtype == torch.float32
    assert torch.equal(got, group_pointwise_conv3d(x.bfloat16().float(), *others, **case.options))


def test_both_ops_run_on_the_current_stream() -> None:
    case = ConvCase((1, 12, 5, 40, 60), 12, 12, groups=4)
    x, *others = on_gpu(case.tensors())
    volume = torch.rand(1, 10, 200, 300, device="cuda")
    expected = group_pointwise_conv3d(x, *others, **case.options)
    expected_search = focus_search(volume)
    late_x, late_volume = torch.zeros_like(x), torch.zeros_like(volume)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # An op on any other stream would not wait, and see zeros.
        torch.cuda._sleep(200_000_000)
        late_x.copy_(x)
        late_volume.copy_(volume)
        y = group_pointwise_conv3d(late_x, *others, **case.options)
        found = focus_search(late_volume)
    side.synchronize()
    assert torch.equal(y, expected)
    assert same_bits(found, expected_search)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_input_is_used_and_the_current_one_kept() -> None:
    case = ConvCase((1, 4, 3, 5, 40), 4, 6, groups=2)
    results = {}
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        assert torch.cuda.current_device() == 0
        y = group_pointwise_conv3d(*case.tensors(device), **case.options)
        found = focus_search(case.tensors(device)[0][0])
        assert str(y.device) == str(found.index.device) == device
        results[device] = y.cpu(), *(part.cpu() for part in found)
    assert torch.cuda.current_device() == 0
    assert same_bits(results["cuda:0"], results["cuda:1"])


@pytest.mark.parametrize("place", range(1, 6))
def test_tensors_on_different_devices_are_refused(place: int) -> None:
    case = ConvCase((1, 4, 3, 5, 6), 4, 6, groups=2, residual=True)
    tensors = on_gpu(case.tensors())
    tensors[place] = tensors[place].cpu()
    with pytest.raises((RuntimeError, ValueError), match="device"):
        torch.ops.gplws.group_pointwise_conv3d(*tensors, 2, 1, True, True, False)
    with pytest.raises((RuntimeError, ValueError), match="device"):
        torch.ops.gplws.focus_search(
            torch.rand(1, 3, 2, 2, device="cuda"), torch.arange(3.0), 1, 1, 1, False
        )


def test_a_cuda_graph_captures_and_replays_both_ops() -> None:
    case = ConvCase((1, 12, 6, 20, 70), 12, 1, groups=4)
    x, *others = on_gpu(case.tensors())

    def work() -> tuple[Tensor, ...]:
        y = group_pointwise_conv3d(x, *others, **case.options, pointwise_relu=False)
        return y, *focus_search(y[:, 0], log_scale=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for seed in (1, 2, 3):
        x.copy_(case.tensors(seed=seed)[0])
        graph.replay()
        assert same_bits(captured, work())


def test_results_are_bitwise_equal_from_run_to_run() -> None:
    case = ConvCase((2, 48, 5, 50, 70), 48, 48, groups=4, residual=True)
    tensors = on_gpu(case.tensors())
    volume = torch.rand(2, 10, 100, 130, device="cuda")
    y, found = group_pointwise_conv3d(*tensors, **case.options), focus_search(volume)
    noise = torch.rand(2048, 2048, device="cuda")
    busy = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(busy):
            noise @ noise  # blocks finish in another order
        assert same_bits((group_pointwise_conv3d(*tensors, **case.options),), (y,))
        assert same_bits(focus_search(volume), found)
    busy.synchronize()


def allocate(shape: tuple[int, ...], free: int, needed: float) -> Tensor:
    if free < needed * GIB:
        pytest.skip(f"needs {needed} GiB of free GPU memory, {free / GIB:.1f} are free")
    return torch.rand(shape, device="cuda")


def far_crops(height: int, width: int) -> list[tuple[slice, slice]]:
    """Corners of an image, as row and column slices."""
    rows, columns = slice(0, 50), slice(0, 70)
    last_rows, last_columns = slice(height - 50, height), slice(width - 70, width)
    return [(rows, columns), (rows, last_columns), (last_rows, columns), (last_rows, last_columns)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_conv_handles_more_than_two_to_the_31_elements(
    free_memory: int, channels_last: bool, stride: int
) -> None:
    size = 16400  # 2 channels x 4 frames x 16400^2 = 1.002 x 2^31
    if channels_last:
        x = allocate((1, 4, size, size, 2), free_memory, 17.5).permute(0, 4, 1, 2, 3)
    else:
        x = allocate((1, 2, 4, size, size), free_memory, 17.5)
    assert x.numel() > 2**31
    weight, pointwise = (torch.randn(s, device="cuda") for s in ((4, 2, 3, 3, 3), (2, 4, 1, 1, 1)))

    def op(part: Tensor) -> Tensor:
        # With stride 1 the input is its own residual: as many elements, and no further memory.
        residual = part if stride == 1 else None
        return group_pointwise_conv3d(part, weight, None, pointwise, None, residual, stride=stride)

    y = op(x)
    inner = slice(1, -1)  # the border of a crop lacks the pixels beyond it
    for rows, columns in far_crops(size, size):
        crop = op(x[..., rows, columns])[..., inner, inner]
        places = [slice(s.start // stride, s.stop // stride) for s in (rows, columns)]
        assert torch.equal(crop, y[..., places[0], places[1]][..., inner, inner])
    edge = op(x[..., -64:, -64:])[..., 1:, 1:]
    assert torch.equal(edge, y[..., -edge.shape[-2] :, -edge.shape[-1] :])


def test_the_search_handles_more_than_two_to_the_31_elements(free_memory: int) -> None:
    volume = allocate((1, 33, 8192, 8192), free_memory, 11)  # 1.03 x 2^31
    assert volume.numel() > 2**31
    found = focus_search(volume)
    for rows, columns in far_crops(8192, 8192):
        crop = focus_search(volume[..., rows, columns].contiguous())
        assert same_bits(crop, tuple(part[:, rows, columns] for part in found))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: group_pointwise_conv3d(x, torch.rand(1, 1, 3, 3, 3, device="cuda")),
        lambda x: focus_search(x[:, 0]),
    ],
    ids=["group_pointwise_conv3d", "focus_search"],
)
def test_out_of_memory_is_said_and_leaves_nothing_broken(
    use: Callable[[Tensor], object], free_memory: int
) -> None:
    before = torch.cuda.memory_allocated()
    huge = torch.zeros(1, device="cuda").expand(1, 1, 1, 2**20, 2**20)  # a result of 4 TiB
    with pytest.raises(RuntimeError, match="out of memory"):
        use(huge)
    del huge
    gc.collect()  # the error's frames held tensors
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    x = torch.rand(1, 1, 4, 20, 40)
    weight = torch.rand(1, 1, 3, 3, 3)
    expected = reference.group_pointwise_conv3d(x.double(), weight.double())
    assert_conv_close(group_pointwise_conv3d(x.cuda(), weight.cuda()), expected)
    assert_search_close(focus_search(x[:, 0].cuda()), reference.focus_search(x[:, 0].double()))


def test_the_fused_network_agrees_with_the_stock_network_on_the_gpu() -> None:
    torch.manual_seed(0)
    model = GPLWSNet().eval().cuda()
    stack = torch.rand(1, 3, 7, 61, 83, device="cuda")
    with torch.inference_mode():
        got = model.fuse()(stack)
        expected = copy.deepcopy(model).double()(stack.double())
    assert_conv_close(got, expected, NETWORK_RELATIVE)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_fused_network_in_half_precision_is_as_near_to_float64_as_stock(
    dtype: torch.dtype,
) -> None:
    model = GPLWSNet().eval().cuda()
    stack = torch.rand(1, 1, 7, 61, 83, device="cuda").to(dtype)
    with torch.inference_mode():
        narrow = copy.deepcopy(model).to(dtype)
        exact = copy.deepcopy(narrow).double()(stack.double())
        got, stock = model.fuse().to(dtype)(stack), narrow(stack)
    assert got.dtype == dtype
    scale = exact.abs().max()
    errors = [((v.double() - exact).abs().max() / scale).item() for v in (got, stock)]
    assert errors[0] <= max(1.5 * errors[1], 2 * HALF_RELATIVE[dtype]), errors


def test_activations_of_the_network_in_half_precision_are_channels_last() -> None:
    model = GPLWSNet().eval().cuda().bfloat16().fuse()
    layouts = []
    for module in (*model.downs, *model.ups, *model.middle):
        module.register_forward_hook(
            lambda _, inputs, y: layouts.extend(
                t.is_contiguous(memory_format=torch.channels_last_3d) for t in (inputs[0], y)
            )
        )
    with torch.inference_mode():
        model(torch.rand(1, 1, 5, 32, 48, device="cuda").bfloat16())
    assert layouts and all(layouts)
