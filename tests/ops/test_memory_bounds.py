"""The ops touch no byte outside their tensors, at sizes around a vector, a chunk and a tile.

Tensors lie next to a page that kills the process when it is accessed. build_tools/check_sanitizers
runs all tests of this folder with AddressSanitizer too, which sees the kernels' own memory as well.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conv_cases import CONV_CASES, ConvCase
from guarded_memory import GuardedMemory
from volumes import random_volume

from gplws.ops import (
    conv3d_input_gradient,
    conv3d_weight_gradient,
    fit_peak,
    focus_search,
    group_pointwise_conv3d,
    regularise_surface,
    sample_surface,
    smooth_surface,
    spline_smooth,
    up_conv3d,
)

DTYPES = [torch.float32, torch.bfloat16]

# A vector holds 4, 8 or 16 pixels, a row chunk up to 128, a tile up to 512 x 16.
WIDTHS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128, 129, 255, 511, 512, 513, 1030]
HEIGHTS = [1, 2, 4, 15, 16, 17, 33]
CASES = [
    *CONV_CASES,
    *(ConvCase((1, 12, 2, 3, width), 12, 12, groups=4, residual=True) for width in WIDTHS),
    *(ConvCase((1, 12, 2, 3, width), 24, stride=2) for width in WIDTHS),
    *(ConvCase((1, 6, 3, height, 19), 6, 5, groups=2) for height in HEIGHTS),
    *(ConvCase((1, 5, 3, height, 19), 10, groups=5, stride=2) for height in HEIGHTS),
]


@pytest.mark.parametrize("edge", ["before", "behind"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_pointwise_conv3d_stays_inside_its_tensors(edge, dtype):
    for case in CASES:
        memory = GuardedMemory(edge)
        plain = [None if t is None else t.to(dtype) for t in case.tensors()]
        expected = group_pointwise_conv3d(*plain, **case.options)
        out = memory.empty_like(expected)
        given = [memory.copy(t) for t in plain]
        assert torch.equal(group_pointwise_conv3d(*given, **case.options, out=out), expected), case


@pytest.mark.parametrize("edge", ["before", "behind"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_up_conv3d_stays_inside_its_tensors(edge, dtype):
    sizes = [(3, width) for width in WIDTHS] + [(height, 19) for height in (*HEIGHTS, 7, 8, 9)]
    for height, width in sizes:
        memory = GuardedMemory(edge)
        x, weight = torch.randn(1, 4, 2, height, width), torch.randn(4, 1, 3, 3, 3)
        bias, residual = torch.randn(2), torch.randn(1, 2, 2, 2 * height, 2 * width)
        plain = [t.to(dtype) for t in (x, weight, bias, residual)]
        expected = up_conv3d(*plain, groups=2)
        out = memory.empty_like(expected)
        given = [memory.copy(t) for t in plain]
        assert torch.equal(up_conv3d(*given, groups=2, out=out), expected), (height, width)


@pytest.mark.parametrize("edge", ["before", "behind"])
@pytest.mark.parametrize("spacing", [1, 8])
def test_spline_smooth_stays_inside_its_tensors(edge, spacing):
    sizes = [(3, width) for width in WIDTHS] + [(height, 19) for height in HEIGHTS]
    for height, width in sizes:
        memory = GuardedMemory(edge)
        images = torch.randn(2, height, width)
        expected = spline_smooth(images, spacing=spacing)
        given, out = memory.copy(images), memory.empty_like(expected)
        assert torch.equal(spline_smooth(given, spacing=spacing, out=out), expected), (
            height,
            width,
        )


@pytest.mark.parametrize("edge", ["before", "behind"])
@pytest.mark.parametrize("reach", [0, 1, 3, 20])
def test_local_filters_stay_inside_their_tensors(edge, reach):
    sizes = [(3, width) for width in WIDTHS] + [(height, 19) for height in HEIGHTS]
    for height, width in sizes:
        memory = GuardedMemory(edge)
        images, weights = torch.randn(2, height, width), torch.randn(reach + 1, reach + 1)
        shifts = torch.tensor([[0, reach], [reach, 0], [-reach, reach]])
        for call, argument in (
            (torch.ops.gplws.symmetric_filter, weights),
            (torch.ops.gplws.second_differences, shifts),
        ):
            given = memory.copy(images), memory.copy(argument)
            assert torch.equal(call(*given), call(images, argument)), (height, width)


@pytest.mark.parametrize("edge", ["before", "behind"])
def test_the_refinement_along_a_surface_stays_inside_its_tensors(edge):
    sizes = [(3, width) for width in WIDTHS] + [(height, 19) for height in HEIGHTS]
    for height, width in sizes:
        memory = GuardedMemory(edge)
        # Beyond the frames, and no number: the responses that are read exist all the same.
        depth = 9 * torch.randn(height, width)
        depth[height // 2, ::5] = torch.nan
        responses = torch.rand(4, height, width)
        for call, *tensors in (
            (lambda x: smooth_surface(x, limit=2.0), depth),
            (sample_surface, responses, depth),
            (fit_peak, *torch.rand(4, 7, height, width)),
            (fit_peak, torch.rand(7, height, width)),
        ):
            expected, found = call(*tensors), call(*(memory.copy(t) for t in tensors))
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("edge", ["before", "behind"])
def test_the_regularisation_stays_inside_its_tensors(edge):
    options = dict(strength=0.3, data_scale=1.0, smoothness_scale=2.0, guide_scale=0.3)
    sizes = [(3, width) for width in WIDTHS] + [(height, 19) for height in HEIGHTS]
    for height, width in [*sizes, (60, 300)]:  # the last is cut into bands
        memory = GuardedMemory(edge)
        maps = torch.rand(3, 2, height, width)
        expected = regularise_surface(*maps, **options, iterations=2)
        found = regularise_surface(*map(memory.copy, maps), **options, iterations=2)
        assert torch.equal(found, expected), (height, width)


@pytest.mark.parametrize("edge", ["before", "behind"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv3d_weight_gradient_stays_inside_its_tensors(edge, stride):
    sizes = [(3, width) for width in WIDTHS] + [(height, 19) for height in HEIGHTS]
    for height, width in sizes:
        memory = GuardedMemory(edge)
        x = torch.randn(1, 4, 3, height, width)
        grad = torch.randn(1, 6, 3, -(-height // stride), -(-width // stride))
        options = {"groups": 2, "stride": stride}
        expected = conv3d_weight_gradient(x, grad, **options)
        given = [memory.copy(t) for t in (x, grad)]
        assert torch.equal(conv3d_weight_gradient(*given, **options), expected), (height, width)


@pytest.mark.parametrize("edge", ["before", "behind"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv3d_input_gradient_stays_inside_its_tensors(edge, stride):
    sizes = [(3, width) for width in WIDTHS] + [(height, 19) for height in HEIGHTS]
    for height, width in sizes:
        memory = GuardedMemory(edge)
        grad = torch.randn(1, 6, 3, -(-height // stride), -(-width // stride))
        weight = torch.randn(6, 2, 3, 3, 3)
        options = {"size": (height, width), "groups": 2, "stride": stride}
        expected = conv3d_input_gradient(grad, weight, **options)
        given = [memory.copy(t) for t in (grad, weight)]
        assert torch.equal(conv3d_input_gradient(*given, **options), expected), (height, width)


@pytest.mark.parametrize("edge", ["before", "behind"])
@pytest.mark.parametrize("refinement", ["none", "parabola", "gaussian"])
def test_focus_search_stays_inside_its_volume(edge, refinement):
    for frames in (1, 2, 3, 10):
        for width in WIDTHS:
            memory = GuardedMemory(edge)
            volume = random_volume("nan", (2, frames, 1, width), seed=width)
            positions = torch.arange(float(frames))
            options = {"groups": 3, "refinement": refinement, "radius": 2}
            expected = focus_search(volume, positions, **options)
            found = focus_search(memory.copy(volume), memory.copy(positions), **options)
            for got, wanted in zip(found, expected, strict=True):
                assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1)), (frames, width)


@pytest.mark.parametrize("edge", ["before", "behind"])
def test_the_forbidden_page_is_where_it_should_be(edge):
    offset = -1 if edge == "before" else 5
    script = (
        "import ctypes, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from guarded_memory import GuardedMemory\n"
        f"memory = GuardedMemory({edge!r})\n"
        "tensor = memory.empty_like(torch.zeros(5, dtype=torch.int8))\n"
        "assert tensor.tolist() == [-1] * 5\n"
        f"ctypes.string_at(tensor.data_ptr() + ({offset}), 1)\n"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True)
    # A sanitizer in the process turns the signal into a report.
    assert ended.returncode == -signal.SIGSEGV or "SEGV" in ended.stderr, ended.stderr
