import importlib.util
import struct

import numpy as np
import pytest
import tifffile
import torch
from depth_files import write_exr, write_pfm
from torch.utils.data import DataLoader

from gplws.data import collate
from gplws.datasets import DatasetError, DepthDataset, read_depth_map
from gplws.datasets.files import depth_sample, frames_tensor, load_frames

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4) / 8


class Squares(DepthDataset):
    def _load(self, index):
        depth = torch.full((4, 5), float(index))
        return depth_sample(
            torch.zeros(1, 3, 4, 5), depth, [0, 1, 2], unit="um", name=str(index), source="memory"
        )


def test_a_data_set_counts_from_both_ends_and_stops():
    squares = Squares(["a", "b", "c"])
    assert len(squares) == 3
    assert squares[-1].name == "2"
    assert [sample.name for sample in squares] == ["0", "1", "2"]
    with pytest.raises(IndexError, match="index"):
        squares[3]


def test_a_data_set_feeds_a_data_loader():
    batches = list(DataLoader(Squares(["a", "b"]), batch_size=2, collate_fn=collate))
    assert batches[0].stack.shape == (2, 1, 3, 4, 5)
    assert batches[0].depth[:, 0, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("scale", [1, 1 / 255])
@pytest.mark.parametrize("big_endian", [False, True])
def test_pfm_rows_run_upwards_in_either_byte_order_whatever_the_scale(tmp_path, big_endian, scale):
    write_pfm(tmp_path / "a.pfm", VALUES, big_endian=big_endian, scale=scale)
    np.testing.assert_array_equal(read_depth_map(tmp_path / "a.pfm"), VALUES)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exr_gives_channel_r_or_the_only_channel(tmp_path, dtype):
    values = VALUES.astype(dtype)
    write_exr(tmp_path / "rgb.exr", {"R": values, "G": values + 1, "B": values + 2})
    write_exr(tmp_path / "z.exr", {"Z": values})
    write_exr(tmp_path / "two.exr", {"U": values, "V": values})
    for name in ("rgb.exr", "z.exr"):
        found = read_depth_map(tmp_path / name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, VALUES)
    with pytest.raises(DatasetError, match=r"two\.exr.*channel R"):
        read_depth_map(tmp_path / "two.exr")


def test_tiff_npy_and_mat_hold_depth_maps_too(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    tifffile.imwrite(tmp_path / "a.tif", VALUES)
    tifffile.imwrite(tmp_path / "b.tiff", (VALUES * 8).astype(np.uint16))
    np.save(tmp_path / "c.npy", VALUES.astype(np.float64))
    savemat(tmp_path / "d.mat", {"SD_Result": VALUES, "step": 1.0})
    for name in ("a.tif", "c.npy", "d.mat"):
        np.testing.assert_array_equal(read_depth_map(tmp_path / name), VALUES)
    np.testing.assert_array_equal(read_depth_map(tmp_path / "b.tiff"), VALUES * 8)


def test_damaged_depth_maps_are_named(tmp_path):
    write_pfm(tmp_path / "a.pfm", VALUES)
    write_exr(tmp_path / "b.exr", {"R": VALUES})
    tifffile.imwrite(tmp_path / "c.tif", VALUES)
    np.save(tmp_path / "d.npy", VALUES)
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 20])
        with pytest.raises(DatasetError, match=path.name):
            read_depth_map(path)
        path.write_bytes(b"")
        with pytest.raises(DatasetError, match=path.name):
            read_depth_map(path)


def test_what_is_no_depth_map_is_named(tmp_path):
    np.save(tmp_path / "volume.npy", np.zeros((2, 3, 4)))
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    (tmp_path / "colour.pfm").write_bytes(b"PF\n1 1\n-1\n" + struct.pack("<3f", 1, 2, 3))
    for name in ("volume.npy", "text.npy", "a.gif", "colour.pfm", "absent.tif"):
        with pytest.raises(DatasetError, match=name):
            read_depth_map(tmp_path / name)


def test_frames_become_channels_first_in_0_to_1(tmp_path):
    random = np.random.default_rng(0)
    gray = random.integers(0, 256, (3, 4, 5), np.uint8)
    color = random.integers(0, 65536, (3, 4, 5, 3), np.uint16)
    for name, frames, top in (("gray", gray, 255), ("color", color, 65535)):
        paths = []
        for index, frame in enumerate(frames):
            paths.append(tmp_path / f"{name}{index}.tif")
            tifffile.imwrite(paths[-1], frame)
        found = load_frames(paths)
        expected = frames[..., None] if frames.ndim == 3 else frames
        np.testing.assert_allclose(found.numpy(), np.moveaxis(expected, 3, 0) / top, rtol=1e-6)
    with pytest.raises(DatasetError, match="absent"):
        load_frames([tmp_path / "gray0.tif", tmp_path / "absent.tif"])


@pytest.mark.parametrize("dtype", ["<u4", ">i4", "<i8"])
def test_wide_integers_are_counts(dtype):
    counts = np.linspace(0, 4000, 24).reshape(2, 3, 4).astype(dtype)
    found = frames_tensor(counts, "here")
    np.testing.assert_allclose(found[0].numpy(), counts / 4095, rtol=1e-6)


def test_float_frames_outside_0_to_1_are_refused():
    with pytest.raises(DatasetError, match=r"here.*0\.\.1"):
        frames_tensor(np.full((2, 3, 4), 200.0, np.float32), "here")


@pytest.mark.parametrize(
    ("size", "positions", "message"),
    [((4, 4), [0, 1, 2], r"gt\.npz"), ((4, 5), [0, 2, 1], r"gt\.npz.*rise or fall")],
)
def test_depth_that_does_not_fit_its_frames_is_named(size, positions, message):
    stack = torch.zeros(1, 3, 4, 5)
    with pytest.raises(DatasetError, match=message):
        depth_sample(stack, np.zeros(size), positions, unit="um", name="", source="gt.npz")


@pytest.mark.parametrize(("suffix", "package"), [("exr", "OpenEXR"), ("mat", "scipy")])
def test_a_missing_package_is_named(suffix, package, tmp_path, monkeypatch):
    path = tmp_path / f"depth.{suffix}"
    path.write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"{suffix} needs .* {package}.*\[datasets\]"):
        read_depth_map(path)
