"""Tests of saving: exact content, strict JSON, and never half of anything."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch

from gplws import files
from gplws.io import read_stack, save_reconstruction, surfaces, write_height_tiff, writers
from gplws.io.pictures import preview_png
from gplws.io.writers import RESULT_FILES, jsonable


@dataclass
class Result:
    height: Any
    units: str = "um"
    pixel_size_um: float | None = 0.5
    all_in_focus: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    valid: Any = None
    depth_index: Any = None
    confidence: Any = None


def make_result(dtype: str = "u1", channels: int | None = None, **changes) -> Result:
    rng = np.random.default_rng(0)
    height = rng.normal(0, 3, (24, 31)).astype(np.float32)
    height[3:5, 7] = np.nan
    shape = height.shape if channels is None else (*height.shape, channels)
    values = rng.random(shape)
    top = 1.0 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    values = {
        "height": height,
        "depth_index": height / 2,
        "confidence": rng.random(height.shape).astype(np.float32),
        "valid": np.isfinite(height),
        "all_in_focus": (values * top).astype(dtype),
    }
    return Result(**values | changes)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def quick_preview(monkeypatch):
    """Drawing takes most of the time of a save; test_pictures tests it."""
    monkeypatch.setattr(writers, "preview_png", lambda *_args, **_options: b"preview")


class TestContent:
    def test_the_preview_is_the_figure(self, tmp_path, monkeypatch):
        monkeypatch.setattr(writers, "preview_png", preview_png)
        out = save_reconstruction(make_result(), tmp_path / "out")
        assert min(cv2.imread(str(out / "preview.png")).shape[:2]) > 200

    def test_maps_come_back_exactly(self, tmp_path):
        result = make_result()
        out = save_reconstruction(result, tmp_path / "out")
        for name in ("height", "depth_index", "confidence"):
            values = tifffile.imread(out / f"{name}.tif")
            assert values.dtype.newbyteorder("=") == np.float32
            np.testing.assert_array_equal(values, getattr(result, name))

    def test_opencv_reads_the_height_map_too(self, tmp_path):
        result = make_result()
        out = save_reconstruction(result, tmp_path / "out")
        values = cv2.imread(str(out / "height.tif"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(values, result.height)

    def test_imagej_finds_the_pixel_size(self, tmp_path):
        out = save_reconstruction(make_result(pixel_size_um=0.345), tmp_path / "out")
        with tifffile.TiffFile(out / "height.tif") as file:
            assert file.is_imagej
            assert file.imagej_metadata["unit"] == "um"
            assert "height in um" in file.imagej_metadata["Info"]
            numerator, denominator = file.pages[0].tags["XResolution"].value
        assert denominator / numerator == pytest.approx(0.345, rel=1e-6)

    def test_unknown_pixel_sizes_are_not_invented(self, tmp_path):
        out = save_reconstruction(make_result(pixel_size_um=None), tmp_path / "out")
        with tifffile.TiffFile(out / "height.tif") as file:
            assert "unit" not in file.imagej_metadata
        assert json.loads((out / "info.json").read_text())["pixel_size_um"] is None

    @pytest.mark.parametrize("dtype", ["u1", "u2"])
    @pytest.mark.parametrize("channels", [None, 3])
    def test_all_in_focus_keeps_8_and_16_bits(self, tmp_path, dtype, channels):
        result = make_result(dtype, channels)
        out = save_reconstruction(result, tmp_path / "out")
        assert not (out / "all_in_focus.tif").exists()
        again = read_stack([out / "all_in_focus.png"] * 2).frames[0]
        assert again.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(again, result.all_in_focus)

    @pytest.mark.parametrize(
        ("dtype", "stored"), [("f2", "f4"), ("f4", "f4"), ("f8", "f4"), ("i2", "i2"), ("u4", "u4")]
    )
    @pytest.mark.parametrize("channels", [None, 3])
    def test_other_dtypes_become_tiff(self, tmp_path, dtype, stored, channels):
        result = make_result(dtype, channels)
        out = save_reconstruction(result, tmp_path / "out")
        assert not (out / "all_in_focus.png").exists()
        again = tifffile.imread(out / "all_in_focus.tif")
        assert again.dtype.newbyteorder("=") == np.dtype(stored)
        np.testing.assert_array_equal(again, result.all_in_focus.astype(stored))

    def test_info_is_strict_json(self, tmp_path):
        metadata = {
            "versions": {"gplws": "1", "numpy": np.__version__},
            "parameters": {"z_step_um": np.float32(2.0), "path": Path("a"), "bad": np.nan},
        }
        result = make_result(metadata=metadata)
        out = save_reconstruction(result, tmp_path / "out")

        def refuse(name):
            raise AssertionError(name)

        info = json.loads((out / "info.json").read_text(), parse_constant=refuse)
        assert info["versions"]["gplws"] == "1"
        assert info["parameters"] == {"z_step_um": 2.0, "path": "a", "bad": None}
        assert info["units"] == "um"
        assert info["shape"] == [24, 31]
        known = result.height[result.valid].astype("f8")
        statistics = info["statistics"]
        assert statistics["valid_share"] == pytest.approx(1 - 2 / (24 * 31))
        assert statistics["height_min"] == known.min()
        assert statistics["height_max"] == known.max()
        assert statistics["height_mean"] == pytest.approx(known.mean())
        assert info["files"] == sorted(path.name for path in out.iterdir())

    def test_nothing_valid_is_no_reason_to_fail(self, tmp_path):
        nothing = np.full((24, 31), np.nan, np.float32)
        result = make_result(height=nothing, valid=np.zeros((24, 31), bool))
        out = save_reconstruction(result, tmp_path / "out")
        statistics = json.loads((out / "info.json").read_text())["statistics"]
        assert statistics["height_mean"] is None
        assert statistics["valid_share"] == 0

    def test_tensors_are_saved_like_arrays(self, tmp_path):
        result = make_result("u2", 3)
        first = save_reconstruction(result, tmp_path / "a")
        for name in ("height", "valid", "depth_index", "confidence", "all_in_focus"):
            setattr(result, name, torch.from_numpy(getattr(result, name)))
        second = save_reconstruction(result, tmp_path / "b")
        assert content(first) == content(second)

    @pytest.mark.parametrize(
        ("mesh", "names"),
        [("ply", {"mesh.ply"}), ((".STL", "glb"), {"mesh.stl", "mesh.glb"}), ((), set())],
    )
    def test_meshes_are_written_on_request(self, tmp_path, mesh, names):
        out = save_reconstruction(make_result(), tmp_path / "out", mesh=mesh)
        assert {path.name for path in out.iterdir() if path.name.startswith("mesh")} == names

    def test_a_surface_file_is_written_on_request(self, tmp_path):
        gwyfile = pytest.importorskip("gwyfile")
        out = save_reconstruction(make_result(), tmp_path / "out", surface=".GWY")
        content = gwyfile.load(str(out / "height.gwy"))
        titles = [content[f"/{n}/data/title"] for n in range(3)]
        assert titles == ["Height", "All in focus", "Confidence"]

    @pytest.mark.parametrize("date", [None, "some day", "2024-02-29T13:05:07+02:00"])
    def test_x3p_has_the_date_of_the_result_or_of_today(self, tmp_path, date):
        x3pio = pytest.importorskip("x3pio")
        result = make_result(metadata={"date": date})
        out = save_reconstruction(result, tmp_path / "out", surface="x3p")
        expected = datetime.fromisoformat(date) if date and date[0] == "2" else datetime.now()
        difference = x3pio.read(out / "height.x3p").metadata.date - expected.astimezone()
        assert abs(difference) < timedelta(minutes=1)

    def test_only_declared_files_are_written(self, tmp_path):
        everything = {"mesh": ("ply", "stl", "glb")}
        if all(importlib.util.find_spec(package) for package in surfaces._PACKAGES.values()):
            everything["surface"] = surfaces.SURFACE_FORMATS
        out = save_reconstruction(make_result(), tmp_path / "out", **everything)
        assert {path.name for path in out.iterdir()} <= RESULT_FILES

    def test_missing_parents_are_created(self, tmp_path):
        assert save_reconstruction(make_result(), str(tmp_path / "a/b/out")).is_dir()


class TestSafety:
    @pytest.mark.parametrize(
        ("changes", "arguments", "message"),
        [
            ({"units": "frames"}, {"mesh": "ply"}, "z_step_um"),
            ({"pixel_size_um": None}, {"mesh": "ply"}, "pixel_size_um"),
            ({}, {"mesh": "obj"}, "mesh must be among"),
            ({}, {"surface": "obj"}, "surface must be among gwy, sdf, x3p"),
            ({"valid": np.ones((3, 4), bool)}, {}, "valid must be"),
            ({"confidence": np.ones((24, 31, 1))}, {}, "confidence must be"),
            ({"all_in_focus": np.ones((3, 4), "u1")}, {}, "all_in_focus must be"),
            ({"units": "mm"}, {}, "units must be"),
        ],
    )
    def test_bad_results_are_refused_and_leave_nothing(self, tmp_path, changes, arguments, message):
        with pytest.raises(ValueError, match=message):
            save_reconstruction(make_result(**changes), tmp_path / "a/out", **arguments)
        assert not list(tmp_path.iterdir())

    def test_folders_with_content_are_not_touched(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            save_reconstruction(make_result(), out)
        assert content(out) == {"notes.txt": b"mine"}

    def test_empty_folders_are_filled(self, tmp_path):
        save_reconstruction(make_result(), tmp_path)
        assert (tmp_path / "info.json").exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_files_are_no_folders(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="is a file"):
                save_reconstruction(make_result(), tmp_path / "out", overwrite=overwrite)
        assert content(tmp_path) == {"out": b"mine"}

    def test_overwriting_replaces_results_and_keeps_other_files(self, tmp_path):
        out = save_reconstruction(make_result("f4"), tmp_path / "out", mesh="ply")
        (out / "notes.txt").write_text("mine")
        (out / "sub").mkdir()
        (out / "sub" / "height.tif").write_text("mine too")
        save_reconstruction(make_result("u2"), out, overwrite=True)
        names = {path.name for path in out.iterdir()}
        assert {"notes.txt", "sub", "all_in_focus.png", "height.tif"} <= names
        # Old results that the new ones do not replace would belong to another surface.
        assert not names & {"mesh.ply", "all_in_focus.tif"}
        assert (out / "sub" / "height.tif").read_text() == "mine too"
        assert not [name for name in names if name.startswith(".")]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("failing", [0, 3, 5])
    @pytest.mark.parametrize("existing", [True, False])
    def test_a_full_disk_loses_nothing(self, tmp_path, monkeypatch, failing, existing):
        out = tmp_path / "a" / "out"
        if existing:
            save_reconstruction(make_result(), out)
            (out / "notes.txt").write_text("mine")
            before = content(out)
        calls = 0
        fsync = os.fsync

        def fill_up(descriptor):
            nonlocal calls
            calls += 1
            if calls > failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fill_up)
        with pytest.raises(OSError, match=r"No space left.*nothing was changed") as caught:
            save_reconstruction(make_result("u2"), out, overwrite=True)
        assert caught.value.errno == errno.ENOSPC
        assert str(out) in str(caught.value)
        if existing:
            assert content(out) == before
        else:
            assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("failing", [0, 3, 6, 11])
    def test_a_failing_exchange_is_undone(self, tmp_path, monkeypatch, failing):
        out = save_reconstruction(make_result(), tmp_path / "out")
        before = content(out)
        rename, calls = os.rename, 0

        def fail_once(source, target):
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise PermissionError(errno.EACCES, "in use")
            rename(source, target)

        monkeypatch.setattr(files.os, "rename", fail_once)
        with pytest.raises(PermissionError, match="in use"):
            save_reconstruction(make_result("u2"), out, overwrite=True)
        assert content(out) == before

    def test_interrupts_leave_nothing_behind(self, tmp_path, monkeypatch):
        out = save_reconstruction(make_result(), tmp_path / "out")
        before = content(out)

        def interrupt(*_args, **_options):
            raise KeyboardInterrupt

        monkeypatch.setattr(writers, "preview_png", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_reconstruction(make_result("u2"), out, overwrite=True)
        assert content(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
    def test_a_real_write_limit_loses_nothing(self, tmp_path):
        out = save_reconstruction(make_result(), tmp_path / "out")
        before = content(out)
        code = (
            "import resource, sys, numpy as np\n"
            "from types import SimpleNamespace\n"
            "from gplws.io import save_reconstruction\n"
            "flat = np.zeros((64, 64), np.float32)\n"
            "result = SimpleNamespace(height=flat, units='um', depth_index=flat, confidence=flat,"
            " valid=flat == 0, all_in_focus=flat, pixel_size_um=1.0, metadata={})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
            "try:\n"
            "    save_reconstruction(result, sys.argv[1], overwrite=True)\n"
            "except OSError as error:\n"
            "    print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120
        )
        assert "nothing was changed" in done.stdout, done.stderr
        assert content(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.skipif(
        sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0),
        reason="root may write anywhere",
    )
    def test_read_only_parents_are_named(self, tmp_path):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match=str(tmp_path)):
                save_reconstruction(make_result(), tmp_path / "out")
        finally:
            tmp_path.chmod(0o700)

    @pytest.mark.parametrize("deep", ["out", "a/out"])
    def test_parents_that_refuse_are_named(self, tmp_path, monkeypatch, deep):
        def refuse(self, *_args, **_options):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(PermissionError, match=f"{tmp_path}.*Permission denied"):
            save_reconstruction(make_result(), tmp_path / deep)


class TestHeightTiff:
    @pytest.mark.parametrize("units", ["um", "frames"])
    def test_heights_come_back_exactly(self, tmp_path, units):
        height = make_result().height
        path = tmp_path / "h.tif"
        write_height_tiff(path, height, pixel_size_um=2.0, units=units)
        np.testing.assert_array_equal(tifffile.imread(path), height)
        with tifffile.TiffFile(path) as file:
            assert f"height in {units}" in file.imagej_metadata["Info"]

    def test_existing_files_survive(self, tmp_path, monkeypatch):
        path = tmp_path / "h.tif"
        write_height_tiff(path, make_result().height)
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match="overwrite=True"):
            write_height_tiff(path, np.zeros((3, 4)))
        with pytest.raises(ValueError, match="height must be"):
            write_height_tiff(path, np.zeros(3), overwrite=True)

        def fill_up(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fill_up)
        with pytest.raises(OSError, match="No space left"):
            write_height_tiff(path, np.zeros((3, 4)), overwrite=True)
        assert content(tmp_path) == {"h.tif": before}


def test_everything_becomes_strict_json():
    @dataclass
    class Point:
        x: float

    value = {
        1: (np.int64(3), np.float32(np.inf), True, np.bool_(False), None),
        "arrays": [np.array([1.0, np.nan]), torch.tensor([1, 2])],
        "rest": [Point(float("nan")), Path("a/b"), np.dtype("u1")],
    }
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == {
        "1": [3, None, True, False, None],
        "arrays": [[1.0, None], [1, 2]],
        "rest": [{"x": None}, "a/b", "uint8"],
    }
