import json

import numpy as np
import pytest
import torch
from PIL import Image

from gplws.data.scenes import SceneSettings, simulate_stack
from gplws.datasets import DatasetError, FolderStacks
from gplws.io.writers import save_simulation


def write_stack(folder, values=(10, 20, 30), *, names=None, index=None, description=None):
    """A stack of constant frames, so that the value of a pixel tells the frame."""
    folder.mkdir(parents=True)
    names = names or [f"f{n}.png" for n in range(len(values))]
    for name, value in zip(names, values, strict=True):
        Image.fromarray(np.full((4, 5), value, np.uint8)).save(folder / name)
    if index is not None:
        np.savez(folder / "gt.npz", gt_index=index)
    if description is not None:
        (folder / "stack.json").write_text(json.dumps(description))


def test_frames_come_in_natural_order_with_depth_in_frames(tmp_path):
    index = np.full((4, 5), 1.5, np.float32)
    index[0, 0] = np.nan
    write_stack(tmp_path / "b10", names=["f10.png", "f2.png", "f1.png"], index=index)
    write_stack(tmp_path / "b9", index=index)
    stacks = FolderStacks(tmp_path)
    assert stacks.names == ("b9", "b10")
    sample = stacks[1]
    assert sample.unit == "frames"
    assert (sample.stack[0, :, 0, 0] * 255).round().tolist() == [30, 20, 10]
    assert not sample.valid[0, 0] and int(sample.valid.sum()) == 19
    assert torch.isnan(sample.depth[0, 0])
    assert sample.depth[1, 1] == 1.5 == sample.depth_index()[1, 1]


def test_stack_json_gives_order_and_positions(tmp_path):
    write_stack(
        tmp_path / "a",
        names=["x.png", "y.png", "z.png"],
        index=np.full((4, 5), 1.5),
        description={"frames": ["z.png", "y.png", "x.png"], "focus_positions_um": [0, 4, 10]},
    )
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a" / "mask.png")
    sample = FolderStacks(tmp_path / "a")[0]
    assert (sample.stack[0, :, 0, 0] * 255).round().tolist() == [30, 20, 10]
    assert sample.unit == "um"
    assert sample.depth[0, 0] == 7.0
    assert sample.depth_index()[0, 0] == 1.5


@pytest.mark.parametrize("frame_format", ["tiff", "png"])
@pytest.mark.parametrize("falling", [False, True])
def test_simulated_stacks_are_read_back(tmp_path, frame_format, falling):
    settings = SceneSettings(height=24, width=32, frames=6, falling=falling, bit_depth=12)
    stack = simulate_stack(settings)
    for name in ("000", "001"):
        save_simulation(stack, tmp_path / name, pixel_size_um=0.5, frame_format=frame_format)
    stacks = FolderStacks(tmp_path)
    assert stacks.names == ("000", "001") and FolderStacks(tmp_path / "001").names == ("001",)
    sample = stacks[1]
    assert sample.unit == "um" and sample.stack.shape == (1, 6, 24, 32)
    torch.testing.assert_close(sample.stack[0], stack.frames.float() / 65535)
    torch.testing.assert_close(sample.focus_positions, stack.focus_positions_um.float())
    known = stack.depth_index.isfinite()
    assert known.any() and torch.equal(sample.valid, known)
    torch.testing.assert_close(sample.depth[known], stack.height_um[known], rtol=1e-4, atol=1e-3)
    (tmp_path / "001" / "info.json").write_text("{}")
    assert stacks[1].unit == "frames"
    torch.testing.assert_close(stacks[1].depth[known], stack.depth_index[known])
    frames = tmp_path / "001" / ("stack.tif" if frame_format == "tiff" else "frames")
    frames.rename(tmp_path / "away")
    with pytest.raises(DatasetError, match=r"001: neither stack\.tif nor frames/ is a stack"):
        stacks[1]


def test_stacks_without_truth_are_left_out_or_given_without_a_valid_pixel(tmp_path):
    write_stack(tmp_path / "a", description={})
    write_stack(tmp_path / "b", index=np.ones((4, 5)), description={})
    assert FolderStacks(tmp_path).names == ("b",)
    both = FolderStacks(tmp_path, require_depth=False)
    assert both.names == ("a", "b")
    assert not both[0].valid.any()


def test_what_is_damaged_or_missing_is_named(tmp_path):
    write_stack(tmp_path / "a", index=np.ones((4, 5)), description={"frames": ["f0.png", "f7.png"]})
    with pytest.raises(DatasetError, match=r"f7\.png"):
        FolderStacks(tmp_path)[0]
    (tmp_path / "a" / "stack.json").write_text("{")
    with pytest.raises(DatasetError, match=r"stack\.json"):
        FolderStacks(tmp_path)[0]
    (tmp_path / "a" / "stack.json").write_text('{"focus_positions_um": [1, 2]}')
    with pytest.raises(DatasetError, match="expected 3 numbers, got 2"):
        FolderStacks(tmp_path)[0]
    (tmp_path / "a" / "stack.json").unlink()
    np.savez(tmp_path / "a" / "gt.npz", other=np.ones(3))
    with pytest.raises(DatasetError, match=r"gt\.npz.*gt_index"):
        FolderStacks(tmp_path)[0]
    (tmp_path / "a" / "gt.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DatasetError, match=r"gt\.npz"):
        FolderStacks(tmp_path)[0]
    (tmp_path / "a" / "f1.png").write_bytes(b"\x89PNG")
    with pytest.raises(DatasetError, match=r"f1\.png"):
        FolderStacks(tmp_path)[0]
    with pytest.raises(FileNotFoundError, match="absent"):
        FolderStacks(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no stack"):
        FolderStacks(tmp_path / "empty")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"frames": 4}, "frames: expected two or more file names, got 4"),
        ({"frames": ["f0.png"]}, "frames: expected two or more file names"),
        ({"frames": ["f0.png", 3]}, "frames: expected two or more file names"),
        ({"focus_positions_um": ["a", 1, 2]}, "focus_positions_um: expected a list of numbers"),
        ({"focus_positions_um": {"a": 1}}, "focus_positions_um: expected a list of numbers"),
        ({"focus_positions_um": None}, "focus_positions_um: expected a list of numbers, got None"),
        ({"focus_positions_um": [0, None, 2]}, "focus_positions_um: expected a list of numbers"),
        ({"focus_positions_um": [0, 2, 1]}, r"do not rise or fall: \[0, 2, 1\]"),
    ],
)
def test_a_description_that_is_wrong_is_named_with_its_key(tmp_path, description, message):
    write_stack(tmp_path / "a", index=np.ones((4, 5)), description=description)
    with pytest.raises(DatasetError, match=rf"a/stack\.json: .*{message}"):
        FolderStacks(tmp_path)[0]


def test_a_folder_without_frames_is_named(tmp_path):
    write_stack(tmp_path / "a", values=(), index=np.ones((4, 5)))
    with pytest.raises(DatasetError, match="a: the folder holds no frames"):
        FolderStacks(tmp_path)[0]


@pytest.mark.shared
def test_the_shared_stacks_with_truth_are_read(shared_dir):
    stacks = FolderStacks(shared_dir / "data" / "stacks")
    assert len(stacks) >= 3
    sample = stacks[0]
    assert sample.unit == "frames" and sample.stack.shape[1] > 10
    assert float(sample.valid.float().mean()) > 0.5
    inside = sample.depth_index()[sample.valid]
    assert float(inside.isfinite().float().mean()) > 0.9
