"""The regularisation of depth maps against stock ops in float64, and where nothing is to be found.

What it does to depth maps is tested in tests/classical/test_regularisation.py.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from instruction_sets import printed_under_each
from regularisation import regularisation_energy
from torch import Tensor

from gplws.ops import reference, regularise_surface

SIZES = [(1, 1), (1, 2), (1, 40), (40, 1), (2, 2), (2, 3), (3, 15), (5, 16), (17, 33), (64, 130)]
OPTIONS = dict(strength=0.3, data_scale=1.0, smoothness_scale=4.0, guide_scale=0.1)
MOST = dict(OPTIONS, iterations=12)


@functools.cache
def scene(height: int, width: int, batch: int = 1) -> tuple[Tensor, ...]:
    """Depth with steps, slopes, noise, outliers and unknown parts; confidence; guide."""
    generator = torch.Generator().manual_seed(height * width)

    def drawn() -> Tensor:
        return torch.rand(batch, height, width, generator=generator)

    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    truth = 3 + 4 * x + 3.0 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.06)
    is_wrong = drawn() < 0.1
    depth = torch.where(is_wrong, 10 * drawn(), truth + 0.1 * drawn())
    confidence = torch.where(is_wrong, 0.001, 0.6) * drawn() * ~((x > 0.7) & (y > 0.6))
    return depth, confidence, truth / 12 + 0.03 * drawn()


def in_double(maps, **options) -> Tensor:
    return reference.regularise_surface(*(values.double() for values in maps), **options)


@pytest.mark.parametrize("iterations", [1, 2, 12])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_agrees_with_stock_ops_in_float64(size, iterations):
    maps, options = scene(*size), dict(OPTIONS, iterations=iterations)
    expected = in_double(maps, **options)
    found = regularise_surface(*maps, **options)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_it_is_no_farther_from_float64_than_stock_ops_in_float32():
    maps = scene(120, 150)
    expected = in_double(maps, **MOST)

    def error(found: Tensor) -> Tensor:
        return (found - expected).square().mean().sqrt()

    ours = error(regularise_surface(*maps, **MOST))
    assert ours <= error(reference.regularise_surface(*maps, **MOST))
    assert ours < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        dict(strength=0.0),
        dict(strength=50.0),
        dict(data_scale=0.05),
        dict(data_scale=1e4, smoothness_scale=1e4),  # all but quadratic
        dict(smoothness_scale=0.3),
        dict(guide_scale=0.003),
        dict(guide_scale=1e-30, smoothness_scale=1e-40),  # only equals are neighbours
    ],
    ids=str,
)
def test_other_options_agree_as_well(options):
    maps = scene(30, 37)
    options = {**MOST, **options, "iterations": 3}
    error = (regularise_surface(*maps, **options) - in_double(maps, **options)).abs()
    # Where a pixel is all but torn from its neighbours, rounding grows.
    assert error.mean() < 5e-7 and error.max() < 2e-4


def test_pixels_without_confidence_and_neighbours_stay():
    depth, confidence, guide = (values.clone() for values in scene(12, 19))
    # Alone in the guide: the diagonal is below the least one.
    guide[:, 5, 7] = 5.0
    confidence[:, 5, 7] = 0.0
    guide[:, 11, 18], confidence[:, 11, 18] = -5.0, 1e-7
    maps = depth, confidence, guide
    found = regularise_surface(*maps, **MOST)
    assert found[:, 5, 7] == depth[:, 5, 7]
    torch.testing.assert_close(found.double(), in_double(maps, **MOST), rtol=0, atol=1e-5)


def test_far_from_zero_little_is_lost():
    depth, *others = scene(20, 31)
    found = regularise_surface(depth + 4096, *others, **MOST)
    expected = in_double((depth + 4096, *others), **MOST)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["nowhere", "in few pixels", "hardly", "on one side"])
def test_where_little_is_known_the_energy_does_not_rise_and_nothing_runs_away(kind):
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        height, width = torch.randint(1, 6, (2,), generator=generator).tolist()
        depth, confidence, guide = torch.rand(3, 1, height, width, generator=generator)
        depth, guide = 50 + 10 * depth, 0.2 * guide
        if kind == "nowhere":
            confidence.zero_()
        elif kind == "in few pixels":
            confidence *= confidence < 0.1
        elif kind == "hardly":
            confidence *= 1e-7
        else:
            confidence[..., width // 2 :] = 0
        options = dict(OPTIONS, strength=2.0, smoothness_scale=30.0)
        found = regularise_surface(depth, confidence, guide, **options, iterations=5)
        assert depth.min() - 0.1 <= found.min() and found.max() <= depth.max() + 0.1
        given = [values.double()[0] for values in (depth, confidence, guide)]
        before, after = (
            float(regularisation_energy(values.double()[0], *given, **options))
            for values in (depth, found)
        )
        assert after <= before * (1 + 1e-6) + 1e-12


def test_a_constant_stays_to_the_bit():
    _, confidence, guide = scene(21, 35)
    depth = torch.full((1, 21, 35), 7.3)
    assert torch.equal(regularise_surface(depth, confidence, guide, **MOST), depth)


def test_a_batch_is_its_members():
    maps = scene(18, 23, batch=3)
    found = regularise_surface(*maps, **MOST)
    for i in range(3):
        one = regularise_surface(*(values[i : i + 1] for values in maps), **MOST)
        assert torch.equal(found[i : i + 1], one)


def test_strides_do_not_matter_and_input_is_left_alone():
    maps = scene(20, 30)
    before = [values.clone() for values in maps]
    turned = [values.mT.contiguous().mT for values in maps]
    assert torch.equal(regularise_surface(*turned, **MOST), regularise_surface(*maps, **MOST))
    assert all(map(torch.equal, maps, before))


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_nothing_gives_nothing(size):
    assert regularise_surface(*[torch.empty(size)] * 3, **MOST).shape == size


def test_float64_is_computed_as_such():
    maps = [values.double() for values in scene(9, 10)]
    found = regularise_surface(*maps, **MOST)
    assert found.dtype == torch.float64
    assert torch.equal(found, reference.regularise_surface(*maps, **MOST))


def test_it_has_no_gradient():
    depth, *others = scene(6, 7)
    found = regularise_surface(depth.clone().requires_grad_(), *others, **MOST)
    assert not found.requires_grad
    assert torch.equal(found, regularise_surface(depth, *others, **MOST))


def test_it_passes_the_checks_of_torch():
    maps, options = scene(6, 11), tuple(MOST.values())
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.gplws.regularise_surface.default
    torch.library.opcheck(op, (*maps, *options), test_utils=tests)
    compiled = torch.compile(lambda *x: regularise_surface(*x, **MOST), backend="aot_eager")
    assert torch.equal(compiled(*maps), regularise_surface(*maps, **MOST))
    stacked = [torch.stack([values, values.flip(1)]) for values in maps]
    mapped = torch.vmap(lambda *x: regularise_surface(*x, **MOST))(*stacked)
    torch.testing.assert_close(mapped[0], regularise_surface(*maps, **MOST), rtol=0, atol=1e-5)


SCRIPT = """
import torch
from gplws.ops import regularise_surface
generator = torch.Generator().manual_seed(0)
depth, confidence, guide = torch.rand(3, 1, 40, 61, generator=generator)
found = regularise_surface(9 * depth, confidence, guide, strength=0.3, data_scale=1.0,
                           smoothness_scale=4.0, guide_scale=0.5, iterations=3)
