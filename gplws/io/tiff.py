"""TIFF files: integrity, pixels in the dtype of the file, what ImageJ and OME say of them."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from gplws.io.calibration import (
    Calibration,
    imagej_calibration,
    ome_calibration,
    ome_plane_position,
)
from gplws.io.errors import DECODE_ERRORS, StackReadError
from gplws.io.stored import ImageChoice, Report, StoredImage, StoredStack, choose_image

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

# tifffile.TiffPage or TiffFrame, whose attributes forward to a page that is typed as optional.
Page: TypeAlias = Any

# Bytes per value of the TIFF types.
_TYPE_BYTES = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}


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


def read_tiff_stack(path: Path, progress: Report, image: ImageChoice = None) -> StoredStack:
    """An image series of a TIFF, ImageJ TIFF or OME-TIFF file.

    Args:
        path: file with one series of equal pages, or several.
        progress: called with (pages read, pages).
        image: number or name of the series, see `choose_image`.

    Returns:
        Pixels, axes and calibration.

    Raises:
        StackReadError: the file is damaged, unsupported, or its pages differ in size or dtype.
        ValueError: there is no such series.
    """
    with _open(path) as file:
        number = _series_number(file, path, image)
        series = file.series[number]
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
        declared = _declared_sizes(file, number)
        return StoredStack(
            array=array,
            axes=series.axes,
            single_axes="".join(
                axis for axis, size in declared.items() if size == 1 and axis not in series.axes
            ),
            calibration=_calibration(file, path, declared.get("Z", 1), number),
        )


def _open(path: Path) -> TiffFile:
    import tifffile

    try:
        check_directory_chain(path)
        file = tifffile.TiffFile(path)
        if not _is_written_page_by_page(file):
            return file
        file.close()
        return tifffile.TiffFile(path, is_shaped=False)
    except StackReadError:
        raise
    except DECODE_ERRORS as error:
        raise StackReadError(f"{path}: not a readable TIFF file: {error}") from error


def _is_written_page_by_page(file: TiffFile) -> bool:
    """Whether tifffile was called for each frame, which calls each of them a series."""
    if not file.is_shaped or len(file.pages) < 2 or len(file.series) < 2:
        return False
    kinds = {(series.shape, series.dtype, series.axes) for series in file.series}
    return len(kinds) == 1 and all(len(series.pages) == 1 for series in file.series)


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


def _series_number(file: TiffFile, path: Path, wanted: ImageChoice) -> int:
    """Number of the series that is read.

    Pages that are unlike the others make a series of their own: only OME files say which is a
    stack.
    """
    try:
        images = [
            StoredImage(
                series.name if file.is_ome else "",
                f"{series.shape} {series.dtype} ({series.axes})",
                series.shape[series.axes.index("Z")] if file.is_ome and "Z" in series.axes else 0,
            )
            for series in file.series
        ]
    except DECODE_ERRORS as error:
        raise StackReadError(f"{path}: damaged TIFF file: {error}") from error
    complaint = "its pages differ in size or mode, or it holds several images"
    return choose_image(path, images, wanted, complaint)


def _declared_sizes(file: TiffFile, number: int) -> dict[str, int]:
    """Length of each axis of a series, those of length 1 among them."""
    every: Any = file.series
    if callable(every):  # tifffile 2026.5.2 and newer
        whole = every(squeeze=False)[number]
        return dict(zip(whole.axes, whole.shape, strict=True))
    whole = every[number]
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
    file = page.parent.filehandle
    was_closed = file.closed  # that of another file of an OME set
    try:
        if was_closed:
            file.open()
        pixels = page.asarray()
    except DECODE_ERRORS as error:
        if "imagecodecs" not in str(error):
            raise StackReadError(f"{path}: page {index} is damaged: {error}") from error
        pixels = _decode_with_opencv(path, page, error)
    finally:
        if was_closed:
            file.close()
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


def _calibration(file: TiffFile, path: Path, n_frames: int, number: int = 0) -> Calibration:
    if file.is_ome and file.ome_metadata:
        return ome_calibration(file.ome_metadata, n_frames, str(path), number)
    if _is_imagej(file):
        first: Page = file.pages[0]
        tags = first.tags
        resolution = tuple(
            tags[name].value if name in tags else None for name in ("XResolution", "YResolution")
        )
        return imagej_calibration(file.imagej_metadata or {}, resolution, str(path))
    return Calibration()
