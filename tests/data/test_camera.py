import io

import numpy as np
import pytest
import torch
from PIL import Image

from gplws.data.camera import add_noise, jpeg_like, quantise, vignetting


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("electrons", [60.0, 5000.0])
def test_noise_has_the_mean_and_variance_of_its_electrons(exact, electrons):
    signal = torch.tensor([0.1, 0.8])[:, None].expand(2, 200_000)
    full_well, read_noise = torch.full((2,), electrons), torch.tensor([2.0, 7.0])
    generator = torch.Generator().manual_seed(0)
    counts = add_noise(signal, full_well, read_noise, generator, exact=exact) * electrons
    expected = torch.tensor([0.1, 0.8]) * electrons
    torch.testing.assert_close(counts.mean(1), expected, rtol=0.005, atol=0.05)
    torch.testing.assert_close(counts.var(1), expected + read_noise**2, rtol=0.02, atol=0)


def test_exact_photons_are_whole_numbers():
    counts = add_noise(
        torch.full((1, 500), 0.5),
        torch.tensor([8.0]),
        torch.zeros(1),
        torch.Generator().manual_seed(0),
    )
    assert torch.equal((counts * 8).round(), counts * 8) and counts.unique().numel() > 5


def test_each_item_has_its_own_bits():
    ramp = torch.linspace(-0.1, 1.1, 5001).repeat(2, 1)
    found = quantise(ramp, torch.tensor([3, 8]))
    assert found[0].unique().numel() == 8 and found[1].unique().numel() == 256
    assert found.min() == 0 and found.max() == 1
    assert (found[1] - ramp[1].clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6


def test_vignetting_is_cos4_about_its_axis():
    found = vignetting((101, 101), torch.tensor([0.25, 0.0]), torch.tensor([[0.0, 0.0], [0.5, 0]]))
    assert found[0, 50, 50] == 1 and (found[1] == 1).all()
    # tan^2 = 0.25 at the middle of a side: cos^4 = 1 / 1.25^2
    assert float(found[0, 50, 100]) == pytest.approx(1.25**-2)
    assert float(found[0, 0, 0]) == pytest.approx(1.5**-2)


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_compression_loses_what_an_encoder_loses(quality):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :72]
    picture = 128 + 60 * np.sin(x / 5) * np.cos(y / 9) + rng.normal(0, 12, (64, 72))
    picture = picture.clip(0, 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    expected = np.asarray(Image.open(buffer)).astype(float)
    found = jpeg_like(torch.from_numpy(picture).float() / 255, quality).numpy() * 255
    # The encoder rounds to integers, and a coefficient halfway between two steps either way.
    assert np.abs(found - expected).mean() < 0.8
    assert np.abs(found - picture).mean() > 0.5


def test_compression_keeps_odd_shapes_and_a_flat_image_and_moves_its_grid():
    flat = torch.full((2, 3, 13, 21), 128 / 255)
    torch.testing.assert_close(jpeg_like(flat, 50, (3, 5)), flat)
    noise = torch.rand(1, 13, 21)
    assert not torch.equal(jpeg_like(noise, 50), jpeg_like(noise, 50, (3, 5)))
    with pytest.raises(ValueError, match="quality"):
        jpeg_like(noise, 0)
