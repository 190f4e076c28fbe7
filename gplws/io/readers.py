"""Reads focal stacks from folders, files, arrays and tensors."""

from __future__ import annotations

import io
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gplws.data import FocalStack
from gplws.data.axes import arrange_frames, drop_alpha, normalize_axes
from gplws.data.focal_stack import resolve_positions
from gplws.io.calibration import Calibration
from gplws.io.errors import DECODE_ERRORS, StackReadError
from gplws.io.microscopes import MICROSCOPE_SUFFIXES, is_zarr, read_microscope_stack
from gplws.io.names import ordered_by_name, positions_of_names
from gplws.io.stored import ImageChoice, Report, StoredStack
from gplws.io.tiff import read_tiff_frame, read_tiff_stack
from gplws.positions import rise_or_fall

_logger = logging.getLogger(__name__)


class HasArray(Protocol):
    """What numpy makes an array of."""

    def __array__(self, dtype: Any = None) -> np.ndarray: ...


Frame: TypeAlias = np.ndarray | Tensor
StackSource: TypeAlias = str | os.PathLike[str] | Frame | FocalStack | Sequence[Any] | HasArray
Positions: TypeAlias = Sequence[float] | np.ndarray | Tensor | Literal["names"] | None
Progress: TypeAlias = bool | Report | None

_TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
_IMAGE_SUFFIXES = frozenset({".bmp", ".png", ".jpg", ".jpeg"}) | _TIFF_SUFFIXES
_ARRAY_SUFFIXES = frozenset({".npy", ".npz"})

# Decoding releases the interpreter lock; more threads than this only compete for the disk.
_MAX_READERS = 8

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_stack(
    source: StackSource,
    *,
    axes: str | None = None,
    channel: int | None = None,
    image: ImageChoice = None,
    z_step_um: float | None = None,
    focus_positions_um: Positions = None,
    pixel_size_um: float | None = None,
    progress: Progress = None,
) -> FocalStack:
    """Focal stack from a folder, a file, several files, an array or a tensor.

    Files keep their dtype (16-bit PNG stays 16-bit). Frames of a folder come in the order of
    `list_frames`: 1, 2, 10. EXIF orientation is ignored, so that all frames have the orientation
    of the sensor. Palette images (but for TIFF) become gray or RGB; a constant opaque alpha channel
    is dropped. Calibration comes from ImageJ and OME metadata, also of one file for each frame,
    with its PositionZ, and from those of microscopes; print resolutions (dpi) are no calibration.
    Explicit arguments win over metadata. What is unknown stays None.

    Args:
        source: one of

            - a folder of BMP, PNG, JPEG or TIFF files, one frame each; hidden files and files of
              other types are skipped;
            - a sequence of paths, in focus order;
            - a multi-page TIFF, ImageJ TIFF or OME-TIFF;
            - a file of Zeiss (.czi), Leica (.lif) or Nikon (.nd2), or an OME-Zarr folder;
            - a .npy file, or a .npz file with one array or an array called ``frames``;
            - a numpy array, a tensor (its frames stay on their device), or a sequence of either,
              one frame each; anything that numpy makes an array of, such as arrays of Dask, Zarr,
              HDF5 or xarray, which are read whole;
            - a `FocalStack`, whose calibration the arguments override.
        axes: one letter per axis of the array or file, see `FocalStack.from_frames`.
        channel: number of the one that is taken of several channels or of RGB, from 0.
        image: number, from 0, or name of the one that is read of a file with several (scenes,
            series, positions); default: the only one that is a stack.
        z_step_um: distance between frames, um, > 0.
        focus_positions_um: (N,) focus positions, um, strictly monotonic; excludes ``z_step_um``.
            "names": of files with one frame each, the one number in which their names differ.
        pixel_size_um: side of a pixel on the object, um, > 0.
        progress: True shows a progress bar on stderr; a function is called with (frames read,
            frames in all).

    Returns:
        The stack. Uncompressed TIFF and .npy files are mapped, not read, where possible.

    Raises:
        FileNotFoundError: a path does not exist.
        StackReadError: a file or folder cannot be read as a stack; a ValueError naming the file.
        ValueError: an argument is out of range, or contradicts the frames.
        TypeError: the source or an argument has the wrong type.
        ModuleNotFoundError: the package that reads a file of a microscope is not installed.
    """
    if z_step_um is not None and focus_positions_um is not None:
        raise ValueError("z_step_um and focus_positions_um exclude each other; pass only one")
    given = _Given(axes, channel, image, z_step_um, focus_positions_um, pixel_size_um)
    if isinstance(source, str | os.PathLike):
        if not os.fspath(source):
            raise ValueError("source: the path is empty")
        return _read_path(Path(source), given, progress)
    given.refuse_image("source")
    if isinstance(source, FocalStack):
        return _override(source, given)
    if isinstance(source, np.ndarray | Tensor):
        return given.stack(source)
    if hasattr(source, "__array__"):
        return given.stack(np.asarray(source))
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        return _read_sequence(list(source), given, progress)
    raise TypeError(
        "source must be a path, a sequence of paths or frames, an array, a tensor or a "
        f"FocalStack, got {type(source).__name__}"
    )


