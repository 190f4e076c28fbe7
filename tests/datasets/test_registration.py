import numpy as np
import pytest
from measured_surfaces import assert_close, grid, measured_map, placed, surface

from gplws.datasets.registration import (
    RegistrationError,
    align_height_map,
    register_height_map,
)

PLACEMENTS = {
    "in place": placed(),
    "turned": placed(rotation=-11.3),
    "shifted": placed(shift=(38.0, -27.5)),
    "scaled": placed(scale=1.04),
    "tilted": placed(offset=250.0, slope=(0.08, -0.05)),
    "all": placed(7.4, 0.97, (-21.0, 16.0), -80.0, (-0.04, 0.06)),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_known_placement_is_recovered(name):
    truth = PLACEMENTS[name]
    x, y = grid((128, 144), 1.4)
    reference = surface(x, y) + 0.4 * np.random.default_rng(1).normal(size=x.shape)
    measured = measured_map(truth, (300, 320), 0.7)
    found = register_height_map(reference, measured, reference_pixel_um=1.4, measured_pixel_um=0.7)
    # A twentieth of a pixel of the stack, and what it means at its rim of 100 um.
    assert_close(found, truth, rotation=0.05, scale=0.001, shift=0.07, offset=0.05, slope=0.0005)
    assert found.residual_um < 0.2
    assert found.correlation > 0.98


def test_holes_outliers_and_a_partial_overlap_do_no_harm():
    truth = placed(5.0, 1.01, (45.0, 30.0), 12.0, (0.03, 0.0))
    random = np.random.default_rng(2)
    x, y = grid((128, 128), 1.5)
    reference = surface(x, y) + 0.3 * random.normal(size=x.shape)
    spikes = random.random(x.shape) < 0.08
    reference[spikes] += random.uniform(-30, 30, int(spikes.sum()))
    reference[random.random(x.shape) < 0.05] = np.nan
    reference[:20, 90:] = np.nan
    measured = measured_map(truth, (200, 220), 0.8)
    measured[90:120, 60:100] = np.nan
    measured[random.random(measured.shape) < 0.01] = np.nan
    found = register_height_map(reference, measured, reference_pixel_um=1.5, measured_pixel_um=0.8)
    assert_close(found, truth, rotation=0.1, scale=0.002, shift=0.15, offset=0.15, slope=0.002)
    assert 0.2 < found.overlap < 0.75


def test_any_rotation_is_found_if_it_is_asked_for():
    truth = placed(rotation=143.0, shift=(8.0, 5.0))
    x, y = grid((120, 120), 1.5)
    measured = measured_map(truth, (260, 260), 0.9)
    found = register_height_map(
        surface(x, y),
        measured,
        reference_pixel_um=1.5,
        measured_pixel_um=0.9,
        max_rotation_deg=180,
    )
    assert_close(found, truth)


def test_maps_of_other_surfaces_are_refused():
    x, y = grid((96, 96), 2.0)
    other = np.cumsum(np.random.default_rng(3).normal(size=(96, 96)), 1)
    with pytest.raises(RegistrationError, match="correlation"):
        register_height_map(surface(x, y), other, reference_pixel_um=2.0, measured_pixel_um=2.0)
    with pytest.raises(RegistrationError, match="mirrored"):
        register_height_map(
            surface(x, y), -surface(x, y), reference_pixel_um=2.0, measured_pixel_um=2.0
        )


def test_the_aligned_map_lies_on_the_stack_and_is_nan_where_nothing_was_measured():
    truth = placed(4.0, 1.0, (10.0, 0.0), 5.0, (0.02, 0.01))
    measured = measured_map(truth, (160, 160), 1.0, noise_um=0.0)
    measured[80, 80] = np.nan
    x, y = grid((100, 140), 1.3)
    aligned = align_height_map(
        measured, truth, (100, 140), reference_pixel_um=1.3, measured_pixel_um=1.0
    )
    known = np.isfinite(aligned)
    assert aligned.dtype == np.float32
    assert 0.6 < known.mean() < 0.95 and not known[:, :5].all()
    assert np.abs(aligned - surface(x, y))[known].max() < 0.25


def test_what_cannot_be_registered_is_named():
    good = np.random.default_rng(0).normal(size=(32, 32))
    for name, value in (
        ("reference_um", np.zeros((3, 4, 5))),
        ("measured_um", np.zeros((8, 40))),
        ("measured_um", np.full((32, 32), np.nan)),
        ("measured_pixel_um", 0.0),
        ("max_rotation_deg", 200.0),
        ("max_scale_error", 1.5),
    ):
        arguments = dict(
            reference_um=good, measured_um=good, reference_pixel_um=1.0, measured_pixel_um=1.0
        )
        with pytest.raises(ValueError, match=name):
            register_height_map(**{**arguments, name: value})
