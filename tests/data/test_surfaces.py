import math

import pytest
import torch

from gplws.data.randomness import Draw
from gplws.data.surfaces import SURFACES, draw_surface
from gplws.data.textures import TEXTURES, contrast, draw_texture

SHAPE = (60, 84)


def several(name, count=12, shape=SHAPE):
    return [draw_surface(name, shape, Draw(seed)) for seed in range(count)]


@pytest.mark.parametrize("name", sorted(SURFACES))
def test_every_surface_is_scaled_finite_repeatable_and_varied(name):
    found = several(name, 8)
    for surface in found:
        assert surface.height.shape == surface.region.shape == SHAPE
        assert surface.height.dtype == surface.region.dtype == torch.float32
        for part in surface:
            assert part.isfinite().all() and part.min() >= 0 and part.max() <= 1
        assert surface.height.max() > 0.99 or surface.height.max() == 0  # flat only if nothing fits
    assert sum(float(s.height.max()) > 0.99 for s in found) >= 6
    again = draw_surface(name, SHAPE, Draw(3))
    assert torch.equal(again.height, found[3].height)
    assert not torch.equal(found[2].height, found[3].height)


def test_a_plane_has_one_slope():
    for surface in several("plane"):
        for axis in (0, 1):
            slope = surface.height.diff(dim=axis)
            assert (slope - slope.mean()).abs().max() < 1e-5


def test_balls_are_spheres_or_caps_of_spheres():
    # On a sphere, height in pixels^2 plus distance^2 is constant: the second difference of
    # height^2 along a row is -2 pixel^2. Where the scale is unknown, compare rows with columns.
    surface = draw_surface("spheres", (128, 128), Draw(7))
    top = int(surface.height.argmax())
    row, column = divmod(top, 128)
    around = surface.height[row - 3 : row + 4, column - 3 : column + 4]
    if around.shape == (7, 7):
        curvature = [around.diff(n=2, dim=axis).mean() for axis in (0, 1)]
        assert float(curvature[0]) == pytest.approx(float(curvature[1]), rel=0.3)
        assert curvature[0] < 0


def test_step_terraces_are_flat_between_their_edges():
    flat = []
    for surface in several("steps", shape=(128, 128)):
        down, right = (surface.height.diff(dim=d).abs() < 1e-6 for d in (0, 1))
        flat.append(float((down[:, 1:] & right[1:]).float().mean()))
    assert torch.tensor(flat).median() > 0.7


def test_fractal_roughness_is_smoother_the_larger_the_scale():
    # Self-affine: the mean difference grows with distance, slower than the distance.
    for surface in several("fractal", 6, (256, 256)):
        near = (surface.height[16:] - surface.height[:-16]).abs().mean()
        far = (surface.height[48:] - surface.height[:-48]).abs().mean()
        assert near < far < 3.2 * near


def test_holes_are_below_the_plate_and_their_region_covers_them():
    sunk = [s for s in several("holes", 20) if float(s.height.median()) > 0.9]
    assert len(sunk) >= 8
    for surface in sunk:
        assert surface.height[surface.region > 0.5].max() < surface.height.median()


def test_a_silhouette_is_far_in_front_of_its_background():
    gaps = []
    for surface in several("silhouette", 16):
        front = surface.region > 0.5
        gaps.append(surface.height[front].min() - surface.height[~front].max())
    assert min(gaps) > 0.15 and max(gaps) > 0.5


def test_fibres_are_as_wide_as_they_are_round():
    surface = draw_surface("fibres", (128, 128), Draw(3))
    assert 0.01 < float(surface.region.mean()) < 0.9
    assert surface.height[surface.region > 0.5].mean() > surface.height[surface.region < 0.5].mean()


def test_machined_surfaces_repeat_along_the_tool_path():
    # Cusps: neighbouring passes are alike, so the spectrum has a peak.
    surface = draw_surface("machined", (256, 256), Draw(5))
    power = torch.fft.rfft2(surface.height - surface.height.mean()).abs() ** 2
    power[0, 0] = 0
    assert power.max() > 100 * power.mean() and math.isfinite(float(power.max()))


@pytest.mark.parametrize("name", sorted(TEXTURES))
def test_every_texture_is_an_albedo_repeatable_and_varied(name):
    found = [draw_texture(name, SHAPE, Draw(seed)) for seed in range(6)]
    for texture in found:
        assert texture.shape == SHAPE and texture.isfinite().all()
        assert texture.min() >= 0 and texture.max() <= 1
    assert torch.equal(draw_texture(name, SHAPE, Draw(2)), found[2])
    if name == "bare":
        assert all(not texture.std() for texture in found)
    else:
        assert not torch.equal(found[1], found[2])
        assert sum(float(texture.std()) > 0.02 for texture in found) >= 5


@pytest.mark.parametrize("name", ["stains", "stripes", "print_dots", "print_marks"])
def test_prints_have_two_levels_and_hard_edges(name):
    for seed in range(4):
        texture = draw_texture(name, (128, 128), Draw(seed))
        # Edges are a pixel or two wide; the finest patterns consist of little else.
        between = ((texture > 0.02) & (texture < 0.98)).float().mean()
        assert between < (0.8 if name in ("stripes", "print_dots") else 0.4)
        assert texture.min() == 0 and texture.max() == 1


def test_brushed_metal_is_streaky():
    for seed in range(4):
        texture = draw_texture("brushed", (128, 128), Draw(seed))
        gradients = torch.stack(torch.gradient(texture)).flatten(1)
        spread = torch.linalg.eigvalsh(gradients @ gradients.T)
        assert spread[1] > 5 * spread[0]


def test_contrast_spans_the_albedos_asked_for():
    found = contrast(torch.tensor([3.0, 5.0, 4.0]), 0.2, 0.6)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.6, 0.4]))


def test_unknown_kinds_and_small_shapes_are_named():
    with pytest.raises(ValueError, match=r"surface: expected one of cells, .*, got 'moon'"):
        draw_surface("moon", SHAPE, Draw(0))
    with pytest.raises(ValueError, match=r"texture: expected one of bare, .*, got 'wool'"):
        draw_texture("wool", SHAPE, Draw(0))
    for draw in (draw_surface, draw_texture):
        with pytest.raises(ValueError, match="shape: expected at least 8 x 8"):
            draw("cells" if draw is draw_surface else "grain", (4, 90), Draw(0))