def read_frame(path: str | os.PathLike[str]) -> np.ndarray:
    """One image of a BMP, PNG, JPEG or TIFF file, as a frame of a folder is read.

    Args:
        path: the file.

    Returns:
        (H, W) gray or (H, W, 3) RGB pixels in the dtype of the file.

    Raises:
        FileNotFoundError: there is no such file.
        StackReadError: it cannot be read; a ValueError that names it.
    """
    return _read_frame(Path(path), calibrated=False)[0]


def list_frames(folder: str | os.PathLike[str], *, leave_out: Collection[str] = ()) -> list[Path]:
    """Image files of a folder in natural order: f1, f2, f10.

    Where names differ in one number alone it may have decimals and a sign: z-2, z-0.5, z0, z0.25.
    A minus is a sign if some names have none there, or behind an underscore or an equals sign; the
    dash of a-1, a-2, a-3 separates.

    Args:
        folder: folder to list; its subfolders are not entered.
        leave_out: names, in lower case, of images that are no frames.

    Returns:
        BMP, PNG, JPEG and TIFF files that are not hidden.

    Raises:
        FileNotFoundError: the folder does not exist.
        StackReadError: the folder cannot be listed, or holds no image.
    """
    return _frames_of(Path(folder), leave_out, even=True)


def _frames_of(root: Path, leave_out: Collection[str], even: bool) -> list[Path]:
    """What `list_frames` returns; gaps are warned of where steps count as ``even``."""
    try:
        entries = list(root.iterdir())
    except FileNotFoundError:
        raise FileNotFoundError(f"source: no such folder: {root}") from None
    except OSError as error:
        raise StackReadError(f"{root}: cannot list the folder: {error.strerror}") from error
    paths = [
        path
        for path in entries
        if path.suffix.lower() in _IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.name.lower() not in leave_out
        and path.is_file()
    ]
    if not paths:
        raise StackReadError(f"{root}: the folder holds no frames (BMP, PNG, JPEG or TIFF files)")
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) > 1:
        _logger.warning("%s: the folder mixes %s; all are read as frames", root, ", ".join(kinds))
    return ordered_by_name(root, paths, even=even)


