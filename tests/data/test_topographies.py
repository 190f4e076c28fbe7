import math

import cv2
import numpy as np
import pytest
import tifffile
import torch

from gplws.data import read_textures, read_topographies, read_topography
from gplws.data.randomness import Draw
from gplws.data.topographies import draw_part, draw_topography, fill_holes, level_heights


def waves(shape=(40, 60)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.sin(x / 6) * np.cos(y / 9)


def test_the_form_is_removed_and_the_rest_is_left():
    y, x = np.mgrid[-1:1:40j, -1:1:60j]
    rest = waves()
    rest = level_heights(rest, np.ones(rest.shape, bool), 2)
    form = 5 + 3 * x - 2 * y + x * y + 0.7 * y**2
    everywhere = np.ones(rest.shape, bool)
    np.testing.assert_allclose(level_heights(rest + form, everywhere, 2), rest, atol=1e-9)
    assert np.ptp(level_heights(form, everywhere, 1)) < np.ptp(form)
    assert level_heights(form, everywhere, 0).mean() == pytest.approx(0, abs=1e-9)
    # A point that does not count does not tilt the plane.
    spoiled, valid = rest + form, everywhere.copy()
    spoiled[3, 5], valid[3, 5] = 1e6, False
    assert np.abs(level_heights(spoiled, valid, 2) - rest)[valid].max() < 0.05
    with pytest.raises(ValueError, match="level"):
        level_heights(form, everywhere, 3)


def test_holes_are_filled_smoothly_and_the_rest_is_kept():
    heights = 10 + waves((70, 90))
    valid = np.random.default_rng(0).random(heights.shape) > 0.2
    valid[20:34, 30:50] = False
    filled = fill_holes(np.where(valid, heights, np.nan), valid)
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[valid], heights[valid])
    single = ~valid
    single[18:36, 28:52] = False
    assert np.abs(filled - heights)[single].mean() < 0.1
    assert heights.min() - 0.2 < filled.min() and filled.max() < heights.max() + 0.2
    with pytest.raises(ValueError, match="valid"):
        fill_holes(heights, np.zeros(heights.shape, bool))


def test_files_of_all_kinds_are_read(tmp_path):
    heights = waves().astype(np.float32)
    holes = np.ones(heights.shape, bool)
    holes[4:8, 9:20] = False
    np.savez(tmp_path / "a.npz", h_um=heights, valid=holes, dx_um=2.0, dy_um=3.0)
    np.save(tmp_path / "b.npy", np.where(holes, heights, np.nan))
    tifffile.imwrite(tmp_path / "c.tif", heights)
    scaled = ((heights + 1) * 30000).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "d.png"), scaled)
    (tmp_path / "notes.txt").write_text("not a surface")
    found = read_topographies([tmp_path], level=0)
    assert [topography.name for topography in found] == ["a.npz", "b.npy", "c.tif", "d.png"]
    assert [t.pixel_size_um for t in found] == [(3.0, 2.0), None, None, None]
    expected = heights - heights[holes].mean()
    for topography in found[:3]:
        assert topography.height_um.dtype == torch.float32
        difference = np.abs(topography.height_um.numpy() - expected)[holes]
        assert difference.max() < 0.02
    resampled = found[0].resampled(6.0)
    assert resampled.shape == (20, 20)
    with pytest.raises(ValueError, match=r"a\.npz: 1 x 1 pixels"):
        found[0].resampled(100.0)
    with pytest.raises(ValueError, match="pixel size is unknown"):
        found[1].resampled(1.0)


def test_a_colour_picture_is_no_height_map(tmp_path):
    gray = ((waves() + 1) * 127).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "gray.png"), np.stack([gray] * 3, -1))
    assert read_topography(tmp_path / "gray.png").height_um.shape == gray.shape
    cv2.imwrite(str(tmp_path / "colour.png"), cv2.applyColorMap(gray, cv2.COLORMAP_VIRIDIS))
    with pytest.raises(ValueError, match=r"colour\.png: .* got a colour picture"):
        read_topography(tmp_path / "colour.png")


@pytest.mark.parametrize(
    ("given", "pitch"),
    [({"dx_um": 2.0}, (2.0, 2.0)), ({"dy_um": 3.0}, (3.0, 3.0)), ({}, None)],
)
def test_one_pitch_is_that_of_rows_and_columns(tmp_path, given, pitch):
    np.savez(tmp_path / "a.npz", h_um=waves(), **given)
    assert read_topography(tmp_path / "a.npz").pixel_size_um == pitch


