"""Depth from focus by all classical methods: depth, validity, tiles, bad input."""

import numpy as np
import pytest
import torch
from stacks import flat_stack, noise_stack, texture, textured_stack
from torch import Tensor

from gplws.classical import (
    LOCAL_PART,
    METHODS,
    DepthFromFocus,
    depth_from_focus,
    focus_validity,
    rdf_volume,
    receptive_radius,
    refine_depth,
    regularised,
    stack_statistics,
)
from gplws.data.simulator import render_focal_stack
from gplws.io import read_stack
from gplws.positions import frame_index

# Mean absolute errors, frames.
CLEAN_ERROR = 0.02
END_ERROR = 0.1  # within a frame of the ends, where the peak is cut off
NOISY_ERROR = 0.1
TILT_ERROR = 0.08
MEASURED_ERROR = 0.12
PART_ERROR = 0.1  # 0.056 to 0.073 over the whole stack, by method
OTHER_METHODS = [method for method in METHODS if method != "rdf"]
# Agreement of two ways to the same result, frames.
SAME = 1e-5
SAME_UP_TO_NOISE = 0.1


def tilted(size: tuple[int, int], low: float, high: float) -> Tensor:
    return torch.linspace(low, high, size[1]).repeat(size[0], 1)


def mean_error(found: DepthFromFocus, depth: Tensor | float) -> float:
    return float((found.depth_index - depth).abs()[found.valid].mean())


@pytest.mark.parametrize("depth", [0.0, 0.4, 3.0, 5.37, 10.5, 11.0])
def test_a_plane_is_found_anywhere_in_the_stack(depth):
    found = depth_from_focus(textured_stack(depth, noise=0.001))
    assert found.valid.float().mean() > 0.999
    assert mean_error(found, depth) < (CLEAN_ERROR if 1 < depth < 10 else END_ERROR)


def flat_plane(height_um: float, positions: Tensor) -> Tensor:
    """(N, 64, 64) of a textured plane as a lens sees it: peaks that are no Gaussians."""
    texture = 0.5 + 0.8 * (torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) - 0.5)
    return render_focal_stack(
        torch.full((64, 64), height_um),
        texture,
        positions,
        pixel_size_um=1.0,
        numerical_aperture=0.3,
        bit_depth=None,
    ).frames


@pytest.mark.parametrize(
    ("frame", "bias", "share"), [(0, 0.02, 0.5), (0.25, 0.05, 0.95), (0.5, 0.22, 0.95)]
)
@pytest.mark.parametrize("at_last", [False, True])
@pytest.mark.parametrize("method", ["rdf", "rr"])
def test_near_the_ends_peaks_of_a_lens_are_found(method, at_last, frame, bias, share):
    positions = 2.0 * torch.arange(10)
    frames = flat_plane(2.0 * frame, positions)
    found = depth_from_focus(frames.flip(0) if at_last else frames, method=method)
    index = 9 - found.depth_index if at_last else found.depth_index
    assert abs(float(index.mean()) - frame) < bias
    assert found.valid.float().mean() > share


@pytest.mark.parametrize(
    ("height_um", "bias"), [(12, 0.01), (18, 0.03), (20, 0.75), (22, 0.15), (24, 0.25), (30, 0.05)]
)
@pytest.mark.parametrize("method", ["rdf", "mdml"])
def test_where_steps_grow_from_1_to_4_um_at_20_um_the_depth_is_not_shifted(method, height_um, bias):
    positions = torch.cat([torch.arange(20.0), torch.arange(20.0, 41, 4)])
    found = depth_from_focus(flat_plane(height_um, positions), positions, method=method)
    assert abs(float(found.depth.mean()) - height_um) < bias  # um


