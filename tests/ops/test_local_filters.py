"""The filters of focus measures against stock ops in float64, and how they behave under torch."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import printed_under_each
from torch import Tensor

from gplws.ops import reference, second_differences, symmetric_filter

SIZES = [(1, 1, 1), (2, 1, 40), (1, 40, 1), (3, 2, 3), (2, 17, 33), (1, 64, 128), (4, 130, 67)]
SHIFTS = {
    "rows and columns": [(0, 1), (1, 0)],
    "directions": [(dy * s, dx * s) for s in (1, 2, 3) for dy, dx in ((0, 1), (1, 1), (1, -1))],
    "one": [(-2, 5)],
    "none": [(0, 0)],
}


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) - 0.3


@pytest.mark.parametrize("reach", [0, 1, 3, 7, 20])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_symmetric_filters_agree_with_stock_ops(size, reach):
    images, weights = drawn(*size), drawn(reach + 1, reach + 1, seed=1).tolist()
    expected = reference.symmetric_filter(images.double(), weights)
    found = symmetric_filter(images, weights)
    assert found.is_contiguous() and found.dtype == torch.float32
    scale = 4 * sum(abs(weight) for row in weights for weight in row)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-7 * scale)


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_second_differences_agree_with_stock_ops(size, name):
    images, shifts = drawn(*size), SHIFTS[name]
    expected = reference.second_differences(images.double(), shifts)
    found = second_differences(images, shifts)
    assert found.is_contiguous() and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-7 * len(shifts))


def test_the_filter_is_the_quarter_four_times():
    weights = torch.arange(1.0, 10.0).view(3, 3)
    impulse = torch.zeros(1, 15, 40)
    impulse[0, 7, 20] = 1
    found = symmetric_filter(impulse, weights.tolist())[0, 5:10, 18:23]
    lower = torch.cat([weights.flip(1)[:, :2], weights], 1)
    assert torch.equal(found, torch.cat([lower.flip(0)[:2], lower]))


def test_a_constant_has_no_second_difference_and_a_ramp_none_inside():
    shifts = SHIFTS["directions"]
    assert not second_differences(torch.full((2, 9, 21), 0.1), shifts).any()
    ramp = torch.arange(32.0) + 4 * torch.arange(20.0)[:, None]
    assert not second_differences(ramp[None], shifts)[:, 3:-3, 3:-3].any()


def test_nan_spreads_over_the_reach_only():
    images = drawn(1, 30, 40)
    images[0, 15, 15] = torch.nan
    found = symmetric_filter(images, [[1.0] * 3] * 3)[0].isnan()
    assert found[13:18, 13:18].all() and found.sum() == 25
    found = second_differences(images, [(0, 2)])[0].isnan()
    assert found[15, [13, 15, 17]].all() and found.sum() == 3


def test_strides_do_not_matter():
    images, weights, shifts = drawn(3, 20, 30), drawn(4, 4), SHIFTS["directions"]
    turned = images.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    quarter = weights.tolist()
    assert torch.equal(symmetric_filter(turned, quarter), symmetric_filter(images, quarter))
    assert torch.equal(second_differences(turned, shifts), second_differences(images, shifts))
    ops, steps = torch.ops.gplws, torch.tensor(shifts)
    transposed = weights.T.contiguous()
    found = ops.symmetric_filter(images, weights.T), ops.second_differences(images, steps.flip(0))
    assert torch.equal(found[0], ops.symmetric_filter(images, transposed))
    assert torch.equal(found[1], ops.second_differences(images, steps.flip(0).contiguous()))


@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_nothing_gives_nothing(size):
    assert symmetric_filter(torch.empty(size), [[1.0]]).shape == size
    assert second_differences(torch.empty(size), [(0, 1)]).shape == size


def test_gradients_are_those_of_stock_ops():
    images, weights = drawn(2, 7, 9).requires_grad_(), drawn(3, 3, seed=1).tolist()
    shifts = SHIFTS["directions"]
    calls = (
        (symmetric_filter, reference.symmetric_filter, weights),
        (second_differences, reference.second_differences, shifts),
    )
    for ours, stock, argument in calls:
        found = torch.autograd.grad((ours(images, argument) ** 2).sum(), images)[0]
        expected = torch.autograd.grad((stock(images, argument) ** 2).sum(), images)[0]
        assert found.abs().max() > 0 and torch.equal(found, expected)


def test_they_pass_the_checks_of_torch():
    images, weights, shifts = drawn(2, 6, 11), drawn(3, 3), torch.tensor([[0, 1]])
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.gplws
    torch.library.opcheck(ops.symmetric_filter.default, (images, weights), test_utils=tests)
    torch.library.opcheck(ops.second_differences.default, (images, shifts), test_utils=tests)
    quarter, batch = weights.tolist(), torch.stack([images, images])
    mapped = torch.vmap(lambda one: symmetric_filter(one, quarter))(batch)
    torch.testing.assert_close(mapped[1], symmetric_filter(images, quarter))
    for x in (images, images.double()):  # by the kernel, and by stock ops
        compiled = torch.compile(_both, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), _both(x))


def _both(x: Tensor) -> Tensor:
    return symmetric_filter(x, [[0.5, 0.1], [0.1, 0.2]]) + second_differences(x, [(0, 1), (2, -1)])


SCRIPT = """
import torch
from gplws.ops import second_differences, symmetric_filter
generator = torch.Generator().manual_seed(0)
images, weights = torch.rand(3, 45, 61, generator=generator), torch.rand(4, 4, generator=generator)
print(float(symmetric_filter(images, weights.tolist()).double().square().mean()),
      float(second_differences(images, [(0, 1), (3, -2)]).double().mean()))
