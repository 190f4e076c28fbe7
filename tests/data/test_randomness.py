import math

import pytest
import torch

from gplws.data.randomness import Draw, radial_frequency, spectral_noise


def test_equal_entropy_repeats_and_other_entropy_does_not():
    def first(*entropy):
        draw = Draw(*entropy)
        return draw.uniform(0, 1), draw.normal_field(3).tolist()

    assert first(1, 2) == first(1, 2)
    assert len({str(first(*e)) for e in ((1, 2), (2, 1), (1,), (12,), (1, 3))}) == 5
    with pytest.raises(ValueError, match="entropy"):
        Draw(-1)


def test_ranges_are_kept_and_logarithms_are_uniform():
    draw = Draw(0)
    values = torch.tensor([draw.log_uniform(0.1, 10) for _ in range(2000)])
    assert values.min() >= 0.1 and values.max() <= 10
    assert float(values.log10().mean()) == pytest.approx(0, abs=0.05)
    assert {draw.integer(2, 4) for _ in range(100)} == {2, 3, 4}
    assert sum(draw.chance(0.3) for _ in range(2000)) / 2000 == pytest.approx(0.3, abs=0.04)
    assert 0 <= draw.angle() <= 2 * math.pi


@pytest.mark.parametrize("exponent", [1.0, 3.0])
def test_noise_has_the_spectrum_asked_for(exponent):
    shape = (256, 240)
    noise = spectral_noise(shape, Draw(1), exponent=exponent, shortest_px=2)
    assert float(noise.mean()) == pytest.approx(0, abs=1e-4)
    assert float(noise.std()) == pytest.approx(1, rel=1e-3)
    power = torch.fft.rfft2(noise).abs() ** 2
    frequency = radial_frequency(shape, noise.device)
    bands = [(0.02, 0.025), (0.2, 0.25)]
    low, high = (power[(frequency > a) & (frequency < b)].mean() for a, b in bands)
    assert math.log10(low / high) == pytest.approx(exponent, abs=0.25)


def test_details_stay_between_the_wavelengths():
    noise = spectral_noise((128, 128), Draw(2), shortest_px=8, longest_px=32)
    power = torch.fft.rfft2(noise).abs() ** 2
    frequency = radial_frequency((128, 128), noise.device)
    inside = power[(frequency > 1 / 32) & (frequency < 1 / 8)].mean()
    assert power[frequency > 1 / 3].mean() < 1e-3 * inside
    assert power[frequency < 1 / 120].mean() < 1e-2 * inside