@pytest.mark.parametrize("method", METHODS)
def test_reversed_frames_give_the_same_confidence(method):
    frames = textured_stack(tilted((40, 48), 2, 9), n_frames=12, contrast=0.03, noise=0.006)
    found, reverse = (depth_from_focus(f, method=method) for f in (frames, frames.flip(0)))
    torch.testing.assert_close(reverse.confidence, found.confidence, rtol=0, atol=1e-4)
    torch.testing.assert_close(11 - reverse.depth_index, found.depth_index, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_depth_does_not_depend_on_the_scale_of_the_brightness(method):
    frames = textured_stack(tilted((40, 48), 2, 9), n_frames=12, contrast=0.03, noise=0.006)
    found, dark = (depth_from_focus(f, method=method) for f in (frames, frames / 16))
    torch.testing.assert_close(dark.depth_index, found.depth_index, rtol=0, atol=0.01)


@pytest.mark.parametrize("width", [0.8, 1.5, 3.0, 8.0])
def test_narrow_and_wide_peaks_are_found(width):
    frames = textured_stack(20.3, n_frames=40, width=width, noise=0.001)
    found = depth_from_focus(frames)
    assert found.valid.all() and mean_error(found, 20.3) < 0.05 * max(1, width)


def test_a_slope_with_noise_is_found():
    depth = tilted((80, 96), 3, 16)
    found = depth_from_focus(textured_stack(depth, n_frames=20, noise=0.01))
    assert found.valid.float().mean() > 0.99
    assert mean_error(found, depth) < TILT_ERROR


def test_a_step_stays_sharp():
    depth = torch.where(torch.arange(80) < 40, 4.0, 12.0).repeat(64, 1)
    found = depth_from_focus(textured_stack(depth, n_frames=17, noise=0.002))
    wrong = (found.depth_index - depth).abs() > 0.5
    assert wrong[:, :34].sum() == 0 and wrong[:, 46:].sum() == 0


@pytest.mark.parametrize("n_frames", [3, 5, 30, 100])
@pytest.mark.parametrize("sigma", [0.001, 0.02])
def test_noise_alone_is_invalid(n_frames, sigma):
    found = depth_from_focus(noise_stack(n_frames, (96, 96), sigma))
    assert found.valid.float().mean() < 0.002
    assert (found.confidence[~found.valid] == 0).all() and found.depth.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_constant_stack_is_invalid(value):
    found = depth_from_focus(torch.full((9, 40, 40), value))
    assert not found.valid.any() and found.depth.isfinite().all()


def test_an_image_that_never_changes_is_invalid():
    frames = (0.5 + 0.1 * texture((50, 50))).expand(8, -1, -1) + noise_stack(8, (50, 50), 0.001)
    assert depth_from_focus(frames).valid.float().mean() < 0.01


def test_texture_beside_an_empty_area_is_told_apart():
    frames = textured_stack(6.3, n_frames=14, size=(96, 128), contrast=0.05)
    frames[:, :, 64:] = 0.5
    frames += noise_stack(14, (96, 128), 0.004) - 0.5
    found = depth_from_focus(frames)
    assert found.valid[:, :60].all()
    assert found.valid[:, 84:].float().mean() < 0.01
    assert mean_error(found, 6.3) < NOISY_ERROR


@pytest.mark.parametrize("depth", [-4.0, 15.0])
def test_a_surface_out_of_the_focus_range_is_invalid(depth):
    found = depth_from_focus(textured_stack(depth, width=3.0, noise=0.0002))
    assert found.valid.float().mean() < 0.02


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_find_a_slope_with_noise(method):
    depth = tilted((56, 72), 3, 11)
    found = depth_from_focus(textured_stack(depth, n_frames=14, noise=0.004), method=method)
    assert found.valid.float().mean() > 0.98
    assert mean_error(found, depth) < 1.5 * TILT_ERROR
    assert found.confidence.min() >= 0 and found.confidence.max() <= 1


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_to_other_methods_noise_alone_is_invalid(method):
    found = depth_from_focus(noise_stack(12, (64, 64), 0.01), method=method)
    assert found.valid.float().mean() < 0.01
    assert depth_from_focus(torch.full((5, 20, 20), 0.5), method=method).valid.sum() == 0


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_tiles_of_other_methods_agree_with_the_whole_image(method):
    frames = textured_stack(tilted((20, 190), 1, 6), n_frames=7, noise=0.01)
    statistics = stack_statistics(frames)
    local, edge = LOCAL_PART.get(method, method), 60
    whole = depth_from_focus(frames, method=local, statistics=statistics)
    tile = frames[:, :, : edge + receptive_radius(method)]
    found = depth_from_focus(tile, method=local, statistics=statistics)
    inner = (..., slice(0, edge))
    torch.testing.assert_close(found.depth[inner], whole.depth[inner], rtol=0, atol=1e-3)
    assert torch.equal(found.valid[inner], whole.valid[inner])


def test_the_last_step_of_rr_is_the_regularisation():
    frames = textured_stack(tilted((40, 48), 2, 7), n_frames=9, contrast=0.02, noise=0.004)
    positions = torch.arange(9.0) * 3
    searched = depth_from_focus(frames, positions, method=LOCAL_PART["rr"])
    guide = frames.gather(0, searched.index[None])[0]
    expected = regularised(searched, guide, positions)
    found = depth_from_focus(frames, positions, method="rr")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.depth, found.depth_index * 3)
    assert mean_error(found, tilted((40, 48), 2, 7)) < mean_error(searched, tilted((40, 48), 2, 7))


