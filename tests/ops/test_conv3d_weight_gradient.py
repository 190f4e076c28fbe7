from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gplws.ops import conv3d_weight_gradient, group_pointwise_conv3d, up_conv3d

RELATIVE = 1e-5  # of the largest element, against float64

CHANNELS = [  # C, M, groups
    (3, 12, 1),  # the network's stem
    (12, 12, 4),
    (24, 24, 4),
    (12, 24, 1),  # the network's ways down
    (12, 24, 12),  # the network's way up
    (5, 7, 1),
    (30, 50, 1),  # several blocks of channels, of different sizes
    (4, 4, 4),
]
SIZES = [  # B, N, H, W
    (1, 1, 1, 1),
    (2, 2, 2, 2),
    (2, 3, 17, 1),
    (1, 2, 1, 17),
    (1, 17, 2, 3),
    (2, 5, 17, 17),
    (1, 2, 5, 31),
    (1, 2, 6, 32),
    (1, 4, 10, 10),  # two pieces
]


def tensors(channels, size, stride, dtype=torch.float32):
    """x, grad."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, _ = channels
    batch, frames, height, width = size
    x = torch.randn(batch, inputs, frames, height, width, generator=generator)
    shape = (batch, outputs, frames, -(-height // stride), -(-width // stride))
    return x.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def stock(x, grad, groups, stride):
    weight = grad.new_empty(grad.shape[1], x.shape[1] // groups, 3, 3, 3)
    return torch.nn.grad.conv3d_weight(
        x, weight.shape, grad, stride=(1, stride, stride), padding=1, groups=groups
    )


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_it_agrees_with_the_float64_gradient(channels, stride):
    for size in SIZES:
        x, grad = tensors(channels, size, stride)
        got = conv3d_weight_gradient(x, grad, groups=channels[2], stride=stride)
        assert_close(got, stock(x.double(), grad.double(), channels[2], stride))


@pytest.mark.parametrize(
    ("channels", "size"),
    [
        ((12, 12, 4), (1, 2, 120, 130)),  # several blocks of rows
        ((4, 4, 1), (1, 2, 3, 2100)),
        ((24, 24, 1), (1, 3, 9, 700)),  # blocks of fewer channels, as rows are long
        ((24, 48, 1), (3, 10, 10, 10)),  # several chunks
    ],
    ids=str,
)
@pytest.mark.parametrize("stride", [1, 2])
def test_work_cut_into_many_pieces_adds_up(channels, size, stride):
    x, grad = tensors(channels, size, stride)
    got = conv3d_weight_gradient(x, grad, groups=channels[2], stride=stride)
    assert_close(got, stock(x.double(), grad.double(), channels[2], stride))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_it_agrees_under_every_instruction_set(isa):
    test = f"{Path(__file__)}::test_it_agrees_with_the_float64_gradient"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    ended = subprocess.run(
        command, env={**os.environ, "GPLWS_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("stride", [1, 2])
def test_the_number_of_threads_does_not_change_a_bit(stride):
    x, grad = tensors((12, 24, 4), (2, 7, 50, 70), stride)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(conv3d_weight_gradient(x, grad, groups=4, stride=stride))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_strided_views_give_the_same_numbers():
    x, grad = tensors((4, 6, 2), (2, 3, 9, 20), 1)
    expected = conv3d_weight_gradient(x, grad, groups=2)
    views = [t.transpose(3, 4).contiguous().transpose(3, 4) for t in (x, grad)]
    assert torch.equal(conv3d_weight_gradient(*views, groups=2), expected)
    last = [t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad)]
    assert torch.equal(conv3d_weight_gradient(*last, groups=2), expected)


@pytest.mark.parametrize("size", [(0, 3, 5, 6), (1, 0, 5, 6), (1, 3, 0, 6), (1, 3, 5, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_nothing_is_zero(size, stride):
    got = conv3d_weight_gradient(*tensors((4, 6, 2), size, stride), groups=2, stride=stride)
    assert torch.equal(got, torch.zeros(6, 2, 3, 3, 3))


@pytest.mark.parametrize("stride", [1, 2])
def test_its_gradients_agree_with_stock_autograd(stride):
    x, grad = (t.requires_grad_() for t in tensors((4, 6, 2), (2, 3, 5, 6), stride))
    got = conv3d_weight_gradient(x, grad, groups=2, stride=stride)
    direction = torch.randn(got.shape)
    weight = torch.zeros_like(got, requires_grad=True)
    y = torch.nn.functional.conv3d(x, weight, stride=(1, stride, stride), padding=1, groups=2)
    (expected,) = torch.autograd.grad(y, weight, grad, create_graph=True)
    for g, e in zip(
        torch.autograd.grad(got, (x, grad), direction),
        torch.autograd.grad(expected, (x, grad), direction),
        strict=True,
    ):
        assert_close(g, e)


@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck_finds_nothing(stride):
    given = [t.requires_grad_() for t in tensors((4, 6, 2), (1, 3, 5, 6), stride)]
    torch.library.opcheck(torch.ops.gplws.conv3d_weight_gradient.default, (*given, 2, stride))


def test_backward_passes_compile_whole_with_dynamic_shapes():
    weight, up_weight = torch.rand(4, 2, 3, 3, 3), torch.rand(4, 1, 3, 3, 3)
    weight.requires_grad_()
    up_weight.requires_grad_()

    def loss(x):
        return up_conv3d(group_pointwise_conv3d(x.sin(), weight, groups=2), up_weight, groups=2)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((1, 4, 2, 3, 5), (2, 4, 3, 7, 6)):
        x = torch.rand(size)
        for g, e in zip(
            torch.autograd.grad(compiled(x).square().sum(), (weight, up_weight)),
            torch.autograd.grad(loss(x).square().sum(), (weight, up_weight)),
            strict=True,
        ):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("in_dims", [(0, None), (1, 0), (None, 2)])
def test_vmap_equals_a_loop(in_dims):
    pairs = (torch.rand(3, 1, 4, 2, 5, 6), torch.rand(3, 1, 6, 2, 5, 6))
    given = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(pairs, in_dims, strict=True)
    ]

    def op(a, b):
        return conv3d_weight_gradient(a, b, groups=2)

    chosen = [[0 if dim is None else i for dim in in_dims] for i in range(3)]
    expected = torch.stack([op(pairs[0][i], pairs[1][j]) for i, j in chosen])
    assert torch.equal(torch.vmap(op, in_dims)(*given), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(4, 2, 3, 5)}, ValueError, "x must be"),
        ({"grad": torch.rand(6, 2, 3, 5)}, ValueError, "grad must be"),
        ({"grad": torch.rand(1, 6, 2, 3, 4)}, ValueError, "grad must be"),
        ({"stride": 2}, ValueError, "grad must be"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
        ({"groups": 4}, ValueError, "groups must divide"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"x": torch.rand(1, 4, 2, 3, 5).double()}, TypeError, "x must be float32"),
        ({"grad": torch.rand(1, 6, 2, 3, 5).bfloat16()}, TypeError, "grad must be float32"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    x, grad = tensors((4, 6, 2), (1, 2, 3, 5), 1)
    arguments = {"x": x, "grad": grad, "groups": 2, "stride": 1}
    with pytest.raises(error, match=message):
        conv3d_weight_gradient(**(arguments | change))


def test_a_direct_call_of_the_op_guards_memory():
    x, grad = tensors((4, 6, 2), (1, 2, 3, 5), 1)
    with pytest.raises(RuntimeError, match="grad has the wrong shape"):
        torch.ops.gplws.conv3d_weight_gradient(x, grad[..., :4].contiguous(), 2, 1)
