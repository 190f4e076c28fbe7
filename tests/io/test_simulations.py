import json

import numpy as np
import pytest
import tifffile
import torch

from gplws.data import SceneSettings, simulate_stack
from gplws.io import read_stack
from gplws.io.writers import save_simulation

SCENE = SceneSettings(height=24, width=20, frames=4, pixel_size_um=0.5, seed=1)


@pytest.fixture(scope="module")
def stack():
    return simulate_stack(SCENE)


@pytest.mark.parametrize("pixel_size_um", [1.0, 2.0, 0.5])
def test_any_pixel_size_is_read_back(tmp_path, pixel_size_um):
    """A resolution of 1 is what writers store that know none."""
    settings = SceneSettings(height=16, width=16, frames=3, pixel_size_um=pixel_size_um)
    save_simulation(simulate_stack(settings), tmp_path / "s", pixel_size_um=pixel_size_um)
    stack = read_stack(tmp_path / "s" / "stack.tif")
    assert stack.pixel_size_um == pytest.approx(pixel_size_um, rel=1e-6)
    height = tmp_path / "s" / "height.tif"
    with tifffile.TiffFile(height) as file:
        assert file.imagej_metadata["pixel_size_um"] == pixel_size_um


@pytest.mark.parametrize("frame_format", ["tiff", "png"])
def test_what_is_written_is_read_back(frame_format, stack, tmp_path):
    out = save_simulation(
        stack, tmp_path / "a", pixel_size_um=0.5, frame_format=frame_format, metadata={"x": 1}
    )
    found = read_stack(out / ("stack.tif" if frame_format == "tiff" else "frames"))
    np.testing.assert_array_equal(np.asarray(found.frames), stack.frames.numpy())
    np.testing.assert_array_equal(tifffile.imread(out / "height.tif"), stack.height_um.numpy())
    index = tifffile.imread(out / "depth_index.tif")
    np.testing.assert_array_equal(index, stack.depth_index.numpy())
    info = json.loads((out / "info.json").read_text())
    assert info["x"] == 1 and info["z_direction"] == "up"
    assert info["height_of_first_frame_um"] == info["focus_positions_um"][0]
    np.testing.assert_allclose(info["focus_positions_um"], stack.focus_positions_um, rtol=1e-6)
    if frame_format == "tiff":
        assert found.pixel_size_um == pytest.approx(0.5, rel=1e-4)
        assert np.diff(found.focus_positions_um) == pytest.approx(info["z_step_um"])


def test_frames_of_an_earlier_run_are_replaced_and_other_files_stay(stack, tmp_path):
    out = tmp_path / "a"
    save_simulation(stack, out, pixel_size_um=0.5, frame_format="png")
    (out / "frames/f009.png").write_bytes(b"left from a longer stack")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        save_simulation(stack, out, pixel_size_um=0.5)
    save_simulation(stack, out, pixel_size_um=0.5, frame_format="png", overwrite=True)
    assert [f.name for f in sorted((out / "frames").iterdir())] == [f"f00{k}.png" for k in range(4)]
    save_simulation(stack, out, pixel_size_um=0.5, overwrite=True)
    assert not (out / "frames").exists() and (out / "stack.tif").is_file()
    assert (out / "notes.txt").read_text() == "mine"


def test_what_cannot_be_written_is_named(stack, tmp_path):
    with pytest.raises(ValueError, match="frame_format must be 'tiff' or 'png', got 'gif'"):
        save_simulation(stack, tmp_path / "a", pixel_size_um=0.5, frame_format="gif")
    color = stack._replace(frames=torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"stack\.frames must be \(N, H, W\)"):
        save_simulation(color, tmp_path / "a", pixel_size_um=0.5)
    with pytest.raises(TypeError, match=r"stack\.frames must be uint8 or uint16"):
        save_simulation(
            stack._replace(frames=torch.zeros(2, 4, 4)), tmp_path / "a", pixel_size_um=0.5
        )
    assert not list(tmp_path.iterdir())
