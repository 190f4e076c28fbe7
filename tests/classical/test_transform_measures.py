"""Wavelet and shearlet energies: formulas by scipy, directions, bands."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from gplws.classical import shearlet_energy, wavelet_energy
from gplws.classical.transform_measures import SHEARLET_REACH, _shearlets, wavelet_reach

MEASURES = (wavelet_energy, shearlet_energy)


def expected_wavelet(image, levels=2):
    """The definition with dense kernels: low- and high-pass along each axis."""
    total = np.zeros_like(image)
    for level in range(levels):
        low = np.zeros(4 * 2**level + 1)
        low[:: 2**level] = np.array([1, 4, 6, 4, 1]) / 16
        high = -low
        high[len(low) // 2] += 1
        bands = [
            ndimage.correlate1d(
                ndimage.correlate1d(image, rows, 0, mode="mirror"), columns, 1, mode="mirror"
            )
            for rows, columns in ((low, low), (low, high), (high, low), (high, high))
        ]
        total += sum(np.abs(band) for band in bands[1:])
        image = bands[0]
    return total


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_wavelet_energy_equals_its_formula(levels):
    frames = torch.rand(2, 33, 40, dtype=torch.float64)
    expected = np.stack([expected_wavelet(frame.numpy(), levels) for frame in frames])
    found = wavelet_energy(frames, levels=levels)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_shearlet_energy_equals_direct_convolutions():
    frames = torch.rand(2, 24, 31, dtype=torch.float64)
    kernels = [kernel.numpy() for kernel in _shearlets(torch.float64, frames.device)]
    expected = np.stack(
        [
            np.sqrt(sum(ndimage.convolve(f.numpy(), k, mode="mirror") ** 2 for k in kernels))
            for f in frames
        ]
    )
    torch.testing.assert_close(
        shearlet_energy(frames), torch.from_numpy(expected), rtol=0, atol=1e-10
    )


def test_shearlets_have_no_mean_and_tell_directions_apart():
    kernels = torch.stack(_shearlets(torch.float64, torch.device("cpu")))
    assert kernels.sum((1, 2)).abs().max() < 1e-12
    place = torch.arange(-SHEARLET_REACH, SHEARLET_REACH + 1, dtype=torch.float64)
    strongest = []
    for degrees in range(0, 180, 45):
        angle = math.radians(degrees)
        across = math.cos(angle) * place + math.sin(angle) * place[:, None]
        wave = torch.exp(1j * 0.5 * math.pi * across)
        strongest.append(int((kernels * wave).sum((1, 2)).abs().argmax()))
    assert len(set(strongest)) == 4


@pytest.mark.parametrize("wavelength", [3.0, 4.0, 6.0, 8.0])
def test_shearlets_see_a_grating_as_well_in_all_directions(wavelength):
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    found = []
    for degrees in range(0, 180, 15):
        angle = math.radians(degrees)
        phase = (x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / wavelength
        found.append(float(shearlet_energy(torch.cos(phase))[14:-14, 14:-14].mean()))
    assert min(found) > 0.4 * max(found) and max(found) > 0.05


@pytest.mark.parametrize("measure", MEASURES)
def test_contrast_counts_and_brightness_does_not(measure):
    frames = torch.rand(3, 24, 20)
    expected = measure(frames)
    torch.testing.assert_close(measure(0.25 * frames + 0.5), 0.25 * expected, rtol=1e-3, atol=1e-5)
    assert measure(torch.full((1, 6, 6), 0.7)).max() < 1e-6


@pytest.mark.parametrize("measure", MEASURES)
def test_turned_and_mirrored_images_have_turned_and_mirrored_responses(measure):
    frames = torch.rand(2, 26, 31)
    expected = measure(frames)
    torch.testing.assert_close(measure(frames.flip(-1)).flip(-1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measure(frames.mT).mT, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("measure", "reach"), [(wavelet_energy, wavelet_reach()), (shearlet_energy, SHEARLET_REACH)]
)
def test_the_reach_is_not_exceeded(measure, reach):
    frames = torch.rand(1, 9, 60)
    before = measure(frames)
    frames[..., :10] = torch.rand(1, 9, 10)
    after = measure(frames)
    far = slice(10 + reach, None)
    torch.testing.assert_close(after[..., far], before[..., far], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(after[..., 10], before[..., 10])


@pytest.mark.parametrize("measure", MEASURES)
def test_leading_axes_and_tiny_images_work(measure):
    frames = torch.rand(2, 3, 5, 6)
    torch.testing.assert_close(measure(frames)[1, 2], measure(frames[1, 2]), rtol=1e-4, atol=1e-6)
    assert measure(torch.rand(2, 1, 1)).max() < 1e-6
    assert measure(torch.empty(0, 4, 4)).shape == (0, 4, 4)


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_agree_with_finite_differences(measure):
    with torch.inference_mode():  # filters kept from here must serve the gradient below
        measure(torch.rand(1, 4, 4, dtype=torch.float64))
    frames = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: measure(f - f.mean()), (frames,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: wavelet_energy(f, levels=0), ValueError, "levels: .*got 0"),
        (lambda f: wavelet_energy(f[0, 0]), ValueError, "frames: expected .* H, W"),
        (lambda f: shearlet_energy(f.half()), TypeError, "frames: .*float16"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(1, 5, 5))
