import dataclasses

import pytest
import torch
from stacks import textured_stack

from gplws.classical import stack_statistics
from gplws.models import GPLWSNet
from gplws.models.frame_bins import FrameBins, bin_size

NETWORK = {"in_channels": 3, "stem": "features", "widths": (4, 8), "depths": (1, 1), "middle": 1}


@pytest.mark.parametrize("n_frames", [1, 2, 7, 24, 97])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_bins_form_the_stack_and_none_is_smaller(n_frames, size):
    edges = torch.tensor(FrameBins(n_frames, size).edges)
    counts = edges.diff()
    assert edges[0] == 0 and edges[-1] == n_frames
    assert counts.min() >= min(size, n_frames)
    assert counts.max() <= (3 * size - 1) // 2 + size or len(counts) == 1
    assert (counts[1:-1] == size).all()


def test_bins_of_one_frame_change_nothing():
    frames = torch.rand(2, 7, 4, 5)
    bins = FrameBins(7, 1)
    assert bins.average(frames) is frames
    numbers = torch.rand(4, 5) * 6
    torch.testing.assert_close(bins.frame_number(numbers), numbers)


def test_averages_and_their_frame_numbers_belong_together():
    frames = torch.arange(11.0).view(11, 1, 1).expand(11, 2, 3)
    bins = FrameBins(11, 3)
    averages = bins.average(frames)  # each frame holds its number
    count = averages.shape[0]
    numbers = torch.arange(float(count)).view(count, 1, 1).expand_as(averages)
    torch.testing.assert_close(bins.frame_number(numbers), averages)
    between = bins.frame_number(torch.tensor([0.5]))
    torch.testing.assert_close(between, averages[:2, 0, 0].mean()[None])


def statistics(n_frames, width):
    found = stack_statistics(torch.rand(n_frames, 8, 8))
    widths = torch.zeros(n_frames + 1, dtype=torch.int64)
    widths[width] = 10 if width else 0
    return dataclasses.replace(found, widths=widths)


@pytest.mark.parametrize(
    ("n_frames", "width", "size"),
    [
        (97, 22, 4),
        (25, 6, 1),
        (49, 11, 2),
        (10, 10, 1),  # too few frames to average
        (97, 0, 4),  # no clear peaks: noise is averaged
        (20, 0, 1),
    ],
)
def test_wide_peaks_are_averaged_to_a_handful_of_bins(n_frames, width, size):
    assert bin_size(statistics(n_frames, width)) == size


def test_a_prediction_from_bins_is_in_frames_and_positions_of_the_stack():
    torch.manual_seed(0)
    model = GPLWSNet(**NETWORK, decoder_depths=(1,)).eval()
    torch.nn.init.zeros_(model.head.bn.weight)  # the classical responses alone decide
    stack = textured_stack(9.0, n_frames=24, width=4.0)[None, None]
    whole = model.predict(stack, bin_size=1)
    found = model.predict(stack, 2.0 * torch.arange(24.0), bin_size=3)
    assert found.peak.shape == whole.peak.shape
    assert (found.depth / 2 - whole.depth).abs().median() < 0.2
    assert ((found.index - found.depth / 2).abs() <= 3).all()
