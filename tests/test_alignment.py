from __future__ import annotations

import json
import logging
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

import gplws
from gplws import Alignment, FocalStack, align_frames, reconstruct
from gplws.alignment import AlignmentError
from gplws.cli import main
from gplws.data import SceneSettings, simulate_stack

SIDE, MARGIN = 224, 12
CORNERS = np.array([[x, y, 1] for x in (0, SIDE - 1) for y in (0, SIDE - 1)], float).T


def scene(frames=9, seed=1):
    """Frames (N, H, W) float32 in 0..1 with a margin, and the depth index (H, W)."""
    side = SIDE + 2 * MARGIN
    settings = SceneSettings(
        surface="holes",
        texture="grain",
        height=side,
        width=side,
        frames=frames,
        seed=seed,
        full_well_electrons=None,
    )
    stack = simulate_stack(settings)
    return stack.frames.numpy().astype(np.float32) / 255, stack.depth_index.numpy()


def movements(n_frames, *, turn=0.0, growth=0.0, shift=1.0, seed=0):
    """(N, 2, 3): from pixels of the middle frame to those of each frame, MARGIN cut off."""
    rng = np.random.default_rng(seed)
    moves = []
    steps = rng.normal(0, shift, (n_frames, 2)).cumsum(0)
    middle = np.full(2, (SIDE - 1) / 2)
    for n in range(n_frames):
        away = n - n_frames // 2
        angle, scale = turn * away, 1 + growth * away
        linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        offset = middle - linear @ middle + steps[n] - steps[n_frames // 2]
        moves.append(np.c_[linear, offset])
    return np.stack(moves)


def moved(frames, moves, noise=0.002, seed=0):
    """(N, SIDE, SIDE) uint8 of frames with margin, each displaced by its movement."""
    rng = np.random.default_rng(seed)
    result = []
    for frame, move in zip(frames, moves, strict=True):
        back = cv2.invertAffineTransform(move)
        back[:, 2] += MARGIN
        flags = cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP
        image = cv2.warpAffine(
            frame, back, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REFLECT
        )
        result.append(image + rng.normal(0, noise, image.shape))
    return (np.stack(result) * 255).clip(0, 255).round().astype(np.uint8)


def largest_error(alignment, moves):
    """Largest distance of the corners of a frame from where they are, pixels."""
    return np.abs(alignment.transforms @ CORNERS - moves @ CORNERS).max()


@pytest.mark.parametrize(
    ("model", "movement", "tolerance"),
    [
        ("translation", {}, 0.2),
        ("similarity", {"turn": 0.001, "growth": 0.002}, 1.0),
        ("affine", {"turn": 0.001, "growth": 0.002}, 2.0),
    ],
)
def test_movements_are_found(model, movement, tolerance):
    frames, _ = scene()
    moves = movements(len(frames), **movement)
    alignment = align_frames(FocalStack(moved(frames, moves)), model)
    assert alignment.matched.all()
    assert largest_error(alignment, moves) < tolerance
    if model == "translation":
        assert np.array_equal(alignment.transforms[:, :, :2], np.broadcast_to(np.eye(2), (9, 2, 2)))
    if model == "similarity":
        (a, b), (c, d) = alignment.transforms[0, :, :2]
        assert a == pytest.approx(d) and b == pytest.approx(-c)


def test_large_steps_are_found():
    frames, _ = scene(frames=3)
    moves = movements(3)
    moves[0, :, 2], moves[2, :, 2] = (-11.0, 7.0), (10.0, -9.0)
    alignment = align_frames(FocalStack(moved([frames[1]] * 3, moves)))
    assert largest_error(alignment, moves) < 0.05


def test_large_frames_are_matched_on_reduced_ones(monkeypatch):
    frames, _ = scene(frames=3)
    moves = movements(3, shift=3.0)
    stack = FocalStack(moved([frames[1]] * 3, moves))
    monkeypatch.setattr("gplws.alignment._MATCHED_PIXELS", 131 * 131)  # no whole ratio
    assert largest_error(align_frames(stack), moves) < 0.05


def test_depth_is_as_good_as_of_frames_that_never_moved():
    frames, depth = scene(frames=12)
    moves = movements(12, shift=2.0)
    still = moved(frames, np.broadcast_to(np.eye(2, 3), moves.shape))
    inner = depth[MARGIN:-MARGIN, MARGIN:-MARGIN]

    def error(stack, **options):
        result = reconstruct(stack, **options)
        top, left, height, width = result.metadata.get("alignment", {}).get(
            "window", (0, 0, SIDE, SIDE)
        )
        truth = inner[top : top + height, left : left + width]
        assert result.depth_index.shape == truth.shape
        return np.nanmean(np.abs(result.depth_index - truth))

    displaced = moved(frames, moves)
    best = error(still)
    assert error(displaced) > 1.5 * best
    assert error(displaced, align="translation") < 1.1 * best
    assert error(displaced, align="similarity") < 1.15 * best


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "int32", "uint64", "float16", "float32", "float64", ">u2"]
)
def test_dtype_range_and_colour_stay(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(20, 120, (3, 60, 70, 3)).astype(dtype)
    moves = np.broadcast_to(np.eye(2, 3), (3, 2, 3)).copy()
    moves[0, :, 2], moves[2, :, 2] = (1.5, -2.25), (-3, 1)
    known = Alignment("translation", 1, (60, 70), moves, np.ones(3), np.ones(3, bool))
    stack = known.apply(FocalStack(values, focus_positions_um=[0, 2, 5], names=("a", "b", "c")))
    assert known.window == (3, 3, 56, 65)
    assert stack.frames.dtype == np.dtype(dtype).newbyteorder("=")
    assert stack.frames.shape == (3, 56, 65, 3)
    assert np.array_equal(stack.frames[1], values[1, 3:59, 3:68])
    assert np.array_equal(stack.frames[2], values[2, 4:60, 0:65])
    assert stack.frames[0].min() >= 20 and stack.frames[0].max() <= 119
    assert np.array_equal(stack.focus_positions_um, [0, 2, 5])
    assert stack.names == ("a", "b", "c")


def test_tensors_come_back_as_tensors():
    frames, _ = scene(frames=3)
    numbers = moved(frames, movements(3))
    result = reconstruct(torch.from_numpy(numbers), align="translation")
    same = reconstruct(numbers, align="translation")
    assert isinstance(result.height, torch.Tensor)
    assert np.array_equal(result.height.numpy(), same.height, equal_nan=True)
    assert result.all_in_focus.dtype == torch.uint8


def test_frames_without_a_match_stay_with_their_neighbour(caplog):
    frames, _ = scene(frames=7)
    moves = movements(7)
    numbers = moved(frames, moves)
    numbers[5] = np.random.default_rng(1).integers(0, 255, numbers[5].shape)
    numbers[0] = 7
    names = tuple(f"z{n}.png" for n in range(7))
    with caplog.at_level(logging.WARNING):
        alignment = align_frames(FocalStack(numbers, names=names))
    assert alignment.matched.tolist() == [False, True, True, True, True, False, True]
    assert "2 of 7 frames" in caplog.text and "frame 0 (z0.png), frame 5 (z5.png)" in caplog.text
    assert np.array_equal(alignment.transforms[0], alignment.transforms[1])
    assert np.array_equal(alignment.transforms[5], alignment.transforms[4])
    kept = [1, 2, 3, 4, 6]
    assert np.abs(alignment.transforms[kept] - moves[kept]).max() < 0.2


@pytest.mark.parametrize(
    ("blank", "matched"),
    [([3], [0, 1, 2, 4, 5, 6]), ([2, 3, 4], [0, 1])],  # 1 and 5 are blurred too differently
)
def test_a_middle_frame_that_shows_nothing_is_not_the_reference(blank, matched):
    frames, _ = scene(frames=7)
    moves = movements(7, shift=0.4)
    numbers = moved(frames, moves)
    numbers[blank] = 90
    alignment = align_frames(FocalStack(numbers))
    assert alignment.reference == min(blank) - 1
    assert np.flatnonzero(alignment.matched).tolist() == matched
    to_reference = np.stack([np.r_[move, [[0, 0, 1]]] for move in moves])
    to_reference = to_reference @ np.linalg.inv(to_reference[alignment.reference])
    assert np.abs(alignment.transforms[matched] - to_reference[matched, :2]).max() < 0.3


def test_where_nothing_matches_the_middle_frame_is_the_reference(caplog):
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 64), np.uint8)
    with caplog.at_level(logging.WARNING):
        alignment = align_frames(FocalStack(noise))
    assert alignment.reference == 2 and "4 of 5 frames" in caplog.text
    assert np.array_equal(alignment.transforms, np.tile(np.eye(2, 3), (5, 1, 1)))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (20, 20)])
