"""What all loaders share: base class, frames as a network wants them, depth maps."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gplws.data import DepthSample, FocalStack
from gplws.io.names import natural_key
from gplws.io.packages import require_package
from gplws.io.readers import read_frame, read_stack
from gplws.positions import rise_or_fall

PathLike = str | os.PathLike[str]


class DatasetError(ValueError):
    """A file or folder of a data set is missing, damaged or unexpected; the message names it."""


class DepthDataset(Dataset[DepthSample], ABC):
    """Samples that are read when they are asked for; ``names`` are their names, in order.

    Works with ``torch.utils.data.DataLoader(..., collate_fn=gplws.data.collate)``; holds no open
    files, so it can be sent to worker processes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> DepthSample:
        """The sample ``index``, from -len to len - 1.

        Raises:
            IndexError: there is no such sample.
            DatasetError: a file of it is missing or damaged.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected {-len(self)}..{len(self) - 1}, got {index}")
        return self._load(range(len(self))[index])

    def __iter__(self) -> Iterator[DepthSample]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def _load(self, index: int) -> DepthSample:
        """Read the sample ``index``, 0 <= index < len."""


def existing_folder(root: PathLike) -> Path:
    """The folder as a path.

    Raises:
        FileNotFoundError: it does not exist.
        DatasetError: it is not a folder.
    """
    folder = Path(root)
    if not folder.exists():
        raise FileNotFoundError(f"root: no such folder: {folder}")
    if not folder.is_dir():
        raise DatasetError(f"{folder}: expected a folder")
    return folder


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder that are not hidden, in natural order (2 before 10)."""
    found = [path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"]
    return sorted(found, key=lambda path: natural_key(path.name))


def require_file(path: Path, purpose: str) -> Path:
    """The path if it is a file.

    Raises:
        DatasetError: it is missing; the message names it and its purpose.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: missing ({purpose})")
    return path


def load_frames(paths: Sequence[Path]) -> Tensor:
    """Frames of one stack as a network wants them.

    Args:
        paths: image files in focus order, all of one size, mode and dtype.

    Returns:
        (C, N, H, W) float32 in 0..1, C = 1 or 3; integers by the levels of
        :class:`gplws.data.FocalStack`.

    Raises:
        DatasetError: a file is missing, damaged or unlike the others, or holds floats outside 0..1.
    """
    for path in paths:
        require_file(path, "a frame")
    try:
        frames = np.asarray(read_stack(paths).frames)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    return frames_tensor(frames, str(paths[0].parent))


def load_image(path: Path) -> Tensor:
    """One image, (C, H, W) float32 in 0..1; raises as `load_frames`."""
    try:
        image = read_frame(require_file(path, "an image"))
    except ValueError as error:
        raise DatasetError(str(error)) from error
    return frames_tensor(np.broadcast_to(image, (2, *image.shape)), str(path))[:, 0]


def frames_tensor(frames: np.ndarray, source: str) -> Tensor:
    """(N, H, W) or (N, H, W, 3) of any dtype as (C, N, H, W) float32 in 0..1.

    Raises:
        DatasetError: floats outside 0..1; the message names ``source``.
    """
    values = torch.from_numpy(np.ascontiguousarray(frames, np.float32))
    if frames.dtype.kind != "f":
        black, span = FocalStack(frames).levels
        values = values.sub_(black).clamp_(0, span).div_(span)
    elif values.numel() and not (values.min() >= 0 and values.max() <= 1):
        raise DatasetError(
            f"{source}: expected float frames in 0..1, got {float(values.min())} to "
            f"{float(values.max())}"
        )
    channels_first = values[None] if values.dim() == 3 else values.movedim(3, 0)
    return channels_first.contiguous()


def depth_sample(
    stack: Tensor,
    depth: np.ndarray | Tensor,
    focus_positions: Any,
    *,
    unit: str,
    name: str,
    source: Path,
    valid: np.ndarray | Tensor | None = None,
    all_in_focus: Tensor | None = None,
) -> DepthSample:
    """A sample whose depth is NaN wherever it is invalid.

    Args:
        stack: (C, N, H, W) float32.
        depth: (H, W), in ``unit``; what is not finite is unknown.
        focus_positions: (N,), in ``unit``.
        unit, name, all_in_focus: as in `DepthSample`.
        source: file of the depth, for messages.
        valid: (H, W) bool; default: all.

    Returns:
        The sample.

    Raises:
        DatasetError: depth and frames differ in size, or the positions do not fit the frames; the
            message names ``source``.
    """
    known = _tensor(depth).to(torch.float32)
    mask = known.isfinite()
    if valid is not None:
        mask = mask & _tensor(valid).to(torch.bool)
    positions = _tensor(focus_positions).to(torch.float32)
    if not rise_or_fall(positions):
        raise DatasetError(f"{source}: focus positions do not rise or fall: {positions.tolist()}")
    try:
        return DepthSample(
            stack=stack,
            focus_positions=positions,
            depth=torch.where(mask, known, torch.nan),
            valid=mask,
            unit=unit,
            name=name,
            all_in_focus=all_in_focus,
        )
    except ValueError as error:
        raise DatasetError(f"{source}: {error}") from error


def _tensor(values: Any) -> Tensor:
    """Tensor of its own of a tensor, or of an array of any strides, or of a sequence."""
    return values.clone() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def read_depth_map(path: Path) -> np.ndarray:
    """Depth map of a file; nothing is scaled, and what is unknown keeps its mark.

    Args:
        path: one of

            - .tif, .tiff: one page, gray, any dtype;
            - .npy: one array;
            - .pfm: gray ("Pf");
            - .exr: channel R, or the only one; needs the package ``OpenEXR``;
            - .mat: the one matrix of more than one element; needs ``scipy``.

    Returns:
        (H, W) float32.

    Raises:
        DatasetError: the file is missing, damaged, or not one (H, W) map; the message names it.
        ModuleNotFoundError: the package that reads the format is not installed.
    """
    require_file(path, "a depth map")
    suffix = path.suffix.lower()
    if suffix not in _DEPTH_READERS:
        raise DatasetError(f"{path}: unknown type of depth map; expected one of {DEPTH_SUFFIXES}")
    try:
        values = _DEPTH_READERS[suffix](path)
    except (DatasetError, ModuleNotFoundError):
        raise
    except Exception as error:  # each library has its own kinds for damaged files
        raise DatasetError(f"{path}: unreadable or truncated: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise DatasetError(f"{path}: expected a map (H, W), got {values.shape} {values.dtype}")
    return np.ascontiguousarray(values, np.float32)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz file, in the order of their names.

    Raises:
        DatasetError: the file is damaged, or an array is missing; the message names it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            there = archive.files
            found = [archive[name] for name in names if name in there]
    except Exception as error:  # zip, zlib and numpy have their own kinds for damaged files
        raise DatasetError(f"{path}: unreadable or truncated: {error}") from error
    if len(found) < len(names):
        raise DatasetError(f"{path}: expected arrays {' and '.join(names)}, got {there}")
    return found


def _read_tiff(path: Path) -> np.ndarray:
    import tifffile

    return tifffile.imread(path)


def _read_npy(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _read_pfm(path: Path) -> np.ndarray:
    """Rows run from the bottom up; a negative scale says little-endian.

    Its magnitude, a brightness, does not count: writers of disparities leave 1 or 1/255 there.

    Source: http://netpbm.sourceforge.net/doc/pfm.html
    """
    data = path.read_bytes()
    header = re.match(rb"(P[Ff])\s+(?:#[^\n]*\n)*(\d+)\s+(\d+)\s+(\S+)\s", data)
    if header is None or header[1] != b"Pf":
        raise DatasetError(f"{path}: no gray PFM file (it begins with {data[:8]!r})")
    width, height, scale = int(header[2]), int(header[3]), float(header[4])
    expected = 4 * width * height
    if len(data) - header.end() < expected:
        raise DatasetError(
            f"{path}: truncated: {width} x {height} pixels need {expected} bytes, got "
            f"{len(data) - header.end()}"
        )
    kind = "<f4" if scale < 0 else ">f4"
    values = np.frombuffer(data, kind, width * height, header.end()).reshape(height, width)
    return values[::-1]


def _read_exr(path: Path) -> np.ndarray:
    # OpenCV reads EXR only where it was built with it, which its wheels are not.
    require_package("OpenEXR", str(path), "datasets")
    import OpenEXR

    with OpenEXR.File(str(path), separate_channels=True) as file:
        channels = file.channels()
        if "R" not in channels and len(channels) != 1:
            raise DatasetError(f"{path}: expected a channel R, or one channel, got {[*channels]}")
        channel = channels["R"] if "R" in channels else next(iter(channels.values()))
        return np.array(channel.pixels)


def _read_mat(path: Path) -> np.ndarray:
    require_package("scipy", str(path), "datasets")
    from scipy.io import loadmat

    content = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
    maps = [value for value in content.values() if getattr(value, "size", 0) > 1]
    if len(maps) != 1:
        raise DatasetError(f"{path}: expected one matrix, got {sorted(content)}")
    return np.asarray(maps[0])


_DEPTH_READERS = {
    ".tif": _read_tiff,
    ".tiff": _read_tiff,
    ".npy": _read_npy,
    ".pfm": _read_pfm,
    ".exr": _read_exr,
    ".mat": _read_mat,
}
DEPTH_SUFFIXES = tuple(_DEPTH_READERS)
"""Formats that :func:`read_depth_map` knows."""