class _Given:
    """The arguments of `read_stack` that win over metadata."""

    def __init__(
        self,
        axes: str | None,
        channel: int | None,
        image: ImageChoice,
        z_step_um: float | None,
        focus_positions_um: Positions,
        pixel_size_um: float | None,
    ) -> None:
        self.axes = axes
        self.channel = channel
        self.image = image
        self.z_step_um = z_step_um
        self.focus_positions_um = focus_positions_um
        self.pixel_size_um = pixel_size_um

    def refuse_image(self, source: str) -> None:
        """For sources that are one stack."""
        if self.image is not None:
            raise ValueError(f"image={self.image!r}: {source} is no file that may hold several")

    def positions(
        self, names: Sequence[str] | None, source: str
    ) -> Sequence[float] | np.ndarray | Tensor | None:
        """Focus positions that are given, or that the names of the files say."""
        given = self.focus_positions_um
        if not isinstance(given, str):
            return given
        if given != "names":
            raise TypeError(f"focus_positions_um: expected numbers or 'names', got {given!r}")
        if names is None:
            raise ValueError(f"focus_positions_um='names': {source} is not one file for each frame")
        return positions_of_names(names, source)

    def stack(
        self,
        frames: Frame,
        *,
        axes: str | None = None,
        names: Sequence[str] | None = None,
        calibration: Calibration | None = None,
        source: str | None = None,
    ) -> FocalStack:
        """Focal stack from frames whose axes and calibration the source gave."""
        found = calibration or Calibration()
        z_step, positions = self.z_step_um, self.positions(names, source or "source")
        if z_step is None and positions is None:
            positions = found.focus_positions_um
            z_step = found.z_step_um if positions is None else None
        elif found.z_step_um is not None or found.focus_positions_um is not None:
            _logger.info(
                "%s: %s wins over the z-step of the %s metadata",
                source,
                "z_step_um" if z_step is not None else "focus_positions_um",
                found.source,
            )
            if z_step is not None:
                _warn_of_direction(found.focus_positions_um, source or "source")
        pixel_size = self.pixel_size_um
        if pixel_size is None:
            pixel_size = found.pixel_size_um
        elif found.pixel_size_um is not None and found.pixel_size_um != pixel_size:
            _logger.info(
                "%s: pixel_size_um=%s wins over %.6g um of the %s metadata",
                source,
                pixel_size,
                found.pixel_size_um,
                found.source,
            )
        metadata: dict[str, Any] = {}
        if source is not None:
            metadata["source"] = source
        if found.source:
            metadata["calibration"] = found.source
        if self.channel is not None:
            metadata["channel"] = self.channel
        if self.image is not None:
            metadata["image"] = self.image
        return FocalStack.from_frames(
            frames,
            axes=self.axes if axes is None else axes,
            channel=self.channel,
            z_step_um=z_step,
            focus_positions_um=positions,
            pixel_size_um=pixel_size,
            names=names,
            metadata=metadata,
        )


def _warn_of_direction(replaced: Sequence[float] | np.ndarray | None, source: str) -> None:
    """A z-step rises, whatever the focus positions did that it replaces."""
    if replaced is not None and len(replaced) > 1 and replaced[1] < replaced[0]:
        _logger.warning(
            "%s: its focus positions fall, with z_step_um they rise, which turns the surface over; "
            "pass z_direction='down' with it, or focus_positions_um",
            source,
        )


def _override(stack: FocalStack, given: _Given) -> FocalStack:
    changes: dict[str, Any] = {}
    if given.axes is not None or given.channel is not None:
        axes = given.axes or "ZYXS"[: stack.frames.ndim]
        changes["frames"] = arrange_frames(stack.frames, axes, given.channel)
        if given.channel is not None:
            changes["metadata"] = {**stack.metadata, "channel": given.channel}
    numbers = given.positions(stack.names, "source")
    positions = resolve_positions(stack.n_frames, given.z_step_um, numbers)
    if positions is not None:
        changes["focus_positions_um"] = positions
        if given.z_step_um is not None:
            _warn_of_direction(stack.focus_positions_um, "source")
    if given.pixel_size_um is not None:
        changes["pixel_size_um"] = given.pixel_size_um
    return replace(stack, **changes) if changes else stack