def test_small_frames_do_not_fail(size):
    frames = np.random.default_rng(0).integers(0, 255, (3, *size)).astype(np.uint8)
    frames[:] = frames[0]
    alignment = align_frames(FocalStack(frames), "similarity")
    assert np.allclose(alignment.transforms, np.eye(2, 3), atol=1e-3)
    assert alignment.apply(FocalStack(frames)).n_frames == 3


def test_an_alignment_is_used_again(tmp_path, capsys):
    frames, _ = scene(frames=3)
    numbers = moved(frames, movements(3))
    np.save(tmp_path / "stack.npy", numbers)
    words = ["reconstruct", str(tmp_path / "stack.npy"), "--quiet"]
    assert main([*words, "--align", "similarity", "-o", str(tmp_path / "a")]) == 0
    info = json.loads((tmp_path / "a/info.json").read_text())
    assert info["alignment"]["model"] == "similarity" and info["seconds"]["align"] > 0
    assert info["shape"] == info["alignment"]["window"][2:]
    assert main([*words, "--align", str(tmp_path / "a"), "-o", str(tmp_path / "b")]) == 0
    heights = [(tmp_path / name / "height.tif").read_bytes() for name in "ab"]
    assert heights[0] == heights[1]
    again = Alignment.read(tmp_path / "b/info.json")
    assert again.to_dict() == info["alignment"]
    with pytest.raises(AlignmentError, match=r"of a stack of 3 x 224 x 224, the stack has 2 x 224"):
        reconstruct(numbers[:2], align=again)


