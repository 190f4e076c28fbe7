from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from volumes import random_volume

from gplws.ops import focus_search, reference
from gplws.ops.reference import FocusSearchResult

DEPTH = {"rtol": 0, "atol": 2e-3}  # frames; a nearly flat fit magnifies rounding
REFINEMENTS = ("none", "parabola", "gaussian")


def assert_agrees(got, expected):
    assert torch.equal(got.index, expected.index)
    torch.testing.assert_close(got.peak.double(), expected.peak.double(), equal_nan=True)
    torch.testing.assert_close(
        got.confidence.double(), expected.confidence.double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(got.depth.double(), expected.depth.double(), equal_nan=True, **DEPTH)


@pytest.mark.parametrize("kind", ["plain", "ties", "nan", "infinite", "negative"])
@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("log_scale", [False, True])
def test_it_agrees_with_the_float64_reference(kind, refinement, log_scale):
    for seed, (frames, width, groups, radius) in enumerate(
        [
            (1, 1, 1, 1),
            (2, 3, 4, 1),
            (3, 15, 2, 1),
            (7, 16, 3, 2),
            (10, 17, 4, 1),
            (41, 33, 4, 3),
            (13, 65, 20, 2),
            (5, 7, 1, 9),
        ]
    ):
        volume = random_volume(kind, (2, frames, 3, width), seed)
        options = {
            "groups": groups,
            "refinement": refinement,
            "radius": radius,
            "log_scale": log_scale,
        }
        assert_agrees(
            focus_search(volume, **options), reference.focus_search(volume.double(), **options)
        )


MASKED = torch.finfo(torch.float32).min  # what masked frames are often filled with


@pytest.mark.parametrize(
    "responses",
    [
        [MASKED, MASKED, 1, MASKED, MASKED],
        [0, MASKED, 1, MASKED, 0],
        [MASKED, 1, MASKED, MASKED, MASKED],
        [-3e38, -3e38, 3e38, -3e38, -1e38],
    ],
)
def test_responses_whose_differences_exceed_a_float_leave_depth_at_the_frame(responses):
    volume = torch.tensor(responses).view(1, 5, 1, 1).expand(-1, -1, 3, 21)
    for positions in (torch.arange(5.0), torch.tensor([0.0, 1, 3, 4, 5])):
        found = focus_search(volume, positions, radius=1)
        expected = positions[torch.tensor(responses).argmax()]
        assert torch.equal(found.depth, expected.expand(1, 3, 21))
        assert torch.equal(found.depth, reference.focus_search(volume, positions, radius=1).depth)


def test_the_index_equals_argmax_for_any_number_of_groups():
    volume = random_volume("ties", (2, 23, 9, 31), 0)
    expected = np.argmax(volume.numpy(), axis=1)  # the first of equals
    for groups in (1, 2, 3, 4, 7, 23, 50):
        index = focus_search(volume, groups=groups).index
        assert np.array_equal(index.numpy(), expected)


def test_a_gaussian_peak_is_found_exactly_between_the_frames():
    truth = torch.linspace(0.6, 8.4, 200).view(1, 1, 200)
    frames = torch.arange(10.0).view(1, 10, 1, 1)
    volume = torch.exp(-((frames - truth[:, None]) ** 2) / 3)
    for radius in (1, 2):
        depth = focus_search(volume, refinement="gaussian", radius=radius).depth
        torch.testing.assert_close(depth, truth, rtol=0, atol=1e-4)
    logits = focus_search(volume.log(), log_scale=True).depth
    torch.testing.assert_close(logits, truth, rtol=0, atol=1e-4)


def test_irregular_and_falling_positions_are_fitted_in_their_own_unit():
    positions = torch.tensor([0.0, 0.7, 2.1, 2.9, 4.4, 5.0, 6.6])
    truth = torch.linspace(0.8, 5.7, 100).view(1, 1, 100)
    volume = torch.exp(-((positions.view(1, -1, 1, 1) - truth[:, None]) ** 2) / 4)
    depth = focus_search(volume, positions, refinement="gaussian").depth
    torch.testing.assert_close(depth, truth, rtol=0, atol=1e-3)
    falling = focus_search(volume.flip(1), positions.flip(0), refinement="gaussian").depth
    torch.testing.assert_close(falling, truth, rtol=0, atol=1e-3)


def test_each_image_may_have_its_own_positions():
    volume = random_volume("plain", (2, 6, 4, 5), 0)
    positions = torch.stack([torch.arange(6.0), torch.arange(6.0) * 2 + 1])
    depth = focus_search(volume, positions).depth
    alone = [focus_search(volume[i : i + 1], positions[i]).depth for i in range(2)]
    assert torch.equal(depth, torch.cat(alone))


def test_the_depth_stays_between_the_neighbouring_frames():
    volume = random_volume("plain", (1, 30, 40, 40), 3)
    for refinement in ("parabola", "gaussian"):
        for radius in (1, 2, 4):
            found = focus_search(volume, refinement=refinement, radius=radius)
            assert ((found.depth - found.index).abs() <= 1).all()
            assert (found.depth >= 0).all() and (found.depth <= 29).all()


def test_reversed_frames_give_the_mirrored_depth():
    volume = random_volume("plain", (1, 11, 20, 20), 5)
    forward = focus_search(volume, radius=2)
    backward = focus_search(volume.flip(1), radius=2)
    torch.testing.assert_close(10 - backward.depth, forward.depth, **DEPTH)


def test_confidence_compares_with_the_runner_up_of_another_group():
    volume = torch.tensor([0.0, 1.0, 4.0, 3.9, 0.5, 0.0, 1.0, 0.0]).view(1, 8, 1, 1)
    # Frame 3 is the flank of the peak at frame 2, although it lies in the next group of 3.
    assert focus_search(volume, groups=3).confidence.item() == pytest.approx(0.75)
    assert focus_search(volume, groups=1).confidence.item() == 1.0
    logits = focus_search(volume, groups=3, log_scale=True).confidence.item()
    assert logits == pytest.approx(1 - np.exp(-3.0))
    assert focus_search(torch.ones(1, 8, 1, 1)).confidence.item() == 0.0
    assert focus_search(torch.zeros(1, 8, 1, 1)).confidence.item() == 0.0


def test_all_nan_gives_nan_depth_and_no_confidence():
    volume = torch.rand(1, 5, 2, 20)
    volume[..., 3] = torch.nan
    found = focus_search(volume)
    assert found.depth[..., 3].isnan().all() and (found.index[..., 3] == 0).all()
    assert (found.peak[..., 3] == -torch.inf).all() and (found.confidence[..., 3] == 0).all()
    assert found.depth[..., :3].isfinite().all() and found.depth[..., 4:].isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "nan"])
