from __future__ import annotations

import pytest
import torch
from stacks import textured_stack

from gplws.classical import depth_from_focus, refine_depth, stack_statistics
from gplws.models import GPLWSNet
from gplws.models.classical_steps import (
    CLASSICAL_STEPS,
    check_against_classical,
    refine_by_classical,
)
from gplws.nn import confidence_of

N = 12
POSITIONS = torch.arange(float(N))


def test_a_classical_depth_replaces_only_a_doubtful_one_nearby():
    frames = textured_stack(6.3, noise=0.002)
    statistics = stack_statistics(frames)
    classical = depth_from_focus(frames, statistics=statistics)
    assert classical.valid.all() and classical.confidence.min() > 0.5
    found = torch.full((64, 64), 3.0)
    deviation = torch.full((64, 64), 0.6)  # sure
    deviation[:, 16:32] = 2.0  # in doubt, and 6.3 is within three deviations
    found[:, 32:48], deviation[:, 32:48] = 0.0, 2.0  # in doubt, 6.3 is not
    deviation[:, 48:] = torch.inf  # knows nothing: confidence 0
    checked = check_against_classical(
        frames, found, confidence_of(deviation), POSITIONS, statistics
    )
    assert torch.equal(checked[:, :16], found[:, :16])
    assert torch.equal(checked[:, 16:32], classical.depth_index[:, 16:32])
    assert torch.equal(checked[:, 32:48], found[:, 32:48])
    assert torch.equal(checked[:, 48:], classical.depth_index[:, 48:])


def test_where_nothing_comes_into_focus_the_network_has_the_last_word():
    frames = 0.5 + 0.01 * torch.randn(N, 48, 48, generator=torch.Generator().manual_seed(0))
    found = 11 * torch.rand(48, 48)
    confidence = torch.full((48, 48), 0.1)
    statistics = stack_statistics(frames)
    assert not depth_from_focus(frames, statistics=statistics).valid.any()
    checked = check_against_classical(frames, found, confidence, POSITIONS, statistics)
    assert torch.equal(checked, found)


def test_wide_focus_peaks_leave_room_for_wider_deviations():
    frames = textured_stack(30.0, n_frames=60, width=12.0, noise=0.001)
    statistics = stack_statistics(frames)
    assert statistics.peak_width() > 20
    found, positions = torch.full((64, 64), 28.0), torch.arange(60.0)
    for deviation, taken in ((2.0, False), (9.0, True)):
        confidence = confidence_of(torch.full((64, 64), deviation))
        checked = check_against_classical(frames, found, confidence, positions, statistics)
        assert torch.equal(checked, found) != taken


def test_the_refinement_moves_a_depth_as_far_as_its_deviation_lets_it():
    frames = textured_stack(6.3, noise=0.001)
    statistics = stack_statistics(frames)
    coarse = torch.full((64, 64), 6.0)
    free = refine_depth(frames, coarse, statistics=statistics)
    deviation = torch.tensor([0.4, 0.6, 5.0]).repeat_interleave(22)[:64].expand(64, 64)
    refined = refine_by_classical(frames, coarse, confidence_of(deviation), POSITIONS, statistics)
    assert torch.equal(refined[:, :22], coarse[:, :22])
    torch.testing.assert_close(refined[:, 22:44], torch.full((64, 22), 6.07), rtol=0, atol=1e-4)
    assert torch.equal(refined[:, 44:], free[:, 44:])


@pytest.mark.parametrize("step", CLASSICAL_STEPS, ids=lambda step: step.apply.__name__)
def test_nothing_beyond_its_reach_changes_a_step(step):
    side = 2 * step.reach + 9
    depth = torch.linspace(2, 9, side).expand(side, side)
    frames = textured_stack(depth, size=(side, side), noise=0.003)
    statistics = stack_statistics(frames)
    found = depth.round()
    confidence = torch.full((side, side), 0.25)
    whole = step.apply(frames, found, confidence, POSITIONS, statistics)
    rows = slice(9, side)  # the first row within reach of the last one of the upper part is 9
    part = step.apply(frames[:, rows], found[rows], confidence[rows], POSITIONS, statistics)
    torch.testing.assert_close(part[step.reach :], whole[rows][step.reach :], rtol=0, atol=2e-4)
    assert not torch.equal(whole, found)


def test_predict_takes_all_steps_and_knows_its_frame():
    torch.manual_seed(0)
    model = GPLWSNet(
        widths=(4, 8), depths=(1, 1), middle=1, decoder_depths=(1,), stem="features"
    ).eval()
    frames = textured_stack(torch.linspace(2, 9, 64).expand(64, 64), noise=0.002)
    positions = 5 + 2 * POSITIONS
    rough = model.predict(frames[None, None], positions, refine=False)
    expected, statistics = (rough.depth[0] - 5) / 2, stack_statistics(frames)
    for step in CLASSICAL_STEPS:
        expected = step.apply(frames, expected, rough.confidence[0], positions, statistics)
    found = model.predict(frames[None, None], positions)
    torch.testing.assert_close(found.depth[0], 5 + 2 * expected, rtol=0, atol=1e-3)
    assert torch.equal(found.index[0], expected.round().long())
    assert torch.equal(found.confidence, rough.confidence)
    assert (found.depth != rough.depth).any()
