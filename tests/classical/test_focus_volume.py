"""Focus measures by name, the plain recipe around them, and the noise they are said to have."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from stacks import noise_stack, textured_stack

from gplws.classical import MEASURES, aggregate, focus_volume
from gplws.classical.focus_volume import gaussian_blur
from gplws.ops.focus_search import focus_search


@pytest.mark.parametrize("sigma", [0.5, 0.8, 2.0])
def test_the_blur_is_a_gaussian(sigma):
    images = torch.rand(2, 30, 21, dtype=torch.float64)
    expected = np.stack(
        [
            ndimage.gaussian_filter(i.numpy(), sigma, mode="mirror", radius=int(np.ceil(3 * sigma)))
            for i in images
        ]
    )
    torch.testing.assert_close(
        gaussian_blur(images, sigma), torch.from_numpy(expected), rtol=0, atol=1e-12
    )
    assert gaussian_blur(images, 0) is images


def test_the_recipe_is_blur_measure_power_window():
    stack = torch.rand(1, 3, 20, 24, dtype=torch.float64)
    found = focus_volume(stack, "tenengrad", pre_blur=0.7, window_sigma=1.5, power=2)
    for frame, response in zip(stack[0].numpy(), found[0], strict=True):
        blurred = ndimage.gaussian_filter(frame, 0.7, mode="mirror", radius=3)
        energy = sum(ndimage.sobel(blurred, axis, mode="mirror") ** 2 for axis in (0, 1))
        expected = ndimage.gaussian_filter(energy, 1.5, mode="mirror", radius=5)
        torch.testing.assert_close(response, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("measure", list(MEASURES))
@pytest.mark.parametrize("refinement", ["gaussian", "parabola"])
def test_every_measure_finds_a_plane(measure, refinement):
    stack = textured_stack(4.3, n_frames=9, width=2.0, size=(40, 40), noise=0.001)
    volume = focus_volume(stack[None], measure, window_sigma=3)
    assert volume.shape == (1, 9, 40, 40) and volume.min() >= 0
    depth = focus_search(volume, refinement=refinement, radius=2).depth
    assert (depth - 4.3).abs().mean() < 0.1


@pytest.mark.parametrize("measure", list(MEASURES))
def test_a_batch_equals_its_members(measure):
    stacks = torch.rand(2, 3, 12, 10)
    found = focus_volume(stacks, measure)
    for stack, expected in zip(stacks, found, strict=True):
        torch.testing.assert_close(focus_volume(stack, measure), expected, rtol=1e-4, atol=1e-6)


def test_of_colour_the_luminance_counts():
    stack = torch.rand(2, 3, 4, 19, 21)
    gray = 0.2126 * stack[:, 0] + 0.7152 * stack[:, 1] + 0.0722 * stack[:, 2]
    torch.testing.assert_close(focus_volume(stack, "sml"), focus_volume(gray, "sml"))


@pytest.mark.parametrize("name", list(MEASURES))
def test_noise_is_what_the_table_says(name):
    measure = MEASURES[name]
    frames = noise_stack(6, (160, 160), 0.01)
    inner = (..., slice(30, -30), slice(30, -30))
    response = measure(frames)
    mean = response[inner].mean()
    assert mean / MEASURES["rdf"](frames)[inner].mean() == pytest.approx(
        measure.noise_gain, rel=0.03
    )
    for levels, deviation in ((2, measure.fine_deviation), (3, measure.medium_deviation)):
        assert aggregate(response, levels)[inner].std() / mean == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize("name", list(MEASURES))
def test_the_reach_is_as_said(name):
    measure = MEASURES[name]
    frames = torch.rand(1, 9, 60)
    before = measure(frames)
    frames[..., :10] = torch.rand(1, 9, 10)
    far = slice(10 + measure.total_reach, None)
    torch.testing.assert_close(measure(frames)[..., far], before[..., far], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"measure": "magic"}, ValueError, "measure: expected one of rdf, sml, .*'magic'"),
        ({"pre_blur": -1.0}, ValueError, "pre_blur: .*got -1"),
        ({"window_sigma": float("nan")}, ValueError, "window_sigma: .*got nan"),
        ({"power": 0.0}, ValueError, "power: .*got 0"),
        ({"stack": torch.rand(4, 4)}, ValueError, r"stack: expected \(N, H, W\)"),
        ({"stack": torch.rand(1, 2, 3, 4, 4)}, ValueError, r"stack: .*\(1, 2, 3, 4, 4\)"),
        ({"stack": torch.ones(3, 4, 4).int()}, TypeError, "stack: .*int32"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        focus_volume(**{"stack": torch.rand(3, 6, 6), **arguments})


@pytest.mark.cuda
@pytest.mark.parametrize("measure", list(MEASURES))
def test_it_is_the_same_on_a_gpu(measure):
    stack = torch.rand(2, 4, 33, 40)
    found = focus_volume(stack.cuda(), measure).cpu()
    torch.testing.assert_close(found, focus_volume(stack, measure), rtol=1e-4, atol=1e-5)
