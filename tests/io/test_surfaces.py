"""Files of surface metrology, read back by the libraries of their formats."""

import importlib.util
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import torch

from gplws import __version__
from gplws.io import surfaces, write_surface
from gplws.io.writers import surface_kinds

HEIGHT_UM = np.array([[1.0, 2.0, np.nan], [-4.0, 5.0, 6.5]], np.float32)
VALID = np.array([[True, True, True], [True, False, True]])
KNOWN = np.isfinite(HEIGHT_UM) & VALID
DATE = datetime(2024, 2, 29, 13, 5, 7, 123456, timezone(timedelta(hours=2)))


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
    write_surface(tmp_path / "a.sdf", height, 0.5, valid, date=DATE)
    write_surface(
        tmp_path / "b.sdf", torch.from_numpy(height), 0.5, torch.from_numpy(valid), date=DATE
    )
    assert (tmp_path / "a.sdf").read_bytes() == (tmp_path / "b.sdf").read_bytes()


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


def test_x3p_gets_exact_metres_and_nan(tmp_path):
    x3pio = pytest.importorskip("x3pio")
    write_surface(tmp_path / "a.x3p", HEIGHT_UM, 0.5, VALID, date=DATE)
    found = x3pio.read(tmp_path / "a.x3p")
    expected = np.where(KNOWN, HEIGHT_UM.astype(float) * 1e-6, np.nan)
    np.testing.assert_array_equal(found.layers[0].z, expected)
    assert found.layers[0].spacing == pytest.approx((0.5e-6, 0.5e-6))
    assert found.revision == x3pio.Revision.ISO5436_2000
    assert found.metadata.instrument.manufacturer == "gplws"
    assert found.metadata.instrument.version == __version__


@pytest.mark.parametrize("kind", ["sdf", "x3p"])
def test_the_same_heights_and_date_give_the_same_file(tmp_path, kind):
    pytest.importorskip(surfaces._PACKAGES[kind])
    a, b = (tmp_path / f"{name}.{kind}" for name in "ab")
    write_surface(a, HEIGHT_UM, 0.5, VALID, date=DATE)
    write_surface(b, torch.from_numpy(HEIGHT_UM), 0.5, torch.from_numpy(VALID), date=DATE)
    assert a.read_bytes() == b.read_bytes()


def test_the_date_is_stated_and_now_by_default(tmp_path):
    sdfio, x3pio = pytest.importorskip("sdfio"), pytest.importorskip("x3pio")
    for name, date in (("given", DATE), ("now", None)):
        for kind in ("sdf", "x3p"):
            write_surface(tmp_path / f"{name}.{kind}", HEIGHT_UM, 0.5, VALID, date=date)
    assert x3pio.read(tmp_path / "given.x3p").metadata.date.replace(microsecond=0) == (
        DATE.replace(microsecond=0)
    )
    assert sdfio.read(tmp_path / "given.sdf").header.create_date.minute == DATE.minute
    now = x3pio.read(tmp_path / "now.x3p").metadata.date
    assert abs(now - datetime.now(timezone.utc)) < timedelta(minutes=1)


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
    assert surface.physical_sizes == pytest.approx((1.5e-6, 1.0e-6))


@pytest.mark.parametrize("kind", ["sdf", "x3p"])
def test_surfalize_shows_the_first_row_on_top(tmp_path, kind):
    surfalize = pytest.importorskip("surfalize")
    pytest.importorskip(surfaces._PACKAGES[kind])
    path = tmp_path / f"a.{kind}"
    write_surface(path, HEIGHT_UM, 0.5, VALID)
    surface = surfalize.Surface.load(path)
    # Surface.show draws the first row of data on top.
    np.testing.assert_allclose(surface.data, np.where(KNOWN, HEIGHT_UM, np.nan), rtol=1e-12)
    assert (surface.step_x, surface.step_y) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height_um": np.ones(3)}, r"\(H, W\)"),
        ({"height_um": np.full((2, 3), np.nan)}, "no known height"),
        ({"pixel_size_um": None}, "a surface file needs the size of a pixel"),
        ({"units": "frames"}, "a surface file needs heights in um"),
        ({"valid": np.ones((2, 2), bool)}, "valid must have shape"),
        ({"path": "a.xyz"}, r"\.gwy, \.sdf or \.x3p"),
    ],
)
@pytest.mark.parametrize("kind", ["gwy", "x3p"])
def test_what_is_no_surface_is_refused(tmp_path, kind, changes, message):
    pytest.importorskip(surfaces._PACKAGES[kind])
    arguments = {"path": f"a.{kind}", "height_um": HEIGHT_UM, "pixel_size_um": 0.5} | changes
    with pytest.raises(ValueError, match=message):
        write_surface(tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())


def test_channels_of_another_size_are_refused(tmp_path):
    pytest.importorskip("gwyfile")
    with pytest.raises(ValueError, match="x must be"):
        write_surface(tmp_path / "a.gwy", HEIGHT_UM, 0.5, images={"x": np.ones((2, 2))})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"sdfio.*gplws\[surface\]"):
        surface_kinds("sdf")
    with pytest.raises(ModuleNotFoundError, match=r"x3pio.*gplws\[surface\]"):
        surface_kinds("x3p")
