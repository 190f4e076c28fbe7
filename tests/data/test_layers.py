"""The batched renderer against the exact one, and against what light must do."""

import math

import pytest
import torch

from gplws.data import demo_scene, render_focal_stack
from gplws.data.layers import render_layers
from gplws.data.optics import Lens
from gplws.data.randomness import Draw, spectral_noise
from gplws.data.simulator import mirrored_indices

GEOMETRIC = Lens(1.0, 0.3, 1e-4)


def step_scene(size: int = 96) -> torch.Tensor:
    """A block of 40 um height on the right half, up to a band at the right end."""
    height = torch.zeros(1, size, size)
    height[..., size // 2 : size - 8] = 40.0
    return height


@pytest.mark.parametrize(("groups", "mean"), [(None, 0.003), (6, 0.003), (2, 0.006)])
def test_it_agrees_with_the_exact_renderer(groups, mean):
    scene, margin, size = demo_scene(96, frames=6), 24, 96
    lens = Lens(scene.pixel_size_um, 0.3)
    total = size + 2 * margin
    index = mirrored_indices(size, margin, total, torch.device("cpu"))
    exact = render_focal_stack(
        scene.height_um,
        scene.albedo,
        scene.focus_positions_um,
        pixel_size_um=scene.pixel_size_um,
        numerical_aperture=0.3,
        bit_depth=None,
    ).frames
    found = render_layers(
        scene.height_um[index][:, index][None],
        scene.albedo[index][:, index][None, None],
        scene.focus_positions_um,
        lens,
        window=(slice(margin, margin + size),) * 2,
        layer_spacing_px=0.5,
        occlusion_groups=groups,
    ).irradiance[0, 0]
    difference = (found - exact).abs()
    assert difference.mean() < mean
    # What differs lies at the walls of the steps and the hole.
    assert (difference > 0.02).float().mean() < 0.05


def test_scenes_of_a_batch_do_not_touch_each_other():
    draw = Draw(1)
    height = torch.stack([20 * spectral_noise((48, 48), draw, exponent=4) for _ in range(3)])
    radiance = draw.uniform_field(3, 2, 48, 48)
    focus = torch.tensor([-20.0, 0.0, 25.0])
    together = render_layers(height, radiance, focus, Lens(1.0, 0.3)).irradiance
    # Layers span the range of the batch, so the others' extremes are put into each.
    assert together.shape == (3, 2, 3, 48, 48)
    swapped = render_layers(height.flip(0), radiance.flip(0), focus, Lens(1.0, 0.3)).irradiance
    torch.testing.assert_close(swapped.flip(0), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 1, 4])
def test_a_uniform_scene_stays_uniform_and_light_is_conserved(groups):
    flat = torch.full((1, 1, 96, 96), 0.7)
    focus = torch.linspace(-20, 60, 5)
    found = render_layers(step_scene(), flat, focus, GEOMETRIC, occlusion_groups=groups)
    assert (found.irradiance - 0.7).abs().max() < 2e-3
    plane, radiance = torch.zeros(1, 96, 96), Draw(0).uniform_field(1, 1, 96, 96)
    found = render_layers(plane, radiance, focus, GEOMETRIC, occlusion_groups=groups)
    means = found.irradiance.mean((3, 4))
    torch.testing.assert_close(means, radiance.mean().expand_as(means), rtol=2e-3, atol=0)


def test_a_dark_block_hides_the_bright_floor_that_bleeds_over_its_rim():
    height = step_scene()
    radiance = torch.where(height > 0, 0.0, 1.0)[:, None]
    stack = render_layers(height, radiance, torch.tensor([0.0, 40.0]), GEOMETRIC).irradiance[0, 0]
    radius = 40 * GEOMETRIC.tangent  # 12.6 px
    floor, block = stack[:, 48]
    # Focus on the floor: the block's defocused rim takes light from the floor beside it.
    assert floor[20] == pytest.approx(1, abs=0.01)
    assert 0.3 < float(floor[47]) < 0.7
    assert (floor[34:48].diff() < 2e-3).all()
    # Focus on the block: no floor shines through its top, right up to the edge.
    assert block[50:86].max() < 0.03
    assert float(block[46]) > 0.9
    assert radius > 12


def test_points_that_the_light_cannot_reach_are_told():
    # A narrow and a wide hole, 60 um deep: the cone of NA 0.3 is 38 px wide at the top.
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    narrow = torch.hypot(y - 32, x - 32) < 4
    wide = torch.hypot(y - 76, x - 76) < 40
    height = torch.where(narrow | wide, 0.0, 60.0)[None]
    radiance = torch.ones(1, 1, 128, 128)
    found = render_layers(height, radiance, torch.linspace(0, 60, 7), GEOMETRIC)
    assert found.visibility[0, 32, 32] < 0.1
    assert found.visibility[0, 76, 76] > 0.9
    assert found.visibility[0, 5, 100] > 0.9