"""


def test_instruction_sets_and_numbers_of_threads_agree():
    found = [[float(number) for number in text.split()] for text in printed_under_each(SCRIPT)]
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], rel=1e-6)
    images, weights, shifts = drawn(5, 130, 301), drawn(4, 4).tolist(), [(2, -1)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            filtered = symmetric_filter(images, weights)
            results.append([filtered, second_differences(images, shifts)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: symmetric_filter(drawn(4, 4), [[1.0]]), ValueError, "images must be"),
        (lambda: symmetric_filter(drawn(1, 4, 4), [[1.0, 2.0]]), ValueError, "weights must be"),
        (lambda: symmetric_filter(drawn(1, 4, 4), []), ValueError, "weights must be"),
        (lambda: symmetric_filter(drawn(1, 4, 4).int(), [[1.0]]), TypeError, "a floating dtype"),
        (lambda: second_differences(drawn(4, 4), [(0, 1)]), ValueError, "images must be"),
        (lambda: second_differences(drawn(1, 4, 4), []), ValueError, "at least one"),
        (lambda: second_differences(drawn(1, 4, 4), [(0, 5000)]), ValueError, "within 4096 px"),
        (lambda: second_differences(drawn(1, 4, 4), [(0, 1, 2)]), ValueError, "rows and columns"),
        (lambda: second_differences(drawn(1, 4, 4).int(), [(0, 1)]), TypeError, "a floating dtype"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_kernels_check_their_own_arguments():
    ops, images, shifts = torch.ops.gplws, drawn(1, 4, 4), torch.tensor([[0, 1]])
    for call, message in (
        (lambda: ops.symmetric_filter(drawn(4, 4), drawn(2, 2)), "images must be"),
        (lambda: ops.symmetric_filter(images.double(), drawn(2, 2)), "images must be float32"),
        (lambda: ops.symmetric_filter(images, drawn(2, 3)), "weights has the wrong shape"),
        (lambda: ops.symmetric_filter(images, drawn(0, 0)), "weights must be"),
        (lambda: ops.second_differences(images, shifts.int()), "shifts must be"),
        (lambda: ops.second_differences(images, shifts[:0]), "shifts must be"),
        (
            lambda: ops.second_differences(images, 5000 * shifts),
            "shifts must be within 4096 pixels, got 5000",
        ),
        (lambda: ops.second_differences(images, -(2**63) * shifts), "shifts must be within"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
