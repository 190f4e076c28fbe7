"""Any folders of frames, with true depth in a file beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data import DepthSample
from ..io.readers import list_frames
from .files import (
    DatasetError,
    DepthDataset,
    PathLike,
    depth_sample,
    existing_folder,
    load_frames,
    read_arrays,
    subfolders,
)


class FolderStacks(DepthDataset):
    """Stacks that lie in folders, each with its true depth in frames.

    ::

        root/NAME/f000.png, f001.png, ...   frames in natural order
        root/NAME/stack.json                optional: {"frames": [file names in focus order],
                                            "focus_positions_um": [...]}; other keys are ignored
        root/NAME/gt.npz                    "gt_index": (H, W) frame number from 0 with fractions,
                                            NaN where unknown

    Samples are in frames, or in um where ``stack.json`` says the focus positions.

    Args:
        root: folder of the stacks, or one stack itself.
        require_depth: True leaves stacks without ``gt.npz`` out; False gives them with no pixel
            valid.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        DatasetError: it holds no stack.
    """

    def __init__(self, root: PathLike, *, require_depth: bool = True) -> None:
        folder = existing_folder(root)
        candidates = [folder, *subfolders(folder)]
        found = [
            path
            for path in candidates
            if (path / "gt.npz").is_file()
            or (not require_depth and (path / "stack.json").is_file())
        ]
        if not found:
            needed = "gt.npz" if require_depth else "gt.npz or stack.json"
            raise DatasetError(f"{folder}: no stack with {needed} in it or its subfolders")
        self._folders = found
        super().__init__([path.name for path in found])

    def _load(self, index: int) -> DepthSample:
        folder = self._folders[index]
        description = read_json(folder / "stack.json")
        if "frames" in description:
            paths = [folder / str(name) for name in description["frames"]]
        else:
            paths = list_frames(folder)
        stack = load_frames(paths)
        numbers = np.arange(len(paths), dtype=np.float64)
        truth = folder / "gt.npz"
        depth = np.full(stack.shape[2:], np.nan)
        if truth.is_file():
            (depth,) = read_arrays(truth, "gt_index")
        if "focus_positions_um" not in description:
            unit, positions = "frames", numbers
        else:
            unit = "um"
            positions = np.asarray(description["focus_positions_um"], np.float64)
            if positions.shape != numbers.shape:
                raise DatasetError(
                    f"{folder / 'stack.json'}: focus_positions_um: expected {len(paths)} numbers, "
                    f"got {positions.size}"
                )
            depth = np.interp(depth, numbers, positions, left=np.nan, right=np.nan)
        return depth_sample(stack, depth, positions, unit=unit, name=folder.name, source=truth)


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
