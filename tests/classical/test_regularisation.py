"""Regularisation of a depth map: the energy, its minimum, steps, outliers, tiny maps."""

import itertools

import numpy as np
import pytest
import torch
from regularisation import regularisation_energy

from gplws.classical import regularise_depth
from gplws.ops import regularise_surface
from gplws.ops.reference import NEIGHBOURS, solve_by_conjugate_gradients

OPTIONS = dict(strength=0.3, data_scale=1.0, smoothness_scale=0.7, guide_scale=0.1)


def scene(size=(20, 24)):
    """A step with noise and outliers, its truth, confidence and guide; float64."""
    truth = torch.where(torch.arange(size[1]) < size[1] // 2, 3.0, 9.0).double().repeat(size[0], 1)
    depth = truth + 0.1 * torch.randn(size, dtype=torch.float64)
    wrong = torch.rand(size) < 0.05
    depth = torch.where(wrong, 12 * torch.rand(size, dtype=torch.float64), depth)
    confidence = torch.where(wrong, 0.05, 0.8).double()
    guide = truth / 12 + 0.005 * torch.randn(size, dtype=torch.float64)
    return truth, depth, confidence, guide


def energy(result, depth, confidence, guide):
    """The sum of the module's text, pair by pair, in numpy."""
    result, depth, confidence, guide = (x.numpy() for x in (result, depth, confidence, guide))

    def penalty(x, scale):
        return scale**2 * (1 - np.exp(-(x**2) / (2 * scale**2)))

    total = (confidence * penalty(result - depth, OPTIONS["data_scale"])).sum()
    height, width = depth.shape
    for y in range(height):
        for x in range(width):
            for dy, dx in NEIGHBOURS:
                v, u = y + dy, x + dx
                if v < height and 0 <= u < width:
                    edge = (guide[v, u] - guide[y, x]) / OPTIONS["guide_scale"]
                    weight = OPTIONS["strength"] / np.hypot(dy, dx) * np.exp(-0.5 * edge**2)
                    step = result[v, u] - result[y, x]
                    total += weight * penalty(step, OPTIONS["smoothness_scale"])
    return total


def test_the_energy_is_that_of_the_text():
    _, *maps = scene()
    found = regularisation_energy(maps[0].flip(0), *maps, **OPTIONS)
    assert float(found) == pytest.approx(energy(maps[0].flip(0), *maps), rel=1e-12)


def test_the_energy_never_rises():
    _, *maps = scene()
    energies = [float(regularisation_energy(maps[0], *maps, **OPTIONS))]
    for iterations in (1, 2, 3, 5, 8, 20):
        result = regularise_depth(*maps, **OPTIONS, iterations=iterations)
        energies.append(float(regularisation_energy(result, *maps, **OPTIONS)))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(energies))
    assert energies[-1] < 0.7 * energies[0]


def test_it_ends_where_the_gradient_is_zero():
    _, *maps = scene((9, 10))
    result = regularise_depth(*maps, **OPTIONS, iterations=300).requires_grad_()
    regularisation_energy(result, *maps, **OPTIONS).backward()
    assert result.grad.abs().max() < 1e-5


def test_the_linear_system_is_solved():
    size = (4, 3)
    data, target = torch.rand(size).double() + 0.1, torch.rand(size).double()
    number = torch.arange(12).view(size)
    matrix = torch.diag(data.flatten())
    weights = []
    for dy, dx in NEIGHBOURS:
        first = number[: 4 - dy, max(-dx, 0) : 3 - max(dx, 0)]
        second = first + dy * 3 + dx
        weight = torch.rand(first.shape).double()
        weights.append(weight)
        for p, q, w in zip(first.flatten(), second.flatten(), weight.flatten(), strict=True):
            matrix[p, p] += w
            matrix[q, q] += w
            matrix[p, q] -= w
            matrix[q, p] -= w
    expected = torch.linalg.solve(matrix, (data * target).flatten()).view(size)
    found = solve_by_conjugate_gradients(data, target, weights, torch.zeros_like(target))
    torch.testing.assert_close(found, expected)


