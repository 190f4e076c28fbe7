"""Derivatives other than those of ``backward``, and results that are written into given tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import gplws
from gplws.models import GPLWSNet
from gplws.nn.blocks import freeze_statistics
from gplws.ops import (
    conv3d_input_gradient,
    conv3d_weight_gradient,
    focus_search,
    group_pointwise_conv3d,
    reference,
    smooth_surface,
    spline_smooth,
    symmetric_filter,
    up_conv3d,
)

# Dynamo of older ones stops at enter_dual_level, whatever is computed.
LEVELS_CAN_BE_COMPILED = Version(torch.__version__) >= Version("2.13")
# Dynamo of newer ones refuses tangents that come from outside.
TANGENTS_MAY_BE_GIVEN = Version(torch.__version__) < Version("2.14.0.dev0")

WEIGHT = torch.rand(4, 2, 3, 3, 3, generator=torch.Generator().manual_seed(1)) - 0.4
UP_WEIGHT = torch.rand(4, 1, 3, 3, 3, generator=torch.Generator().manual_seed(2)) - 0.4
CONV_GRAD = torch.rand(1, 4, 3, 5, 6, generator=torch.Generator().manual_seed(4)) - 0.4
TAPS = [[0.4, 0.1], [0.1, 0.05]]
VOLUME = torch.rand(1, 7, 3, 4, generator=torch.Generator().manual_seed(3))

# Op, its reference from stock ops, and the shape of what it takes.
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "group_pointwise_conv3d": (
        lambda x: group_pointwise_conv3d(x, WEIGHT, groups=2),
        lambda x: reference.group_pointwise_conv3d(x, WEIGHT, groups=2),
        (1, 4, 3, 5, 6),
    ),
    "up_conv3d": (
        lambda x: up_conv3d(x, UP_WEIGHT, groups=2),
        lambda x: reference.up_conv3d(x, UP_WEIGHT, groups=2),
        (1, 4, 2, 3, 4),
    ),
    "focus_search": (
        lambda x: focus_search(x).depth,
        lambda x: reference.focus_search(x).depth,
        (1, 7, 3, 4),
    ),
    "focus_search by positions": (
        lambda x: focus_search(VOLUME, x.cumsum(-1)).depth,
        lambda x: reference.focus_search(VOLUME, x.cumsum(-1)).depth,
        (7,),
    ),
    "conv3d_input_gradient by grad": (
        lambda x: conv3d_input_gradient(x, WEIGHT, size=(10, 11), groups=2, stride=2),
        lambda x: reference.conv3d_input_gradient(x, WEIGHT, size=(10, 11), groups=2, stride=2),
        (1, 4, 3, 5, 6),
    ),
    "conv3d_input_gradient by weight": (
        lambda x: conv3d_input_gradient(CONV_GRAD, x, size=(5, 6), groups=2),
        lambda x: reference.conv3d_input_gradient(CONV_GRAD, x, size=(5, 6), groups=2),
        (4, 2, 3, 3, 3),
    ),
    "conv3d_weight_gradient by x": (
        lambda x: conv3d_weight_gradient(x, CONV_GRAD, groups=2, stride=2),
        lambda x: reference.conv3d_weight_gradient(x, CONV_GRAD, groups=2, stride=2),
        (1, 4, 3, 10, 11),
    ),
    "conv3d_weight_gradient by grad": (
        lambda x: conv3d_weight_gradient(CONV_GRAD, x, groups=2),
        lambda x: reference.conv3d_weight_gradient(CONV_GRAD, x, groups=2),
        (1, 4, 3, 5, 6),
    ),
    "spline_smooth": (spline_smooth, reference.spline_smooth, (2, 6, 7)),
}
# Ops without registered derivatives.
PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "symmetric_filter": (
        lambda x: symmetric_filter(x, TAPS),
        lambda x: reference.symmetric_filter(x, TAPS),
        (2, 6, 7),
    ),
    "smooth_surface": (
        lambda x: smooth_surface(x, limit=2.0),
        lambda x: reference.smooth_surface(x, limit=2.0),
        (6, 7),
    ),
}
op_cases = pytest.mark.parametrize("name", OPS)
# What is compiled is wired once for each op, by whichever operand the derivative is.
COMPILED = {
    name: case
    for name, case in {**OPS, **PLAIN}.items()
    if name not in ("conv3d_input_gradient by weight", "conv3d_weight_gradient by x")
}


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@op_cases
def test_forward_mode_gives_the_derivatives_of_the_reference(name: str) -> None:
    op, stock, shape = OPS[name]
    x, tangent = drawn(shape), drawn(shape, 1)
    expected = torch.func.jvp(stock, (x,), (tangent,))[1]
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(torch.func.jvp(op, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(op(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(found, expected)
        # What has no tangent goes its usual way.
        assert torch.equal(op(x), op(x.clone()))


@op_cases
def test_gradients_of_torch_func_are_those_of_the_reference(name: str) -> None:
    op, stock, shape = OPS[name]
    x = drawn((3, *shape))

    def gradients(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def total(sample: Tensor) -> Tensor:
            return of(sample).square().sum()

        return [
            torch.func.grad(total)(x[0]),
            torch.func.vmap(torch.func.grad(total))(x),
            torch.func.grad(lambda every: torch.func.vmap(of)(every).square().sum())(x),
            torch.func.jacrev(total)(x[1]),
        ]

    for found, expected in zip(gradients(op), gradients(stock), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def by_explicit_levels(op: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Forward mode of ``op`` by the functions behind ``dual_level``."""

    def tangent_of(x: Tensor, tangent: Tensor) -> Tensor:
        forward_ad.enter_dual_level()
        result = forward_ad.unpack_dual(op(forward_ad.make_dual(x, tangent))).tangent
        forward_ad.exit_dual_level()
        return result

    return tangent_of


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_transforms_give_the_derivatives_of_the_reference(name: str) -> None:
    op, stock, shape = COMPILED[name]
    x, tangent = drawn(shape), drawn(shape, 1)

    def total(sample: Tensor) -> Tensor:
        return op(sample).square().sum()

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    expected = torch.func.jvp(stock, (x,), (tangent,))[1]
    assert expected.abs().max() > 0.01
    alone = compiled(op)
    torch.testing.assert_close(alone(x), stock(x))
    if TANGENTS_MAY_BE_GIVEN:
        with forward_ad.dual_level():
            dual = alone(forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    forward = compiled(lambda x, t: torch.func.jvp(op, (x,), (t,))[1])
    torch.testing.assert_close(forward(x, tangent), expected)
    if LEVELS_CAN_BE_COMPILED:
        torch.testing.assert_close(compiled(by_explicit_levels(op))(x, tangent), expected)
    expected = torch.func.grad(lambda sample: stock(sample).square().sum())(x)
    torch.testing.assert_close(compiled(torch.func.grad(total))(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", [*OPS, *PLAIN])
def test_what_is_compiled_without_transforms_keeps_the_kernels(name: str) -> None:
    op, _, shape = {**OPS, **PLAIN}[name]
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for function, x in ((op, drawn(shape)), (torch.func.vmap(op), drawn((3, *shape)))):
        targets.clear()
        found = torch.compile(function, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(found, function(x))
        assert any(target.startswith("gplws.") for target in targets)


@op_cases
def test_forward_mode_passes_through_the_backward_pass(name: str) -> None:
    op, _, shape = OPS[name]
    x = drawn(shape).requires_grad_()
    y = op(x)
    direction, tangent = drawn(y.shape, 1), drawn(y.shape, 2)
    # The backward pass is linear.
    (expected,) = torch.autograd.grad(y, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(y, x, forward_ad.make_dual(direction, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, expected)


@op_cases
def test_batches_of_gradients_are_those_of_the_reference(name: str) -> None:
    op, stock, shape = OPS[name]
    jacobian = torch.autograd.functional.jacobian
    found, expected = jacobian(op, drawn(shape), vectorize=True), jacobian(stock, drawn(shape))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_convs_stay_float32_under_autocast(stride: int) -> None:
    grad, size = drawn((1, 4, 3, 5, 6)), (5 * stride, 6 * stride)

    def input_gradient(grad: Tensor) -> Tensor:
        return conv3d_input_gradient(grad, WEIGHT, size=size, groups=2, stride=stride)

    def weight_gradient(grad: Tensor) -> Tensor:
        return conv3d_weight_gradient(drawn((1, 4, 3, *size)), grad, groups=2, stride=stride)

    for op in (input_gradient, weight_gradient):
        expected = op(grad), torch.func.jvp(op, (grad,), (grad,))[1]
        with torch.autocast("cpu"):
            found = op(grad), torch.func.jvp(op, (grad,), (grad,))[1]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_confidence_has_no_derivatives(compiled: bool) -> None:
    def confidence(volume: Tensor) -> Tensor:
        return focus_search(volume).confidence

    def derivatives(volume: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.func.grad(lambda v: confidence(v).sum())(volume)
        return gradient, torch.func.jvp(confidence, (volume,), (volume,))[1]

    if compiled:
        derivatives = torch.compile(derivatives, backend="aot_eager", fullgraph=True)
    assert all(not found.any() for found in derivatives(VOLUME))


def test_networks_on_the_kernels_have_these_derivatives_too() -> None:
    model = gplws.load_model("gplws", fused=False)
    merged = gplws.load_model("gplws", fused=False)
    freeze_statistics(merged)
    stack, tangent = drawn((1, 1, 5, 16, 24)), drawn((1, 1, 5, 16, 24), 1)
    with torch.no_grad():
        expected = torch.func.jvp(model, (stack,), (tangent,))[1]
        for network in (model.fuse(), merged):
            found = torch.func.jvp(network, (stack,), (tangent,))[1]
            # Single pixels differ where rounding takes a ReLU to its other side.
            assert (found - expected).abs().mean() < 1e-3 * expected.abs().mean()
            every = torch.stack([stack, tangent])
            mapped = torch.func.vmap(network)(every)
            torch.testing.assert_close(
                mapped, torch.stack([network(one) for one in every]), rtol=1e-4, atol=1e-4
            )


def test_a_pass_with_fake_tensors_leaves_nothing_behind() -> None:
    model = gplws.load_model("gplws")
    stack = drawn((1, 1, 5, 16, 24))
    with torch.no_grad():
        expected = model(stack).clone()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(stack)).shape == expected.shape
        found = model(stack)
    assert type(found) is Tensor and torch.equal(found, expected)


def test_meta_tensors_have_no_autocast() -> None:
    model = GPLWSNet(widths=(4, 8), depths=(1, 1), middle=1, decoder_depths=(1,)).to("meta")
    freeze_statistics(model)
    stack = torch.empty(1, 3, 2, 8, 8, device="meta")
    assert model(stack).shape == (1, 2, 8, 8)
    with pytest.raises(TypeError, match="x must be float32 or bfloat16"):
        group_pointwise_conv3d(stack.half(), torch.empty(2, 3, 3, 3, 3, device="meta"))


def test_an_empty_stack_is_refused() -> None:
    model = gplws.load_model("gplws")
    for shape in ((0, 1, 5, 8, 8), (1, 1, 0, 8, 8), (1, 1, 5, 0, 8)):
        with pytest.raises(ValueError, match="not empty"):
            model(torch.rand(shape))


@pytest.mark.parametrize("name", [name for name in OPS if " " not in name])
def test_writing_into_a_tensor_that_autograd_needs_is_noticed(name: str) -> None:
    _, _, shape = OPS[name]
    calls: dict[str, Callable[..., Tensor]] = {
        "group_pointwise_conv3d": lambda x, **o: group_pointwise_conv3d(x, WEIGHT, groups=2, **o),
        "up_conv3d": lambda x, **o: up_conv3d(x, UP_WEIGHT, groups=2, **o),
        "spline_smooth": spline_smooth,
    }

    def write(x: Tensor, out: Tensor | None = None) -> Tensor:
        if name != "focus_search":
            return calls[name](x, out=out)
        outs = focus_search(x)
        return focus_search(x, out=outs if out is None else outs._replace(depth=out)).depth

    buffer = write(drawn(shape))
    factor = torch.ones_like(buffer, requires_grad=True)
    product = (factor * buffer).sum()
    write(drawn(shape, 1), buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match="must not require gradients"):
        write(drawn(shape), torch.empty_like(buffer, requires_grad=True) * 1)
    with torch.inference_mode():
        assert torch.equal(write(drawn(shape), torch.empty_like(buffer)), write(drawn(shape)))


def test_a_result_over_an_operand_is_refused() -> None:
    x = drawn((1, 4, 3, 5, 6))
    with pytest.raises(ValueError, match="out must be apart from x"):
        group_pointwise_conv3d(x, WEIGHT, groups=2, out=x)
    residual = drawn((1, 4, 3, 5, 6), 1)
    expected = group_pointwise_conv3d(x, WEIGHT, residual=residual.clone(), groups=2)
    into = group_pointwise_conv3d(x, WEIGHT, residual=residual, groups=2, out=residual)
    assert into is residual and torch.equal(into, expected)
    both = torch.rand(2 * 2 * 2 * 6 * 8 + 96)
    with pytest.raises(ValueError, match="out must be apart from x"):
        up_conv3d(
            both[:96].view(1, 4, 2, 3, 4),
            UP_WEIGHT,
            groups=2,
            out=both[48 : 48 + 192].view(1, 2, 2, 6, 8),
        )
    images = torch.rand(9, 16, 16)
    with pytest.raises(ValueError, match="out must be apart from images"):
        spline_smooth(images[:8], out=images[1:])
    volume = torch.rand(1, 5, 4, 4)
    results = focus_search(volume)._replace(depth=volume[:, 0])
    with pytest.raises(ValueError, match=r"out\.depth must be apart from volume"):
        focus_search(volume, out=results)
    results = focus_search(volume)
    with pytest.raises(ValueError, match=r"out\.confidence must be apart from out\.depth"):
        focus_search(volume, out=results._replace(confidence=results.depth))
    both = torch.empty(2, 1, 4, 4).flatten()
    overlapping = [both[start : start + 16].view(1, 4, 4) for start in (0, 8)]
    with pytest.raises(ValueError, match=r"out\.peak must be apart from out\.depth"):
        focus_search(volume, out=results._replace(depth=overlapping[0], peak=overlapping[1]))
    positions = both[:5].copy_(torch.arange(5.0))
    with pytest.raises(ValueError, match=r"out\.peak must be apart from focus_positions"):
        focus_search(volume, positions, out=results._replace(peak=overlapping[0]))


def test_direct_calls_refuse_a_result_over_an_operand_as_well() -> None:
    ops, memory = torch.ops.gplws, torch.rand(1200)

    def part(start: int, *shape: int) -> Tensor:
        return memory[start : start + math.prod(shape)].view(shape)

    size, options = (1, 4, 3, 5, 6), (2, 1, True, True, False)
    x = part(0, *size)  # 360 elements
    for bias, residual, out, name in (
        (None, None, part(359, *size), "x"),
        (part(719, 4), None, part(360, *size), "bias"),
        (None, part(361, *size), part(360, *size), "residual"),
    ):
        with pytest.raises(RuntimeError, match=f"conv3d: out must be apart from {name}"):
            ops.group_pointwise_conv3d.out(x, WEIGHT, bias, None, None, residual, *options, out)
    expected = ops.group_pointwise_conv3d(x, WEIGHT, None, None, None, part(360, *size), *options)
    out = part(360, *size)
    ops.group_pointwise_conv3d.out(x, WEIGHT, part(720, 4) * 0, None, None, out, *options, out)
    assert torch.equal(out, expected)

    x = part(0, 1, 4, 2, 3, 4)  # 96 elements
    for residual, out, name in (
        (None, part(95, 1, 2, 2, 6, 8), "x"),
        (part(97, 1, 2, 2, 6, 8), part(96, 1, 2, 2, 6, 8), "residual"),
    ):
        with pytest.raises(RuntimeError, match=f"up_conv3d: out must be apart from {name}"):
            ops.up_conv3d.out(x, UP_WEIGHT, None, residual, 2, out)
    expected, out = ops.up_conv3d(x, UP_WEIGHT, None, None, 2), part(96, 1, 2, 2, 6, 8)
    ops.up_conv3d.out(x, UP_WEIGHT, None, None, 2, out)
    assert torch.equal(out, expected)

    images = part(0, 2, 8, 8)
    with pytest.raises(RuntimeError, match="spline_smooth: out must be apart from images"):
        ops.spline_smooth.out(images, 1, part(127, 2, 8, 8))
    ops.spline_smooth.out(images, 1, part(128, 2, 8, 8))
    assert torch.equal(part(128, 2, 8, 8), spline_smooth(images))

    volume, positions = part(0, 1, 5, 4, 4), part(80, 5).copy_(torch.arange(5.0))
    index = torch.empty(1, 4, 4, dtype=torch.int64)
    for depth, peak, message in (
        (part(70, 1, 4, 4), part(200, 1, 4, 4), "out.depth must be apart from volume"),
        (part(200, 1, 4, 4), part(84, 1, 4, 4), "out.peak must be apart from focus_positions"),
        (part(200, 1, 4, 4), part(215, 1, 4, 4), "out.peak must be apart from out.depth"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.focus_search.out(
                volume, positions, 4, 1, 1, False, depth, index, peak, part(300, 1, 4, 4)
            )


def test_a_residual_may_be_changed_before_the_backward_pass() -> None:
    """Its gradient is that of the result, whatever its values are, but behind a ReLU."""
    x = drawn((1, 4, 3, 5, 6)).requires_grad_()
    residual = drawn((1, 4, 3, 5, 6), 1)
    y = group_pointwise_conv3d(x, WEIGHT, residual=residual, groups=2)
    residual.add_(1)
    y.sum().backward()
    stock = x.detach().clone().requires_grad_()
    reference.group_pointwise_conv3d(stock, WEIGHT, groups=2).sum().backward()
    assert x.grad is not None and stock.grad is not None
    torch.testing.assert_close(x.grad, stock.grad)
    y = group_pointwise_conv3d(x, WEIGHT, residual=residual, groups=2, residual_relu=True)
    residual.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_radius_beyond_the_stack_takes_no_more_memory() -> None:
    grads = []
    for radius in (5, 10**9):
        volume = drawn((1, 5, 4, 4)).requires_grad_()
        focus_search(volume, radius=radius).depth.sum().backward()
        grads.append(volume.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_bfloat16_gradients_do_not_depend_on_the_layout(frames: int) -> None:
    drawn_weight = (torch.randn(8, 4, 3, 3, 3)).bfloat16()
    last = torch.channels_last_3d
    ops: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = [
        (lambda x, w: group_pointwise_conv3d(x, w, groups=2, relu=False), drawn_weight),
        (lambda x, w: up_conv3d(x, w, groups=4), drawn_weight[:, :1].contiguous()),
    ]
    for op, weight in ops:
        x = torch.randn(2, 8, frames, 9, 10).bfloat16()
        direction = torch.randn_like(op(x, weight))
        found = []
        for layout in (torch.contiguous_format, last):
            leaves = x.contiguous(memory_format=layout).requires_grad_(), weight.requires_grad_()
            found.append(torch.autograd.grad(op(*leaves), leaves, direction))
        for expected, got in zip(*found, strict=True):
            assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("size", [(0, 3, 5, 6), (1, 0, 5, 6), (1, 3, 0, 6), (1, 3, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_nothing_are_zero(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    x = torch.rand(size[0], 4, *size[1:], dtype=dtype, requires_grad=True)
    weight, up_weight = (w.to(dtype).requires_grad_() for w in (WEIGHT, UP_WEIGHT))
    pointwise = torch.rand(3, 4, 1, 1, 1, dtype=dtype, requires_grad=True)
    biases = [torch.rand(n, dtype=dtype, requires_grad=True) for n in (4, 3, 2)]
    convs: list[tuple[Tensor, tuple[Tensor, ...]]] = [
        (
            group_pointwise_conv3d(x, weight, biases[0], pointwise, biases[1], groups=2),
            (x, weight, biases[0], pointwise, biases[1]),
        ),
        (up_conv3d(x, up_weight, biases[2], groups=2), (x, up_weight, biases[2])),
    ]
    for y, tensors in convs:
        grads = torch.autograd.grad(y.sum(), tensors, create_graph=True)
        for grad, tensor in zip(grads, tensors, strict=True):
            assert torch.equal(grad, torch.zeros_like(tensor))