@pytest.mark.parametrize("frames", [16, 17, 31, 33, 100])
def test_long_stacks_of_wide_images_agree_with_the_reference(kind, frames):
    """Frames are walked a few at a time and pixels in runs: across the seams of both."""
    volume = random_volume(kind, (2, frames, 1, 1100), frames)
    for refinement in REFINEMENTS:
        options = {"groups": 7, "refinement": refinement}
        assert_agrees(
            focus_search(volume, **options), reference.focus_search(volume.double(), **options)
        )


@pytest.mark.parametrize("frames", [10, 40])
@pytest.mark.parametrize("ratio", [1.0, 1.2, 15.0, 40.0])
@pytest.mark.parametrize("falling", [False, True])
def test_gaps_of_any_ratio_agree_with_the_reference(frames, ratio, falling):
    gaps = torch.where(torch.arange(frames) % 3 == 0, 0.1 * ratio, 0.1)
    positions = gaps.cumsum(0)
    positions = positions.flip(0) if falling else positions
    volume = random_volume("plain", (1, frames, 20, 30), 4)
    for refinement in REFINEMENTS:
        got = focus_search(volume, positions, refinement=refinement)
        expected = reference.focus_search(
            volume.double(), positions.double(), refinement=refinement
        )
        assert torch.equal(got.index, expected.index)
        # From a ratio of 16 on, three frames too are fitted by Cramer's rule in float32.
        atol = 2e-5 if ratio < 16 else 2e-3 * gaps.max().item()
        torch.testing.assert_close(got.depth.double(), expected.depth, rtol=1e-6, atol=atol)


