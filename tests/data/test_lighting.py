import math

import pytest
import torch

from gplws.data.lighting import light_directions, shade, slopes


def tilted(slope: float, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes of a plane that rises to the right."""
    return slopes(slope * 2.0 * torch.arange(size).float().repeat(size, 1), 2.0)


def test_slopes_are_height_over_distance():
    down, right = tilted(0.7)
    assert torch.allclose(right, torch.tensor(0.7)) and torch.allclose(down, torch.tensor(0.0))
    with pytest.raises(ValueError, match="height_um: expected at least 2 x 2"):
        slopes(torch.zeros(1, 5), 1.0)


@pytest.mark.parametrize("slope", [0.0, 0.5, 2.0])
def test_coaxial_light_follows_the_cosine_of_the_slope(slope):
    found = shade(*tilted(slope), light_directions("coaxial"), ambient=0.3)
    expected = 0.3 + 0.7 * math.cos(math.atan(slope))
    assert torch.allclose(found.diffuse, torch.tensor(expected))
    assert not found.specular.any()


def test_oblique_light_favours_the_side_that_faces_it_and_a_ring_none():
    towards_right = light_directions("oblique", elevation=math.pi / 4, azimuth=0.0)
    facing, averted = (
        float(shade(*tilted(slope), towards_right, ambient=0.0).diffuse[4, 4])
        for slope in (-1.0, 1.0)  # falls to the right: looks right
    )
    assert facing == pytest.approx(1, abs=1e-6) and averted == pytest.approx(0, abs=1e-6)
    ring = light_directions("ring", elevation=1.0)
    assert len(ring) == 8
    left, right = (float(shade(*tilted(s), ring).diffuse[4, 4]) for s in (-0.4, 0.4))
    assert left == pytest.approx(right, rel=1e-5)


def test_gloss_is_brightest_where_a_facet_mirrors_the_light_up():
    # Light at 60 degrees from the vertical is mirrored up by facets tilted by 30 degrees.
    light = light_directions("oblique", elevation=math.radians(30), azimuth=0.0)
    slopes_tried = [-math.tan(math.radians(angle)) for angle in (0, 20, 30, 40)]
    found = [
        float(shade(*tilted(s), light, gloss=2.0, lobe=0.1).specular[4, 4]) for s in slopes_tried
    ]
    assert found[2] == pytest.approx(2.0, rel=1e-4)
    assert found[2] > found[1] > found[0] and found[2] > found[3]


def test_lights_are_unit_vectors_and_unknown_ones_are_named():
    for kind in ("coaxial", "ring", "oblique"):
        for light in light_directions(kind, elevation=0.3, azimuth=1.0):
            assert math.hypot(*light) == pytest.approx(1)
    with pytest.raises(ValueError, match="light: expected one of coaxial, ring, oblique"):
        light_directions("lamp")
