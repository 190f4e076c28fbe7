"""Transfer functions against closed forms, a brute-force pupil, and one another."""

import math

import pytest
import torch

from gplws.data.optics import Lens, fast_length, wave_transfer

FREQUENCY = torch.linspace(0, 0.6, 61)
MODELS = ("disk", "gaussian", "wave")


def transfer(psf: str, radius_px: float, cutoff: float = 1.0, aperture: float = 0.2):
    """Transfer function of a lens at the defocus that gives this geometric blur."""
    lens = Lens(cutoff * 0.55 / (2 * aperture), aperture, 0.55, psf=psf)
    return lens.transfer(torch.tensor([radius_px / lens.radius_px_per_um]), FREQUENCY)[0]


@pytest.mark.parametrize("psf", MODELS)
@pytest.mark.parametrize("radius_px", [0.0, 0.7, 12.0, 60.0])
def test_light_is_conserved_and_never_amplified(psf, radius_px):
    found = transfer(psf, radius_px)
    assert float(found[0]) == pytest.approx(1, abs=1e-6)
    assert found.abs().max() < 1 + 1e-6


def test_in_focus_all_models_are_the_diffraction_limited_lens():
    s = FREQUENCY.double() / 0.5
    s = s.clamp(max=1)
    expected = 2 / math.pi * (torch.acos(s) - s * (1 - s * s).sqrt())
    for psf in MODELS:
        torch.testing.assert_close(
            transfer(psf, 0.0, cutoff=0.5).double(), expected, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(("aperture", "index"), [(0.1, 1.0), (0.3, 1.0), (0.8, 1.0), (0.9, 1.33)])
def test_the_wave_model_is_the_autocorrelation_of_the_pupil(aperture, index):
    # Brute force: two shifted pupils on a fine grid.
    waves = torch.tensor([3.0])  # defocus / wavelength
    count = 801
    axis = torch.linspace(-1, 1, count, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for s in (0.1, 0.35, 0.7):
        product = 0
        sides = []
        for sign in (1, -1):
            square = (x + sign * s) ** 2 + y**2
            phase = 2 * math.pi * index * waves.item()
            phase = phase * torch.sqrt((1 - (aperture / index) ** 2 * square).clamp(min=0))
            sides.append(torch.polar((square <= 1).double(), phase))
        product = (sides[0] * sides[1].conj()).real.mean() * 4 / math.pi
        found = wave_transfer(
            waves, torch.tensor([s]), numerical_aperture=aperture, refractive_index=index
        )
        assert float(found) == pytest.approx(float(product), abs=0.01)


def test_wave_optics_becomes_geometry_far_from_focus():
    far = (transfer("wave", 60.0) - transfer("disk", 60.0)).abs()
    nearer = (transfer("wave", 6.0) - transfer("disk", 6.0)).abs()
    assert far.max() < 0.02 and far.max() < 0.3 * nearer.max()
    # A short wavelength is geometry anywhere.
    short = {psf: Lens(1.0, 0.2, 0.002, psf=psf) for psf in ("disk", "wave")}
    defocus = torch.tensor([20.0])
    curves = [lens.transfer(defocus, FREQUENCY) for lens in short.values()]
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=0.01)


def test_within_the_depth_of_field_wave_optics_blurs_less_than_geometry():
    # A quarter wave of defocus costs a lens little; the product of two blurs costs it more.
    radius_px = 4 * 0.25  # waves = radius * cutoff / 4
    wave, disk, sharp = (
        transfer("wave", radius_px),
        transfer("disk", radius_px),
        transfer("wave", 0),
    )
    assert (wave > disk - 1e-6).all()
    assert (sharp - wave).max() < 0.7 * (sharp - disk).max()
    assert (wave < sharp + 1e-6).all()


def test_gaussian_and_disk_have_the_same_variance():
    # Variance along an axis is minus the curvature at 0, over 4 pi^2.
    frequency = torch.tensor([0.0, 1e-3], dtype=torch.float64)
    curvature = [
        float(1 - Lens(1e4, 0.2, psf=psf).transfer(torch.tensor([49e4]), frequency)[0, 1])
        for psf in ("disk", "gaussian")
    ]
    assert curvature[0] == pytest.approx(curvature[1], rel=0.05)


def test_the_table_over_the_radius_is_accurate_for_wide_blur():
    lens = Lens(2.0, 0.2, psf="disk")
    defocus = torch.tensor([0.0, 1.0, 15.0, 60.0]) / lens.radius_px_per_um
    frequency = torch.rand(20, 30) * 0.7
    expected = lens.transfer(defocus, frequency.flatten()).view(4, 20, 30)
    found = lens.transfer_on_grid(defocus, frequency)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_residual_blur_is_a_gaussian_on_top():
    plain, soft = (Lens(1.0, 0.3, residual_blur_px=sigma) for sigma in (0.0, 0.8))
    ratio = soft.transfer(torch.zeros(1), FREQUENCY) / plain.transfer(torch.zeros(1), FREQUENCY)
    expected = torch.exp(-2 * (math.pi * 0.8 * FREQUENCY) ** 2)
    torch.testing.assert_close(ratio[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_size_um": -1.0}, "pixel_size_um"),
        ({"numerical_aperture": 1.0}, "numerical_aperture: .*refractive_index"),
        ({"wavelength_um": math.inf}, "wavelength_um"),
        ({"refractive_index": 0.9}, "refractive_index"),
        ({"psf": "box"}, "psf: expected 'disk', 'gaussian' or 'wave'"),
        ({"residual_blur_px": -0.1}, "residual_blur_px"),
    ],
)
def test_impossible_lenses_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lens(**{"pixel_size_um": 1.0, "numerical_aperture": 0.3, **arguments})


def test_fast_lengths_have_small_factors():
    assert [fast_length(n) for n in (1, 7, 97, 128, 129, 301)] == [2, 8, 100, 128, 144, 320]
