"""Files of surface metrology: Gwyddion's own format, ISO 25178-71 and ISO 25178-72."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from io import BytesIO
from pathlib import Path

import numpy as np
from torch import Tensor

from gplws._extension import __version__
from gplws.files import kind_of, new_file
from gplws.io.arrays import as_numpy
from gplws.io.meshes import known_heights, require_calibration
from gplws.io.packages import require_package
from gplws.luminance import LUMINANCE

_PACKAGES = {"gwy": "gwyfile", "sdf": "sdfio", "x3p": "x3pio"}
SURFACE_FORMATS = tuple(_PACKAGES)

_METRES_PER_UM = 1e-6


def write_surface(
    path: str | Path,
    height_um: np.ndarray | Tensor,
    pixel_size_um: float | None,
    valid: np.ndarray | Tensor | None = None,
    *,
    images: Mapping[str, np.ndarray | Tensor] | None = None,
    units: str = "um",
    date: datetime | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a height map for programs of metrology; the file appears complete or not at all.

    ``.gwy`` opens in Gwyddion: lengths in metres, and a mask over the pixels without a height,
    which have the mean of the others, as Gwyddion knows no missing values. ``.sdf`` is the binary
    form of ISO 25178-71:2012, which most programs for roughness read: lengths in metres, missing
    heights marked, rows from the top of the picture to its bottom, as Gwyddion and surfalize show
    them. ``.x3p`` is the XML container of ISO 25178-72:2017 (ISO 5436-2): float64 heights in
    metres, NaN where missing, rows in the same order. By the letter of that standard y grows from
    row to row; a program that draws it upwards shows the surface mirrored.

    Args:
        path: file ending in .gwy, .sdf or .x3p.
        height_um: (H, W) float, um, NaN where unknown.
        pixel_size_um: side of a pixel, um.
        valid: (H, W) bool; False counts as unknown.
        images: further channels of .gwy by title: (H, W) or (H, W, 3), of which the luminance is
            stored. Those that are not finite anywhere are left out.
        units: unit of the heights; anything but ``"um"`` is refused.
        date: of the heights, which .sdf and .x3p state; default: now.
        overwrite: whether an existing file is replaced.

    Raises:
        ValueError: heights are in frames or nowhere known, the pixel size is unknown, shapes
            differ, or the suffix is another.
        ModuleNotFoundError: the package that writes the format is not installed.
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the file cannot be written; an existing one is unchanged.

    Source:
        https://gwyddion.net/documentation/user-guide-en/gwyfile-format.html; ISO 25178-71; ISO
        25178-72.
    """
    target = Path(path)
    kind = kind_of(target, SURFACE_FORMATS)
    with new_file(target, overwrite=overwrite) as file:
        surface = encode_surface(
            kind, height_um, pixel_size_um, valid, images=images, units=units, date=date
        )
        file.write(surface)


def encode_surface(
    kind: str,
    height_um: np.ndarray | Tensor,
    pixel_size_um: float | None,
    valid: np.ndarray | Tensor | None = None,
    *,
    images: Mapping[str, np.ndarray | Tensor] | None = None,
    units: str = "um",
    date: datetime | None = None,
) -> bytes:
    """Content of the file that `write_surface` writes; ``kind`` is "gwy", "sdf" or "x3p"."""
    pixel_size_m = require_calibration(units, pixel_size_um, "a surface file") * _METRES_PER_UM
    require_surface_package(kind)
    height_um = as_numpy(height_um)
    valid = None if valid is None else as_numpy(valid)
    channels = {name: as_numpy(image) for name, image in (images or {}).items()}
    if height_um.ndim != 2 or 0 in height_um.shape:
        raise ValueError(f"height_um must be (H, W) and not empty, got shape {height_um.shape}")
    known = known_heights(height_um, valid)
    if not known.any():
        raise ValueError("height_um has no known height")
    height_m = height_um.astype(np.float64) * _METRES_PER_UM
    if kind == "gwy":
        return _gwy(height_m, known, pixel_size_m, channels)
    encode = _sdf if kind == "sdf" else _x3p
    when = date or datetime.now().astimezone()
    return encode(np.where(known, height_m, np.nan), pixel_size_m, when)


def require_surface_package(kind: str) -> None:
    """Raise ModuleNotFoundError where a format cannot be written; it says what to install."""
    require_package(_PACKAGES[kind], f"a .{kind} file", "surface")


def _sdf(height_m: np.ndarray, pixel_size_m: float, date: datetime) -> bytes:
    import sdfio

    file = BytesIO()
    sdfio.write(
        file,
        height_m,  # the first row is on top in programs that read the format
        x_scale=pixel_size_m,
        y_scale=pixel_size_m,
        metadata=sdfio.Metadata(
            revision=sdfio.Revision("ISO-1.0"),  # other programs do not read later ones yet
            manufacturer_id="gplws",
            create_date=date,
            mod_date=date,
        ),
    )
    return file.getvalue()


def _x3p(height_m: np.ndarray, pixel_size_m: float, date: datetime) -> bytes:
    import x3pio

    file = BytesIO()
    x3pio.write(
        file,
        height_m,
        x_scale=pixel_size_m,
        y_scale=pixel_size_m,
        revision=x3pio.Revision.ISO5436_2000,  # other programs do not read later ones yet
        metadata=x3pio.Metadata(
            date=date,
            instrument=x3pio.Instrument("gplws", "shape from focus", "unknown", __version__),
            calibration_date=date,
            probing_system=x3pio.ProbingSystem(
                x3pio.ProbingType("NonContacting"), "shape from focus"
            ),
            comment="The date of calibration is unknown; the format demands one.",
        ),
    )
    return file.getvalue()


def _gwy(
    height_m: np.ndarray, known: np.ndarray, pixel_size_m: float, images: Mapping[str, np.ndarray]
) -> bytes:
    from gwyfile.objects import GwyContainer, GwyDataField

    rows, columns = height_m.shape

    def channel(values: np.ndarray, unit: str) -> GwyDataField:
        return GwyDataField(
            np.ascontiguousarray(values, np.float64),
            xreal=columns * pixel_size_m,
            yreal=rows * pixel_size_m,
            si_unit_xy="m",
            si_unit_z=unit,
        )

    content = GwyContainer()
    content["/0/data"] = channel(np.where(known, height_m, height_m[known].mean()), "m")
    content["/0/data/title"] = "Height"
    content["/0/data/visible"] = True
    if not known.all():
        content["/0/mask"] = channel(~known, "")
    number = 1
    for title, image in images.items():
        if image.shape[:2] != height_m.shape or image.ndim not in (2, 3):
            raise ValueError(
                f"{title} must be {height_m.shape} or {(*height_m.shape, 3)}, got {image.shape}"
            )
        gray = image if image.ndim == 2 else image @ np.array(LUMINANCE)
        if np.isfinite(gray).all():
            content[f"/{number}/data"] = channel(gray, "")
            content[f"/{number}/data/title"] = title
            number += 1
    file = BytesIO()
    content.tofile(file)
    return file.getvalue()
