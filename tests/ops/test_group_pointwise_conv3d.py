from __future__ import annotations

import pytest
import torch
from conv_cases import CONV_CASES, ConvCase

from gplws.ops import group_pointwise_conv3d, reference

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest result, against float64
SMALL = ConvCase((1, 4, 3, 5, 6), 4, 6, groups=2, residual=True)


def as_double(tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_close(got, expected, relative=None):
    assert got.shape == expected.shape
    if relative is None:
        relative = RELATIVE[got.dtype]
    assert (got - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_it_agrees_with_the_float64_reference(case):
    tensors = case.tensors()
    got = group_pointwise_conv3d(*tensors, **case.options)
    assert_close(got, reference.group_pointwise_conv3d(*as_double(tensors), **case.options))


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_bfloat16_agrees_to_its_rounding(case):
    tensors = [None if t is None else t.bfloat16() for t in case.tensors()]
    got = group_pointwise_conv3d(*tensors, **case.options)
    assert got.dtype == torch.bfloat16
    assert_close(got, reference.group_pointwise_conv3d(*as_double(tensors), **case.options))


@pytest.mark.parametrize("dtype", RELATIVE)
def test_a_result_may_go_into_given_memory(dtype):
    tensors = [t.to(dtype) for t in SMALL.tensors()]
    expected = group_pointwise_conv3d(*tensors, **SMALL.options)
    out = torch.full_like(expected, torch.nan)
    assert group_pointwise_conv3d(*tensors, **SMALL.options, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pointwise_relu", [False, True])
@pytest.mark.parametrize("residual_relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_each_activation_is_applied_where_it_belongs(relu, pointwise_relu, residual_relu, residual):
    case = ConvCase((1, 4, 3, 5, 21), 8, 6, groups=2, residual=residual)
    options = {"relu": relu, "pointwise_relu": pointwise_relu, "residual_relu": residual_relu}
    tensors = case.tensors()
    got = group_pointwise_conv3d(*tensors, **case.options, **options)
    assert_close(
        got, reference.group_pointwise_conv3d(*as_double(tensors), **case.options, **options)
    )


@pytest.mark.parametrize("case", CONV_CASES[:4], ids=str)
def test_channels_last_gives_the_same_numbers_in_channels_last(case):
    x, *others = case.tensors()
    expected = group_pointwise_conv3d(x, *others, **case.options)
    got = group_pointwise_conv3d(
        x.contiguous(memory_format=torch.channels_last_3d), *others, **case.options
    )
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(got, expected)


def test_strided_views_give_the_same_numbers():
    case = ConvCase((2, 4, 3, 9, 20), 4, 6, groups=2, residual=True)
    tensors = case.tensors()
    expected = group_pointwise_conv3d(*tensors, **case.options)
    views = []
    for t in tensors:
        wide = torch.full([2 * s for s in t.shape], torch.nan)
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        view.copy_(t)
        views.append(view)
    assert torch.equal(group_pointwise_conv3d(*views, **case.options), expected)
    x = tensors[0]
    flipped = x.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(group_pointwise_conv3d(flipped, *tensors[1:], **case.options), expected)
    expanded = x[:1].expand_as(x)
    assert torch.equal(
        group_pointwise_conv3d(expanded, *tensors[1:], **case.options),
        group_pointwise_conv3d(expanded.clone(), *tensors[1:], **case.options),
    )


def test_inputs_are_not_changed():
    tensors = SMALL.tensors()
    copies = [t.clone() for t in tensors]
    group_pointwise_conv3d(*tensors, **SMALL.options)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


def test_the_number_of_threads_does_not_change_a_bit():
    case = ConvCase((1, 12, 7, 50, 70), 12, 12, groups=4)
    tensors = case.tensors()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(group_pointwise_conv3d(*tensors, **case.options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_a_crop_away_from_the_border_equals_the_crop_of_the_result():
    case = ConvCase((1, 12, 3, 60, 300), 12, 12, groups=4)
    x, *others = case.tensors()
    whole = group_pointwise_conv3d(x, *others, **case.options)
    part = group_pointwise_conv3d(x[..., 7:43, 11:281], *others, **case.options)
    assert torch.equal(part[..., 1:-1, 1:-1], whole[..., 8:42, 12:280])


@pytest.mark.parametrize(
    "size", [(0, 4, 3, 5, 6), (1, 4, 0, 5, 6), (1, 4, 3, 0, 6), (1, 4, 3, 5, 0)]
)
def test_empty_inputs_give_empty_results(size):
    case = ConvCase(size, 4, 6, groups=2)
    result = group_pointwise_conv3d(*case.tensors(), **case.options)
    assert result.shape == (size[0], 6, *size[2:])
    assert result.numel() == 0


def test_nan_reaches_its_neighbourhood_and_no_further():
    case = ConvCase((1, 4, 5, 9, 40), 4, 4, groups=2)
    x, *others = case.tensors()
    x[0, 0, 2, 4, 20] = torch.nan
    found = group_pointwise_conv3d(x, *others, **case.options).isnan()
    expected = torch.zeros_like(found)
    expected[:, :, 1:4, 3:6, 19:22] = True
    assert torch.equal(found, expected)


def test_gradients_agree_with_stock_autograd():
    cases = (
        SMALL,
        ConvCase((2, 3, 2, 5, 6), 6, groups=3, stride=2),
        ConvCase((2, 4, 3, 7, 5), 8, groups=2, bias=False),
        ConvCase((2, 4, 3, 7, 5), 4, 6, residual=True, bias=False),
    )
    for case in cases:
        for options in ({}, {"residual_relu": True}, {"relu": False, "pointwise_relu": False}):
            tensors = [
                None if t is None else t.double().float().requires_grad_() for t in case.tensors()
            ]
            wanted = [t for t in tensors if t is not None]
            y = group_pointwise_conv3d(*tensors, **case.options, **options)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            got = torch.autograd.grad(y, wanted, grad)
            y = reference.group_pointwise_conv3d(*tensors, **case.options, **options)
            for g, e in zip(got, torch.autograd.grad(y, wanted, grad), strict=True):
                assert_close(g, e)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_a_backward_pass_under_autocast_keeps_the_dtypes(dtype):
    tensors = [t.to(dtype).requires_grad_() for t in SMALL.tensors()]
    y = group_pointwise_conv3d(*tensors, **SMALL.options)
    expected = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(y, tensors, torch.ones_like(y))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        assert_close(g, e, relative=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_the_layout_of_the_incoming_gradient_does_not_matter(layout):
    tensors = [t.requires_grad_() for t in SMALL.tensors()]
    y = group_pointwise_conv3d(*tensors, **SMALL.options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    if layout == "expanded":
        grad = grad[:1, :1, :1, :1, :1].expand_as(y)
    elif layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
    got = torch.autograd.grad(y, tensors, grad)
    y = reference.group_pointwise_conv3d(*tensors, **SMALL.options)
    for g, e in zip(got, torch.autograd.grad(y, tensors, grad), strict=True):
        assert_close(g, e)


def test_second_derivatives_agree_with_stock_autograd():
    def penalty(op):
        tensors = [t.requires_grad_() for t in SMALL.tensors()]
        y = op(*tensors, **SMALL.options)
        (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors[1])[0]

    assert_close(penalty(group_pointwise_conv3d), penalty(reference.group_pointwise_conv3d))


@pytest.mark.parametrize("case", [SMALL, ConvCase((1, 4, 2, 5, 5), 4, groups=2, stride=2)], ids=str)
def test_opcheck_finds_nothing(case):
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors()]
    args = (*tensors, case.groups, case.stride, True, True, False)
    torch.library.opcheck(torch.ops.gplws.group_pointwise_conv3d.default, args)
    x = tensors[0].detach().contiguous(memory_format=torch.channels_last_3d)
    torch.library.opcheck(
        torch.ops.gplws.group_pointwise_conv3d.default, (x, *args[1:]), test_utils="test_faketensor"
    )


def test_it_compiles_whole_with_dynamic_shapes():
    _, *others = SMALL.tensors()

    def function(x):
        return group_pointwise_conv3d(x.sin(), *others[:4], **SMALL.options).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((1, 4, 3, 5, 6), (2, 4, 5, 7, 9)):
        x = torch.rand(size)
        torch.testing.assert_close(compiled(x), function(x))


def test_it_exports_with_dynamic_shapes():
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            return group_pointwise_conv3d(x, weight, groups=2)

    x, weight, *_ = SMALL.tensors()
    dims = dict.fromkeys((2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Model(), (x, weight), dynamic_shapes={"x": dims, "weight": None})
    x = torch.rand(1, 4, 6, 8, 9)
    torch.testing.assert_close(program.module()(x, weight), Model()(x, weight))


def test_autocast_computes_in_bfloat16():
    tensors = SMALL.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = group_pointwise_conv3d(*tensors, **SMALL.options)
    assert got.dtype == torch.bfloat16
    expected = group_pointwise_conv3d(*(t.bfloat16() for t in tensors), **SMALL.options)
    assert torch.equal(got, expected)


def test_under_autocast_dtypes_must_fit_where_nothing_is_cast():
    x, *others = SMALL.tensors()
    half = group_pointwise_conv3d(x, *others, **SMALL.options).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"weight must be torch\.bfloat16 as x"):
            group_pointwise_conv3d(x.bfloat16(), *others, **SMALL.options, out=half)
        with pytest.raises(TypeError, match=r"x must be float32 or bfloat16, got torch\.float64"):
            group_pointwise_conv3d(x.double(), *others, **SMALL.options)


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 0), (2, 1)])
def test_vmap_equals_a_loop(in_dims):
    x, weight = torch.rand(3, 1, 4, 2, 5, 6), torch.rand(3, 4, 2, 3, 3, 3)
    given = [
        t[0] if dim is None else t.movedim(0, dim)
        for t, dim in zip((x, weight), in_dims, strict=True)
    ]

    def op(a, b):
        return group_pointwise_conv3d(a, b, groups=2)

    expected = torch.stack(
        [
            op(x[i if in_dims[0] is not None else 0], weight[i if in_dims[1] is not None else 0])
            for i in range(3)
        ]
    )
    torch.testing.assert_close(torch.vmap(op, in_dims)(*given), expected)


def test_it_may_be_called_from_several_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    case = ConvCase((1, 12, 3, 30, 40), 12, 12, groups=4)
    inputs = [case.tensors(seed=seed) for seed in range(4)]
    expected = [group_pointwise_conv3d(*t, **case.options) for t in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda t: group_pointwise_conv3d(*t, **case.options), inputs * 3))
    assert all(torch.equal(g, e) for g, e in zip(got, expected * 3, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(4, 3, 5, 6)}, "x must be"),
        ({"weight": torch.rand(4, 2, 3, 3)}, "weight must be"),
        ({"weight": torch.rand(4, 3, 3, 3, 3)}, "weight must be"),
        ({"weight": torch.rand(4, 2, 3, 3, 1)}, "weight must be"),
        ({"bias": torch.rand(5)}, "bias must be"),
        ({"pointwise_weight": torch.rand(6, 4)}, "pointwise_weight must be"),
        ({"pointwise_weight": torch.rand(6, 5, 1, 1, 1)}, "pointwise_weight must be"),
        ({"pointwise_bias": torch.rand(7)}, "pointwise_bias must be"),
        ({"pointwise_weight": None}, "pointwise_bias needs"),
        ({"residual": torch.rand(1, 6, 3, 5, 5)}, "residual must be"),
        ({"groups": 3}, "groups must divide"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"stride": 3}, "stride must be"),
        ({"out": torch.rand(1, 6, 3, 5, 5)}, "out must be"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    names = ("x", "weight", "bias", "pointwise_weight", "pointwise_bias", "residual")
    arguments = dict(zip(names, SMALL.tensors(), strict=True)) | SMALL.options
    with pytest.raises(ValueError, match=message):
        group_pointwise_conv3d(**(arguments | change))


def test_another_dtype_is_refused_by_name():
    x, weight, *_ = SMALL.tensors()
    with pytest.raises(TypeError, match=r"weight must be torch\.float32 as x, got torch\.float64"):
        group_pointwise_conv3d(x, weight.double(), groups=2)


def test_a_direct_call_of_the_op_guards_memory():
    x, weight, *_ = SMALL.tensors()
    with pytest.raises(RuntimeError, match="weight has the wrong shape"):
        torch.ops.gplws.group_pointwise_conv3d(
            x, weight[:, :1], None, None, None, None, 2, 1, True, True, False
        )
