"""Any folders of frames with true depth in a file, and those of ``gplws simulate``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gplws.data import DepthSample
from gplws.datasets.files import (
    DatasetError,
    DepthDataset,
    PathLike,
    depth_sample,
    existing_folder,
    frames_tensor,
    load_frames,
    read_arrays,
    read_depth_map,
    subfolders,
)
from gplws.io.readers import list_frames, read_stack
from gplws.positions import rise_or_fall

_TRUTH, _SIMULATED_TRUTH = "gt.npz", "depth_index.tif"


class FolderStacks(DepthDataset):
    """Stacks that lie in folders, each with its true depth in frames.

    ::

        root/NAME/f000.png, f001.png, ...   frames in natural order
        root/NAME/stack.json                optional: {"frames": [file names in focus order],
                                            "focus_positions_um": [...]}; other keys are ignored
        root/NAME/gt.npz                    "gt_index": (H, W) frame number from 0 with fractions,
                                            NaN where unknown

    or, as ``gplws simulate`` writes them,

    ::

        root/NAME/stack.tif                 the frames; or frames/f000.png, f001.png, ...
        root/NAME/info.json                 {"focus_positions_um": [...]}; other keys are ignored
        root/NAME/depth_index.tif           (H, W) as gt_index

    Samples are in frames, or in um where ``stack.json`` or ``info.json`` say the focus positions.

    Args:
        root: folder of the stacks, or one stack itself.
        require_depth: True leaves stacks without true depth out; False gives those that have a
            ``stack.json``, with no pixel valid.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        DatasetError: it holds no stack.
    """

    def __init__(self, root: PathLike, *, require_depth: bool = True) -> None:
        folder = existing_folder(root)
        candidates = [folder, *subfolders(folder)]
        marks = [_TRUTH, _SIMULATED_TRUTH, *([] if require_depth else ["stack.json"])]
        found = [path for path in candidates if any((path / mark).is_file() for mark in marks)]
        if not found:
            needed = f"{', '.join(marks[:-1])} or {marks[-1]}"
            raise DatasetError(f"{folder}: no stack with {needed} in it or its subfolders")
        self._folders = found
        super().__init__([path.name for path in found])

    def _load(self, index: int) -> DepthSample:
        folder = self._folders[index]
        truth = folder / _TRUTH
        if (folder / _SIMULATED_TRUTH).is_file() and not truth.is_file():
            truth, source = folder / _SIMULATED_TRUTH, folder / "info.json"
            description = read_json(source)
            stack = _simulated_frames(folder)
            depth = read_depth_map(truth)
        else:
            source = folder / "stack.json"
            description = read_json(source)
            stack = load_frames(_frame_files(folder, description, source))
            depth = np.full(stack.shape[2:], np.nan)
            if truth.is_file():
                (depth,) = read_arrays(truth, "gt_index")
        numbers = np.arange(stack.shape[1], dtype=np.float64)
        if "focus_positions_um" not in description:
            unit, positions = "frames", numbers
        else:
            unit = "um"
            positions = read_positions(description, "focus_positions_um", len(numbers), source)
            depth = np.interp(depth, numbers, positions, left=np.nan, right=np.nan)
        return depth_sample(stack, depth, positions, unit=unit, name=folder.name, source=truth)


def _simulated_frames(folder: Path) -> Tensor:
    """Frames (1, N, H, W) of a folder that ``gplws simulate`` wrote."""
    tiff, pictures = folder / "stack.tif", folder / "frames"
    try:
        stack = read_stack(tiff if tiff.is_file() else pictures)
    except (ValueError, FileNotFoundError) as error:
        raise DatasetError(
            f"{folder}: neither stack.tif nor frames/ is a stack: {error}"
        ) from error
    return frames_tensor(np.asarray(stack.frames), str(folder))


def _frame_files(folder: Path, description: dict[str, Any], source: Path) -> list[Path]:
    if "frames" in description:
        names = description["frames"]
        if not (
            isinstance(names, list)
            and len(names) >= 2
            and all(isinstance(name, str) for name in names)
        ):
            raise DatasetError(f"{source}: frames: expected two or more file names, got {names!r}")
        return [folder / name for name in names]
    try:
        return list_frames(folder)
    except ValueError as error:
        raise DatasetError(str(error)) from error


def read_positions(description: dict[str, Any], key: str, frames: int, source: Path) -> np.ndarray:
    """Focus positions of a JSON object.

    Args:
        description: the object.
        key: the name of the positions in it.
        frames: how many there should be.
        source: the file, for messages.

    Returns:
        (N,) float64, strictly monotonic.

    Raises:
        DatasetError: they are no such numbers; the message names file and key.
    """
    values = description.get(key)
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise DatasetError(f"{source}: {key}: expected a list of numbers, got {values!r}")
    if len(values) != frames:
        raise DatasetError(f"{source}: {key}: expected {frames} numbers, got {len(values)}")
    positions = np.array(values, np.float64)
    if not rise_or_fall(positions):
        raise DatasetError(f"{source}: {key}: they do not rise or fall: {values}")
    return positions


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: Path) -> dict[str, Any]:
    """Object of a JSON file, empty where there is no file.

    Raises:
        DatasetError: the file is damaged or holds something else; the message names it.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: unreadable: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