def test_outliers_give_way_and_the_step_stays():
    truth, *maps = scene((40, 48))
    result = regularise_depth(*maps)
    before, after = ((x - truth).abs() for x in (maps[0], result))
    assert after.mean() < 0.3 * before.mean()
    assert after[:, 22:26].mean() < 0.15  # beside the step of 6 frames


def test_a_slope_stays_a_slope():
    depth = torch.linspace(0, 20, 64).repeat(32, 1)
    result = regularise_depth(depth, torch.ones_like(depth), torch.zeros_like(depth))
    assert (result - depth)[:, 4:-4].abs().max() < 0.01


def test_pixels_without_confidence_are_filled_from_around_them():
    depth, confidence = torch.full((16, 16), 5.0), torch.ones(16, 16)
    depth[5:9, 5:9], confidence[5:9, 5:9] = 5.8, 0.0
    result = regularise_depth(depth, confidence, torch.zeros(16, 16))
    assert (result - 5).abs().max() < 0.05


def test_where_nothing_is_known_nothing_changes():
    depth = torch.full((6, 7), 2.0)
    empty = torch.zeros(6, 7)
    torch.testing.assert_close(regularise_depth(depth, empty, empty), depth)
    noisy = torch.rand(6, 7)
    assert torch.equal(regularise_depth(noisy, torch.ones(6, 7), empty, strength=0), noisy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_depth_leaves_the_range_where_hardly_anything_holds_the_surface(dtype):
    generator = torch.Generator().manual_seed(0)
    ran_away = 0
    for width in range(1, 13):
        depth, confidence, guide = torch.rand(3, 6, 2, width, dtype=dtype, generator=generator)
        confidence = 1e-4 * torch.where(confidence < 0.3, confidence, 0)
        result = regularise_depth(10 * depth, confidence, guide)
        assert (result >= 10 * depth.amin((1, 2), keepdim=True)).all()
        assert (result <= 10 * depth.amax((1, 2), keepdim=True)).all()
        options = dict(data_scale=1.0, smoothness_scale=4.0, guide_scale=0.1, iterations=12)
        free = regularise_surface(10 * depth, confidence, guide, strength=0.3, **options)
        ran_away += bool((free - result).abs().max() > 0)
    assert ran_away or dtype == torch.float32  # whose rounding decides which do


def test_a_batch_equals_its_members_and_input_is_left_alone():
    scenes = [scene()[1:] for _ in range(3)]
    maps = [torch.stack(values) for values in zip(*scenes, strict=True)]
    before = [values.clone() for values in maps]
    batch = regularise_depth(*maps)
    for found, one in zip(batch, scenes, strict=True):
        torch.testing.assert_close(found, regularise_depth(*one))
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (2, 2)])
def test_any_size_works(size):
    maps = [torch.rand(size) for _ in range(3)]
    result = regularise_depth(*maps)
    assert result.shape == size and result.isfinite().all()
    assert maps[0].min() - 1e-5 <= result.min() and result.max() <= maps[0].max() + 1e-5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "strength: .*got -1"),
        ({"data_scale": 0.0}, ValueError, "data_scale: .*got 0"),
        ({"smoothness_scale": float("nan")}, ValueError, "smoothness_scale: .*nan"),
        ({"guide_scale": -0.1}, ValueError, "guide_scale: .*-0.1"),
        ({"iterations": 0}, ValueError, "iterations: .*got 0"),
        ({"depth": torch.rand(4)}, ValueError, r"depth: expected \(H, W\)"),
        ({"depth": torch.ones(4, 4).int()}, TypeError, "depth: .*int32"),
        ({"guide": torch.rand(4, 5)}, ValueError, r"guide: expected \(4, 4\).*\(4, 5\)"),
        ({"confidence": torch.rand(4, 4).double()}, TypeError, "confidence: .*float64"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    maps = {name: torch.rand(4, 4) for name in ("depth", "confidence", "guide")}
    with pytest.raises(error, match=message):
        regularise_depth(**{**maps, **arguments})


@pytest.mark.cuda
def test_it_is_the_same_on_a_gpu():
    maps = [values.float() for values in scene()[1:]]
    found = regularise_depth(*(values.cuda() for values in maps)).cpu()
    torch.testing.assert_close(found, regularise_depth(*maps), rtol=0, atol=1e-3)