print(*found[0, ::7, ::6].flatten().tolist())
"""


def test_instruction_sets_agree():
    found = [[float(number) for number in text.split()] for text in printed_under_each(SCRIPT)]
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("size", [(130, 91), (3, 4000), (2000, 5)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(size):
    maps, threads = scene(*size), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(regularise_surface(*maps, **OPTIONS, iterations=3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(depth=torch.rand(4, 4)), ValueError, r"depth must be \(B, H, W\)"),
        (dict(guide=torch.rand(1, 4, 5)), ValueError, "guide must be the shape of depth"),
        (dict(confidence=torch.rand(4, 4)), ValueError, "confidence must be the shape of depth"),
        (dict(guide=torch.rand(1, 4, 4).double()), TypeError, "guide must be torch.float32"),
        (dict(depth=torch.ones(1, 4, 4).int()), TypeError, "depth must be of a float"),
        (dict(strength=-1), ValueError, "strength must be at least 0, got -1"),
        (dict(data_scale=0), ValueError, "data_scale must be positive, got 0"),
        (dict(smoothness_scale=math.nan), ValueError, "smoothness_scale must be positive, got nan"),
        (dict(guide_scale=math.inf), ValueError, "guide_scale must be positive, got inf"),
        (dict(iterations=0), ValueError, "iterations must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    maps = {name: torch.rand(1, 4, 4) for name in ("depth", "confidence", "guide")}
    with pytest.raises(error, match=f"^regularise_surface: {message}"):
        regularise_surface(**{**maps, **MOST, **change})


def test_the_kernel_checks_its_own_arguments():
    op, maps, options = torch.ops.gplws.regularise_surface, torch.rand(3, 1, 4, 4), (0.3, 1, 4, 0.1)
    for arguments, message in (
        ((maps[0, 0], maps[1], maps[2], *options, 1), r"depth must be \(B, H, W\)"),
        ((*maps.double(), *options, 1), "depth must be float32"),
        ((maps[0], maps[1, :, :3], maps[2], *options, 1), "confidence has the wrong shape"),
        ((maps[0], maps[1], maps[2].double(), *options, 1), "guide has another dtype"),
        ((*maps, *options, 0), "iterations must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
