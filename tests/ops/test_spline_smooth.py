"""spline_smooth against the stock ops in float64, and how it behaves under torch."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import printed_under_each

from gplws.ops import reference, spline_smooth

SIZES = [(1, 1, 1), (2, 1, 40), (1, 40, 1), (3, 2, 3), (2, 17, 33), (1, 64, 128), (4, 130, 67)]


def images(size, seed=0):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spacing", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_agrees_with_stock_ops(size, spacing):
    x = images(size)
    expected = reference.spline_smooth(x.double(), spacing=spacing)
    found = spline_smooth(x, spacing=spacing)
    assert found.is_contiguous() and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)
    assert found.min() >= x.min() and found.max() <= x.max()


@pytest.mark.parametrize("spacing", [1, 4])
def test_the_window_is_the_spline_and_borders_are_mirrored(spacing):
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    reach, size = 2 * spacing, 40
    impulse = torch.zeros(1, size, size)
    impulse[0, 20, 19] = 1
    found = spline_smooth(impulse, spacing=spacing)[0]
    window = found[20 - reach : 21 + reach : spacing, 19 - reach : 20 + reach : spacing]
    torch.testing.assert_close(window, taps[:, None] * taps)
    assert found.sum() == 1
    ramp = torch.arange(float(size)).expand(1, size, size).contiguous()
    beside = torch.cat([ramp[0, 0, 1 : reach + 1].flip(0), ramp[0, 0]])
    expected = sum(beside[k * spacing] * tap for k, tap in enumerate(taps))
    assert spline_smooth(ramp, spacing=spacing)[0, 5, 0] == pytest.approx(float(expected))


def test_a_constant_stays_to_the_bit():
    for value in (0.1, 1 / 3, 1e37):
        x = torch.full((2, 9, 21), value)
        assert torch.equal(spline_smooth(x, spacing=2), x)


def test_nan_spreads_over_the_window_only():
    x = images((1, 30, 30))
    x[0, 15, 15] = torch.nan
    found = spline_smooth(x, spacing=2)[0].isnan()
    rows = torch.zeros(30, dtype=torch.bool)
    rows[11:20:2] = True
    assert torch.equal(found, rows[:, None] & rows)


def test_strides_of_the_input_do_not_matter():
    x = images((3, 20, 30))
    turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(spline_smooth(turned, spacing=2), spline_smooth(x, spacing=2))
    assert torch.equal(spline_smooth(x[:, ::2], spacing=1), spline_smooth(x[:, ::2].clone()))


@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_nothing_gives_nothing(size):
    assert spline_smooth(torch.empty(size)).shape == size


def test_it_writes_into_out():
    x = images((2, 12, 19))
    out = torch.full_like(x, torch.nan)
    assert spline_smooth(x, spacing=2, out=out) is out
    assert torch.equal(out, spline_smooth(x, spacing=2))


def test_gradients_are_those_of_stock_ops():
    x = images((2, 7, 9)).requires_grad_()
    weight = images((2, 7, 9), seed=1)
    found = torch.autograd.grad((spline_smooth(x, spacing=2) ** 2 * weight).sum(), x)[0]
    expected = torch.autograd.grad((reference.spline_smooth(x, spacing=2) ** 2 * weight).sum(), x)
    torch.testing.assert_close(found, expected[0])
    first = torch.autograd.grad((spline_smooth(x) ** 3).sum(), x, create_graph=True)[0]
    again = torch.autograd.grad((reference.spline_smooth(x) ** 3).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), x)[0], torch.autograd.grad(again.sum(), x)[0]
    )


def test_it_passes_the_checks_of_torch():
    x = images((2, 6, 11)).requires_grad_()
    torch.library.opcheck(torch.ops.gplws.spline_smooth.default, (x, 2))
    batch = images((4, 3, 6, 11))
    mapped = torch.vmap(lambda one: spline_smooth(one, spacing=2))(batch)
    assert torch.equal(mapped, torch.stack([spline_smooth(one, spacing=2) for one in batch]))


def test_every_instruction_set_gives_the_same_bits():
    script = (
        "import torch; from gplws.ops import spline_smooth; "
        "x = torch.rand((3, 45, 61), generator=torch.Generator().manual_seed(0)); "
        "print(spline_smooth(x, spacing=4).view(torch.int32).long().sum().item())"
    )
    assert len({int(text) for text in printed_under_each(script)}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.ones(4, 4)}, ValueError, r"images must be \(C, H, W\)"),
        ({"images": torch.ones(1, 4, 4).double()}, TypeError, "images must be float32"),
        ({"spacing": 0}, ValueError, "spacing must be 1 to 4096, got 0"),
        ({"spacing": 4097}, ValueError, "spacing must be 1 to 4096, got 4097"),
        ({"spacing": 2**61}, ValueError, "spacing must be 1 to 4096, got 230584"),
        ({"out": torch.ones(1, 4, 5)}, ValueError, "out must be"),
        ({"out": torch.ones(1, 4, 4).double()}, TypeError, "out must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        spline_smooth(**{"images": torch.ones(1, 4, 4), **arguments})


def test_the_largest_spacing_agrees_with_stock_ops():
    x = images((1, 9, 7))
    expected = reference.spline_smooth(x.double(), spacing=4096)
    found = spline_smooth(x, spacing=4096)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)
    with pytest.raises(RuntimeError, match="spacing must be 1 to 4096, got 4097"):
        torch.ops.gplws.spline_smooth(x, 4097)


def test_the_result_must_not_be_the_input():
    x = torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match="apart"):
        spline_smooth(x, out=x)
