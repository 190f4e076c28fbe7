from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_data import ToySource

from gplws.data import DepthSample, collate
from gplws.data.transforms import (
    Augmentation,
    add_noise,
    adjust,
    crop,
    flip,
    gamma,
    invert,
    reverse_frames,
    rotate,
    select_frames,
    split,
)

QUIET = replace(
    Augmentation.none(), rotate=True, flip=True, reverse=0.5, frames=(3, 6), irregular=0.5, crop=8
)


@pytest.fixture
def marked() -> DepthSample:
    """Two stacks whose sharpest frame can be told from the pixels alone; irregular positions.

    A voxel is bright by how near its position is to the depth of its pixel, so that whatever moves
    the stack without its depth, or the other way round, shows.
    """
    positions = torch.tensor([[10.0, 11, 13, 14, 17, 18, 20], [-3.0, -2, 0, 1, 2, 5, 6]])
    share = torch.rand(2, 9, 12)
    ends = positions[:, [0, -1]]
    depth = ends[:, :1, None] + share * (ends[:, 1:, None] - ends[:, :1, None])
    image = torch.rand(2, 1, 9, 12)
    valid = torch.rand(2, 9, 12) < 0.8
    depth = torch.where(valid, depth, torch.nan)
    return DepthSample(drawn(depth, positions), positions, depth, valid, "um", "marked", image)


def drawn(depth, positions):
    """(B, 1, N, H, W) stack that says the depth: ``exp(-|position - depth| / 8)``."""
    distance = (positions[:, :, None, None] - depth[:, None]).abs()
    return torch.exp(-distance.nan_to_num(8.0) / 8)[:, None]


def assert_depth_follows(changed):
    """The stack is what its own depth and positions draw."""
    known = changed.depth.isfinite()[:, None, None].expand_as(changed.stack)
    expected = drawn(changed.depth, changed.focus_positions)
    torch.testing.assert_close(changed.stack[known], expected[known])
    assert not changed.valid[~changed.depth.isfinite()].any()


def test_a_quarter_turn_moves_all_images_alike(marked):
    turned = rotate(marked, 1)
    assert turned.stack.shape == (2, 1, 7, 12, 9)
    assert_depth_follows(turned)
    for field in ("stack", "depth", "valid", "all_in_focus"):
        back = getattr(rotate(turned, 3), field)
        torch.testing.assert_close(back, getattr(marked, field), equal_nan=True)
    assert torch.equal(turned.depth[:, 0, 0].isnan(), marked.depth[:, 0, -1].isnan())


@pytest.mark.parametrize(("across", "down"), [(True, False), (False, True), (True, True)])
def test_flips_mirror_all_images(marked, across, down):
    changed = flip(marked, across=across, down=down)
    assert_depth_follows(changed)
    y, x = -1 if down else 0, -1 if across else 0
    assert torch.equal(changed.all_in_focus[..., 0, 0], marked.all_in_focus[..., y, x])
    assert torch.equal(changed.valid[..., 0, 0], marked.valid[..., y, x])


def test_a_crop_keeps_what_belongs_together(marked):
    part = crop(marked, 2, 3, 4, 5)
    assert part.stack.shape[-2:] == (4, 5)
    assert_depth_follows(part)
    assert torch.equal(part.valid, marked.valid[:, 2:6, 3:8])
    with pytest.raises(ValueError, match="reach beyond an image of 9 x 12"):
        crop(marked, 6, 0, 4, 4)


def test_reversed_frames_keep_their_range_and_mirror_the_depth_index(marked):
    changed = reverse_frames(marked)
    assert_depth_follows(changed)
    assert torch.equal(changed.focus_positions[:, [0, -1]], marked.focus_positions[:, [0, -1]])
    assert (changed.focus_positions.diff() > 0).all()
    torch.testing.assert_close(
        changed.depth_index(), 6 - marked.depth_index(), equal_nan=True, atol=1e-5, rtol=0
    )


