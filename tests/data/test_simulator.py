"""The simulator against optics: sharpness, blur, energy, occlusion, noise."""

import math

import pytest
import torch
from torch import Tensor

from gplws.data import demo_scene, render_focal_stack
from gplws.data.simulator import blur_radius_um, surface_shading

OPTICS = {"pixel_size_um": 1.0, "numerical_aperture": 0.3, "bit_depth": None}
TANGENT = math.tan(math.asin(0.3))
# Wavelength so short that only geometric blur is left.
GEOMETRIC = {**OPTICS, "wavelength_um": 1e-4}

VALUE = 2e-3  # brightness
RADIUS = 0.02  # share of the blur radius
PEAK = 0.15  # frames


def grain(size: int, seed: int = 0) -> Tensor:
    return 0.2 + 0.6 * torch.rand(size, size, generator=torch.Generator().manual_seed(seed))


def point(size: int, brightness: float = 25.0, background: float = 0.1) -> Tensor:
    albedo = torch.full((size, size), background)
    albedo[size // 2, size // 2] += brightness
    return albedo


def second_moment(image: Tensor, background: float = 0.1) -> float:
    """Variance along x of the light above the background, px^2."""
    place = torch.arange(image.shape[1], dtype=torch.float64) - image.shape[1] // 2
    light = (image.double() - background).sum(0)
    return float((light * place**2).sum() / light.sum())


@pytest.mark.parametrize("psf", ["disk", "gaussian"])
@pytest.mark.parametrize("refractive_index", [1.0, 1.33])
def test_blur_grows_with_defocus_at_the_rate_of_the_aperture(psf, refractive_index):
    size, height = 129, 40.0
    focus = torch.tensor([-20.0, 0.0, 20.0, 70.0, 100.0])
    stack = render_focal_stack(
        torch.full((size, size), height),
        point(size),
        focus,
        psf=psf,
        refractive_index=refractive_index,
        **GEOMETRIC,
    )
    rate = math.tan(math.asin(0.3 / refractive_index))
    for frame, position in zip(stack.frames, focus, strict=True):
        radius = 2 * math.sqrt(second_moment(frame))  # of a disk: variance is radius^2 / 4
        assert radius == pytest.approx(rate * abs(height - float(position)), rel=RADIUS)
    expected = blur_radius_um(height - focus, numerical_aperture=0.3)
    torch.testing.assert_close(expected, TANGENT * (height - focus).abs())


def test_a_plane_in_focus_is_sharp_to_the_diffraction_limit():
    # A grating passes with the contrast of the diffraction-limited lens, and none beyond cutoff.
    size, wavelength, aperture = 120, 0.6, 0.15
    cutoff = 2 * aperture / wavelength  # 0.5 cycles per um
    for period in (40, 8, 4, 3):
        x = torch.arange(size, dtype=torch.float32)
        albedo = (0.5 + 0.4 * torch.cos(2 * math.pi * x / period)).repeat(size, 1)
        stack = render_focal_stack(
            torch.zeros(size, size),
            albedo,
            torch.tensor([0.0]),
            pixel_size_um=0.8,
            numerical_aperture=aperture,
            wavelength_um=wavelength,
            bit_depth=None,
        )
        s = min(1 / (period * 0.8) / cutoff, 1.0)
        contrast = 2 / math.pi * (math.acos(s) - s * math.sqrt(1 - s * s))
        # Mirrored borders break the grating's phase: look at the middle only.
        middle = stack.frames[0, 60, 30:90]
        assert float(middle.max() - middle.min()) == pytest.approx(0.8 * contrast, abs=0.02)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_a_uniform_surface_stays_uniform(slope):
    height = slope * torch.arange(96.0).repeat(80, 1)
    stack = render_focal_stack(
        height, torch.full((80, 96), 0.7), torch.linspace(-30, 50, 5), **OPTICS
    )
    assert (stack.frames - 0.7).abs().max() < VALUE


def test_steps_and_holes_have_no_dark_seams():
    height = torch.full((96, 96), 60.0)
    height[30:66, 30:66] = 0.0
    height[:, 80:] = 25.0
    stack = render_focal_stack(
        height, torch.full((96, 96), 0.7), torch.linspace(-10, 70, 5), **OPTICS
    )
    assert (stack.frames - 0.7).abs().max() < VALUE


@pytest.mark.parametrize("focus", [-40.0, 0.0, 25.0])
def test_light_is_conserved(focus):
    size = 101
    albedo = point(size, brightness=0.9)
    stack = render_focal_stack(torch.zeros(size, size), albedo, torch.tensor([focus]), **OPTICS)
    assert float(stack.frames.mean()) == pytest.approx(float(albedo.mean()), rel=VALUE / 10)


def test_a_gentle_slope_is_the_sum_of_its_blurred_parts():
    # Without occlusion imaging is linear in the albedo.
    height = 0.1 * torch.arange(90.0).repeat(90, 1)
    focus = torch.tensor([0.0, 12.0])
    first, second = 0.5 * grain(90, 1), 0.5 * grain(90, 2)
    parts = [render_focal_stack(height, a, focus, **OPTICS).frames for a in (first, second)]
    both = render_focal_stack(height, first + second, focus, **OPTICS).frames
    assert (both - sum(parts)).abs().max() < VALUE


def test_a_high_wall_hides_what_is_behind_it_out_of_focus():
    # Black floor beside a white block: seen in focus, the floor far from the wall is black; near it
    # the block cuts off part of the light cone, and its own blurred light takes that part.
    height = torch.zeros(120, 120)
    height[:, 60:] = 80.0
    albedo = torch.where(height > 0, 1.0, 0.0)
    frame = render_focal_stack(height, albedo, torch.tensor([0.0]), **GEOMETRIC).frames[0, 60]
    radius = 80 * TANGENT  # 25 px
    assert frame[: 60 - math.ceil(radius) - 3].max() < VALUE
    assert float(frame[60 - 1]) == pytest.approx(0.5, abs=0.05)
    assert (frame[35:60].diff() > -VALUE).all()
    # In focus, the block's edge does not let the floor behind it shine through.
    top = render_focal_stack(height, albedo, torch.tensor([80.0]), **GEOMETRIC).frames[0, 60]
    assert top[63:].min() > 0.97


def test_the_sharpest_frame_is_where_the_height_is():
    size = 96
    heights = torch.tensor([12.0, 31.0, 46.5])
    height = heights.repeat_interleave(size // 3).repeat(size, 1)
    focus = torch.arange(0.0, 61.0, 3.0)
    stack = render_focal_stack(height, grain(size), focus, **OPTICS)
    detail = (stack.frames - stack.frames.mean((1, 2), keepdim=True)).diff(dim=1) ** 2
    for k, expected in enumerate(heights):
        inner = slice(k * 32 + 11, k * 32 + 21)
        energy = detail[:, :, inner].mean((1, 2)).log()
        best = int(energy.argmax())
        left, middle, right = energy[best - 1 : best + 2]
        found = best + 0.5 * (left - right) / (left - 2 * middle + right)
        assert float(found) == pytest.approx(float(expected) / 3, abs=PEAK)
        assert (stack.depth_index[:, inner] - expected / 3).abs().max() < 1e-4


def test_disk_and_gaussian_blur_agree_in_width():
    arguments = (torch.zeros(97, 97), point(97), torch.tensor([30.0]))
    disk, gaussian = (
        render_focal_stack(*arguments, psf=psf, **GEOMETRIC).frames[0]
        for psf in ("disk", "gaussian")
    )
    assert second_moment(disk) == pytest.approx(second_moment(gaussian), rel=2 * RADIUS)


def test_photon_and_read_noise_have_their_variance():
    full_well, read_noise, signal = 5000.0, 20.0, 0.4
    stack = render_focal_stack(
        torch.zeros(128, 128),
        torch.full((128, 128), signal),
        torch.tensor([0.0, 1.0]),
        full_well_electrons=full_well,
        read_noise_electrons=read_noise,
        **OPTICS,
    )
    electrons = stack.frames * full_well
    assert float(electrons.mean()) == pytest.approx(signal * full_well, rel=0.01)
    assert float(electrons.var()) == pytest.approx(signal * full_well + read_noise**2, rel=0.05)
    assert not torch.equal(stack.frames[0], stack.frames[1])


def test_a_seed_repeats_and_another_does_not():
    def noisy(seed: int) -> Tensor:
        return render_focal_stack(
            torch.zeros(16, 16),
            grain(16),
            torch.tensor([0.0, 5.0]),
            full_well_electrons=1000,
            seed=seed,
            **OPTICS,
        ).frames

    assert torch.equal(noisy(3), noisy(3)) and not torch.equal(noisy(3), noisy(4))


@pytest.mark.parametrize("bit_depth", [8, 10, 12, 16])
def test_values_are_quantised_over_the_range_of_their_type(bit_depth):
    albedo = torch.linspace(0, 1.2, 4096).view(64, 64)  # the brightest are clipped
    optics = {**OPTICS, "bit_depth": bit_depth, "numerical_aperture": 0.9, "wavelength_um": 0.1}
    stack = render_focal_stack(torch.zeros(64, 64), albedo, torch.tensor([0.0]), **optics)
    assert stack.frames.dtype == (torch.uint8 if bit_depth == 8 else torch.uint16)
    values = stack.frames.to(torch.int64)
    assert int(values.max()) == (255 if bit_depth == 8 else 65535)
    levels = values.unique().double() / values.max() * (2**bit_depth - 1)
    assert (levels - levels.round()).abs().max() < 0.01 * 2 ** (bit_depth - 8)


def test_color_is_three_gray_renderings():
    height = torch.zeros(40, 40)
    height[:, 20:] = 15.0
    focus = torch.tensor([0.0, 10.0])
    color = torch.stack([grain(40, seed) for seed in range(3)], -1)
    found = render_focal_stack(height, color, focus, **OPTICS)
    assert found.frames.shape == (2, 40, 40, 3) and found.all_in_focus.shape == (40, 40, 3)
    for k in range(3):
        gray = render_focal_stack(height, color[..., k], focus, **OPTICS)
        torch.testing.assert_close(found.frames[..., k], gray.frames, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3)])
