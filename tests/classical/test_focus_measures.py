"""The ring difference filter against a direct convolution."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gplws.classical import ring_difference_filter

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
SIZES = [(1, 1), (1, 9), (2, 3), (4, 4), (7, 5), (17, 33)]


def direct(image: Tensor, disk: float, inner: float, outer: float) -> Tensor:
    """The definition, pixel by pixel of the kernel, on an image mirrored by hand."""
    reach = math.floor(outer)
    y, x = torch.meshgrid(*[torch.arange(-reach, reach + 1)] * 2, indexing="ij")
    distance = torch.hypot(x.double(), y.double())
    in_disk, in_ring = distance <= disk, (distance >= inner) & (distance <= outer)
    kernel = in_disk.double() / in_disk.sum() - in_ring.double() / in_ring.sum()
    padded = mirrored(mirrored(image, 0, reach), 1, reach)
    return F.conv2d(padded[None, None], kernel[None, None].to(image.dtype))[0, 0]


def mirrored(image: Tensor, dim: int, reach: int) -> Tensor:
    size = image.shape[dim]
    places = []
    for i in range(-reach, size + reach):
        while not 0 <= i < size:  # bounce at both edges
            i = -i if i < 0 else 2 * (size - 1) - i
            if size == 1:
                i = 0
        places.append(i)
    return image.index_select(dim, torch.tensor(places))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("radii", [(1.0, 2.0, 3.0), (0.0, 1.0, 1.0), (1.5, 3.0, 4.5)])
def test_it_equals_the_direct_convolution(size, dtype, radii):
    frames = torch.rand(3, *size, dtype=dtype)
    disk, inner, outer = radii
    found = ring_difference_filter(
        frames, disk_radius=disk, ring_inner_radius=inner, ring_outer_radius=outer
    )
    expected = torch.stack([direct(frame, *radii) for frame in frames])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


def test_it_does_not_see_brightness_or_slopes():
    ramp = torch.arange(20.0).repeat(20, 1) + 3 * torch.arange(20.0)[:, None]
    assert ring_difference_filter(ramp)[3:-3, 3:-3].abs().max() < 1e-5


def test_strides_leading_axes_and_empty_input_do_not_matter():
    frames = torch.rand(2, 3, 8, 10)
    expected = ring_difference_filter(frames)
    swapped = frames.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    torch.testing.assert_close(ring_difference_filter(swapped), expected)
    torch.testing.assert_close(ring_difference_filter(frames[1, 2]), expected[1, 2])
    assert ring_difference_filter(torch.empty(0, 8, 8)).shape == (0, 8, 8)


def test_its_gradient_agrees_with_finite_differences():
    frames = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ring_difference_filter, (frames,))


def test_it_leaves_its_input_alone():
    frames = torch.rand(2, 8, 8)
    before = frames.clone()
    ring_difference_filter(frames)
    assert torch.equal(frames, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"frames": torch.ones(4)}, ValueError, "frames: expected .* H, W"),
        ({"frames": torch.ones(4, 4, dtype=torch.uint8)}, TypeError, "frames: .*uint8"),
        ({"disk_radius": 2.5}, ValueError, "disk_radius < ring_inner_radius"),
        ({"disk_radius": -1.0}, ValueError, "0 <= disk_radius"),
        ({"ring_inner_radius": 2.25, "ring_outer_radius": 2.5}, ValueError, "no pixel lies"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ring_difference_filter(**{"frames": torch.ones(4, 4), **arguments})


@pytest.mark.cuda
def test_it_is_the_same_on_a_gpu():
    frames = torch.rand(5, 65, 33)
    found = ring_difference_filter(frames.cuda()).cpu()
    torch.testing.assert_close(found, ring_difference_filter(frames), rtol=0, atol=1e-6)