def test_selected_frames_keep_positions_and_invalidate_what_lies_outside(marked):
    index = torch.tensor([[1, 2, 5], [0, 3, 4]])
    changed = select_frames(marked, index)
    assert_depth_follows(changed)
    assert changed.focus_positions.tolist() == [[11, 13, 18], [-3, 1, 2]]
    low, high = torch.tensor([11.0, -3])[:, None, None], torch.tensor([18.0, 2])[:, None, None]
    inside = (marked.depth >= low) & (marked.depth <= high)
    assert torch.equal(changed.valid, marked.valid & inside)
    assert changed.depth_index()[changed.valid].isfinite().all()
    same = select_frames(marked, torch.tensor([1, 2, 5]))
    assert torch.equal(same.stack[0], changed.stack[0])
    one = select_frames(split(marked)[1], torch.tensor([0, 3, 4]))
    assert torch.equal(one.stack, changed.stack[1]) and torch.equal(one.valid, changed.valid[1])


@pytest.mark.parametrize("index", [[], [0, 7], [2, 1], [1, 1], [-1, 2]])
def test_frames_that_cannot_be_selected_are_named(marked, index):
    with pytest.raises(ValueError, match=r"index: expected rising frame numbers in 0\.\.6"):
        select_frames(marked, torch.tensor(index, dtype=torch.int64))


def test_intensities_change_by_their_formulas_and_depth_stays(marked):
    stack = marked.stack
    for changed, expected in (
        (gamma(marked, 2.0), stack**2),
        (invert(marked), 1 - stack),
        (adjust(marked, contrast=2.0, brightness=0.1), (2 * stack - 0.4).clamp(0, 1)),
    ):
        torch.testing.assert_close(changed.stack, expected)
        assert changed.depth is marked.depth and changed.valid is marked.valid
    assert torch.equal(invert(marked).all_in_focus, 1 - marked.all_in_focus)
    generator = torch.Generator().manual_seed(0)
    gray = replace(marked, stack=torch.full_like(stack, 0.5))
    assert add_noise(gray, 0.05, generator).stack.std().item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("seed", range(6))
def test_an_augmented_batch_still_says_its_depth(marked, seed):
    changed = QUIET(marked, torch.Generator().manual_seed(seed))
    assert_depth_follows(changed)
    assert changed.stack.shape[-2:] == (8, 8) and 3 <= changed.stack.shape[2] <= 6
    assert changed.name == "marked"
    assert marked.stack.shape == (2, 1, 7, 9, 12)


def test_equal_seeds_give_equal_batches_and_other_seeds_other_ones():
    batch = ToySource()(0)
    full = Augmentation(frames=(3, 4))
    first, again, other = (full(batch, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.stack, again.stack) and torch.equal(first.valid, again.valid)
    assert first.stack.shape != other.stack.shape or not torch.equal(first.stack, other.stack)
    assert first.stack.min() >= 0 and first.stack.max() <= 1


def test_each_sample_of_a_batch_is_changed_in_its_own_way():
    one = split(ToySource(batch_size=1, side=32)(0))[0]
    batch = collate([one] * 8)
    changed = replace(Augmentation.none(), flip=True)(batch, torch.Generator().manual_seed(0))
    assert len({sample.depth.nan_to_num().numpy().tobytes() for sample in split(changed)}) > 1


def test_stacks_shorter_or_smaller_than_asked_for_stay_as_they_are():
    batch = ToySource(frames=3, side=16)(0)
    wide = replace(Augmentation.none(), crop=64, frames=(4, 9))
    assert torch.equal(wide(batch, torch.Generator()).stack, batch.stack)


def test_none_changes_nothing():
    batch = ToySource()(0)
    assert Augmentation.none()(batch, torch.Generator()) is batch


@pytest.mark.parametrize(
    "changes",
    [{"reverse": 2}, {"gamma": (0, 1)}, {"noise": (0.2, 0.1)}, {"frames": (1, 3)}, {"crop": 0}],
)
def test_values_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=f"augmentation.{next(iter(changes))}"):
        Augmentation(**changes)


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="batch: expected"):
        Augmentation()(split(ToySource()(0))[0], torch.Generator())
