import numpy as np
import pytest
import torch
from depth_files import write_pfm
from PIL import Image

from gplws.classical import depth_from_focus
from gplws.datasets import DatasetError, MiddleburyPairs
from gplws.datasets.middlebury import fill_unknown


def write_scene(folder, size=(72, 96), *, style="2001"):
    """A textured wall at 20 px with a square at 50 px before it; unknown beside the square."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (*size, 3), np.uint8)
    disparity = np.full(size, 20.0, np.float32)
    disparity[24:48, 36:66] = 50.0
    valid = np.ones(size, bool)
    valid[24:48, 30:36] = False
    if style == "2001":
        Image.fromarray(image).save(folder / "image.png")
        np.savez(folder / "disp.npz", disp_px=np.where(valid, disparity, 999), valid=valid)
    else:
        Image.fromarray(image).save(folder / "im0.png")
        write_pfm(folder / "disp0.pfm", np.where(valid, disparity, np.inf).astype(np.float32))
    return image, disparity, valid


@pytest.mark.parametrize("style", ["2001", "2014"])
def test_pairs_are_sharp_where_the_focus_is_at_their_disparity(tmp_path, style):
    image, disparity, valid = write_scene(tmp_path / "scene", style=style)
    sample = MiddleburyPairs(tmp_path, frames=7, max_blur_px=6)[0]
    assert sample.stack.shape == (3, 7, 72, 96) and sample.unit == "px"
    assert sample.focus_positions[[0, -1]].tolist() == [20.0, 50.0]
    np.testing.assert_array_equal(sample.valid.numpy(), valid)
    np.testing.assert_array_equal(sample.depth.numpy()[valid], disparity[valid])
    sharp = torch.from_numpy(image).movedim(2, 0) / 255
    difference = (sample.stack - sharp[:, None]).abs().mean(0)  # (N, H, W)
    wall, square = difference[:, :16], difference[:, 32:40, 46:56]
    assert int(wall.mean((1, 2)).argmin()) == 0 and float(wall[0].mean()) < 0.03
    assert int(square.mean((1, 2)).argmin()) == 6 and float(square[6].mean()) < 0.03


def test_blur_grows_with_the_difference_of_disparities(tmp_path):
    write_scene(tmp_path / "scene")
    sample = MiddleburyPairs(tmp_path, frames=4, max_blur_px=4)[0]
    contrast = sample.stack[1, :, :16].std((1, 2))
    assert bool((contrast.diff() < 0).all())
    assert sample.depth_index()[0, 0] == 0.0 and sample.depth_index()[36, 50] == 3.0


def test_large_scenes_are_shrunk_with_their_disparities(tmp_path):
    write_scene(tmp_path / "scene")
    sample = MiddleburyPairs(tmp_path, frames=3, max_size=48)[0]
    assert sample.stack.shape == (3, 3, 36, 48)
    assert sample.focus_positions.tolist() == [10.0, 17.5, 25.0]


def test_gaps_are_filled_with_what_is_farther():
    nan = np.nan
    rows = np.array([[nan, 3, nan, 5, nan], [nan] * 5, [nan, nan, nan, nan, 7]], np.float32)
    expected = [[3, 3, 3, 5, 5], [3, 3, 3, 5, 5], [7, 7, 7, 7, 7]]
    np.testing.assert_array_equal(fill_unknown(rows), expected)


def test_missing_and_damaged_files_are_named(tmp_path):
    write_scene(tmp_path / "scene")
    disparity = tmp_path / "scene" / "disp.npz"
    np.savez(disparity, disp_px=np.zeros((4, 4)), valid=np.ones((4, 4), bool))
    with pytest.raises(DatasetError, match=r"disp\.npz.*\(72, 96\)"):
        MiddleburyPairs(tmp_path)[0]
    np.savez(disparity, disp_px=np.zeros((72, 96)), valid=np.zeros((72, 96), bool))
    with pytest.raises(DatasetError, match="no pixel is valid"):
        MiddleburyPairs(tmp_path)[0]
    disparity.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"disp\.npz"):
        MiddleburyPairs(tmp_path)[0]
    disparity.unlink()
    with pytest.raises(DatasetError, match=r"disp\.npz.*missing"):
        MiddleburyPairs(tmp_path)[0]
    (tmp_path / "scene" / "image.png").unlink()
    with pytest.raises(DatasetError, match="no scene"):
        MiddleburyPairs(tmp_path)
    for name, value in (("frames", 1), ("max_blur_px", 0.0), ("max_size", 4)):
        with pytest.raises(ValueError, match=name):
            MiddleburyPairs(tmp_path, **{name: value})


@pytest.mark.shared
def test_depth_from_focus_finds_the_disparity_of_a_real_pair(shared_dir):
    pairs = MiddleburyPairs(shared_dir / "data" / "middlebury", frames=10, max_size=200)
    sample = pairs[pairs.names.index("Cloth1")]
    found = depth_from_focus(sample.stack.mean(0), torch.arange(10.0))
    error = (found.depth - sample.depth_index()).abs()[sample.valid & found.valid]
    assert len(error) > 0.8 * sample.valid.numel()
    assert float(error.median()) < 0.3
