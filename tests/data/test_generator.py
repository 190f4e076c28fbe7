"""The generator: what it promises about its batches, and whether their truth is true."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gplws.data import StackGenerator, StackSettings, read_topographies
from gplws.data.generator import draw_geometry
from gplws.data.randomness import Draw
from gplws.data.topographies import Topography

# Well lit, well textured, little noise: what any focus measure must find.
EASY = StackSettings(
    textures=("grain", "cloudy", "speckle"),
    surfaces=("plane", "dome", "waves", "steps"),
    total_blur_px=(12.0, 25.0),
    texture_contrast=(0.7, 1.0),
    exposure=(0.4, 0.5),
    full_well_electrons=(50000.0, 60000.0),
    read_noise_electrons=(1.0, 2.0),
    bit_depths=(12,),
    strong_materials=0.0,
    gloss=0.0,
    jpeg=0.0,
    jitter=0.0,
    magnification=0.0,
    psfs=("wave", "disk"),
    numerical_aperture=(0.1, 0.4),
    cutoff=(0.8, 1.5),
    roughness=(0.0005, 0.001),
    second_surface=0.0,
)


def sharpest_frame(stack: torch.Tensor) -> torch.Tensor:
    """Frame of the largest local variance, refined by a parabola: (B, H, W) of (B, 1, N, H, W)."""
    batch, _, frames, height, width = stack.shape
    flat = stack.reshape(batch * frames, 1, height, width)
    flat = flat / flat.mean((2, 3), keepdim=True)
    detail = flat - F.avg_pool2d(flat, 5, 1, 2, count_include_pad=False)
    energy = F.avg_pool2d(detail**2, 9, 1, 4, count_include_pad=False)
    energy = energy.view(batch, frames, height, width).log()
    best = energy.argmax(1, keepdim=True).clamp(1, frames - 2)
    left, middle, right = (energy.gather(1, best + k)[:, 0] for k in (-1, 0, 1))
    offset = 0.5 * (left - right) / (left - 2 * middle + right).clamp(max=-1e-6)
    return best[:, 0] + offset.clamp(-1, 1)


@pytest.mark.parametrize(
    ("frames", "crop", "size"), [(10, 32, 2), (2, (16, 40), 3), (5, 24, 1), (100, 16, 1)]
)
@pytest.mark.parametrize("unit", ["frames", "um"])
def test_batches_are_samples_of_the_shape_asked_for(frames, crop, size, unit):
    sample = StackGenerator(StackSettings(unit=unit), seed=1).batch(3, size, frames, crop)
    height, width = (crop, crop) if isinstance(crop, int) else crop
    assert sample.stack.shape == (size, 1, frames, height, width)
    assert sample.all_in_focus.shape == (size, 1, height, width)
    assert sample.unit == unit
    assert sample.stack.min() >= 0 and sample.stack.max() <= 1
    steps = sample.focus_positions.diff(dim=1)
    assert (steps > 0).all() or (steps < 0).all()
    assert sample.depth[sample.valid].isfinite().all()


def test_a_seed_and_a_step_repeat_and_others_do_not():
    first = StackGenerator(seed=5).batch(7, 2, 4, 32)
    again = StackGenerator(seed=5)
    again.batch(0, 1, 3, 16)  # what was drawn before does not matter
    again = again.batch(7, 2, 4, 32)
    for field in ("stack", "depth", "valid", "focus_positions", "all_in_focus"):
        assert torch.equal(
            getattr(first, field).nan_to_num(), getattr(again, field).nan_to_num()
        ), field
    assert not torch.equal(first.stack, StackGenerator(seed=5).batch(8, 2, 4, 32).stack)
    assert not torch.equal(first.stack, StackGenerator(seed=6).batch(7, 2, 4, 32).stack)
    steps = StackGenerator(seed=5).batches(2, 4, 32, first_step=7)
    assert torch.equal(next(steps).stack, first.stack)
    assert "step 8" in next(steps).name


def test_the_sharpest_frame_is_the_true_one_on_well_textured_scenes():
    generator = StackGenerator(EASY, seed=0)
    errors = []
    for step in range(6):
        sample = generator.batch(step, 2, 10, 64)
        # Away from walls: a window over two heights has two sharpest frames.
        depth = sample.depth[:, None]
        rough = F.max_pool2d(depth, 9, 1, 4) - F.max_pool2d(-depth, 9, 1, 4).neg()
        calm = sample.valid & (rough[:, 0] < 1) & (sample.depth > 1) & (sample.depth < 8)
        errors.append((sharpest_frame(sample.stack) - sample.depth)[calm])
    error = torch.cat(errors)
    assert error.numel() > 5000
    assert error.abs().median() < 0.15
    assert abs(float(error.median())) < 0.05
    assert (error.abs() < 0.5).float().mean() > 0.9


def test_truth_in_um_is_the_truth_in_frames():
    by_unit = {}
    for unit in ("frames", "um"):
        settings = StackSettings(unit=unit, irregular=1.0)
        by_unit[unit] = StackGenerator(settings, seed=2).batch(1, 2, 6, 32)
    assert torch.equal(by_unit["um"].stack, by_unit["frames"].stack)
    torch.testing.assert_close(
        by_unit["um"].depth_index(), by_unit["frames"].depth, equal_nan=True, rtol=0, atol=1e-3
    )


def test_what_lies_out_of_the_focus_range_is_not_valid():
    settings = StackSettings(out_of_range=1.0, relief=(0.5, 1.0))
    shares = []
    for step in range(6):
        sample = StackGenerator(settings, seed=3).batch(step, 2, 6, 32)
        assert not sample.valid[sample.depth.isnan()].any()
        shares.append(float(sample.depth.isnan().float().mean()))
    assert 0.02 < sum(shares) / len(shares) < 0.6


def test_where_focus_stands_still_frames_differ_by_noise_only():
    differ = {}
    for still in (0.0, 1.0):
        settings = dataclasses.replace(EASY, still=still, gain_drift=0.0)
        sample = StackGenerator(settings, seed=5).batch(0, 2, 6, 48)
        differ[still] = sample.stack.diff(dim=2).square().mean().sqrt().item()
        assert sample.valid.float().mean() > 0.5
    noise = 1 / 50_000**0.5  # of a full well, as a share of the largest value
    assert differ[1.0] < 1.5 * noise
    assert differ[0.0] > 5 * noise


@pytest.mark.parametrize("deviation", [0.03, 0.2])
def test_bare_scenes_have_the_grain_asked_for(deviation):
    # Flat, and lit from above: nothing else is seen.
    settings = dataclasses.replace(
        EASY,
        surfaces=("plane",),
        relief=(1e-6, 1.1e-6),
        textures=("bare",),
        two_materials=0.0,
        lights=("coaxial",),
        grain_contrast=(deviation, 1.001 * deviation),
    )
    relative = []
    for grain in (1.0, 0.0):
        generator = StackGenerator(dataclasses.replace(settings, grain=grain), seed=2)
        sharp = torch.cat([generator.batch(step, 2, 3, 48).all_in_focus for step in range(3)])
        rest = sharp - F.avg_pool2d(sharp, 9, 1, 4, count_include_pad=False)
        relative.append((rest.std((1, 2, 3)) / sharp.mean((1, 2, 3))).median().item())
    with_grain, without = relative
    assert (with_grain**2 - without**2) ** 0.5 == pytest.approx(deviation, rel=0.15)


@pytest.mark.parametrize("deviation", [0.01, 0.05])
def test_the_pattern_of_the_sensor_is_the_same_in_all_frames(deviation):
    settings = dataclasses.replace(
        EASY,
        surfaces=("plane",),
        textures=("bare",),
        two_materials=0.0,
        grain=0.0,
        lights=("coaxial",),
        full_well_electrons=(1e8, 1e8),
        bit_depths=(16,),
        vignetting=0.0,
        gain_drift=0.0,
        gamma=0.0,
    )
    relative = {}
    for chance in (0.0, 1.0):
        changed = dataclasses.replace(
            settings,
            fixed_pattern=chance,
            fixed_pattern_deviation=(deviation, 1.001 * deviation),
        )
        generator = StackGenerator(changed, seed=3)
        stacks = torch.cat([generator.batch(step, 2, 4, 48).stack[:, 0] for step in range(3)])
        relative[chance] = stacks / stacks.mean((2, 3), keepdim=True)  # (B, N, H, W)
    pattern = relative[1.0] - relative[0.0]
    assert pattern.std((2, 3)).mean().item() == pytest.approx(deviation, rel=0.1)
    assert (pattern - pattern.mean(1, keepdim=True)).std() < 0.1 * deviation


def test_displaced_frames_move_by_as_much_as_asked():
    # Flat, sharp scenes without noise: the shift follows from the gradient.
    still = StackSettings(
        surfaces=("plane",),
        textures=("cloudy",),
        relief=(0.01, 0.011),
        total_blur_px=(3.0, 3.1),
        second_surface=0.0,
        texture_contrast=(0.9, 1.0),
        full_well_electrons=(1e6, 1e6),
        read_noise_electrons=(1.0, 1.0),
        bit_depths=(16,),
        gain_drift=0.0,
        vignetting=0.0,
        jpeg=0.0,
        gamma=0.0,
        magnification=0.0,
        jitter=0.0,
        residual_blur_px=(0.8, 0.9),
        cutoff=(0.4, 0.5),
        out_of_range=0.0,
        psfs=("gaussian",),
    )
    moving = dataclasses.replace(still, jitter=1.0, jitter_px=(0.3, 0.30001))
    found = []
    for step in range(6):
        first, second = (
            StackGenerator(settings, seed=1).batch(step, 2, 8, 64).stack[:, 0, :, 4:-4, 4:-4]
            for settings in (still, moving)
        )
        down, right = torch.gradient(first, dim=(2, 3))
        basis = torch.stack([down, right], -1).flatten(2, 3)  # (B, N, P, 2)
        change = (first - second).flatten(2)[..., None]
        found.append(torch.linalg.lstsq(basis, change).solution.flatten())
    assert float(torch.cat(found).std()) == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize("frames", [5, 10, 30, 100])
def test_geometry_stays_within_its_ranges(frames):
    settings = StackSettings()
    rising = 0
    uneven = 0
    widest = []
    for seed in range(60):
        geometry = draw_geometry(settings, frames, Draw(seed))
        steps = geometry.focus_um.double().diff()
        assert (steps > 0).all() or (steps < 0).all()
        rising += bool(steps[0] > 0)
        uneven += bool(steps.abs().max() > 1.01 * steps.abs().min())
        per_frame = geometry.widest_px / (frames - 1)
        assert 0.299 < per_frame < 6.001
        assert geometry.widest_px < 60.01
        assert 0.05 <= geometry.lens.numerical_aperture <= 0.9
        assert 0.4 <= geometry.lens.cutoff * 1.0001 <= 2.501
        widest.append(geometry.widest_px)
    assert 15 < rising < 45 and 3 < uneven < 30
    assert max(widest) > min(6 * (frames - 1), 60) * 0.7


def test_scenes_cover_weak_and_hard_ones():
    generator = StackGenerator(seed=0)
    contrast, noise, clipped, jumps = [], [], [], []
    for step in range(20):
        sample = generator.batch(step, 2, 4, 48)
        image = sample.all_in_focus[:, 0]
        contrast += (image.std((1, 2)) / image.mean((1, 2)).clamp(min=0.01)).tolist()
        clipped += (sample.stack >= 1).float().mean((1, 2, 3, 4)).tolist()
        jump = sample.depth.nan_to_num().diff(dim=2).abs().amax((1, 2))
        jumps += jump.tolist()
        fine = sample.stack - 0.5 * (sample.stack.roll(1, 4) + sample.stack.roll(-1, 4))
        noise += fine.std((1, 2, 3, 4)).tolist()
    for values, low, high in ((contrast, 0.07, 0.5), (noise, 0.01, 0.05), (jumps, 0.2, 1.5)):
        assert min(values) < low and max(values) > high
    assert sum(share < 0.05 for share in clipped) > 30


def test_measured_surfaces_and_pictures_are_used():
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(220.0), indexing="ij")
    ramp = Topography(x / 20 + 0 * y, None, "ramp")
    stripes = ((x // 8) % 2).expand(3, -1, -1).contiguous()
    settings = StackSettings(
        channels=3, measured_share=1.0, picture_share=1.0, second_surface=0.0, out_of_range=0.0
    )
    used = StackGenerator(settings, topographies=[ramp], textures=[stripes], seed=0)
    plain = StackGenerator(settings, seed=0)
    sample = used.batch(0, 2, 5, 32)
    assert sample.stack.shape == (2, 3, 5, 32, 32)
    assert not torch.equal(sample.stack, plain.batch(0, 2, 5, 32).stack)
    with pytest.raises(ValueError, match=r"textures: expected .1 or 3, H, W."):
        StackGenerator(textures=[torch.zeros(4, 4)])


@pytest.mark.shared
def test_it_draws_from_the_measured_topographies(shared_dir):
    found = read_topographies([shared_dir / "data/topo"])
    settings = StackSettings(measured_share=1.0)
    sample = StackGenerator(settings, topographies=found, seed=0).batch(0, 4, 5, 48)
    assert sample.valid.float().mean() > 0.5 and sample.stack.isfinite().all()


def test_settings_may_be_the_lists_of_a_configuration():
    settings = StackSettings(unit="um", jitter_px=(0.1, 0.2), surfaces=("holes", "pads"))
    lists = StackSettings(unit="um", jitter_px=[0.1, 0.2], surfaces=["holes", "pads"])
    assert lists == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unit": "mm"}, "unit: expected 'frames' or 'um'"),
        ({"channels": 2}, "channels"),
        ({"jitter": 1.5}, "jitter: expected 0..1"),
        ({"relief": (1.0, 0.5)}, "relief: expected 0 <= low <= high"),
        ({"cutoff": (0.0, 0.5)}, "cutoff: expected low > 0"),
        ({"surfaces": ("holes", "moon")}, "surfaces: expected some of .*fractal"),
        ({"textures": ()}, "textures: expected some of"),
        ({"psfs": ("box",)}, "psfs"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        StackSettings(**values)


@pytest.mark.parametrize(
    "arguments", [{"step": -1}, {"batch_size": 0}, {"frames": 1}, {"crop": 7}, {"crop": (7, 20)}]
)
def test_wrong_batches_are_named(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected at least"):
        StackGenerator().batch(**{"step": 0, **arguments})
    with pytest.raises(ValueError, match="seed"):
        StackGenerator(seed=-1)


@pytest.mark.cuda
def test_a_gpu_draws_scenes_of_the_same_kind():
    samples = [
        StackGenerator(EASY, seed=0, device=device).batch(0, 2, 6, 48) for device in ("cpu", "cuda")
    ]
    assert samples[1].stack.is_cuda and samples[1].valid.is_cuda
    torch.testing.assert_close(samples[0].focus_positions, samples[1].focus_positions.cpu())
    error = (sharpest_frame(samples[1].stack) - samples[1].depth)[samples[1].valid].abs()
    assert error.median() < 0.3
