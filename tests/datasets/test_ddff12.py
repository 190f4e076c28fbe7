import pickle

import numpy as np
import pytest

from gplws.datasets import DDFF12, DatasetError

h5py = pytest.importorskip("h5py")


def write_file(path, *, train=3, dtype=np.uint8, extra_axis=False):
    with h5py.File(path, "w") as file:
        frames = np.arange(10, dtype=dtype).reshape(1, 10, 1, 1, 1) * 20
        file["stack_train"] = np.broadcast_to(frames, (train, 10, 6, 8, 3)).astype(dtype)
        disparity = np.full((train, 6, 8), 0.1, np.float32)
        disparity[:, 0, 0] = 0
        disparity[1] = 0.2
        file["disp_train"] = disparity[:, None] if extra_axis else disparity


@pytest.mark.parametrize(("dtype", "extra_axis"), [(np.uint8, False), (np.float32, True)])
def test_stacks_have_ten_frames_and_depth_as_disparity(tmp_path, dtype, extra_axis):
    write_file(tmp_path / "trainval.h5", dtype=dtype, extra_axis=extra_axis)
    stacks = DDFF12(tmp_path / "trainval.h5")
    assert len(stacks) == 3
    sample = stacks[1]
    assert sample.stack.shape == (3, 10, 6, 8)
    assert (sample.stack[0, :, 0, 0] * 255).round().tolist() == [20 * n for n in range(10)]
    assert float(sample.focus_positions[0]) == pytest.approx(0.2825, abs=1e-4)
    assert float(sample.focus_positions[-1]) == pytest.approx(0.0202, abs=1e-4)
    assert float(sample.depth[1, 1]) == pytest.approx(0.2)
    assert float(sample.depth_index()[1, 1]) == pytest.approx(
        9 * (0.28247 - 0.2) / 0.26229, abs=0.01
    )
    assert not stacks[0].valid[0, 0] and int(stacks[0].valid.sum()) == 47


def test_a_test_file_has_no_disparity_and_the_data_set_can_be_sent_to_workers(tmp_path):
    with h5py.File(tmp_path / "test.h5", "w") as file:
        file["stack_test"] = np.zeros((2, 10, 6, 8, 3), np.uint8)
    stacks = pickle.loads(pickle.dumps(DDFF12(tmp_path / "test.h5", "test")))
    assert len(stacks) == 2 and not stacks[0].valid.any()


def test_what_is_damaged_or_missing_is_named(tmp_path):
    file = tmp_path / "a.h5"
    write_file(file)
    with pytest.raises(DatasetError, match=r"a\.h5.*stack_val"):
        DDFF12(file, "val")
    with pytest.raises(ValueError, match="split"):
        DDFF12(file, "all")
    with h5py.File(file, "a") as content:
        content["stack_val"] = np.zeros((2, 10, 6, 8))
        content["disp_val"] = np.zeros((2, 6, 8))
    with pytest.raises(DatasetError, match="stack_val: expected"):
        DDFF12(file, "val")
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(DatasetError, match=r"a\.h5"):
        DDFF12(file)
    with pytest.raises(FileNotFoundError, match="absent"):
        DDFF12(tmp_path / "absent.h5")
