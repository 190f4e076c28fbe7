import numpy as np
import pytest
from depth_files import write_exr
from PIL import Image

from gplws.datasets import DatasetError, FlyingThings3DStacks, MiddleburyStacks

DISPARITIES = np.linspace(10, 100, 15)


def write_scene(folder, names=None):
    folder.mkdir(parents=True)
    names = names or [f"{value:.2f}".rstrip("0").rstrip(".") for value in DISPARITIES]
    for number, name in enumerate(names):
        Image.fromarray(np.full((4, 6, 3), number + 1, np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(folder / "AiF.png")
    disparity = np.full((4, 6), 55.0, np.float32)
    disparity[0, 0] = -1.0
    write_exr(folder / "disp.exr", {"Y": disparity})
    return [folder / f"{name}.png" for name in names]


def test_frames_are_focused_at_the_disparity_they_are_called_by(tmp_path):
    write_scene(tmp_path / "val" / "0001")
    stacks = FlyingThings3DStacks(tmp_path)
    sample = stacks[0]
    assert stacks.names == ("0001",)
    assert sample.stack.shape == (3, 15, 4, 6)
    assert (sample.stack[0, :, 0, 0] * 255).round().tolist() == list(range(1, 16))
    np.testing.assert_allclose(sample.focus_positions, DISPARITIES, atol=0.006)
    assert sample.unit == "px" and sample.depth[1, 1] == 55.0
    assert not sample.valid[0, 0]
    assert float(sample.all_in_focus[0, 0, 0]) == pytest.approx(200 / 255)
    assert float(sample.depth_index()[1, 1]) == pytest.approx(7.0, abs=1e-3)


def test_lists_of_other_machines_are_looked_up_by_the_end_of_their_paths(tmp_path):
    names = [f"frame{number}" for number in range(1, 16)]
    frames = write_scene(tmp_path / "focal_stack" / "Teddy", names)
    entries = [f"/home/someone/data/Middlebury_FS/focal_stack/Teddy/{path.name}" for path in frames]
    lines = " ".join([*entries, "/home/someone/data/Middlebury_FS/focal_stack/Teddy/disp.exr"])
    list_file = tmp_path / "focal_stack" / "Middlebury_path.txt"
    list_file.write_text(lines + "\n\n")
    sample = MiddleburyStacks(tmp_path, list_file)[0]
    assert sample.name == "Teddy"
    assert (sample.stack[0, :, 0, 0] * 255).round().tolist() == list(range(1, 16))
    np.testing.assert_allclose(sample.focus_positions, np.linspace(10, 60, 15), rtol=1e-6)
    assert sample.all_in_focus is not None


def test_pictures_beside_the_frames_are_no_frames(tmp_path):
    write_scene(tmp_path / "numbered")
    Image.new("RGB", (6, 4)).save(tmp_path / "numbered" / "disp_color.png")
    sample = FlyingThings3DStacks(tmp_path)[0]
    np.testing.assert_allclose(sample.focus_positions, DISPARITIES, atol=0.006)
    write_scene(tmp_path / "named", [f"frame{number}" for number in range(1, 16)])
    Image.new("RGB", (6, 4)).save(tmp_path / "named" / "disp_color.png")
    with pytest.raises(DatasetError, match=r"named: .* 15, got 16 with other names"):
        FlyingThings3DStacks(tmp_path)


def test_no_file_of_another_scene_stands_for_a_missing_one(tmp_path):
    """All paths of a list lose the same first parts."""
    first = write_scene(tmp_path / "train" / "0000")
    second = write_scene(tmp_path / "train" / "0001")
    lines = [
        " ".join(f"/data/FT/train/{n}/{name}" for name in [*(p.name for p in paths), "disp.exr"])
        for n, paths in (("0000", first), ("0001", second))
    ]
    list_file = tmp_path / "lists" / "all.txt"
    list_file.parent.mkdir()
    list_file.write_text("\n".join(lines))
    assert FlyingThings3DStacks(tmp_path, list_file).names == ("0000", "0001")
    (tmp_path / "train" / "0001" / "disp.exr").unlink()
    write_scene(tmp_path / "0001")
    with pytest.raises(DatasetError, match=r"train/0001/disp\.exr: missing .*line 2"):
        FlyingThings3DStacks(tmp_path, list_file)
    with pytest.raises(DatasetError, match=r"line 2: .* does not begin with data/FT/train/0000"):
        FlyingThings3DStacks(tmp_path / "train" / "0000", list_file)


def test_missing_and_damaged_files_are_named(tmp_path):
    frames = write_scene(tmp_path / "a")
    list_file = tmp_path / "focal_stack_path.txt"
    list_file.write_text(
        " ".join([*(f"a/{path.name}" for path in frames[:-1]), "a/77.png a/d.exr"])
    )
    with pytest.raises(DatasetError, match=r"77\.png.*line 1"):
        FlyingThings3DStacks(tmp_path, list_file)
    list_file.write_text("a/10.png a/disp.exr")
    with pytest.raises(DatasetError, match=r"line 1.*got 2 paths"):
        FlyingThings3DStacks(tmp_path, list_file)
    list_file.write_text("\n")
    with pytest.raises(DatasetError, match="empty"):
        FlyingThings3DStacks(tmp_path, list_file)
    with pytest.raises(FileNotFoundError, match="list_file"):
        FlyingThings3DStacks(tmp_path, tmp_path / "absent.txt")
    (tmp_path / "a" / "disp.exr").write_bytes(b"no exr")
    with pytest.raises(DatasetError, match=r"disp\.exr"):
        FlyingThings3DStacks(tmp_path)[0]
    (tmp_path / "a" / "disp.exr").unlink()
    with pytest.raises(DatasetError, match="no scene"):
        FlyingThings3DStacks(tmp_path)
