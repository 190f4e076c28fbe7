import math

import numpy as np
import pytest
import torch
from depth_files import write_pfm
from PIL import Image

from gplws.datasets import DatasetError, LightField4D, refocus

CONFIG = """[intrinsics]
image_resolution_x_px = {width}
image_resolution_y_px = {height}

[extrinsics]
num_cams_x = {columns}
num_cams_y = {rows}
baseline_mm = 50.0

[meta]
scene = plane
"""


def plane_view(row, column, disparity, grid=(3, 3), size=(40, 48)):
    """View of a plane with a smooth texture, known at any shift: (3, H, W) in 0..1."""
    y = torch.arange(size[0])[:, None] + disparity * (row - grid[0] // 2)
    x = torch.arange(size[1])[None] + disparity * (column - grid[1] // 2)
    waves = [(0.9, 0.2, 0.0), (0.3, 1.1, 1.0), (1.7, 0.6, 2.0)]
    image = sum(torch.cos(a * y + b * x + c) for a, b, c in waves) / 6
    return (0.5 + image)[None] * torch.tensor([1.0, 0.8, 0.6])[:, None, None]


def write_scene(folder, disparity=1.0, rows=3, columns=3):
    folder.mkdir(parents=True)
    central = plane_view(rows // 2, columns // 2, disparity, (rows, columns))
    height, width = central.shape[1:]
    text = CONFIG.format(width=width, height=height, rows=rows, columns=columns)
    (folder / "parameters.cfg").write_text(text)
    for row in range(rows):
        for column in range(columns):
            view = plane_view(row, column, disparity, (rows, columns))
            pixels = (view.movedim(0, 2).numpy() * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"input_Cam{row * columns + column:03d}.png")
    write_pfm(folder / "gt_disp_lowres.pfm", np.full((height, width), disparity, np.float32))


@pytest.mark.parametrize("disparity", [-1.3, 0.0, 0.4])
def test_refocusing_at_the_disparity_of_a_plane_gives_the_central_view(disparity):
    stack = refocus(
        lambda row, column: plane_view(row, column, disparity),
        (3, 3),
        torch.tensor([disparity - 1.5, disparity, disparity + 1.0]),
    )
    central = plane_view(1, 1, disparity)
    assert stack.shape == (3, 3, 40, 48)
    inner = (..., slice(6, -6), slice(6, -6))
    error = [(stack[:, n][inner] - central[inner]).abs().max() for n in range(3)]
    assert error[1] < 0.01
    assert error[0] > 0.1 and error[2] > 0.1


def test_refocusing_by_whole_pixels_equals_rolled_views():
    views = torch.rand(3, 3, 1, 32, 32)
    stack = refocus(lambda row, column: views[row, column], (3, 3), torch.tensor([0.0, 2.0]))
    rolled = [
        views[r, c].roll((2 * (r - 1), 2 * (c - 1)), (1, 2)) for r in range(3) for c in range(3)
    ]
    expected = torch.stack(rolled).mean(0)
    torch.testing.assert_close(stack[:, 1, 3:-3, 3:-3], expected[:, 3:-3, 3:-3], atol=1e-5, rtol=0)
    torch.testing.assert_close(stack[:, 0], views.mean((0, 1)), atol=1e-5, rtol=0)


def test_scenes_of_the_benchmark_become_stacks(tmp_path):
    write_scene(tmp_path / "training" / "plane", 1.0)
    write_scene(tmp_path / "stratified" / "slope", -0.5)
    (tmp_path / "test" / "hidden").mkdir(parents=True)
    (tmp_path / "test" / "hidden" / "parameters.cfg").write_text("")
    scenes = LightField4D(tmp_path, frames=6, disparity_range=(-1.5, 1.0))
    assert [name.replace("\\", "/") for name in scenes.names] == [
        "stratified/slope",
        "training/plane",
    ]
    sample = scenes[1]
    assert sample.stack.shape == (3, 6, 40, 48) and sample.unit == "px"
    assert sample.depth_index()[3, 3] == 5.0
    inner = (..., slice(6, -6), slice(6, -6))
    difference = (sample.stack - sample.all_in_focus[:, None])[inner].abs().mean((0, 2, 3))
    assert int(difference.argmin()) == 5
    assert LightField4D(tmp_path, categories=["training"]).names == (scenes.names[1],)


def test_a_grid_that_is_no_square_is_read_row_by_row(tmp_path):
    write_scene(tmp_path / "wide", 0.8, rows=3, columns=5)
    sample = LightField4D(tmp_path, frames=2, disparity_range=(0.8, -1.0))[0]
    inner = (..., slice(8, -8), slice(8, -8))
    assert float((sample.stack[:, 0] - sample.all_in_focus)[inner].abs().max()) < 0.02


def test_missing_and_damaged_files_are_named(tmp_path):
    write_scene(tmp_path / "a")
    (tmp_path / "a" / "input_Cam004.png").rename(tmp_path / "view.png")
    with pytest.raises(DatasetError, match=r"input_Cam004\.png.*missing"):
        LightField4D(tmp_path)[0]
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "input_Cam004.png")
    with pytest.raises(DatasetError, match=r"input_Cam\d+\.png.*as the other views"):
        LightField4D(tmp_path)[0]
    (tmp_path / "view.png").rename(tmp_path / "a" / "input_Cam004.png")
    disparity = tmp_path / "a" / "gt_disp_lowres.pfm"
    disparity.write_bytes(disparity.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"gt_disp_lowres\.pfm.*truncated"):
        LightField4D(tmp_path)[0]
    (tmp_path / "a" / "parameters.cfg").write_text("[extrinsics]\nnum_cams_x = many\n")
    with pytest.raises(DatasetError, match=r"parameters\.cfg"):
        LightField4D(tmp_path)[0]
    with pytest.raises(DatasetError, match="no scene"):
        LightField4D(tmp_path, categories=["training"])
    with pytest.raises(ValueError, match="frames"):
        LightField4D(tmp_path, frames=1)
    with pytest.raises(ValueError, match="disparity_range"):
        LightField4D(tmp_path, disparity_range=(0.0, math.inf))
