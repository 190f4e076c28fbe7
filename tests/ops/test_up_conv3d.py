from __future__ import annotations

import pytest
import torch

from gplws.ops import reference, up_conv3d

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest result, against float64

SIZES = [  # (B, C, N, H, W), groups
    ((1, 24, 10, 7, 9), 12),
    ((2, 6, 3, 1, 1), 3),
    ((1, 8, 1, 5, 16), 8),
    ((1, 8, 2, 3, 17), 4),
    ((1, 4, 2, 20, 33), 2),
    ((1, 6, 3, 9, 32), 2),
    ((1, 3, 2, 17, 15), 1),
]


def tensors(size, groups, dtype=torch.float32):
    """x, weight, bias, residual."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, frames, height, width = size
    shapes = (
        size,
        (channels, 1, 3, 3, 3),
        (groups,),
        (batch, groups, frames, 2 * height, 2 * width),
    )
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= RELATIVE[got.dtype] * expected.abs().max()


@pytest.mark.parametrize(("size", "groups"), SIZES)
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("extras", [False, True])
def test_it_agrees_with_the_float64_reference(size, groups, dtype, extras):
    given = tensors(size, groups, dtype)
    given = given if extras else given[:2]
    expected = reference.up_conv3d(*(t.double() for t in given), groups=groups)
    assert_close(up_conv3d(*given, groups=groups), expected)


def test_layouts_threads_and_out_do_not_change_a_bit():
    x, *others = tensors((2, 6, 4, 19, 23), 3)
    expected = up_conv3d(x, *others, groups=3)
    last = up_conv3d(x.contiguous(memory_format=torch.channels_last_3d), *others, groups=3)
    assert last.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(last, expected)
    view = x.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(up_conv3d(view, *others, groups=3), expected)
    out = torch.full_like(expected, torch.nan)
    assert up_conv3d(x, *others, groups=3, out=out) is out
    assert torch.equal(out, expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(up_conv3d(x, *others, groups=3), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(0, 4, 3, 5, 6), (1, 4, 0, 5, 6), (1, 4, 3, 0, 6)])
def test_empty_inputs_give_empty_results(size):
    assert up_conv3d(*tensors(size, 2), groups=2).numel() == 0


def test_gradients_agree_with_stock_autograd():
    given = [t.requires_grad_() for t in tensors((2, 4, 3, 4, 5), 2)]
    y = up_conv3d(*given, groups=2)
    grad = torch.randn(y.shape)
    got = torch.autograd.grad(y, given, grad)
    expected = torch.autograd.grad(reference.up_conv3d(*given, groups=2), given, grad)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)


def test_opcheck_finds_nothing():
    given = [t.requires_grad_() for t in tensors((1, 4, 2, 3, 5), 2)]
    torch.library.opcheck(torch.ops.gplws.up_conv3d.default, (*given, 2))


def test_it_compiles_whole_with_dynamic_shapes():
    _, weight, bias, _ = tensors((1, 4, 2, 3, 5), 2)

    def function(x):
        return up_conv3d(x.sin(), weight, bias, groups=2).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((1, 4, 2, 3, 5), (2, 4, 3, 7, 6)):
        x = torch.rand(size)
        torch.testing.assert_close(compiled(x), function(x))


def test_autocast_computes_in_bfloat16():
    given = tensors((1, 4, 2, 3, 5), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = up_conv3d(*given, groups=2)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, up_conv3d(*(t.bfloat16() for t in given), groups=2))


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (0, 0), (None, 0)])
def test_vmap_equals_a_loop(in_dims):
    x, weight = torch.rand(3, 1, 4, 2, 5, 6), torch.rand(3, 4, 1, 3, 3, 3)
    given = [
        t[0] if dim is None else t.movedim(0, dim)
        for t, dim in zip((x, weight), in_dims, strict=True)
    ]

    def op(a, b):
        return up_conv3d(a, b, groups=2)

    chosen = [[0 if dim is None else i for dim in in_dims] for i in range(3)]
    expected = torch.stack([op(x[i], weight[j]) for i, j in chosen])
    torch.testing.assert_close(torch.vmap(op, in_dims)(*given), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(4, 2, 3, 5)}, ValueError, "x must be"),
        ({"groups": 3}, ValueError, "groups must divide"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"weight": torch.rand(4, 2, 3, 3, 3)}, ValueError, "weight must be"),
        ({"bias": torch.rand(4)}, ValueError, "bias must be"),
        ({"residual": torch.rand(1, 2, 2, 3, 5)}, ValueError, "residual must be"),
        ({"out": torch.rand(1, 2, 2, 3, 5)}, ValueError, "out must be"),
        ({"out": torch.rand(1, 2, 2, 10, 6).mT}, ValueError, "out must be contiguous"),
        ({"out": torch.rand(1, 2, 2, 6, 10).double()}, TypeError, "out must be torch.float32"),
        ({"weight": torch.rand(4, 1, 3, 3, 3).half()}, TypeError, "weight must be torch.float32"),
        ({"x": torch.rand(1, 4, 2, 3, 5).half()}, TypeError, "x must be float32 or bfloat16"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    names = ("x", "weight", "bias", "residual")
    arguments = dict(zip(names, tensors((1, 4, 2, 3, 5), 2), strict=True)) | {"groups": 2}
    with pytest.raises(error, match=message.replace(".", r"\.")):
        up_conv3d(**(arguments | change))