def test_wrong_alignments_are_errors(tmp_path):
    stack = FocalStack(np.zeros((3, 40, 50), np.uint8))
    with pytest.raises(ValueError, match="model must be one of translation, similarity, affine"):
        align_frames(stack, "rigid")
    with pytest.raises(FileNotFoundError, match="align must be one of none, translation"):
        reconstruct(stack, align="rigid")
    with pytest.raises(TypeError, match="align must be a name, a path or an Alignment, got bool"):
        reconstruct(stack, align=True)
    for text in ("{}", "[]", "no json", '{"alignment": null}', '{"transforms": [[1]]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(AlignmentError, match=r"a\.json: "):
            reconstruct(stack, align=tmp_path / "a.json")
    mirrored = {
        **align_frames(stack).to_dict(),
        "transforms": [[[-1.0, 0, 49], [0, 1, 0]]] * 3,
    }
    with pytest.raises(AlignmentError, match="keep their orientation"):
        Alignment.from_dict(mirrored)
    far = np.broadcast_to(np.eye(2, 3), (3, 2, 3)).copy()
    far[2, 0, 2] = 45
    known = Alignment("translation", 1, (40, 50), far, np.ones(3), np.ones(3, bool))
    with pytest.raises(AlignmentError, match="frames have 40 x 5 of 40 x 50 pixels in common"):
        known.apply(stack)
    apart = replace(known, transforms=2 * far)
    assert apart.window[2:] == (20, 0)


def test_frames_may_be_given_in_any_form(tmp_path):
    frames = (255 * np.random.default_rng(0).random((3, 80, 64))).astype(np.uint8)
    expected = align_frames(FocalStack(frames))
    for number, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"{number}.png"), frame)
    for source in (frames, list(frames), str(tmp_path)):
        found = align_frames(source)
        assert np.array_equal(found.transforms, expected.transforms)
        moved = found.apply(source)
        assert np.array_equal(moved.frames, expected.apply(FocalStack(frames)).frames)


def test_nothing_is_aligned_unasked():
    frames, _ = scene(frames=3)
    numbers = moved(frames, movements(3))
    result = gplws.reconstruct(numbers)
    assert "alignment" not in result.metadata
    assert result.height.shape == (SIDE, SIDE)