def test_out_takes_the_results():
    volume = random_volume("plain", (2, 9, 50, 70), 1)
    expected = focus_search(volume)
    out = FocusSearchResult(*(torch.full_like(t, 7) for t in expected))
    assert focus_search(volume, out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("depth", torch.rand(1, 4, 6), ValueError, "out.depth must be"),
        ("index", torch.rand(1, 4, 5), TypeError, "out.index must be torch.int64"),
        ("peak", torch.rand(1, 4, 5).double(), TypeError, "out.peak must be torch.float32"),
        ("confidence", torch.rand(1, 5, 4).mT, ValueError, "out.confidence must be contiguous"),
    ],
)
def test_an_out_that_does_not_fit_is_named(name, tensor, error, message):
    volume = torch.rand(1, 3, 4, 5)
    out = focus_search(volume)._replace(**{name: tensor})
    with pytest.raises(error, match=message):
        focus_search(volume, out=out)
    with pytest.raises(RuntimeError, match=f"out.{name} must be"):
        torch.ops.gplws.focus_search.out(volume, torch.arange(3.0), 4, 1, 1, False, *out)


def test_strided_volumes_and_threads_do_not_change_a_bit():
    volume = random_volume("plain", (2, 9, 50, 70), 1)
    expected = focus_search(volume)
    for view in (
        volume.transpose(2, 3).contiguous().transpose(2, 3),
        volume.contiguous(memory_format=torch.channels_last),
        torch.stack([volume, volume], -1)[..., 0],
    ):
        assert all(torch.equal(a, b) for a, b in zip(focus_search(view), expected, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(focus_search(volume), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_volumes_give_empty_results(size):
    assert all(r.shape == (size[0], *size[2:]) for r in focus_search(torch.rand(size)))


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_gradients_agree_with_stock_autograd(refinement):
    volume = random_volume("plain", (2, 8, 3, 5), 2) + 0.1
    volume[0, 3, 1, 1] = torch.nan
    for positions in (torch.rand(8).cumsum(0), torch.rand(2, 8).cumsum(1)):
        grads = []
        for op in (focus_search, reference.focus_search):
            v, z = volume.clone().requires_grad_(), positions.clone().requires_grad_()
            found = op(v, z, refinement=refinement, radius=2)
            loss = (found.depth * 3).sum() + (found.peak.square()).sum()
            grads.append(torch.autograd.grad(loss, (v, z)))
            one = op(volume, z, refinement=refinement, radius=2).depth.sum()
            grads[-1] += torch.autograd.grad(3 * one, z)
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected.nan_to_num(0), rtol=1e-4, atol=1e-5)
        assert not found.index.requires_grad


@pytest.mark.parametrize("frames", [1, 2])
def test_few_frames_have_gradients_as_well(frames):
    volume, positions = torch.rand(1, frames, 3, 4) + 0.1, torch.arange(float(frames))
    found = [
        torch.autograd.grad(op(v, z).depth.sum() + op(v, z).peak.sum(), (v, z))
        for op in (focus_search, reference.focus_search)
        for v, z in [(volume.clone().requires_grad_(), positions.clone().requires_grad_())]
    ]
    assert all(map(torch.equal, *found))


def test_opcheck_finds_nothing():
    volume = (torch.rand(2, 6, 4, 5) + 0.1).requires_grad_()
    for refinement in (0, 1, 2):
        positions = torch.arange(6.0).requires_grad_()
        args = (volume, positions, 3, refinement, 1, False)
        torch.library.opcheck(torch.ops.gplws.focus_search.default, args)


def test_it_compiles_whole_with_dynamic_shapes():
    def function(volume):
        return focus_search(volume * 2, radius=2)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((1, 6, 5, 7), (2, 9, 8, 3)):
        volume = torch.rand(size)
        assert all(
            torch.equal(a, b) for a, b in zip(compiled(volume), function(volume), strict=True)
        )


def test_gradients_compile_too():
    volume = torch.rand(1, 6, 5, 7) + 0.1

    def loss(v):
        return focus_search(v, radius=2).depth.sum()

    expected = torch.autograd.grad(loss(leaf := volume.clone().requires_grad_()), leaf)[0]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(leaf := volume.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(got, expected)


def test_it_exports_with_dynamic_shapes():
    class Model(torch.nn.Module):
        def forward(self, volume):
            return focus_search(volume).depth

    dims = {"volume": dict.fromkeys((1, 2, 3), torch.export.Dim.DYNAMIC)}
    program = torch.export.export(Model(), (torch.rand(1, 6, 5, 7),), dynamic_shapes=dims)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    volume = torch.rand(1, 9, 8, 3)
    assert torch.equal(program.module()(volume), Model()(volume))


def test_autocast_computes_in_float32():
    volume = torch.rand(1, 6, 5, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = focus_search(volume)
    assert got.depth.dtype == torch.float32
    assert torch.equal(got.depth, focus_search(volume.float()).depth)


def test_results_to_write_into_are_not_cast_by_autocast():
    out = focus_search(torch.rand(1, 6, 5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"volume must be float32, got torch\.bfloat16"):
            focus_search(torch.rand(1, 6, 5, 7).bfloat16(), out=out)
        with pytest.raises(TypeError, match=r"volume must be float32, got torch\.float64"):
            focus_search(torch.rand(1, 6, 5, 7).double())


@pytest.mark.parametrize("in_dims", [(0, None), (2, None), (0, 0), (None, 0)])
def test_vmap_equals_a_loop(in_dims):
    volume, positions = torch.rand(3, 2, 6, 4, 5), torch.rand(3, 6).cumsum(1)
    given = [
        t[0] if dim is None else t.movedim(0, dim)
        for t, dim in zip((volume, positions), in_dims, strict=True)
    ]

    def depth(v, z):
        return focus_search(v, z).depth

    expected = torch.stack(
        [
            depth(
                volume[i if in_dims[0] is not None else 0],
                positions[i if in_dims[1] is not None else 0],
            )
            for i in range(3)
        ]
    )
    assert torch.equal(torch.vmap(depth, in_dims)(*given), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": torch.rand(6, 4, 5)}, "volume must be"),
        ({"volume": torch.rand(1, 0, 4, 5)}, "1 to 16777216 frames, got 0"),
        ({"volume": torch.rand(1, 1, 1, 1).expand(1, 2**24 + 1, 1, 1)}, "frames, got 16777217"),
        ({"focus_positions": torch.rand(5)}, "focus_positions must be"),
        ({"focus_positions": torch.rand(3, 6)}, "focus_positions must be"),
        ({"groups": 0}, "groups must be"),
        ({"radius": 0}, "radius must be"),
        ({"refinement": "cubic"}, "refinement must be one of"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        focus_search(**({"volume": torch.rand(2, 6, 4, 5)} | change))


def test_another_dtype_is_refused_by_name():
    with pytest.raises(TypeError, match=r"volume must be float32, got torch\.float16"):
        focus_search(torch.rand(1, 3, 4, 5).half())


def test_a_direct_call_of_the_op_guards_memory():
    with pytest.raises(RuntimeError, match="focus_positions must be"):
        torch.ops.gplws.focus_search(torch.rand(1, 3, 4, 5), torch.arange(2.0), 4, 1, 1, False)
    many = torch.rand(1).expand(2**24 + 1)
    with pytest.raises(RuntimeError, match="volume must have 1 to 16777216 frames, got 16777217"):
        torch.ops.gplws.focus_search(many.view(1, -1, 1, 1), many, 4, 1, 1, False)