def test_small_images_work(size):
    stack = render_focal_stack(
        torch.rand(size), torch.rand(size), torch.linspace(-200, 200, 3), **OPTICS
    )
    assert stack.frames.shape == (3, *size) and stack.frames.isfinite().all()


@pytest.mark.parametrize("falling", [False, True])
def test_the_true_depth_index_follows_uneven_positions(falling):
    focus = torch.tensor([0.0, 1.0, 3.0, 7.0])
    focus = focus.flip(0) if falling else focus
    height = torch.tensor([[-0.1, 0.0, 0.5, 2.0, 5.0, 7.0, 7.1]])
    stack = render_focal_stack(height, torch.ones_like(height), focus, **OPTICS)
    expected = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0]])
    expected = 3 - expected if falling else expected
    torch.testing.assert_close(stack.depth_index[:, 1:-1], expected)
    assert stack.depth_index[0, [0, -1]].isnan().all()


def test_arrays_are_taken_and_left_alone():
    height, albedo = torch.rand(8, 8), torch.rand(8, 8)
    before = height.clone(), albedo.clone()
    focus = torch.tensor([0.0, 1.0])
    by_tensor = render_focal_stack(height, albedo, focus, **OPTICS)
    by_array = render_focal_stack(height.numpy(), albedo.numpy(), focus.numpy(), **OPTICS)
    assert torch.equal(by_tensor.frames, by_array.frames)
    assert torch.equal(height, before[0]) and torch.equal(albedo, before[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height_um": torch.ones(4)}, ValueError, "height_um: expected .*H, W"),
        ({"height_um": torch.full((4, 4), torch.nan)}, ValueError, "height_um: expected finite"),
        ({"albedo": torch.ones(4, 5)}, ValueError, "albedo: expected"),
        ({"albedo": -torch.ones(4, 4)}, ValueError, "albedo: .*>= 0"),
        ({"albedo": torch.ones(4, 4) > 0}, TypeError, "albedo: .*bool"),
        ({"focus_positions_um": torch.ones(2)}, ValueError, "focus_positions_um: .*rising"),
        ({"focus_positions_um": torch.ones(0)}, ValueError, "focus_positions_um: .*N >= 1"),
        ({"pixel_size_um": 0.0}, ValueError, "pixel_size_um"),
        ({"wavelength_um": -1.0}, ValueError, "wavelength_um"),
        ({"numerical_aperture": 1.2}, ValueError, "numerical_aperture: .*refractive_index"),
        ({"refractive_index": 0.5}, ValueError, "refractive_index"),
        ({"psf": "square"}, ValueError, "psf: expected 'disk', 'gaussian' or 'wave'"),
        ({"full_well_electrons": 0.0}, ValueError, "full_well_electrons"),
        ({"read_noise_electrons": -1.0}, ValueError, "read_noise_electrons"),
        ({"bit_depth": 7}, ValueError, "bit_depth: expected 8..16"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    usual = {
        "height_um": torch.zeros(4, 4),
        "albedo": torch.ones(4, 4),
        "focus_positions_um": torch.tensor([0.0, 1.0]),
        **OPTICS,
    }
    with pytest.raises(error, match=message):
        render_focal_stack(**{**usual, **arguments})


def test_shading_is_brightest_where_the_surface_faces_the_light():
    x = torch.arange(20.0).repeat(20, 1)
    assert torch.allclose(surface_shading(torch.zeros(20, 20), 1.0), torch.tensor(1.0))
    rising = surface_shading(x, 1.0, light=(-1.0, 0.0, 1.0), ambient=0.0)  # faces left
    assert torch.allclose(rising, torch.tensor(1.0), atol=1e-5)
    assert surface_shading(-x, 1.0, light=(-1.0, 0.0, 1.0), ambient=0.0).max() < 1e-5
    with pytest.raises(ValueError, match="light"):
        surface_shading(x, 1.0, light=(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="height_um"):
        surface_shading(torch.ones(1, 4), 1.0)


@pytest.mark.parametrize("size", [32, 384])
def test_the_demo_scene_fits_its_focus_range(size):
    scene = demo_scene(size, frames=12)
    assert scene.height_um.shape == scene.albedo.shape == (size, size)
    assert scene.focus_positions_um.shape == (12,)
    assert scene.focus_positions_um[0] < scene.height_um.min()
    assert scene.focus_positions_um[-1] > scene.height_um.max()
    assert scene.albedo.min() > 0 and scene.albedo.max() < 1
    assert torch.equal(scene.height_um, demo_scene(size, frames=12).height_um)
    assert size * scene.pixel_size_um == pytest.approx(384)


def test_a_demo_scene_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="size: expected at least 32"):
        demo_scene(8)
    with pytest.raises(ValueError, match="frames: expected at least 2"):
        demo_scene(64, frames=1)


def test_the_demo_scene_renders_without_light_lost():
    scene = demo_scene(64, frames=3)
    stack = render_focal_stack(
        **scene._asdict(),
        full_well_electrons=20_000,
    )
    assert stack.frames.shape == (3, 64, 64) and stack.frames.dtype == torch.uint8
    brightness = stack.frames.float().mean((1, 2)) / 255
    assert (brightness - scene.albedo.mean()).abs().max() < 0.05


@pytest.mark.cuda
def test_it_is_the_same_on_a_gpu():
    scene = demo_scene(48, frames=3)
    arguments = {"pixel_size_um": 8.0, "numerical_aperture": 0.3, "full_well_electrons": 1000}
    found, expected = (
        render_focal_stack(
            scene.height_um.to(place), scene.albedo, scene.focus_positions_um, **arguments
        ).frames.cpu()
        for place in ("cuda", "cpu")
    )
    assert (found.int() - expected.int()).abs().float().mean() < 2