def _read_path(path: Path, given: _Given, progress: Progress) -> FocalStack:
    suffix = path.suffix.lower()
    if path.is_dir():
        if is_zarr(path) or suffix == ".zarr":
            return _read_stored(path, read_microscope_stack, given, progress)
        _refuse_results(path)
        even = given.focus_positions_um is None
        return _read_files(_frames_of(path, (), even), given, progress, source=str(path))
    if not path.exists():
        raise FileNotFoundError(f"source: no such file or folder: {path}")
    if suffix in _TIFF_SUFFIXES:
        return _read_stored(path, read_tiff_stack, given, progress)
    if suffix in MICROSCOPE_SUFFIXES:
        return _read_stored(path, read_microscope_stack, given, progress)
    if suffix in _ARRAY_SUFFIXES:
        given.refuse_image(str(path))
        return given.stack(_read_array(path), source=str(path))
    if suffix in _IMAGE_SUFFIXES:
        raise StackReadError(
            f"{path}: one image is one frame, and a focal stack has at least 2; pass the folder "
            "or a list of files"
        )
    raise StackReadError(
        f"{path}: unknown file type {suffix or '(no suffix)'}; expected a folder, a TIFF, .czi, "
        ".lif, .nd2, .npy or .npz file, or OME-Zarr"
    )


def _refuse_results(folder: Path) -> None:
    """Of the folders that this package writes, say where the frames are."""
    if not (folder / "info.json").is_file():
        return
    for frames in (folder / "stack.tif", folder / "frames"):
        if frames.exists():
            raise StackReadError(f"{folder}: holds a simulation; its frames are {frames}")
    if (folder / "height.tif").is_file():
        raise StackReadError(
            f"{folder}: holds the results of a reconstruction, no frames; 'gplws convert' writes "
            "meshes and surface files of them"
        )


def _read_sequence(items: list[Any], given: _Given, progress: Progress) -> FocalStack:
    if not items:
        raise ValueError("source must hold at least 2 frames, got an empty sequence")
    if all(isinstance(item, str | os.PathLike) for item in items):
        paths = [Path(item) for item in items]
        for path in paths:
            if path.is_dir():
                raise StackReadError(f"{path}: is a folder; a list must name one file per frame")
            if not path.exists():
                raise FileNotFoundError(f"source: no such file: {path}")
            if path.suffix.lower() not in _IMAGE_SUFFIXES:
                raise StackReadError(f"{path}: not a BMP, PNG, JPEG or TIFF file")
        return _read_files(paths, given, progress, source=None)
    for kind in (np.ndarray, Tensor):
        if all(isinstance(item, kind) for item in items):
            return given.stack(_stacked(items))
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise TypeError(f"source must hold only paths, only arrays or only tensors, got {kinds}")


def _stacked(frames: list[Any]) -> Frame:
    first = frames[0]
    if len(frames) < 2:
        raise ValueError("source must hold at least 2 frames, got 1")
    for index, frame in enumerate(frames):
        if frame.shape != first.shape or frame.dtype != first.dtype:
            raise ValueError(
                f"source: frame {index} is {tuple(frame.shape)} {frame.dtype}, frame 0 is "
                f"{tuple(first.shape)} {first.dtype}; all frames must be alike"
            )
        if isinstance(first, Tensor) and frame.device != first.device:
            raise ValueError(
                f"source: frame {index} is on {frame.device}, frame 0 on {first.device}"
            )
    return torch.stack(frames) if isinstance(first, Tensor) else np.stack(frames)


def _read_stored(
    path: Path,
    read: Callable[[Path, Report, ImageChoice], StoredStack],
    given: _Given,
    progress: Progress,
) -> FocalStack:
    """Focal stack of a file that says something about its axes and lengths."""
    with _reporting(progress) as report:
        stored = read(path, report, given.image)
    array, axes = stored.array, stored.axes
    if given.axes is not None:
        axes = given.axes
        if len(axes) > array.ndim:
            # Axes of size 1 that the file declares are no longer in the array.
            axes = "".join(letter for letter in axes if letter.upper() not in stored.single_axes)
        try:
            normalize_axes(axes, array.ndim)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; the file holds {_described(stored)}") from error
    elif axes.count("Q") > 1:
        # A bare array without axes: its shape may still tell.
        return given.stack(array, calibration=stored.calibration, source=str(path))
    unknown = set(axes.upper()) - set("ZNYHXWCSTIQ")
    if unknown and given.axes is None:
        raise StackReadError(
            f"{path}: {_described(stored)} is no focal stack of gray or RGB frames; pass axes to "
            "say which axis holds the frames (Z)"
        )
    try:
        return given.stack(
            array, axes=axes, names=None, calibration=stored.calibration, source=str(path)
        )
    except ValueError as error:
        raise StackReadError(f"{path}: {error}") from error


