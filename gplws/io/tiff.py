"""TIFF files: integrity, pixels in the dtype of the file, calibration from ImageJ and OME."""

from __future__ import annotations

import logging
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias
from xml.etree import ElementTree

import numpy as np

from .errors import StackReadError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

logger = logging.getLogger(__name__)

# tifffile.TiffPage or TiffFrame, whose attributes forward to a page that is typed as optional.
Page: TypeAlias = Any

# What tifffile and the decoders below raise on files that are damaged or not supported.
DECODE_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    NotImplementedError,
    EOFError,
    struct.error,
    zlib.error,
)

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

# Bytes per value of the TIFF types.
_TYPE_BYTES = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}

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


@dataclass(frozen=True)
class TiffStack:
    """Pixels of a TIFF file before their axes are interpreted.

    Attributes:
        array: pixels in native byte order; lazily mapped from the file where it is uncompressed.
        axes: axes of ``array``, as far as the file names them.
        single_axes: axes of size 1 that the file declares; they are not in ``array``.
        calibration: lengths from the metadata.
    """

    array: np.ndarray
    axes: str
    single_axes: str
    calibration: Calibration


def um_per_unit(unit: str | None) -> float | None:
    """Micrometres per unit of length; None where the unit is missing or not a length."""
    if unit is None:
        return None
    # ImageJ writes the micro sign as an escape; Unicode has two signs that look alike.
    name = unit.strip().replace("\\u00B5", "u").replace("\\u00b5", "u")
    name = name.replace("\u00b5", "u").replace("\u03bc", "u").replace("\u212b", "å")
    lowered = name.lower().replace("metre", "meter")
    return _UM_PER_UNIT.get(lowered) or _UM_PER_UNIT.get(lowered.removesuffix("s"))


def read_tiff_frame(path: Path, *, calibrated: bool = True) -> tuple[np.ndarray, Calibration]:
    """The one image of a TIFF file.

    Args:
        path: file with a single page.
        calibrated: False leaves the metadata, and what may be said about them, alone, but for the
            position of the frame.

    Returns:
        (H, W) or (H, W, channels) array in native byte order, and the calibration.

    Raises:
        StackReadError: the file is damaged, unsupported, or holds several pages.
    """
    with _open(path) as file:
        if len(file.pages) != 1:
            raise StackReadError(
                f"{path}: holds {len(file.pages)} pages where one frame per file is expected; "
                "pass this file alone to read it as a stack"
            )
        page: Page = file.pages[0]
        _check_pages(path, [page])
        pixels = _page_pixels(path, page, 0, _is_imagej(file))
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
        elif page.axes not in ("YX", "YXS"):
            raise StackReadError(f"{path}: one image expected, got axes {page.axes}")
        calibration = _calibration(file, path, n_frames=1) if calibrated else Calibration()
        if file.is_ome and file.ome_metadata:
            position = ome_plane_position(file.ome_metadata, path.name)
            calibration = replace(calibration, plane_position_um=position)
        return np.ascontiguousarray(pixels), calibration


def read_tiff_stack(path: Path, progress: Callable[[int, int], None]) -> TiffStack:
    """The image series of a TIFF, ImageJ TIFF or OME-TIFF file.

    Args:
        path: file with one series of equal pages.
        progress: called with (pages read, pages).

    Returns:
        Pixels, axes and calibration.

    Raises:
        StackReadError: the file is damaged, unsupported, or its pages differ in size or dtype.
    """
    with _open(path) as file:
        series = _only_series(file, path)
        pages: list[Page] = list(series.pages)
        if any(page is None for page in pages):
            raise StackReadError(f"{path}: frames of this OME-TIFF set are missing")
        _check_declared_frames(file, path, series)
        imagej = _is_imagej(file)
        array = _mapped(path, series, imagej)
        if array is None:
            array = np.empty(series.shape, series.dtype.newbyteorder("="))
            flat = array.reshape(-1, *series.keyframe.shape)
            if len(pages) != len(flat):
                raise StackReadError(
                    f"{path}: {len(flat)} pages expected, {len(pages)} found; "
                    "the file is incomplete"
                )
            _check_pages(path, pages)
            for index, page in enumerate(pages):
                pixels = _page_pixels(path, page, index, imagej)
                if pixels.shape != flat.shape[1:] or pixels.dtype != array.dtype:
                    raise StackReadError(
                        f"{path}: page {index} decodes to {pixels.shape} {pixels.dtype} where "
                        f"{flat.shape[1:]} {array.dtype} is expected"
                    )
                flat[index] = pixels
                progress(index + 1, len(pages))
        else:
            progress(len(pages), len(pages))
        declared = _declared_sizes(file, series)
        return TiffStack(
            array=array,
            axes=series.axes,
            single_axes="".join(
                axis for axis, size in declared.items() if size == 1 and axis not in series.axes
            ),
            calibration=_calibration(file, path, declared.get("Z", 1)),
        )