@pytest.mark.parametrize("refinement", ["surface", "gaussian", "parabola", "none"])
@pytest.mark.parametrize("uneven", [False, True])
def test_every_refinement_finds_a_plane(refinement, uneven):
    positions = torch.arange(12.0)
    if uneven:
        positions = positions + 0.3 * torch.sin(positions)
    frames = textured_stack(5.3, width=2.0, positions=positions, noise=0.001)
    found = depth_from_focus(frames, positions, refinement=refinement)
    error = (found.depth - 5.3).abs().mean()
    limits = {"surface": 0.03, "gaussian": 0.03, "parabola": 0.1}
    if refinement == "none":
        assert torch.equal(found.depth, positions[found.index]) and error < 0.6
    else:
        assert error < limits[refinement]


def test_tiles_agree_with_the_whole_image():
    depth = tilted((300, 40), 1, 10).flip(0)
    frames = textured_stack(depth, noise=0.01)
    statistics = stack_statistics(frames)
    whole = depth_from_focus(frames, statistics=statistics)
    reach = receptive_radius("rdf")
    for begin, end in ((0, 100), (100, 201), (201, 300)):
        first, last = max(begin - reach, 0), min(end + reach, 300)
        tile = depth_from_focus(frames[:, first:last], statistics=statistics)
        inner = slice(begin - first, end - first)
        for name in ("depth", "depth_index", "confidence", "peak"):
            torch.testing.assert_close(
                getattr(tile, name)[inner], getattr(whole, name)[begin:end], rtol=0, atol=SAME
            )
        assert torch.equal(tile.valid[inner], whole.valid[begin:end])


def test_the_reach_is_not_exceeded():
    frames = textured_stack(tilted((20, 240), 1, 10), noise=0.01)
    statistics = stack_statistics(frames)
    before = depth_from_focus(frames, statistics=statistics)
    frames[:, :, :20] = torch.rand(12, 20, 20)
    after = depth_from_focus(frames, statistics=statistics)
    beyond = 20 + receptive_radius()
    torch.testing.assert_close(after.depth[:, beyond:], before.depth[:, beyond:])
    assert not torch.equal(after.depth[:, 20:50], before.depth[:, 20:50])


@pytest.mark.parametrize("method", METHODS)
def test_frames_may_lie_in_memory_in_any_order(method):
    frames = textured_stack(tilted((40, 48), 2, 9), noise=0.01)
    expected = depth_from_focus(frames, method=method)
    other = frames.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    found = depth_from_focus(other.requires_grad_(method == "rr"), method=method)
    for one, values in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), values)


def test_a_batch_equals_its_members():
    stacks = torch.stack([textured_stack(d, noise=0.01, seed=i) for i, d in enumerate((3.0, 8.2))])
    batch = depth_from_focus(stacks)
    for i, stack in enumerate(stacks):
        single = depth_from_focus(stack)
        for found, expected in zip(batch, single, strict=True):
            torch.testing.assert_close(found[i], expected)
    assert rdf_volume(stacks).shape == stacks.shape
    assert rdf_volume(stacks).min() >= 0