def test_whole_pixels_of_displacement_move_the_image():
    draw = Draw(3)
    height = 15 * spectral_noise((64, 64), draw, exponent=4)[None]
    radiance = draw.uniform_field(1, 1, 64, 64)
    focus = torch.linspace(-20, 20, 3)
    still = render_layers(height, radiance, focus, Lens(1.0, 0.3)).irradiance
    shift = torch.tensor([[[0.0, 0.0], [2.0, -3.0], [0.0, 5.0]]])
    moved = render_layers(height, radiance, focus, Lens(1.0, 0.3), shift_px=shift).irradiance
    for frame, (down, right) in enumerate(shift[0].int().tolist()):
        expected = still[0, 0, frame].roll((down, right), (0, 1))
        assert (moved[0, 0, frame] - expected).abs().max() < 1e-3


def test_magnification_scales_about_the_middle():
    # A bright spot at 20 px from the middle moves to 22 px.
    size, scale = 96, 1.1
    radiance = torch.full((1, 1, size, size + 1), 0.1)
    radiance[0, 0, 48, 48 + 20] = 10.0
    height = torch.zeros(1, size, size + 1)
    blurred = Lens(1.0, 0.3, 1e-4, residual_blur_px=1.0)
    plain, larger = (
        render_layers(
            height,
            radiance,
            torch.zeros(1),
            blurred,
            magnification=torch.full((1, 1), factor),
        ).irradiance[0, 0, 0]
        for factor in (1.0, scale)
    )
    x = torch.arange(size + 1.0) - 48

    def middle(image):
        light = (image - 0.1).sum(0)
        return float((light * x).sum() / light.sum())

    assert middle(plain) == pytest.approx(20, abs=0.05)
    assert middle(larger) == pytest.approx(22, abs=0.1)
    still = render_layers(height, radiance, torch.zeros(1), blurred).irradiance[0, 0, 0]
    torch.testing.assert_close(plain, still, rtol=0, atol=1e-4)


def test_displacement_and_magnification_go_together():
    draw = Draw(4)
    radiance = spectral_noise((64, 64), draw, shortest_px=8)[None, None] + 5
    height, focus = torch.zeros(1, 64, 64), torch.zeros(1)
    shift = torch.tensor([[[0.4, -0.7]]])
    by_phase = render_layers(height, radiance, focus, GEOMETRIC, shift_px=shift).irradiance
    by_waves = render_layers(
        height, radiance, focus, GEOMETRIC, shift_px=shift, magnification=torch.ones(1, 1)
    ).irradiance
    torch.testing.assert_close(by_phase, by_waves, rtol=0, atol=1e-3)


def test_many_frames_in_chunks_are_the_frames_one_by_one(monkeypatch):
    draw = Draw(5)
    height = 15 * spectral_noise((40, 40), draw, exponent=4)[None]
    radiance = draw.uniform_field(1, 1, 40, 40)
    focus = torch.linspace(-20, 20, 7)
    shift = draw.normal_field(1, 7, 2)
    whole = render_layers(height, radiance, focus, GEOMETRIC, shift_px=shift)
    monkeypatch.setattr("gplws.data.layers._CHUNK_ELEMENTS", 1)
    parts = render_layers(height, radiance, focus, GEOMETRIC, shift_px=shift)
    torch.testing.assert_close(parts.irradiance, whole.irradiance, rtol=0, atol=2e-4)
    torch.testing.assert_close(parts.visibility, whole.visibility, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height_um": torch.zeros(8, 8)}, "height_um: expected .B, P, Q."),
        ({"radiance": torch.zeros(1, 1, 8, 9)}, r"radiance: expected \(1, C, 8, 8\)"),
        ({"focus_positions_um": torch.zeros(0)}, "focus_positions_um"),
        ({"layer_spacing_px": 0.0}, "layer_spacing_px"),
        ({"occlusion_groups": 0}, "occlusion_groups"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    usual = {
        "height_um": torch.zeros(1, 8, 8),
        "radiance": torch.zeros(1, 1, 8, 8),
        "focus_positions_um": torch.zeros(2),
        "lens": Lens(1.0, 0.3),
    }
    with pytest.raises(ValueError, match=message):
        render_layers(**{**usual, **arguments})


def test_the_radius_of_what_is_out_of_focus_is_the_geometric_one():
    radiance = torch.full((1, 1, 97, 97), 0.1)
    radiance[0, 0, 48, 48] = 25.0
    focus = torch.tensor([0.0, 30.0, -60.0])
    frames = render_layers(torch.zeros(1, 97, 97), radiance, focus, GEOMETRIC).irradiance[0, 0]
    x = torch.arange(97.0) - 48
    for frame, position in zip(frames, focus, strict=True):
        light = (frame - 0.1).double().sum(0)
        radius = 2 * math.sqrt(max(float((light * x**2).sum() / light.sum()), 0))
        assert radius == pytest.approx(abs(float(position)) * GEOMETRIC.tangent, rel=0.03, abs=0.1)
