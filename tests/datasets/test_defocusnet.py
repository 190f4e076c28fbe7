import numpy as np
import pytest
from depth_files import write_exr
from PIL import Image

from gplws.datasets import DatasetError, FoD500


def write_set(folder, stacks=5):
    for stack in range(stacks):
        for frame in range(1, 6):
            image = np.full((4, 6, 3), 10 * frame + stack, np.uint8)
            Image.fromarray(image).save(folder / f"{stack:06d}_{frame:02d}All.tif")
        depth = np.full((4, 6), 0.2 * (stack + 1), np.float16)
        depth[0, 0] = 0
        write_exr(folder / f"{stack:06d}Dpt.exr", {"R": depth, "G": depth * 0, "B": depth * 0})


def test_stacks_have_five_frames_and_depth_in_metres(tmp_path):
    write_set(tmp_path)
    stacks = FoD500(tmp_path)
    assert len(stacks) == 5 and stacks.names[1] == "000001"
    sample = stacks[1]
    assert sample.stack.shape == (3, 5, 4, 6)
    assert (sample.stack[0, :, 0, 0] * 255).round().tolist() == [11, 21, 31, 41, 51]
    assert sample.unit == "m"
    np.testing.assert_allclose(sample.focus_positions, [0.1, 0.15, 0.3, 0.7, 1.5])
    assert float(sample.depth[1, 1]) == pytest.approx(0.4, abs=1e-3)
    assert not sample.valid[0, 0] and int(sample.valid.sum()) == 23
    assert float(sample.depth_index()[1, 1]) == pytest.approx(2.25, abs=1e-2)


def test_the_first_four_fifths_are_for_training(tmp_path):
    write_set(tmp_path)
    assert FoD500(tmp_path, "train").names == tuple(f"{n:06d}" for n in range(4))
    assert FoD500(tmp_path, "test").names == ("000004",)
    with pytest.raises(ValueError, match="split"):
        FoD500(tmp_path, "val")


def test_missing_and_damaged_files_are_named(tmp_path):
    write_set(tmp_path, 2)
    depth = tmp_path / "000001Dpt.exr"
    data = depth.read_bytes()
    depth.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"000001Dpt\.exr"):
        FoD500(tmp_path)[1]
    depth.unlink()
    with pytest.raises(DatasetError, match=r"000001Dpt\.exr"):
        FoD500(tmp_path)
    depth.write_bytes(data)
    (tmp_path / "000000_03All.tif").unlink()
    with pytest.raises(DatasetError, match=r"000000_.*5 frames, got 4"):
        FoD500(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no files"):
        FoD500(tmp_path / "empty")
