from __future__ import annotations

import itertools
import signal
from dataclasses import replace

import pytest
import torch
from signalled_worker import same
from toy_data import ToySource, double, killed_at_two

from gplws.data import DepthSample
from gplws.data.sources import (
    AugmentedSource,
    DatasetSource,
    GeneratorSource,
    MixedSource,
    Prefetcher,
    seed_of,
)
from gplws.data.transforms import Augmentation


class Numbered:
    """A data set whose samples say their number in every pixel."""

    name = "numbered"

    def __init__(self, length, frames=6, side=20):
        self.length, self.frames, self.side = length, frames, side

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        side = self.side + index  # sizes differ, as in files
        return DepthSample(
            torch.full((1, self.frames, side, side), index / 100),
            torch.arange(self.frames, dtype=torch.float32),
            torch.ones(side, side),
            torch.ones(side, side, dtype=torch.bool),
            "um",
        )


def numbers(batch):
    return (100 * batch.stack[:, 0, 0, 0, 0]).round().int().tolist()


def fail_at_three(step):
    if step == 3:
        raise ValueError("no data for step 3")
    return step


def test_an_epoch_has_each_sample_once_in_another_order_each_time():
    source = DatasetSource([Numbered(8)], batch_size=2, crop=16, frames=(4, 4), seed=3)
    assert len(source) == 4
    epochs = [[n for s in range(4) for n in numbers(source(4 * e + s))] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8))
    assert epochs[0] != epochs[1]
    assert source(5).stack.shape == (2, 1, 4, 16, 16)
    assert torch.equal(source(5).stack, source(5).stack)


def test_images_and_stacks_smaller_than_the_crop_are_used_whole():
    source = DatasetSource([Numbered(3, frames=2)], batch_size=3, crop=64, frames=(4, 5))
    assert source(0).stack.shape == (3, 1, 2, 20, 20)
    assert source(0).name == "numbered"


def test_batches_are_filled_and_of_one_data_set():
    source = DatasetSource(
        [Numbered(3), Numbered(2, side=40)], batch_size=2, crop=30, frames=(3, 6)
    )
    assert len(source) == 3
    for step in range(6):
        batch = source(step)
        assert batch.stack.shape[0] == 2 and batch.stack.shape[-1] in (20, 21, 30)


def test_units_and_channels_that_differ_within_a_data_set_are_made_alike():
    class Mixed(Numbered):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            positions = 2 * sample.focus_positions
            if index == 1:  # in um, falling, RGB
                colour = sample.stack * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1, 1)
                return replace(sample, stack=colour, focus_positions=positions.flip(0))
            return replace(sample, unit="frames", all_in_focus=sample.stack[:, 0])

    source = DatasetSource([Mixed(2)], batch_size=2, crop=16, frames=(6, 6))
    batch = source(0)
    assert batch.unit == "frames" and batch.stack.shape == (2, 3, 6, 16, 16)
    assert batch.focus_positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    colour = int(batch.stack[:, 0].flatten(1).amax(1).argmax())
    assert batch.depth[colour].unique().tolist() == [4.5]  # 1 um, between 2 um and 0
    assert batch.depth[1 - colour].unique().tolist() == [1.0]
    assert batch.stack[colour, :, 0, 0, 0].tolist() == pytest.approx([0.01, 0.005, 0])
    uniform = DatasetSource([Numbered(2)], batch_size=2, crop=16, frames=(6, 6))(0)
    assert uniform.unit == "um" and uniform.stack.shape[1] == 1


def test_an_empty_data_set_is_named():
    with pytest.raises(ValueError, match="numbered is empty"):
        DatasetSource([Numbered(3), Numbered(0)], batch_size=2, crop=8, frames=(2, 2))


def test_a_generator_is_asked_for_the_frames_drawn():
    class Recorder:
        def batch(self, step, batch_size, frames, crop):
            return step, batch_size, frames, crop

    source = GeneratorSource(Recorder(), batch_size=3, frames=(5, 8), crop=32, seed=1)
    asked = [source(step) for step in range(40)]
    assert {frames for _, _, frames, _ in asked} == {5, 6, 7, 8}
    assert asked[7] == source(7) and asked[7][0] == 7 and asked[7][1::2] == (3, 32)


def test_sources_are_mixed_by_their_weights_and_by_step():
    source = MixedSource([lambda step: "a", lambda step: "b"], [3, 1])
    drawn = [source(step) for step in range(400)]
    assert drawn == [source(step) for step in range(400)]
    assert 0.2 < drawn.count("b") / 400 < 0.3
    with pytest.raises(ValueError, match="positive weight"):
        MixedSource([double], [0])


def test_augmentation_depends_on_the_step_alone():
    source = AugmentedSource(ToySource(), Augmentation(), seed=4)
    first = source(3)
    source(4)
    assert torch.equal(source(3).stack, first.stack)
    assert not torch.equal(
        AugmentedSource(ToySource(), Augmentation(), seed=5)(3).stack, first.stack
    )


def test_seeds_of_several_numbers_differ():
    seeds = {seed_of(a, b) for a, b in itertools.product(range(20), repeat=2)}
    assert len(seeds) == 400 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(
    ("workers", "kind"), [(0, "thread"), (1, "thread"), (3, "thread"), (1, "process")]
)
def test_results_come_in_order_whoever_makes_them(workers, kind):
    with Prefetcher(double, iter(range(7)), workers=workers, ahead=3, kind=kind) as results:
        assert list(results) == [0, 2, 4, 6, 8, 10, 12]


def test_signals_to_a_worker_that_still_starts_do_not_end_it():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with Prefetcher(same, iter(range(3)), workers=1, kind="process") as results:
        assert list(results) == [0, 1, 2]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_worker_that_was_killed_is_named():
    with Prefetcher(killed_at_two, itertools.count(), workers=1, kind="process") as results:
        for _ in range(2):  # at the result, then at the next job
            with pytest.raises(RuntimeError, match=r"data worker ended: .*data\.workers.*--resume"):
                list(results)


def test_an_error_is_raised_at_its_step_and_no_more_than_asked_for_is_made():
    made = []

    def make(step):
        made.append(step)
        return fail_at_three(step)

    with Prefetcher(make, itertools.count(), workers=1, ahead=2) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="no data for step 3"):
            next(results)
    assert max(made) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": -1}, "workers"), ({"ahead": 0}, "ahead"), ({"kind": "fibre"}, "kind")],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Prefetcher(double, iter([]), **options)
