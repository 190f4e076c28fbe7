from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gplws.ops import conv3d_input_gradient, group_pointwise_conv3d

RELATIVE = 1e-5  # of the largest element, against float64

CHANNELS = [  # C, M, groups
    (12, 24, 1),  # the network's way down
    (3, 12, 1),
    (24, 24, 4),
    (5, 7, 1),  # blocks of four channels and of one, or of three and of two
    (7, 5, 1),  # of six, or twice three, and of one
    (10, 3, 1),  # of six and of four, or of three and of one
    (6, 12, 6),
    (1, 1, 1),
]
SIZES = [  # B, N, H, W
    (1, 1, 1, 1),
    (2, 2, 2, 2),
    (2, 3, 17, 1),
    (1, 2, 1, 17),
    (1, 17, 2, 3),
    (2, 5, 17, 17),
    (1, 2, 5, 31),
    (1, 3, 9, 32),
    (1, 2, 6, 33),
    (1, 4, 10, 10),
]


def tensors(channels, size, stride, dtype=torch.float32):
    """grad, weight."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, groups = channels
    batch, frames, height, width = size
    shape = (batch, outputs, frames, -(-height // stride), -(-width // stride))
    grad = torch.randn(shape, generator=generator)
    weight = torch.randn(outputs, inputs // groups, 3, 3, 3, generator=generator)
    return grad.to(dtype), weight.to(dtype)


def stock(grad, weight, size, groups, stride):
    batch, frames, height, width = size
    shape = (batch, weight.shape[1] * groups, frames, height, width)
    return torch.nn.grad.conv3d_input(
        shape, weight, grad, stride=(1, stride, stride), padding=1, groups=groups
    )


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= RELATIVE * expected.abs().max()


def assert_it_agrees(channels, size, stride):
    grad, weight = tensors(channels, size, stride)
    got = conv3d_input_gradient(grad, weight, size=size[2:], groups=channels[2], stride=stride)
    assert got.is_contiguous()
    assert_close(got, stock(grad.double(), weight.double(), size, channels[2], stride))


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_it_agrees_with_the_float64_gradient(channels, stride):
    for size in SIZES:
        assert_it_agrees(channels, size, stride)


@pytest.mark.parametrize(
    ("channels", "size"),
    [
        ((12, 24, 1), (1, 3, 300, 130)),  # several blocks of rows, the last one shorter
        ((12, 96, 1), (1, 2, 7, 1000)),  # rows so long that a task has one
        ((4, 300, 1), (1, 1, 3, 1500)),  # and one that is more than scratch should have
    ],
    ids=str,
)
def test_work_cut_into_many_pieces_fits_together(channels, size):
    assert_it_agrees(channels, size, 2)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_it_agrees_under_every_instruction_set(isa):
    test = f"{Path(__file__)}::test_it_agrees_with_the_float64_gradient"
    tests = [f"{test}[2-{channels}]" for channels in CHANNELS[:1] + CHANNELS[3:6]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    ended = subprocess.run(
        command, env={**os.environ, "GPLWS_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("stride", [1, 2])
def test_the_number_of_threads_does_not_change_a_bit(stride):
    size = (2, 7, 50, 70)
    grad, weight = tensors((12, 24, 4), size, stride)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                conv3d_input_gradient(grad, weight, size=size[2:], groups=4, stride=stride)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("stride", [1, 2])
def test_strided_views_give_the_same_numbers(stride):
    grad, weight = tensors((4, 6, 2), (2, 3, 9, 20), stride)
    options = {"size": (9, 20), "groups": 2, "stride": stride}
    expected = conv3d_input_gradient(grad, weight, **options)
    views = [t.transpose(3, 4).contiguous().transpose(3, 4) for t in (grad, weight)]
    assert torch.equal(conv3d_input_gradient(*views, **options), expected)
    last = [t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, weight)]
    assert torch.equal(conv3d_input_gradient(*last, **options), expected)


@pytest.mark.parametrize("size", [(0, 3, 5, 6), (1, 0, 5, 6), (1, 3, 0, 6), (1, 3, 5, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_at_no_input_is_empty(size, stride):
    grad, weight = tensors((4, 6, 2), size, stride)
    got = conv3d_input_gradient(grad, weight, size=size[2:], groups=2, stride=stride)
    assert got.shape == (size[0], 4, *size[1:])


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_no_channels_is_zero(stride):
    grad, weight = tensors((4, 0, 1), (1, 2, 5, 6), stride)
    got = conv3d_input_gradient(grad, weight, size=(5, 6), stride=stride)
    assert torch.equal(got, torch.zeros(1, 4, 2, 5, 6))


@pytest.mark.parametrize("stride", [1, 2])
def test_its_gradients_agree_with_stock_autograd(stride):
    size = (2, 3, 5, 6)
    grad, weight = (t.requires_grad_() for t in tensors((4, 6, 2), size, stride))
    got = conv3d_input_gradient(grad, weight, size=size[2:], groups=2, stride=stride)
    direction = torch.randn(got.shape)
    x = torch.zeros_like(got, requires_grad=True)
    y = torch.nn.functional.conv3d(x, weight, stride=(1, stride, stride), padding=1, groups=2)
    (expected,) = torch.autograd.grad(y, x, grad, create_graph=True)
    for g, e in zip(
        torch.autograd.grad(got, (grad, weight), direction),
        torch.autograd.grad(expected, (grad, weight), direction),
        strict=True,
    ):
        assert_close(g, e)


def test_opcheck_finds_nothing():
    given = [t.requires_grad_() for t in tensors((4, 6, 2), (1, 3, 5, 6), 2)]
    torch.library.opcheck(torch.ops.gplws.conv3d_input_gradient.default, (*given, 2, False, True))


def test_backward_passes_compile_whole_with_dynamic_shapes():
    weight = torch.rand(6, 2, 3, 3, 3)

    def loss(x):
        return group_pointwise_conv3d(x.sin(), weight, groups=2, stride=2)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((1, 4, 2, 3, 5), (2, 4, 3, 7, 6)):
        x = torch.rand(size, requires_grad=True)
        (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad(loss(x).square().sum(), x)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("in_dims", [(0, None), (1, 0), (None, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_equals_a_loop(in_dims, stride):
    pairs = (torch.rand(3, 1, 6, 2, 5, 6), torch.rand(3, 6, 2, 3, 3, 3))
    given = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(pairs, in_dims, strict=True)
    ]

    def op(grad, weight):
        size = (5 * stride, 6 * stride)
        return conv3d_input_gradient(grad, weight, size=size, groups=2, stride=stride)

    chosen = [[0 if dim is None else i for dim in in_dims] for i in range(3)]
    expected = torch.stack([op(pairs[0][i], pairs[1][j]) for i, j in chosen])
    assert torch.equal(torch.vmap(op, in_dims)(*given), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.rand(6, 2, 3, 5)}, ValueError, "grad must be"),
        ({"grad": torch.rand(1, 6, 2, 3, 4)}, ValueError, "grad must be"),
        ({"weight": torch.rand(6, 2, 3, 3)}, ValueError, "weight must be"),
        ({"weight": torch.rand(4, 2, 3, 3, 3)}, ValueError, "weight must be"),
        ({"size": (4, 10)}, ValueError, "grad must be"),
        ({"stride": 1}, ValueError, "grad must be"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
        ({"groups": 4}, ValueError, "groups must divide"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"grad": torch.rand(1, 6, 2, 3, 5).double()}, TypeError, "grad must be float32"),
        ({"weight": torch.rand(6, 2, 3, 3, 3).bfloat16()}, TypeError, "weight must be float32"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    grad, weight = tensors((4, 6, 2), (1, 2, 5, 10), 2)
    arguments = {"grad": grad, "weight": weight, "size": (5, 10), "groups": 2, "stride": 2}
    with pytest.raises(error, match=message):
        conv3d_input_gradient(**(arguments | change))


def test_a_direct_call_of_the_op_guards_memory():
    grad, weight = tensors((4, 6, 2), (1, 2, 5, 10), 2)
    with pytest.raises(RuntimeError, match="weight has the wrong shape"):
        torch.ops.gplws.conv3d_input_gradient(grad, weight[:4], 2, False, True)
    with pytest.raises(RuntimeError, match="must divide the 6 channels"):
        torch.ops.gplws.conv3d_input_gradient(grad, weight, 4, False, True)