def test_parts_are_drawn_over_the_whole_surface_and_repeat(tmp_path):
    np.savez(tmp_path / "a.npz", h_um=waves((200, 240)))
    topography = read_topography(tmp_path / "a.npz")
    found = [draw_topography(topography, (48, 64), Draw(seed)) for seed in range(5)]
    for surface in found:
        assert surface.height.shape == (48, 64)
        assert surface.height.min() == 0 and surface.height.max() == 1
    assert torch.equal(draw_topography(topography, (48, 64), Draw(1)).height, found[1].height)
    assert not torch.equal(found[0].height, found[1].height)


def test_a_turned_part_keeps_lengths():
    # A cone stays round, whatever the turn and the mirror.
    y, x = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    cone = torch.hypot(y, x)[None]
    for seed in range(6):
        part = draw_part(cone, (60, 60), Draw(seed))[0]
        down, right = torch.gradient(part)
        steep = torch.hypot(down, right)[10:-10, 10:-10]
        scale = steep.median()
        assert 0.45 < float(scale) < 1.2
        assert ((steep - scale).abs() < 0.1 * scale).float().mean() > 0.8


def test_small_surfaces_are_mirrored_to_the_size_asked_for():
    part = draw_part(torch.rand(1, 9, 10), (50, 70), Draw(0))
    assert part.shape == (1, 50, 70) and part.isfinite().all()


def test_pictures_are_read_in_rgb(tmp_path):
    picture = np.zeros((10, 12, 3), np.uint8)
    picture[..., 0] = 255  # red
    cv2.imwrite(str(tmp_path / "red.png"), picture[..., ::-1])
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((9, 9), 65535, np.uint16))
    deep, red = read_textures([tmp_path])
    assert red.shape == (3, 10, 12) and red.mean((1, 2)).tolist() == [1, 0, 0]
    assert deep.shape == (3, 9, 9) and deep.min() == 1


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("nowhere.npz", None, FileNotFoundError, "nowhere.npz"),
        ("a.npz", {"z": np.ones((9, 9))}, ValueError, "expected an array h_um, got z"),
        ("a.npz", {"h_um": np.ones(9)}, ValueError, "8 x 8"),
        ("a.npz", {"h_um": np.ones((9, 9)), "valid": np.ones((9, 8))}, ValueError, "valid is"),
        ("a.npz", {"h_um": np.full((9, 9), np.nan)}, ValueError, "only 0% of the heights"),
        ("a.txt", b"1 2 3", ValueError, "expected one of .npz"),
        ("a.png", b"1 2 3", ValueError, r"a\.png: no readable height map"),
        ("a.png", b"", ValueError, r"a\.png: no readable height map"),
        ("a.npz", b"PK\x03\x04 and no more", ValueError, r"a\.npz: no readable height map"),
        ("a.npy", b"\x93NUMPY", ValueError, r"a\.npy: no readable height map"),
        ("a.npz", {"h_um": np.full((9, 9), "a")}, ValueError, r"a\.npz: no readable height map"),
        ("a.npz", {"h_um": np.ones((9, 9)), "dx_um": 0.0}, ValueError, "dx_um: expected one pos"),
        ("a.npz", {"h_um": np.ones((9, 9)), "dx_um": [1, 2]}, ValueError, "dx_um: expected one"),
        (
            "a.npz",
            {"h_um": np.ones((9, 9)), "dx_um": 1.0, "dy_um": np.nan},
            ValueError,
            "dy_um: expected one positive number, got nan",
        ),
    ],
)
def test_files_that_are_no_surface_are_named(name, content, error, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_topography(path)


def test_folders_without_files_and_files_without_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no topographies in it"):
        read_topographies([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_textures([tmp_path / "nowhere"])
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.png: expected a picture"):
        read_textures([tmp_path])
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png: expected a picture"):
        read_textures([tmp_path])


def test_a_pitch_may_be_an_array_of_one_number(tmp_path):
    np.savez(tmp_path / "a.npz", h_um=waves(), dx_um=np.array([2]), dy_um=np.array([[3.0]]))
    assert read_topography(tmp_path / "a.npz").pixel_size_um == (3.0, 2.0)


@pytest.mark.shared
def test_the_measured_topographies_can_be_drawn_from(shared_dir):
    found = read_topographies([shared_dir / "data/topo"])
    assert len(found) > 20
    for topography in found:
        assert topography.height_um.isfinite().all()
        height = draw_topography(topography, (64, 64), Draw(0)).height
        # Not one spike above a flat rest.
        low, high = (float(torch.quantile(height, share)) for share in (0.02, 0.98))
        assert high - low > 0.05 and math.isfinite(high)