def _described(stored: StoredStack) -> str:
    return f"an array of shape {stored.array.shape} with axes {stored.axes!r}"


def _read_array(path: Path) -> np.ndarray:
    """Array of a .npy file (mapped, copy-on-write) or of a .npz file."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
        else:
            with np.load(path, allow_pickle=False) as archive:
                names = list(archive.files)
                if len(names) != 1 and "frames" not in names:
                    raise StackReadError(
                        f"{path}: holds the arrays {', '.join(names) or '(none)'}; expected one "
                        "array, or one called 'frames'"
                    )
                array = archive["frames" if "frames" in names else names[0]]
    except StackReadError:
        raise
    except (*DECODE_ERRORS, zipfile.BadZipFile) as error:
        raise StackReadError(f"{path}: unreadable or truncated: {error}") from error
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _read_files(
    paths: list[Path], given: _Given, progress: Progress, source: str | None
) -> FocalStack:
    """One frame per file, read into one preallocated array by a few threads."""
    if len(paths) == 1:
        if paths[0].suffix.lower() in _TIFF_SUFFIXES:
            return _read_stored(paths[0], read_tiff_stack, given, progress)
        raise StackReadError(f"{paths[0]}: a focal stack has at least 2 frames, got this one")
    given.refuse_image(source or "a list of files")
    first, calibration = _read_frame(paths[0])
    if first.ndim == 3 and first.shape[2] != 3:
        raise StackReadError(f"{paths[0]}: {_mode(first)}; expected a gray or RGB image")
    frames = np.empty((len(paths), *first.shape), first.dtype)
    frames[0] = first
    positions = [calibration.plane_position_um] * len(paths)

    def load(index: int) -> None:
        frame, of_frame = _read_frame(paths[index], calibrated=False)
        positions[index] = of_frame.plane_position_um
        if frame.shape != first.shape or frame.dtype != first.dtype:
            raise StackReadError(
                f"frames differ: {paths[0]} is {_mode(first)}, {paths[index]} is {_mode(frame)}; "
                "all frames must have one size and mode"
            )
        frames[index] = frame

    workers = min(_MAX_READERS, os.cpu_count() or 1, len(paths))
    with _reporting(progress) as report, ThreadPoolExecutor(workers) as pool:
        report(1, len(paths))
        tasks = [pool.submit(load, index) for index in range(1, len(paths))]
        try:
            # In frame order, so that the same bad folder always names the same file.
            for done, task in enumerate(tasks, start=2):
                task.result()
                report(done, len(paths))
        finally:
            for task in tasks:
                task.cancel()
    name = source or str(paths[0].parent)
    return given.stack(
        frames,
        axes=None if given.axes else "ZYXS"[: frames.ndim],
        names=[path.name for path in paths],
        calibration=_with_positions(calibration, positions, name),
        source=name,
    )


def _with_positions(
    calibration: Calibration, positions: list[float | None], source: str
) -> Calibration:
    """The calibration of the first file with the positions that all files have on their stage."""
    known = [position for position in positions if position is not None]
    if len(known) < len(positions):
        return calibration
    if not rise_or_fall(known):
        _logger.warning(
            "%s: PositionZ of the files does not rise or fall strictly in the order of their "
            "names: ignored",
            source,
        )
        return calibration
    relative = tuple(position - known[0] for position in known)
    return replace(calibration, focus_positions_um=relative)


def _mode(frame: np.ndarray) -> str:
    height, width = frame.shape[:2]
    channels = 1 if frame.ndim == 2 else frame.shape[2]
    kind = {1: "gray", 3: "RGB"}.get(channels, f"{channels}-channel")
    return f"{width} x {height} pixels, {kind}, {frame.dtype}"


def _read_frame(path: Path, *, calibrated: bool = True) -> tuple[np.ndarray, Calibration]:
    """Gray (H, W) or RGB (H, W, 3) pixels of one file."""
    if path.suffix.lower() in _TIFF_SUFFIXES:
        pixels, calibration = read_tiff_frame(path, calibrated=calibrated)
    else:
        pixels, calibration = _read_picture(path), Calibration()
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        try:
            pixels = drop_alpha(pixels, str(path))
        except ValueError as error:
            raise StackReadError(str(error)) from error
    elif pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return pixels, calibration


def _read_picture(path: Path) -> np.ndarray:
    """Pixels of a BMP, PNG or JPEG file, with alpha if it has any."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = path.read_bytes()
        if data.startswith(_PNG_SIGNATURE):
            depth, color = _check_png(path, data)
            if depth == 16 and color != 0:
                return _decode_deep_png(path, data)
        with Image.open(io.BytesIO(data)) as image:
            return _image_pixels(path, image)
    except StackReadError:
        raise
    except UnidentifiedImageError as error:
        raise StackReadError(
            f"{path}: not a readable image, or truncated ({len(data)} bytes)"
        ) from error
    except Image.DecompressionBombError as error:
        raise StackReadError(f"{path}: {error}; save frames of this size as TIFF") from error
    except DECODE_ERRORS as error:
        raise StackReadError(f"{path}: unreadable or truncated: {error}") from error