@pytest.mark.parametrize("falling", [False, True])
def test_uneven_and_falling_positions_give_depth_in_their_unit(falling):
    positions = torch.cumsum(1 + 0.5 * torch.sin(torch.arange(16.0)), 0) * 2.5 - 7
    if falling:
        positions = positions.flip(0)
    depth = tilted((64, 80), 5, 20)
    frames = textured_stack(depth, width=4.0, positions=positions, noise=0.002)
    found = depth_from_focus(frames, positions)
    assert found.valid.float().mean() > 0.99
    assert float((found.depth - depth).abs()[found.valid].mean()) < 0.2
    rising, frame = (positions.flip(0), 15 - np.arange(16)) if falling else (positions, range(16))
    index = np.interp(found.depth.numpy(), rising.numpy(), frame)
    assert np.abs(index - found.depth_index.numpy()).max() < 1e-3


@pytest.mark.parametrize("method", ["rdf", "mdml", "tft", "rr"])
def test_frames_far_away_change_nothing(method):
    fine = torch.arange(0, 10, 0.5)
    depth = tilted((64, 80), 1.5, 8)
    expected = depth_from_focus(
        textured_stack(depth, width=2.0, positions=fine, noise=0.002), fine, method=method
    )
    error = (expected.depth - depth).abs().mean()
    for far in ([100.0], [20.0, 40.0, 80.0]):
        positions = torch.cat([fine, torch.tensor(far)])
        frames = textured_stack(depth, width=2.0, positions=positions, noise=0.002)
        found = depth_from_focus(frames, positions, method=method)
        assert found.valid.float().mean() > 0.99
        assert (found.depth - depth).abs().mean() < 1.2 * error + 0.003


@pytest.mark.parametrize("ratio", [1.1, 1.25])
def test_steps_that_grow_are_measured_to_parts_of_the_step(ratio):
    positions = torch.tensor([sum(ratio**k for k in range(n)) for n in range(16)])
    positions = positions * (15 / positions[-1])
    depth = tilted((64, 80), 2, 13)
    frames = textured_stack(depth, width=3.0, positions=positions, noise=0.002)
    noisy = frame_index(depth + 0.2 * torch.randn(depth.shape), positions, extrapolate=True)
    refined = refine_depth(frames, noisy.clamp(0, 15), positions)
    for index in (depth_from_focus(frames, positions).depth_index, refined):
        assert (index - frame_index(depth, positions)).abs().mean() < 0.06


def test_positions_far_from_zero_lose_nothing_but_the_digits_of_the_result():
    steps = 0.1 * torch.cumsum(1 + 0.5 * torch.sin(torch.arange(12.0, dtype=torch.float64)), 0)
    frames = textured_stack(tilted((48, 48), 2, 9), noise=0.004)
    near, far = depth_from_focus(frames, steps), depth_from_focus(frames, 50_000 + steps)
    torch.testing.assert_close(far.depth_index, near.depth_index, rtol=0, atol=1e-5)
    assert (far.depth.double() - 50_000 - near.depth).abs().max() < 0.004  # float32 at 50,000


def test_reversed_rotated_brighter_and_drifting_stacks_agree():
    depth = tilted((72, 72), 2, 9)
    frames = textured_stack(depth, noise=0.004)
    expected = depth_from_focus(frames).depth_index
    drift = torch.linspace(0.7, 1.3, 12).view(-1, 1, 1)
    others = {
        "reversed": 11 - depth_from_focus(frames.flip(0)).depth_index,
        "rotated": depth_from_focus(frames.rot90(1, (1, 2))).depth_index.rot90(-1),
        "mirrored": depth_from_focus(frames.flip(2)).depth_index.flip(1),
        "inverted": depth_from_focus(1 - frames).depth_index,
        "darker": depth_from_focus(0.3 * frames + 0.1).depth_index,
        "drifting": depth_from_focus(drift * frames).depth_index,
    }
    for name, found in others.items():
        assert (found - expected).abs().mean() < SAME_UP_TO_NOISE, name


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (9, 33)])
@pytest.mark.parametrize("n_frames", [1, 2, 3, 4, 9])
def test_any_size_and_number_of_frames_works(size, n_frames):
    found = depth_from_focus(torch.rand(n_frames, *size))
    for values in found:
        assert values.shape == size
        assert values.isfinite().all()
    assert (found.index >= 0).all() and (found.index < n_frames).all()
    assert (found.depth_index >= 0).all() and (found.depth_index <= n_frames - 1).all()


