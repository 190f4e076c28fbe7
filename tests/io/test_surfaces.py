"""Files of surface metrology, read back by the libraries of their formats."""

import importlib.util

import numpy as np
import pytest
import torch

from gplws.io import surfaces, write_surface
from gplws.io.writers import surface_kinds

HEIGHT_UM = np.array([[1.0, 2.0, np.nan], [-4.0, 5.0, 6.5]], np.float32)
VALID = np.array([[True, True, True], [True, False, True]])
KNOWN = np.isfinite(HEIGHT_UM) & VALID


def loaded_gwy(path):
    gwyfile = pytest.importorskip("gwyfile")
    return gwyfile.load(str(path))


def test_gwyddion_gets_metres_a_mask_and_further_channels(tmp_path):
    path = tmp_path / "a.gwy"
    pytest.importorskip("gwyfile")
    colors = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]] * 2, np.uint8)
    unknown = np.array([[0.5, np.nan, 0.5]] * 2)
    write_surface(
        path, HEIGHT_UM, 0.5, VALID, images={"All in focus": colors, "Confidence": unknown}
    )
    content = loaded_gwy(path)
    field, mask, image = (content[key] for key in ("/0/data", "/0/mask", "/1/data"))
    np.testing.assert_allclose(field.data[KNOWN], HEIGHT_UM[KNOWN] * 1e-6)
    np.testing.assert_allclose(field.data[~KNOWN], HEIGHT_UM[KNOWN].mean() * 1e-6)
    np.testing.assert_array_equal(mask.data, ~KNOWN)
    np.testing.assert_allclose(image.data[0], 255 * np.array([0.2126, 0.7152, 0.0722]))
    assert (field.xreal, field.yreal) == pytest.approx((1.5e-6, 1.0e-6))
    assert (field.si_unit_xy.unitstr, field.si_unit_z.unitstr) == ("m", "m")
    assert content["/1/data/title"] == "All in focus" and "/2/data" not in content


def test_tensors_are_taken_as_well(tmp_path):
    pytest.importorskip("sdfio")
    height = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    valid = height > -1
    write_surface(tmp_path / "a.sdf", height, 0.5, valid)
    write_surface(tmp_path / "b.sdf", torch.from_numpy(height), 0.5, torch.from_numpy(valid))
    a, b = ((tmp_path / f"{name}.sdf").read_bytes() for name in "ab")
    assert a[81:] == b[81:]  # behind the head, which has the time


def test_a_whole_surface_has_no_mask(tmp_path):
    pytest.importorskip("gwyfile")
    write_surface(tmp_path / "a.gwy", np.ones((3, 4)), 2.0)
    assert "/0/mask" not in loaded_gwy(tmp_path / "a.gwy")


def test_iso_25178_gets_metres_and_holes(tmp_path):
    sdfio = pytest.importorskip("sdfio")
    path = tmp_path / "a.sdf"
    write_surface(path, HEIGHT_UM, 0.5, VALID)
    assert path.read_bytes().startswith(b"bISO-1.0")
    found = sdfio.read(path)
    expected = np.where(KNOWN, HEIGHT_UM.astype(float) * 1e-6, np.nan)
    np.testing.assert_allclose(found.data, expected)
    assert (found.header.x_scale, found.header.y_scale) == pytest.approx((0.5e-6, 0.5e-6))


@pytest.mark.parametrize("kind", surfaces.SURFACE_FORMATS)
def test_other_programs_read_the_same_heights(tmp_path, kind):
    library = pytest.importorskip("SurfaceTopography")
    pytest.importorskip(surfaces._PACKAGES[kind])
    path = tmp_path / f"a.{kind}"
    write_surface(path, HEIGHT_UM, 0.5, VALID)
    surface = library.read_topography(str(path)).to_unit("m")
    heights = np.ma.filled(surface.heights(), np.nan).T
    np.testing.assert_allclose(heights[KNOWN], HEIGHT_UM[KNOWN] * 1e-6, rtol=1e-6)
    assert not np.isfinite(heights[~KNOWN]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height_um": np.ones(3)}, r"\(H, W\)"),
        ({"height_um": np.full((2, 3), np.nan)}, "no known height"),
        ({"pixel_size_um": None}, "a surface file needs the size of a pixel"),
        ({"units": "frames"}, "a surface file needs heights in um"),
        ({"valid": np.ones((2, 2), bool)}, "valid must have shape"),
        ({"images": {"x": np.ones((2, 2))}}, "x must be"),
        ({"path": "a.xyz"}, r"\.gwy or \.sdf"),
    ],
)
def test_what_is_no_surface_is_refused(tmp_path, changes, message):
    pytest.importorskip("gwyfile")
    arguments = {"path": "a.gwy", "height_um": HEIGHT_UM, "pixel_size_um": 0.5} | changes
    with pytest.raises(ValueError, match=message):
        write_surface(tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"sdfio.*gplws\[surface\]"):
        surface_kinds("sdf")
