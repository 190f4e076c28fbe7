"""A folder of results is read back as it was written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import gplws
from gplws.io import StackReadError, read_reconstruction


def result(dtype: str = "u1", *, colour: bool = False, **changes) -> gplws.Reconstruction:
    random = np.random.default_rng(0)
    height = random.random((20, 30)).astype(np.float32)
    height[3, 4:9] = np.nan
    image = random.random((20, 30, 3) if colour else (20, 30))
    if np.dtype(dtype).kind != "f":
        image *= np.iinfo(dtype).max
    fields = {
        "height": height,
        "units": "um",
        "depth_index": 2 * height,
        "confidence": random.random((20, 30)).astype(np.float32),
        "valid": np.isfinite(height),
        "all_in_focus": image.astype(dtype),
        "pixel_size_um": 0.5,
        "metadata": {
            "method": "rdf",
            "parameters": {"n_frames": 5},
            "seconds": {"reconstruct": 0.25},
        },
    }
    return gplws.Reconstruction(**{**fields, **changes})


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4"])
def test_what_was_saved_comes_back(tmp_path, dtype, colour):
    saved = result(dtype, colour=colour)
    found = gplws.Reconstruction.load(saved.save(tmp_path / "out"))
    for name in ("height", "depth_index", "confidence", "valid", "all_in_focus"):
        array = getattr(found, name)
        np.testing.assert_array_equal(array, getattr(saved, name))
        assert array.dtype == getattr(saved, name).dtype
    assert (found.units, found.pixel_size_um) == ("um", 0.5)
    assert found.metadata == saved.metadata
    found.save(tmp_path / "again")
    first, again = (json.loads((tmp_path / n / "info.json").read_text()) for n in ("out", "again"))
    assert again == first


def test_results_in_frames_and_of_tensors_come_back(tmp_path):
    saved = result(units="frames", pixel_size_um=None, confidence=np.full((20, 30), np.nan, "f4"))
    tensors = {
        name: torch.from_numpy(getattr(saved, name))
        for name in ("height", "depth_index", "confidence", "valid", "all_in_focus")
    }
    folder = result(units="frames", pixel_size_um=None, **tensors).save(tmp_path / "out")
    found = gplws.Reconstruction.load(folder)
    assert (found.units, found.pixel_size_um) == ("frames", None)
    np.testing.assert_array_equal(found.height, saved.height)
    assert np.isnan(found.confidence).all()


def test_what_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        read_reconstruction(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no results, as info\.json is missing"):
        read_reconstruction(tmp_path)
    out = result().save(tmp_path / "out")
    (out / "confidence.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no results, as confidence\.tif is missing"):
        read_reconstruction(out)
    out = result().save(tmp_path / "other")
    height = (out / "height.tif").read_bytes()
    (out / "height.tif").write_bytes(height[:200])
    with pytest.raises(StackReadError, match=r"height\.tif"):
        read_reconstruction(out)
    larger = result(
        **{n: np.zeros((4, 5), "f4") for n in ("height", "depth_index", "confidence")},
        valid=np.ones((4, 5), bool),
        all_in_focus=np.zeros((4, 5), "u1"),
    )
    small = larger.save(tmp_path / "small")
    (out / "height.tif").write_bytes((small / "height.tif").read_bytes())
    with pytest.raises(
        ValueError, match=r"depth_index\.tif: is \(20, 30\), not \(4, 5\) as height"
    ):
        read_reconstruction(out)
    for text, message in (("{", "no JSON"), ("{}", "not that of a reconstruction.* units")):
        (small / "info.json").write_text(text)
        with pytest.raises(ValueError, match=rf"info\.json: is {message}"):
            read_reconstruction(small)