def test_of_two_frames_the_sharper_one_is_taken():
    frames = textured_stack(torch.where(torch.arange(64) < 32, 0.0, 1.0).repeat(40, 1), n_frames=2)
    found = depth_from_focus(frames)
    assert (found.index[:, :26] == 0).all() and (found.index[:, 38:] == 1).all()


def test_pixels_that_are_not_numbers_spoil_their_surroundings_only():
    frames = textured_stack(5.0, size=(40, 240), noise=0.002)
    statistics = stack_statistics(frames)
    frames[3, 20, 5] = torch.nan
    found = depth_from_focus(frames, statistics=statistics)
    assert not found.valid[20, 5]
    far = found.depth_index[:, 5 + receptive_radius() + 1 :]
    assert (far - 5).abs().mean() < CLEAN_ERROR


def test_confidence_is_lower_where_texture_is_weak():
    frames = textured_stack(6.0, size=(64, 128), contrast=0.1)
    frames[:, :, 64:] = 0.5 + 0.05 * (frames[:, :, 64:] - 0.5)
    frames += noise_stack(12, (64, 128), 0.004) - 0.5
    found = depth_from_focus(frames)
    assert found.confidence[:, :56].mean() > found.confidence[:, 80:].mean() + 0.2
    assert found.confidence.min() >= 0 and found.confidence.max() <= 1


def test_validity_needs_a_clear_peak_within_the_stack():
    prominence = torch.tensor([100.0, 3.0, 100.0, 100.0, 100.0])
    contrast = torch.tensor([0.9, 0.9, 0.05, 0.9, 0.9])
    vertex = torch.tensor([4.0, 4.0, 4.0, 10.1, torch.nan])
    valid = focus_validity(prominence, contrast, vertex, 10)
    assert valid.tolist() == [True, False, False, False, False]


def test_the_volume_is_differentiable():
    frames = textured_stack(4.0, n_frames=6, size=(20, 20), noise=0.01).requires_grad_()
    rdf_volume(frames).square().mean().backward()
    assert frames.grad is not None and frames.grad.isfinite().all() and frames.grad.any()


def test_a_coarse_depth_map_is_refined_no_further_than_its_limit():
    truth = tilted((64, 80), 3, 12)
    frames = textured_stack(truth, n_frames=16, noise=0.003)
    coarse = truth.round()
    free = refine_depth(frames, coarse)
    assert (free - truth).abs().mean() < 0.25 * (coarse - truth).abs().mean()
    limit = tilted((64, 80), 0, 0.2)
    held = refine_depth(frames, coarse, limit=limit)
    assert torch.equal(held[:, 0], coarse[:, 0]) and ((held - coarse).abs() <= limit + SAME).all()
    unheld = (free - coarse).abs() < limit
    assert unheld.any() and torch.equal(held[unheld], free[unheld])
    with pytest.raises(ValueError, match=r"limit: expected \(64, 80\)"):
        refine_depth(frames, coarse, limit=limit[1:])


