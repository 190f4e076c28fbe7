"""Tests of FocalStack: validation, axes, luminance."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch

from gplws.data import FocalStack

LUMINANCE_TOLERANCE = 1e-6


def gray_frames(n: int = 4, height: int = 5, width: int = 7, dtype: str = "u1") -> np.ndarray:
    values = np.arange(n * height * width).reshape(n, height, width)
    return values.astype(dtype)


class TestValidation:
    def test_masked_arrays_are_refused(self):
        frames = np.ma.masked_greater(np.arange(24.0).reshape(2, 3, 4), 20)
        with pytest.raises(TypeError, match="a mask is not used"):
            FocalStack.from_frames(frames)

    def test_one_frame_is_refused_by_name(self):
        with pytest.raises(ValueError, match="frames must hold at least 2"):
            FocalStack(gray_frames(1))

    @pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 7, 2), (4, 5, 7, 4), (1, 4, 5, 7, 3)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match="got shape"):
            FocalStack(np.zeros(shape, np.uint8))

    @pytest.mark.parametrize("shape", [(3, 0, 5), (3, 5, 0)])
    def test_empty_frames_are_refused(self, shape):
        with pytest.raises(ValueError, match="at least one row"):
            FocalStack(np.zeros(shape, np.uint8))

    @pytest.mark.parametrize("dtype", [bool, complex, object, "U3", np.longdouble])
    def test_dtypes_that_are_no_image_are_refused(self, dtype):
        with pytest.raises(TypeError, match="dtype"):
            FocalStack(np.zeros((3, 4, 5), dtype))

    def test_bool_tensor_is_refused(self):
        with pytest.raises(TypeError, match=r"torch\.bool"):
            FocalStack(torch.zeros(3, 4, 5, dtype=torch.bool))

    def test_lists_are_refused(self):
        with pytest.raises(TypeError, match="got list"):
            FocalStack.from_frames([[[1]]])

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("kind", ["numpy", "torch", "half", "big-endian"])
    def test_nan_and_inf_name_the_frame(self, value, kind):
        frames = gray_frames(dtype="f4")
        frames[2, 3, 1] = value
        given = {
            "numpy": frames,
            "torch": torch.from_numpy(frames),
            "half": frames.astype("f2"),
            "big-endian": frames.astype(">f4"),
        }[kind]
        with pytest.raises(ValueError, match=r"frame 2 \(c\.tif\)"):
            FocalStack(given, names=("a.tif", "b.tif", "c.tif", "d.tif"))

    def test_doubles_beyond_float32_are_refused(self):
        frames = gray_frames(dtype="f8")
        frames[1, 0, 0] = 1e200
        with pytest.raises(ValueError, match="finite in float32: frame 1"):
            FocalStack(frames)

    @pytest.mark.parametrize(
        ("positions", "message"),
        [
            ([0.0, 1.0, 2.0], r"shape \(4,\)"),
            ([[0.0, 1.0, 2.0, 3.0]], r"shape \(4,\)"),
            ([0.0, 1.0, np.nan, 3.0], "finite"),
            ([0.0, 1.0, np.inf, 3.0], "finite"),
            ([0.0, 1.0, 1.0, 3.0], "strictly.*1.0 at 1"),
            ([0.0, 2.0, 1.0, 3.0], "strictly.*2.0 at 1"),
            ([3.0, 2.0, 2.5, 1.0], "strictly.*2.0 at 1"),
            ([5.0, 5.0, 5.0, 5.0], "strictly"),
        ],
    )
    def test_wrong_positions_are_refused(self, positions, message):
        with pytest.raises(ValueError, match=message):
            FocalStack(gray_frames(), focus_positions_um=positions)

    def test_positions_that_are_no_numbers_are_refused(self):
        with pytest.raises(TypeError, match="focus_positions_um"):
            FocalStack(gray_frames(), focus_positions_um=["a", "b", "c", "d"])

    @pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf])
    @pytest.mark.parametrize("name", ["pixel_size_um", "z_step_um"])
    def test_lengths_must_be_positive(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            FocalStack.from_frames(gray_frames(), **{name: value})

    @pytest.mark.parametrize("value", ["1", True, (1.0, 2.0)])
    @pytest.mark.parametrize("name", ["pixel_size_um", "z_step_um"])
    def test_lengths_must_be_numbers(self, name, value):
        with pytest.raises(TypeError, match=name):
            FocalStack.from_frames(gray_frames(), **{name: value})

    def test_step_and_positions_exclude_each_other(self):
        with pytest.raises(ValueError, match="exclude each other"):
            FocalStack.from_frames(gray_frames(), z_step_um=1.0, focus_positions_um=[0, 1, 2, 3])

    def test_names_must_fit_the_frames(self):
        with pytest.raises(ValueError, match="one name per frame"):
            FocalStack(gray_frames(), names=("a",))


class TestCalibration:
    def test_step_starts_at_zero(self):
        stack = FocalStack.from_frames(gray_frames(), z_step_um=np.float32(2.5))
        np.testing.assert_array_equal(stack.focus_positions_um, [0.0, 2.5, 5.0, 7.5])

    def test_nothing_is_invented(self):
        stack = FocalStack.from_frames(gray_frames())
        assert stack.focus_positions_um is None
        assert stack.pixel_size_um is None

    @pytest.mark.parametrize("positions", [[0, 1, 3, 7], [4.0, 2.0, 1.0, -3.0]])
    def test_irregular_and_falling_positions_are_kept(self, positions):
        for given in (positions, np.array(positions), torch.tensor(positions)):
            stack = FocalStack.from_frames(gray_frames(), focus_positions_um=given)
            assert stack.focus_positions_um.dtype == np.float64
            np.testing.assert_array_equal(stack.focus_positions_um, positions)

    def test_inputs_are_copied_or_shared_but_never_changed(self):
        positions, frames, metadata = np.array([0.0, 1.0, 2.0, 3.0]), gray_frames(), {"a": 1}
        stack = FocalStack(frames, focus_positions_um=positions, metadata=metadata)
        positions[0] = 9.0
        metadata["a"] = 2
        assert stack.focus_positions_um[0] == 0.0
        assert stack.metadata["a"] == 1
        assert np.shares_memory(stack.frames, frames)
        with pytest.raises(ValueError, match="read-only"):
            stack.focus_positions_um[0] = 1.0


class TestAxes:
    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize(
        ("axes", "order", "extra"),
        [
            ("ZYX", (0, 1, 2), ()),
            ("nhw", (0, 1, 2), ()),
            ("YXZ", (1, 2, 0), ()),
            ("XZY", (2, 0, 1), ()),
            ("TCZYX", (0, 1, 2), (0, 0)),
            ("TZCYX", (0, 1, 2), (1, 0)),
            ("IYX", (0, 1, 2), ()),
        ],
    )
    def test_gray_axes_are_brought_into_order(self, axes, order, extra, convert):
        frames = gray_frames()
        given = frames.transpose(order)
        for axis in extra:
            given = np.expand_dims(given, axis)
        stack = FocalStack.from_frames(convert(given.copy()), axes=axes)
        np.testing.assert_array_equal(np.asarray(stack.frames), frames)
        assert not stack.is_color
        assert (stack.n_frames, stack.height, stack.width) == (4, 5, 7)

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize(
        ("axes", "order"),
        [
            ("ZYXS", (0, 1, 2, 3)),
            ("NHWC", (0, 1, 2, 3)),
            ("ZCYX", (0, 3, 1, 2)),
            ("CZYX", (3, 0, 1, 2)),
            ("SYXZ", (3, 1, 2, 0)),
        ],
    )
    def test_color_axes_are_brought_into_order(self, axes, order, convert):
        frames = np.stack([gray_frames(), gray_frames() + 1, gray_frames() + 2], axis=-1)
        stack = FocalStack.from_frames(convert(frames.transpose(order).copy()), axes=axes)
        np.testing.assert_array_equal(np.asarray(stack.frames), frames)
        assert stack.is_color

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((4, 5, 7), (4, 5, 7)),
            ((4, 5, 7, 1), (4, 5, 7)),
            ((4, 5, 7, 3), (4, 5, 7, 3)),
            ((2, 1, 1000), (2, 1, 1000)),
        ],
    )
    def test_unambiguous_shapes_need_no_axes(self, shape, expected):
        assert FocalStack.from_frames(np.zeros(shape, np.uint8)).frames.shape == expected

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((4, 3, 5, 7), "axes='ZCYX'"),
            ((3, 4, 5, 7), "pass axes"),
            ((4, 1, 5, 7), "pass axes|axes="),
            ((1, 4, 5, 7), "pass axes"),
            ((4, 3, 7, 3), "ambiguous"),
            ((480, 640, 3), "one image with 3 channels"),
            ((480, 640, 1), "one image with 1 channels"),
            ((480, 640), "one image"),
            ((1, 1, 4, 5, 7), "axes='TCZYX'"),
            ((7,), "pass axes"),
        ],
    )
    def test_ambiguous_shapes_name_the_fix(self, shape, message):
        with pytest.raises(ValueError, match=message):
            FocalStack.from_frames(np.zeros(shape, np.uint8))

    @pytest.mark.parametrize(
        ("axes", "shape", "message"),
        [
            ("ZYX", (4, 5, 7, 3), "names 3 axes, but the array has 4"),
            ("ZZX", (4, 5, 7), "twice"),
            ("NZX", (4, 5, 7), "twice"),
            ("ZYB", (4, 5, 7), "unknown letters B"),
            ("ZYC", (4, 5, 7), "must name the rows"),
            ("", (4, 5, 7), "must name the rows"),
            ("TZYX", (2, 4, 5, 7), "T=2"),
            ("TYX", (4, 5, 7), "axes='ZYX'"),
            ("TZYX", (4, 1, 5, 7), "axes='ZTYX'"),
            ("CZYX", (2, 4, 5, 7), "2 channels.*pass channel=0"),
            ("CZYX", (4, 4, 5, 7), "4 channels"),
            ("ZYXS", (4, 5, 7, 5), "5 channels"),
            ("CYX", (3, 5, 7), "at least 2 frames"),
            ("YX", (5, 7), "at least 2 frames"),
            ("ZCYXS", (4, 3, 5, 7, 3), "two colour axes.*channel=0"),
        ],
    )
    def test_wrong_axes_are_refused(self, axes, shape, message):
        with pytest.raises(ValueError, match=message):
            FocalStack.from_frames(np.zeros(shape, np.uint8), axes=axes)

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize(
        ("axes", "order"),
        [("ZCYX", (0, 1, 2, 3)), ("CZYX", (1, 0, 2, 3)), ("ZYXS", (0, 2, 3, 1))],
    )
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_one_channel_is_taken(self, axes, order, count, convert):
        channels = np.stack([gray_frames() + k for k in range(count)], axis=1)
        given = convert(channels.transpose(order).copy())
        for channel in {0, count - 1}:
            stack = FocalStack.from_frames(given, axes=axes, channel=channel)
            np.testing.assert_array_equal(np.asarray(stack.frames), channels[:, channel])

    def test_of_two_colour_axes_the_first_is_taken_from(self):
        frames = np.random.default_rng(0).integers(0, 255, (4, 2, 5, 7, 3), np.uint8)
        stack = FocalStack.from_frames(frames, axes="ZCYXS", channel=1)
        np.testing.assert_array_equal(stack.frames, frames[:, 1])

    @pytest.mark.parametrize(
        ("channel", "error", "message"),
        [
            (3, ValueError, "channel must be 0 to 2, got 3"),
            (-1, ValueError, "channel must be 0 to 2, got -1"),
            (True, TypeError, "channel must be an integer, got bool"),
            (1.0, TypeError, "channel must be an integer, got float"),
        ],
    )
    def test_wrong_channels_are_refused(self, channel, error, message):
        with pytest.raises(error, match=message):
            FocalStack.from_frames(np.zeros((4, 5, 7, 3), np.uint8), channel=channel)
        with pytest.raises(ValueError, match=r"channel=0: axes 'ZYX' .* have no colour"):
            FocalStack.from_frames(gray_frames(), channel=0)

    def test_axes_must_be_text(self):
        with pytest.raises(TypeError, match="axes must be a string"):
            FocalStack.from_frames(gray_frames(), axes=(0, 1, 2))

    @pytest.mark.parametrize(
        ("dtype", "opaque"), [("u1", 255), ("u2", 65535), ("f4", 1.0)], ids=["u1", "u2", "f4"]
    )
    def test_opaque_alpha_is_dropped_with_a_log(self, dtype, opaque, caplog):
        frames = np.full((4, 5, 7, 4), opaque, dtype)
        frames[..., :3] = 0.25 if dtype == "f4" else 7
        with caplog.at_level(logging.INFO, logger="gplws"):
            stack = FocalStack.from_frames(frames)
        np.testing.assert_array_equal(stack.frames, frames[..., :3])
        assert "alpha" in caplog.text

    def test_transparent_alpha_is_refused(self):
        frames = np.full((4, 5, 7, 4), 255, np.uint8)
        frames[1, 2, 3, 3] = 254
        with pytest.raises(ValueError, match="alpha"):
            FocalStack.from_frames(frames)


class TestGray:
    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    def test_some_frames_are_those_of_all(self, convert):
        stack = FocalStack(convert(gray_frames().astype(np.int16) - 9))
        some = stack.gray(slice(1, 3), frames=slice(1, 2))
        assert torch.equal(some, stack.gray()[1:2, 1:3])

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"])
    def test_integers_are_scaled_by_the_maximum_of_their_dtype(self, dtype, convert):
        top = np.iinfo(dtype).max
        frames = np.zeros((3, 4, 5), dtype)
        frames[1] = top
        frames[2] = top // 2
        gray = FocalStack(convert(frames)).gray()
        assert gray.dtype == torch.float32
        assert gray.shape == (3, 4, 5)
        np.testing.assert_allclose(gray[:, 0, 0], [0, 1, (top // 2) / top], atol=1e-7)

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
    def test_floats_of_up_to_2_keep_their_values(self, dtype, convert):
        frames = (gray_frames() / 70).astype(dtype)
        gray = FocalStack(convert(frames)).gray()
        np.testing.assert_array_equal(gray.numpy(), frames.astype("f4"))
        assert gray.data_ptr() != frames.ctypes.data

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize(
        ("dtype", "highest", "full"),
        [
            ("i8", 200, 255),
            ("i8", 9, 255),
            ("u8", 4095, 4095),
            ("u4", 4096, 8191),
            ("u4", 2**32 - 2, 2**32 - 1),
            ("i2", 4095, 2**15 - 1),
            ("f4", 255, 255),
            ("f8", 65535.5, 2**17 - 1),
            ("f4", 3, 3),
        ],
    )
    def test_counts_are_divided_by_the_full_scale_that_holds_them(
        self, dtype, highest, full, convert
    ):
        frames = np.zeros((3, 4, 5), dtype)
        frames[1, 2, 3], frames[2, 0, 0] = highest, highest / 3
        stack = FocalStack(convert(frames))
        assert stack.levels == (0, float(full))
        expected = torch.from_numpy((frames / full).astype("f4"))
        torch.testing.assert_close(stack.gray(), expected, rtol=1e-6, atol=0)
        assert torch.equal(stack.gray(slice(0, 1)), stack.gray()[:, :1])

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize(
        ("dtype", "lowest", "highest", "full"),
        [
            ("f4", -0.5, 0.5, 1),
            ("f4", -0.75, -0.25, 1),
            ("f8", -2000, 40000, 65535),
            ("i1", -100, 27, 127),
            ("i2", -(2**15), 2**15 - 1, 65535),
            ("i8", -(2**63), 2**63 - 1, 2**64 - 1),
        ],
    )
    def test_black_is_the_lowest_of_negative_values(self, dtype, lowest, highest, full, convert):
        frames = np.full((3, 4, 5), highest, dtype)
        frames[1, 2, 3] = lowest
        stack = FocalStack(convert(frames))
        assert stack.levels == (float(lowest), float(full))
        gray = stack.gray()
        assert gray.min() == gray[1, 2, 3] == 0
        assert gray.max() == pytest.approx((highest - lowest) / full)

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    @pytest.mark.parametrize(("dtype", "full"), [("f4", 1), ("i8", 255)])
    def test_a_hot_pixel_and_a_dead_one_do_not_change_the_scale(self, dtype, full, convert):
        frames = np.linspace(0, full, 6 * 40 * 50).reshape(6, 40, 50).astype(dtype)
        frames[:, 7, 8], frames[:, 30, 2] = 100_000, -100_000
        assert FocalStack(convert(frames)).levels == (0, full)

    def test_other_levels_may_be_given(self):
        frames = torch.rand(3, 4, 5)
        gray = FocalStack(frames).gray(levels=torch.tensor([0.5, 2.0]))
        torch.testing.assert_close(gray, ((frames - 0.5) / 2).clamp(min=0))

    def test_bfloat16_tensors_become_float32(self):
        frames = torch.rand(3, 4, 5).bfloat16()
        stack = FocalStack(frames)
        assert stack.frames.dtype == torch.float32
        torch.testing.assert_close(stack.gray(), frames.float())

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    def test_color_becomes_rec_709_luminance(self, convert):
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 256, (3, 16, 17, 3)).astype(np.uint8)
        expected = (frames.astype("f8") / 255) @ np.array([0.2126, 0.7152, 0.0722])
        gray = FocalStack(convert(frames)).gray()
        np.testing.assert_allclose(gray.numpy(), expected, atol=LUMINANCE_TOLERANCE)

    @pytest.mark.parametrize("shape", [(3, 33, 17), (3, 33, 17, 3)])
    def test_rectangles_agree_bitwise_with_the_whole(self, shape):
        frames = np.random.default_rng(1).random(shape, np.float32)
        spans = (slice(0, 1), slice(5, 12), slice(7, 7), slice(None, None, 3), slice(None))
        for given in (frames, torch.from_numpy(frames)):
            stack = FocalStack(given)
            whole = stack.gray()
            for rows, columns in itertools.product(spans, spans):
                assert torch.equal(stack.gray(rows, columns), whole[:, rows, columns])

    @pytest.mark.parametrize(
        "change",
        [
            lambda a: a[:, ::-1, ::-1],
            lambda a: a.astype(">u2"),
            lambda a: np.asfortranarray(a),
            lambda a: np.broadcast_to(a, a.shape),
        ],
        ids=["negative strides", "big-endian", "fortran", "read-only"],
    )
    def test_any_memory_layout_is_read(self, change):
        frames = change(gray_frames(dtype="u2"))
        np.testing.assert_allclose(
            FocalStack(frames).gray(slice(1, 2)).numpy(), frames[:, 1:2] / 65535.0, rtol=1e-6
        )

    def test_source_is_not_changed(self):
        frames = torch.rand(3, 4, 5)
        before = frames.clone()
        FocalStack(frames).gray().zero_()
        assert torch.equal(frames, before)

    @pytest.mark.cuda
    def test_tensors_stay_on_their_device(self):
        frames = torch.rand(3, 4, 5, 3)
        stack = FocalStack(frames.cuda())
        assert stack.gray().device.type == "cuda"
        torch.testing.assert_close(stack.gray().cpu(), FocalStack(frames).gray())


def test_positions_that_float32_cannot_tell_apart_are_refused():
    positions = np.r_[np.arange(3) * 1e-5, np.arange(3) * 1e-5 + 2000]
    with pytest.raises(ValueError, match="focus_positions_um must have steps that float32 tells"):
        FocalStack(np.zeros((6, 8, 9), np.uint8), positions)
    FocalStack(np.zeros((6, 8, 9), np.uint8), 1e6 + 0.01 * np.arange(6))