def _image_pixels(path: Path, image: Any) -> np.ndarray:
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        pixels = np.asarray(image)
        gray = (pixels[..., :1] == pixels[..., 1:3]).all()
        return np.ascontiguousarray(pixels[..., 0]) if gray and pixels.shape[2] == 3 else pixels
    if image.mode == "1":
        raise StackReadError(f"{path}: a 1-bit image carries no focus; save it with 8 bits or more")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I", "F") and not image.mode.startswith("I;16"):
        raise StackReadError(f"{path}: colour mode {image.mode} is no gray or RGB image")
    pixels = np.asarray(image)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _check_png(path: Path, data: bytes) -> tuple[int, int]:
    """Walks the chunks of a PNG file; returns its bit depth and colour type.

    OpenCV decodes what is left of a damaged file without an error, so it is checked here.
    """
    position = len(_PNG_SIGNATURE)
    while True:
        if position + 12 > len(data):
            raise StackReadError(f"{path}: truncated PNG file ({len(data)} bytes)")
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        end = position + 12 + length
        if end > len(data):
            raise StackReadError(f"{path}: truncated PNG file ({len(data)} bytes)")
        checksum = struct.unpack(">I", data[end - 4 : end])[0]
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum:
            raise StackReadError(f"{path}: damaged PNG file (checksum of {kind!r} is wrong)")
        if kind == b"IEND":
            return data[24], data[25]
        position = end


def _decode_deep_png(path: Path, data: bytes) -> np.ndarray:
    """16-bit colour PNG, which Pillow would cut to 8 bits."""
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.ndim != 3:
        raise StackReadError(f"{path}: the 16-bit PNG file cannot be decoded")
    return np.ascontiguousarray(image[..., [2, 1, 0, 3][: image.shape[2]]])


@contextmanager
def _reporting(progress: Progress) -> Iterator[Report]:
    """Function that reports frames read, whatever form of progress was asked for."""
    if callable(progress):
        yield progress
    elif progress:
        from tqdm import tqdm

        with tqdm(desc="read", unit="frame", leave=False) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield advance
    else:
        yield lambda done, total: None
