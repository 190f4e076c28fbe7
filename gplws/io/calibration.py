"""Lengths that files say of themselves: descriptions of ImageJ and OME."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from gplws.positions import rise_or_fall

_logger = logging.getLogger(__name__)

_UM_PER_UNIT = {
    "pm": 1e-6,
    "å": 1e-4,
    "angstrom": 1e-4,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "mm": 1e3,
    "millimeter": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "m": 1e6,
    "meter": 1e6,
}
# Lengths on paper: ImageJ writes them where a file that it opened had a print resolution (dpi).
_INCHES = {"in", "inch", "inches"}

# Pixels count as square if their sides agree within the rounding of TIFF rationals.
_SQUARE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Calibration:
    """What a file says about lengths; None where it says nothing usable.

    Attributes:
        pixel_size_um: side of a square pixel, um.
        z_step_um: distance between frames, um.
        focus_positions_um: position of each frame relative to the first, um.
        plane_position_um: position of the only frame of the file on its stage, um.
        source: "ImageJ" or "OME", for messages.
    """

    pixel_size_um: float | None = None
    z_step_um: float | None = None
    focus_positions_um: tuple[float, ...] | None = None
    plane_position_um: float | None = None
    source: str = ""


def um_per_unit(unit: str | None) -> float | None:
    """Micrometres per unit of length; None where the unit is missing or not a length."""
    if unit is None:
        return None
    # ImageJ writes the micro sign as an escape; Unicode has two signs that look alike.
    name = unit.strip().replace("\\u00B5", "u").replace("\\u00b5", "u")
    name = name.replace("\u00b5", "u").replace("\u03bc", "u").replace("\u212b", "å")
    lowered = name.lower().replace("metre", "meter")
    return _UM_PER_UNIT.get(lowered) or _UM_PER_UNIT.get(lowered.removesuffix("s"))


def usable_length(value: Any, scale: float, what: str, name: str) -> float | None:
    """``value`` times ``scale`` if that is a length; else None, with a warning about ``what``."""
    try:
        length = float(value) * scale
    except (TypeError, ValueError):
        length = math.nan
    if math.isfinite(length) and length > 0:
        return length
    _logger.warning("%s: %s %r in the metadata is no length: ignored", name, what, value)
    return None


def square_pixel(x: float | None, y: float | None, name: str) -> float | None:
    """Side of a pixel of sides x and y; None, with a warning, where they differ."""
    if x is None or y is None:
        return None
    if math.isclose(x, y, rel_tol=_SQUARE_TOLERANCE):
        return x
    _logger.warning(
        "%s: pixels are not square (%.6g x %.6g um): pixel size unknown; resample the frames or "
        "pass pixel_size_um",
        name,
        x,
        y,
    )
    return None


def imagej_calibration(
    metadata: dict[str, Any],
    resolution: tuple[tuple[int, int] | None, ...],
    name: str,
) -> Calibration:
    """Lengths from an ImageJ description and the resolution tags (pixels per unit).

    A resolution of exactly 1/1 is what writers store that know none, so it counts as unknown, but
    where the description says ``pixel_size_um`` as well, as those of this package do. Inches are
    those of a print resolution, which says nothing about the object.

    Args:
        metadata: parsed ImageJ description.
        resolution: XResolution and YResolution as (numerator, denominator), or None.
        name: file, for messages.

    Returns:
        The calibration; entries without a usable unit are None.
    """
    unit = metadata.get("unit")
    lateral = um_per_unit(None if unit is None else str(unit))
    axial = um_per_unit(str(metadata["zunit"])) if "zunit" in metadata else lateral
    z_step = None
    spacing = metadata.get("spacing")
    if spacing is not None and axial is not None:
        z_step = usable_length(spacing, axial, "z-step", name)
    pixel_size = None
    if str(unit).lower() in _INCHES:
        _logger.warning(
            "%s: lengths in inches are those of a print: calibration unknown; pass pixel_size_um "
            "and z_step_um",
            name,
        )
    if lateral is not None:
        if (1, 1) in resolution and "pixel_size_um" in metadata:
            pixel_size = usable_length(metadata["pixel_size_um"], 1.0, "pixel size", name)
        elif (1, 1) in resolution:
            _logger.warning(
                "%s: unit %s but no resolution beyond the default 1: pixel size unknown; "
                "pass pixel_size_um",
                name,
                unit,
            )
        elif None not in resolution:
            y_unit = um_per_unit(str(metadata["yunit"])) if "yunit" in metadata else lateral
            sides = [
                usable_length(rational[1] / rational[0], scale, "pixel size", name)
                if rational and rational[0] and scale
                else None
                for rational, scale in zip(resolution, (lateral, y_unit), strict=True)
            ]
            pixel_size = square_pixel(sides[0], sides[1], name)
    return Calibration(pixel_size, z_step, source="ImageJ")


def ome_calibration(xml: str, n_frames: int, name: str, image: int = 0) -> Calibration:
    """Lengths from one image of an OME-XML description.

    Positions of the planes win over PhysicalSizeZ where every frame has one, their unit is a
    length (or unnamed, but in agreement with PhysicalSizeZ), and they rise or fall strictly.

    Args:
        xml: OME-XML.
        n_frames: number of focus positions that the image has.
        name: file, for messages.
        image: number of the image.

    Returns:
        The calibration; positions are relative to the first frame.
    """
    try:
        pixels = _ome_pixels(xml, image)
    except ElementTree.ParseError as error:
        _logger.warning("%s: OME metadata cannot be parsed (%s): calibration unknown", name, error)
        return Calibration()
    if pixels is None:
        return Calibration()
    sizes: dict[str, float | None] = {}
    for axis in "XYZ":
        value = pixels.get(f"PhysicalSize{axis}")
        unit = pixels.get(f"PhysicalSize{axis}Unit", "um")
        scale = um_per_unit(unit)
        if value is not None and scale is None:
            _logger.warning("%s: PhysicalSize%s has the unknown unit %s", name, axis, unit)
        sizes[axis] = (
            None
            if value is None or scale is None
            else usable_length(value, scale, f"PhysicalSize{axis}", name)
        )
    z_step = sizes["Z"]
    positions = _ome_positions(pixels, n_frames, z_step, name)
    pixel_size = square_pixel(sizes["X"], sizes["Y"], name)
    return Calibration(pixel_size, z_step, positions, source="OME")


def ome_plane_position(xml: str, file_name: str) -> float | None:
    """PositionZ of the only plane of a file, um; None where it is not known.

    Args:
        xml: OME-XML of the file, which may describe all files of a set.
        file_name: name of the file, by which such a set tells which plane it holds.
    """
    try:
        pixels = _ome_pixels(xml)
    except ElementTree.ParseError:
        return None
    if pixels is None:
        return None
    planes = [e for e in pixels if _local_name(e) == "Plane"]
    if len(planes) > 1:
        place = _place_in_set(pixels, file_name)
        planes = [e for e in planes if place == tuple(e.get(f"The{axis}") for axis in "ZCT")]
    if len(planes) != 1:
        return None
    # The schema's default is no length.
    scale = um_per_unit(planes[0].get("PositionZUnit"))
    try:
        position = float(planes[0].get("PositionZ", "nan"))
    except ValueError:
        return None
    return position * scale if scale is not None and math.isfinite(position) else None


def _place_in_set(pixels: ElementTree.Element, file_name: str) -> tuple[str, ...] | None:
    """Z, C and T of the only plane that a set of files keeps in this one."""
    places = []
    for data in pixels:
        if _local_name(data) != "TiffData":
            continue
        if any(e.get("FileName") == file_name for e in data if _local_name(e) == "UUID"):
            places.append(tuple(data.get(f"First{axis}", "0") for axis in "ZCT"))
    return places[0] if len(places) == 1 else None


def _ome_pixels(xml: str, image: int = 0) -> ElementTree.Element | None:
    """The pixels of one image."""
    root = ElementTree.fromstring(xml)
    pixels = (element for element in root.iter() if _local_name(element) == "Pixels")
    return next(itertools.islice(pixels, image, None), None)


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _ome_positions(
    pixels: ElementTree.Element, n_frames: int, z_step: float | None, name: str
) -> tuple[float, ...] | None:
    found: dict[int, float] = {}
    units: set[str | None] = set()
    for plane in pixels:
        if _local_name(plane) != "Plane" or plane.get("PositionZ") is None:
            continue
        if plane.get("TheC", "0") != "0" or plane.get("TheT", "0") != "0":
            continue
        try:
            found[int(plane.get("TheZ", "0"))] = float(plane.get("PositionZ", "nan"))
        except ValueError:
            return None
        units.add(plane.get("PositionZUnit"))
    if n_frames < 2 or len(units) != 1 or sorted(found) != list(range(n_frames)):
        return None
    values = np.array([found[index] for index in range(n_frames)])
    steps = np.diff(values)
    scale = um_per_unit(units.pop())
    if scale is None:
        # Without a unit, only agreement with the step tells that these are micrometres.
        if z_step is None or not math.isclose(abs(float(steps.mean())), z_step, rel_tol=0.01):
            return None
        scale = 1.0
    if not np.isfinite(values).all() or not rise_or_fall(values):
        _logger.warning("%s: PositionZ of the planes is not strictly monotonic: ignored", name)
        return None
    positions = (values - values[0]) * scale
    mean_step = abs(float(positions[-1])) / (n_frames - 1)
    if z_step is not None and not math.isclose(mean_step, z_step, rel_tol=0.1):
        _logger.warning(
            "%s: PositionZ advances by %.6g um on average, PhysicalSizeZ says %.6g um; "
            "PositionZ is used",
            name,
            mean_step,
            z_step,
        )
    return tuple(float(position) for position in positions)
