"""Tests of the preview figure and its parts."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gplws.io import preview_figure, write_preview
from gplws.io.pictures import (
    display_uint8,
    format_length,
    nice_length,
    preview_png,
    robust_limits,
    telling_line,
)


def bowl(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    radius = np.hypot(x - 0.5 * width, y - 0.3 * height)
    return np.where(radius < 0.2 * min(height, width), -10.0, 0.01 * x).astype(np.float32)


def texts(figure) -> str:
    found = [t.get_text() for axes in figure.axes for t in axes.texts]
    found += [label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel())]
    return "\n".join(found)


@pytest.mark.parametrize(
    "shape", [(64, 64), (300, 600), (20, 1000), (1000, 20), (1, 50), (50, 1), (1, 1), (7, 5)]
)
@pytest.mark.parametrize(("pixel_size_um", "channels"), [(None, None), (0.25, 3)])
def test_every_shape_gives_a_picture_with_content(shape, pixel_size_um, channels):
    image = np.zeros(shape if channels is None else (*shape, channels), np.uint16)
    data = preview_png(bowl(*shape), image, pixel_size_um=pixel_size_um)
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    assert min(picture.size) > 200
    assert max(picture.size) < 4000
    assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 40), (20, 1000), (1000, 20)])
@pytest.mark.parametrize("pixel_size_um", [None, 0.25])
def test_nothing_leaves_the_figure_and_no_texts_collide(shape, pixel_size_um):
    height = bowl(*shape)
    height[:2] = np.nan
    figure = preview_figure(height, np.zeros(shape, np.uint8), pixel_size_um=pixel_size_um)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    boxes = []
    for axes in figure.axes:
        boxes += [t.get_window_extent(renderer) for t in axes.texts if t.get_text()]
        box = axes.get_tightbbox(renderer)
        assert box.x0 >= page.x0
        assert box.x1 <= page.x1
        assert box.y0 >= page.y0
        assert box.y1 <= page.y1
    for i, first in enumerate(boxes):
        for second in boxes[i + 1 :]:
            overlap_x = min(first.x1, second.x1) - max(first.x0, second.x0)
            overlap_y = min(first.y1, second.y1) - max(first.y0, second.y0)
            # Ascents and descents of neighbouring lines may touch by a few dots.
            assert min(overlap_x, overlap_y) < 6


def test_units_are_named():
    calibrated = texts(preview_figure(bowl(50, 60), pixel_size_um=2.0))
    assert "Height (µm)" in calibrated
    assert "x (µm)" in calibrated
    assert "20 µm" in calibrated
    assert "(px)" not in calibrated
    frames = texts(preview_figure(bowl(50, 60), units="frames"))
    assert "Height (frames)" in frames
    assert "x (px)" in frames
    assert "µm" not in frames


def test_missing_pixels_are_counted_and_nothing_is_drawn_for_them():
    height = bowl(50, 60)
    valid = np.ones(height.shape, bool)
    valid[:25] = False
    height[25:30] = np.nan
    figure = preview_figure(height, valid=valid)
    assert "hatched: no height (60.0 %)" in texts(figure)
    alpha = figure.axes[0].images[0].get_array()[..., 3]
    assert not alpha[:30].any()
    assert alpha[30:].all()


def test_height_maps_without_any_or_any_relief_are_drawn():
    assert "100.0 %" in texts(preview_figure(np.full((30, 40), np.nan)))
    preview_png(np.full((30, 40), 3.0), np.full((30, 40), np.nan, np.float32))


def test_stretched_pictures_say_so():
    assert "in y" in texts(preview_figure(bowl(20, 1000)))
    assert "in x" in texts(preview_figure(bowl(1000, 20)))
    assert "stretched" not in texts(preview_figure(bowl(100, 200)))


def test_neither_inputs_nor_global_state_change():
    import matplotlib

    settings = dict(matplotlib.rcParams)
    height, image = bowl(30, 40), np.arange(1200, dtype=np.uint16).reshape(30, 40)
    height[0, 0] = np.inf
    copies = height.copy(), image.copy()
    preview_png(height, image, valid=np.ones((30, 40), bool), pixel_size_um=1.0)
    np.testing.assert_array_equal(height, copies[0])
    np.testing.assert_array_equal(image, copies[1])
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": np.zeros((3, 4, 5))}, "height must be"),
        ({"height": np.zeros((0, 4))}, "height must be"),
        ({"units": "mm"}, "units must be"),
        ({"all_in_focus": np.zeros((5, 4))}, "all_in_focus must be"),
        ({"valid": np.ones((5, 4), bool)}, "valid must have shape"),
        ({"pixel_size_um": 0.0}, "pixel_size_um must be positive"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        preview_figure(**{"height": np.zeros((4, 5)), **arguments})


def test_the_telling_row_crosses_the_relief():
    height = np.zeros((100, 80))
    height[40:61, 20:60] = 5.0
    assert telling_line(height) == 50
    assert 20 <= telling_line(height, axis=1) < 60
    height[45:55] = np.nan
    assert 40 <= telling_line(height) < 61
    assert np.isfinite(height[telling_line(height)]).all()


def test_noise_at_the_border_is_not_the_telling_row():
    height = np.zeros((100, 80))
    height[50, 10:70] = 1.0
    height[:3] = np.random.default_rng(0).normal(size=(3, 80))
    assert telling_line(height) == 50
    height[50] = 0
    assert telling_line(height) < 3  # there is nothing else


def test_a_spike_is_not_the_telling_row():
    height = np.zeros((200, 200))
    height[60:80, 50:150] = 1.0
    height[150, 3] = 1e6
    assert 60 <= telling_line(height) < 80


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1.0, 1), (1.99, 1), (2.0, 2), (4.9, 2), (5, 5), (9.99, 5), (1000, 1000), (0.03, 0.02)],
)
def test_scale_bars_have_nice_lengths(limit, expected):
    assert nice_length(limit) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("length", "text"),
    [(0.5, "500 nm"), (0.002, "2 nm"), (20, "20 µm"), (1000, "1 mm"), (50000, "50 mm")],
)
def test_lengths_have_readable_units(length, text):
    assert format_length(length) == text


def test_color_limits_ignore_outliers_and_are_never_empty():
    values = np.append(np.linspace(0, 1, 10_000), [1e6, np.nan, -1e6])
    low, high = robust_limits(values)
    assert -0.01 < low < 0.02
    assert 0.98 < high < 1.01
    for flat in (np.full(5, 3.0), np.full(5, np.nan), np.array([]), np.zeros(3)):
        low, high = robust_limits(flat)
        assert low < high


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4", "f8"])
def test_display_images_use_all_gray_levels(dtype):
    image = (np.arange(10_000) / 3).astype(dtype).reshape(100, 100)
    shown = display_uint8(image)
    assert shown.dtype == np.uint8
    assert shown.min() == 0
    assert shown.max() == 255
    assert (np.diff(shown.ravel().astype(int)) >= 0).all()


def test_8_bit_display_images_are_unchanged():
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)
    assert display_uint8(image) is image


def test_previews_are_not_overwritten_by_accident(tmp_path):
    path = tmp_path / "p.png"
    write_preview(path, bowl(30, 40))
    with pytest.raises(FileExistsError, match="overwrite"):
        write_preview(path, bowl(30, 40))
    write_preview(path, bowl(30, 40), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