def test_input_is_left_alone():
    frames = textured_stack(4.0, noise=0.01)
    before = frames.clone()
    depth_from_focus(frames)
    assert torch.equal(frames, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"frames": torch.rand(4, 4)}, ValueError, r"frames: expected \(N, H, W\)"),
        ({"frames": torch.rand(0, 4, 4)}, ValueError, "frames: .*not empty"),
        ({"frames": torch.rand(5, 4, 4).double()}, TypeError, "frames: .*float64"),
        ({"method": "magic"}, ValueError, "method: expected one of .*got 'magic'"),
        ({"refinement": "spline"}, ValueError, "refinement: expected one of .*got 'spline'"),
        ({"focus_positions": torch.arange(4.0)}, ValueError, "focus_positions: .*N = 5"),
        (
            {"focus_positions": torch.tensor([0.0, 1, 1, 2, 3])},
            ValueError,
            "focus_positions: .*rising",
        ),
        (
            {"statistics": stack_statistics(torch.rand(4, 8, 8))},
            ValueError,
            "statistics: .*5 frames, got 4",
        ),
        ({"statistics": []}, ValueError, "statistics: expected 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        depth_from_focus(**{"frames": torch.rand(5, 8, 8), **arguments})


def test_an_unknown_method_has_no_reach():
    with pytest.raises(ValueError, match="method"):
        receptive_radius("magic")


def shared_stack(shared_dir, name: str) -> Tensor:
    return read_stack(shared_dir / "data/stacks" / name).gray()


@pytest.mark.shared
@pytest.mark.parametrize("number", [1, 2, 3])
def test_generated_stacks_are_measured(shared_dir, number):
    name = f"cou2023_{number}_gt"
    frames = shared_stack(shared_dir, name)
    with np.load(shared_dir / "data/stacks" / name / "gt.npz") as truth:
        depth = torch.from_numpy(truth["gt_index"])
    found = depth_from_focus(frames)
    known = depth.isfinite()
    assert found.valid[known].float().mean() > 0.99
    assert float((found.depth_index - depth).abs()[known].mean()) < MEASURED_ERROR


@pytest.fixture(scope="module")
def part_of_a_generated_stack(shared_dir):
    """Frames (N, 112, 112) of a stack with known depth, and that depth."""
    part = (..., slice(100, 212), slice(100, 212))
    with np.load(shared_dir / "data/stacks/cou2023_1_gt/gt.npz") as truth:
        return shared_stack(shared_dir, "cou2023_1_gt")[part], torch.from_numpy(truth["gt_index"])[
            part
        ]


@pytest.mark.shared
@pytest.mark.parametrize("method", METHODS)
def test_every_method_measures_a_part_of_a_generated_stack(part_of_a_generated_stack, method):
    frames, depth = part_of_a_generated_stack
    found = depth_from_focus(frames, method=method)
    error = (found.depth_index - depth).abs()[depth.isfinite()].mean()
    assert float(error) < PART_ERROR


@pytest.mark.shared
def test_a_blind_hole_is_measured(shared_dir):
    found = depth_from_focus(shared_stack(shared_dir, "drillhole"))
    top, bottom = found.depth_index[:120, :140], found.depth_index[225:, 225:]
    assert found.valid.float().mean() > 0.99
    assert 5 < top.median() < 9 and 75 < bottom.median() < 82
    assert ((top - top.median()).abs() < 2.5).float().mean() > 0.96
    assert ((bottom - bottom.median()).abs() < 5).float().mean() > 0.96


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_same_on_a_gpu(method):
    frames = textured_stack(tilted((90, 70), 1, 10), noise=0.01)
    found, expected = (depth_from_focus(f, method=method) for f in (frames.cuda(), frames))
    assert (found.depth_index.cpu() - expected.depth_index).abs().mean() < 1e-4
    assert (found.valid.cpu() == expected.valid).float().mean() > 0.999


@pytest.mark.parametrize("at", [1.0, 2.0, 7.0, 8.0])
def test_depth_near_the_ends_is_as_even_as_elsewhere(at):
    error = (depth_from_focus(flat_stack(at)).depth_index - at).abs()
    assert error.mean() < 0.05 and error.max() < 0.3


def test_depth_beyond_the_stack_is_left_out_where_it_is_asked_for():
    for at, least, most in (
        (-2.0, 0.0, 0.05),
        (0.3, 0.99, 1.0),
        (8.7, 0.99, 1.0),
        (11.0, 0.0, 0.05),
    ):
        frames = flat_stack(at)
        nearest = torch.full(frames.shape[1:], min(max(at, 0.2), 8.8))
        found = refine_depth(frames, nearest, leave_out_beyond=True)
        assert least <= found.isfinite().float().mean() <= most, at
        assert refine_depth(frames, nearest).isfinite().all()
    batch = refine_depth(frames[None], nearest[None], leave_out_beyond=True)[0]
    assert torch.equal(batch.nan_to_num(-1), found.nan_to_num(-1))