def _open(path: Path) -> TiffFile:
    import tifffile

    try:
        check_directory_chain(path)
        return tifffile.TiffFile(path)
    except StackReadError:
        raise
    except DECODE_ERRORS as error:
        raise StackReadError(f"{path}: not a readable TIFF file: {error}") from error


def check_directory_chain(path: Path) -> None:
    """Follows the chain of image directories to its end; all of it must lie in the file.

    A reader that meets a directory behind the end of the file takes it for the end of the chain:
    a truncated stack would silently lose its last frames.

    Raises:
        StackReadError: the chain leaves the file, or runs in a circle.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        header = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(header[:2])
        if order is None or len(header) < 8:
            raise StackReadError(f"{path}: not a TIFF file")
        version = struct.unpack(order + "H", header[2:4])[0]
        if version == 42:
            count_format, entry_bytes, offset_format = order + "H", 12, order + "I"
            offset = struct.unpack(offset_format, header[4:8])[0]
        elif version == 43 and len(header) == 16:
            count_format, entry_bytes, offset_format = order + "Q", 20, order + "Q"
            offset = struct.unpack(offset_format, header[8:16])[0]
        else:
            raise StackReadError(f"{path}: not a TIFF file (version {version})")
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise StackReadError(f"{path}: damaged, its image directories run in a circle")
            seen.add(offset)
            count = _unpack_at(file, offset, count_format)
            link, end = None, size
            if count is not None:
                start = offset + struct.calcsize(count_format)
                link = _unpack_at(file, start + count * entry_bytes, offset_format)
                if link is not None:
                    end = _end_of_values(file, start, count, offset_format)
            if link is None or end > size:
                raise StackReadError(
                    f"{path}: truncated: the directory of image {len(seen)} reaches behind the "
                    f"end of the file ({size} bytes)"
                )
            offset = link
        if not seen:
            raise StackReadError(f"{path}: holds no image; the file is empty or truncated")


def _end_of_values(file: BinaryIO, start: int, count: int, offset_format: str) -> int:
    """First byte behind all values to which the entries of a directory point."""
    file.seek(start)
    width = struct.calcsize(offset_format)
    entry = struct.Struct(offset_format[0] + "HH" + 2 * offset_format[1])
    end = 0
    for _, kind, length, offset in entry.iter_unpack(file.read(count * entry.size)):
        size = _TYPE_BYTES.get(kind, 0) * length
        if size > width:
            end = max(end, offset + size)
    return end


def _unpack_at(file: BinaryIO, offset: int, number_format: str) -> int | None:
    file.seek(offset)
    data = file.read(struct.calcsize(number_format))
    if len(data) < struct.calcsize(number_format):
        return None
    return int(struct.unpack(number_format, data)[0])


def _only_series(file: TiffFile, path: Path) -> TiffPageSeries:
    try:
        series = list(file.series)
    except DECODE_ERRORS as error:
        raise StackReadError(f"{path}: damaged TIFF file: {error}") from error
    if not series:
        raise StackReadError(f"{path}: holds no image")
    if len(series) > 1:
        sizes = "; ".join(f"{s.shape} {s.dtype} ({s.axes})" for s in series[:4])
        raise StackReadError(
            f"{path}: its pages differ in size or mode, or it holds several images: {sizes}"
            f"{'; ...' if len(series) > 4 else ''}; export the focal stack alone"
        )
    return series[0]


def _declared_sizes(file: TiffFile, series: TiffPageSeries) -> dict[str, int]:
    """Length of each axis of the only series, those of length 1 among them."""
    every: Any = file.series
    whole: Any = series
    if callable(every):  # tifffile 2026.5.2 and newer
        whole = every(squeeze=False)[0]
        return dict(zip(whole.axes, whole.shape, strict=True))
    return dict(zip(whole.get_axes(squeeze=False), whole.get_shape(squeeze=False), strict=True))


def _check_declared_frames(file: TiffFile, path: Path, series: TiffPageSeries) -> None:
    """Compares the number of frames with what the ImageJ description promises."""
    if not _is_imagej(file):
        return
    declared = int((file.imagej_metadata or {}).get("images", 1))
    channels = series.keyframe.samplesperpixel
    found = math.prod(series.shape) // math.prod(series.keyframe.shape)
    if declared not in (found, found * channels):
        raise StackReadError(
            f"{path}: truncated: ImageJ wrote {declared} frames, {found} are in the file"
        )


def _check_pages(path: Path, pages: list[Page]) -> None:
    for index, page in enumerate(pages):
        # Pages of a multi-file OME set lie in other files.
        size = page.parent.filehandle.size
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            if count == 0 or offset + count > size:
                raise StackReadError(
                    f"{path}: truncated: pixels of page {index} lie behind the end of the file "
                    f"({size} bytes)"
                )


def _mapped(path: Path, series: TiffPageSeries, imagej: bool) -> np.ndarray | None:
    """The pixels mapped from the file if they lie there as one array, else None.

    Copy-on-write, so that the array is writable (torch warns otherwise) and the file is safe.
    """
    offset = series.dataoffset
    page: Page = series.keyframe
    if offset is None or page.parent.filehandle.path != str(path.resolve()):
        return None
    if _needs_inversion(page, imagej):
        return None
    _check_photometric(path, page, imagej)
    dtype = np.dtype(page.parent.byteorder + series.dtype.char)
    if dtype.kind not in "iuf":
        raise StackReadError(f"{path}: pixels of type {series.dtype} are no gray or RGB image")
    try:
        mapped = np.memmap(path, dtype, "c", offset, tuple(series.shape))
    except DECODE_ERRORS as error:
        raise StackReadError(f"{path}: truncated or unreadable: {error}") from error
    return np.asarray(mapped) if dtype.isnative else mapped.astype(dtype.newbyteorder("="))


def _page_pixels(path: Path, page: Page, index: int, imagej: bool) -> np.ndarray:
    keyframe = page.keyframe
    _check_photometric(path, keyframe, imagej)
    try:
        pixels = page.asarray()
    except DECODE_ERRORS as error:
        if "imagecodecs" not in str(error):
            raise StackReadError(f"{path}: page {index} is damaged: {error}") from error
        pixels = _decode_with_opencv(path, page, error)
    if pixels.dtype.kind not in "iuf":
        raise StackReadError(
            f"{path}: pixels of type {pixels.dtype} are no gray or RGB image; "
            "save the frames with at least 8 bits"
        )
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if not _needs_inversion(keyframe, imagej):
        return pixels
    return pixels ^ pixels.dtype.type((1 << int(keyframe.bitspersample)) - 1)


def _decode_with_opencv(path: Path, page: Page, reason: Exception) -> np.ndarray:
    """Page with a compression that tifffile cannot decode alone (LZW, JPEG, ...)."""
    import cv2

    file = Path(page.parent.filehandle.path)
    try:
        done, images = cv2.imreadmulti(
            str(file), start=int(page.index), count=1, flags=cv2.IMREAD_UNCHANGED
        )
    except cv2.error:
        done, images = False, ()
    if not done or len(images) != 1:
        raise StackReadError(
            f"{path}: page {page.index} cannot be decoded ({reason}); "
            "install imagecodecs or save the file uncompressed"
        ) from reason
    image = _as_stored(np.asarray(images[0]), page)
    if image.ndim == 3:
        order = [2, 1, 0, 3][: image.shape[2]]
        image = image[..., order]
    if page.keyframe.axes == "SYX":
        image = np.moveaxis(image, -1, 0)
    return image


def _as_stored(image: np.ndarray, page: Page) -> np.ndarray:
    """What OpenCV decoded, without what it does to the pixels beyond that."""
    bits = int(page.keyframe.bitspersample)
    if image.dtype == np.uint16 and bits < 16:  # 10, 12 and 14 bits fill 16
        image = image >> (16 - bits)
    if image.dtype == np.uint8 and int(page.keyframe.photometric) == 0:
        image = np.invert(image)
    tag = page.aspage().tags.get("Orientation")
    orientation = 1 if tag is None else int(tag.value)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    image = image[::rows, ::columns]
    return image.swapaxes(0, 1) if orientation >= 5 else image


def _is_imagej(file: TiffFile) -> bool:
    return bool(file.is_imagej)


def _needs_inversion(page: Page, imagej: bool) -> bool:
    """Whether small values mean bright; ImageJ keeps the values and inverts only its display."""
    unsigned = page.dtype is not None and page.dtype.kind == "u"
    return unsigned and int(page.photometric) == 0 and not imagej


def _check_photometric(path: Path, page: Page, imagej: bool) -> None:
    photometric = int(page.photometric)
    # 0 and 1: gray; 2: RGB; 6: YCbCr, which the decoders turn into RGB. ImageJ writes gray values
    # that are shown through a lookup table as a palette image (3).
    if photometric in (0, 1, 2, 6) or (photometric == 3 and imagej):
        return
    name = getattr(page.photometric, "name", str(photometric))
    raise StackReadError(f"{path}: {name} colours are not supported; save it as gray or RGB")


def _calibration(file: TiffFile, path: Path, n_frames: int) -> Calibration:
    if file.is_ome and file.ome_metadata:
        return ome_calibration(file.ome_metadata, n_frames, str(path))
    if _is_imagej(file):
        first: Page = file.pages[0]
        tags = first.tags
        resolution = tuple(
            tags[name].value if name in tags else None for name in ("XResolution", "YResolution")
        )
        return imagej_calibration(file.imagej_metadata or {}, resolution, str(path))
    return Calibration()


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
        z_step = _usable_length(spacing, axial, "z-step", name)
    pixel_size = None
    if str(unit).lower() in _INCHES:
        logger.warning(
            "%s: lengths in inches are those of a print: calibration unknown; pass pixel_size_um "
            "and z_step_um",
            name,
        )
    if lateral is not None:
        if (1, 1) in resolution and "pixel_size_um" in metadata:
            pixel_size = _usable_length(metadata["pixel_size_um"], 1.0, "pixel size", name)
        elif (1, 1) in resolution:
            logger.warning(
                "%s: unit %s but no resolution beyond the default 1: pixel size unknown; "
                "pass pixel_size_um",
                name,
                unit,
            )
        elif None not in resolution:
            y_unit = um_per_unit(str(metadata["yunit"])) if "yunit" in metadata else lateral
            sides = [
                _usable_length(rational[1] / rational[0], scale, "pixel size", name)
                if rational and rational[0] and scale
                else None
                for rational, scale in zip(resolution, (lateral, y_unit), strict=True)
            ]
            pixel_size = _square(sides[0], sides[1], name)
    return Calibration(pixel_size, z_step, source="ImageJ")


def ome_calibration(xml: str, n_frames: int, name: str) -> Calibration:
    """Lengths from the first image of an OME-XML description.

    Positions of the planes win over PhysicalSizeZ where every frame has one, their unit is a
    length (or unnamed, but in agreement with PhysicalSizeZ), and they rise or fall strictly.

    Args:
        xml: OME-XML.
        n_frames: number of focus positions that the file holds.
        name: file, for messages.

    Returns:
        The calibration; positions are relative to the first frame.
    """
    try:
        pixels = _ome_pixels(xml)
    except ElementTree.ParseError as error:
        logger.warning("%s: OME metadata cannot be parsed (%s): calibration unknown", name, error)
        return Calibration()
    if pixels is None:
        return Calibration()
    sizes: dict[str, float | None] = {}
    for axis in "XYZ":
        value = pixels.get(f"PhysicalSize{axis}")
        unit = pixels.get(f"PhysicalSize{axis}Unit", "um")
        scale = um_per_unit(unit)
        if value is not None and scale is None:
            logger.warning("%s: PhysicalSize%s has the unknown unit %s", name, axis, unit)
        sizes[axis] = (
            None
            if value is None or scale is None
            else _usable_length(value, scale, f"PhysicalSize{axis}", name)
        )
    z_step = sizes["Z"]
    positions = _ome_positions(pixels, n_frames, z_step, name)
    pixel_size = _square(sizes["X"], sizes["Y"], name)
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


def _ome_pixels(xml: str) -> ElementTree.Element | None:
    """The pixels of the first image."""
    root = ElementTree.fromstring(xml)
    return next((e for e in root.iter() if _local_name(e) == "Pixels"), None)


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
    if not np.isfinite(values).all() or not ((steps > 0).all() or (steps < 0).all()):
        logger.warning("%s: PositionZ of the planes is not strictly monotonic: ignored", name)
        return None
    positions = (values - values[0]) * scale
    mean_step = abs(float(positions[-1])) / (n_frames - 1)
    if z_step is not None and not math.isclose(mean_step, z_step, rel_tol=0.1):
        logger.warning(
            "%s: PositionZ advances by %.6g um on average, PhysicalSizeZ says %.6g um; "
            "PositionZ is used",
            name,
            mean_step,
            z_step,
        )
    return tuple(float(position) for position in positions)


def _usable_length(value: Any, scale: float, what: str, name: str) -> float | None:
    try:
        length = float(value) * scale
    except (TypeError, ValueError):
        length = math.nan
    if math.isfinite(length) and length > 0:
        return length
    logger.warning("%s: %s %r in the metadata is no length: ignored", name, what, value)
    return None


def _square(x: float | None, y: float | None, name: str) -> float | None:
    if x is None or y is None:
        return None
    if math.isclose(x, y, rel_tol=_SQUARE_TOLERANCE):
        return x
    logger.warning(
        "%s: pixels are not square (%.6g x %.6g um): pixel size unknown; resample the frames or "
        "pass pixel_size_um",
        name,
        x,
        y,
    )
    return None
