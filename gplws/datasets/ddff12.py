"""DDFF 12-Scene: stacks of a light field camera with registered depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from gplws.data import DepthSample
from gplws.datasets.files import DatasetError, DepthDataset, PathLike, depth_sample, frames_tensor
from gplws.io.packages import require_package

# Calibration of the light field camera, and the distances of the first and last focal plane.
_FOCAL_LENGTH_PX = 521.4052
_BASELINE_M = 1982.0250823695178 / 7317.020641763665 * 1e-3
_FOCUS_RANGE_M = (0.5, 7.0)


class DDFF12(DepthDataset):
    """Stacks of ten RGB frames of 383 x 552 pixels; depth is disparity in pixels.

    ::

        ddff-dataset-trainval.h5: stack_train (n, 10, 383, 552, 3) in 0..255, disp_train
                                  (n, 383, 552) or (n, 1, 383, 552), 0: unknown; the same with _val
        ddff-dataset-test.h5:     stack_test; its disparity is not public

    The focal planes are evenly spaced in disparity from 0.2825 (0.5 m) to 0.0202 px (7 m). Needs
    the package ``h5py``.

    Args:
        file: the HDF5 file.
        split: "train", "val" or "test"; samples of a file without disparities have no pixel valid.

    Raises:
        FileNotFoundError: the file does not exist.
        DatasetError: the file is damaged or has other arrays; the message names it.
        ModuleNotFoundError: h5py is not installed.
        ValueError: an unknown split.

    Source: Hazirbas et al., "Deep depth from focus", ACCV 2018, arXiv:1704.01085; keys and
    calibration: the repositories soyers/ddff-pytorch and albert100121/AiFDepthNet.
    """

    def __init__(self, file: PathLike, split: Literal["train", "val", "test"] = "train") -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"split: expected 'train', 'val' or 'test', got {split!r}")
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"file: no such file: {path}")
        self._path, self._stack_key, self._disparity_key = path, f"stack_{split}", f"disp_{split}"
        with _opened(path) as content:
            self._has_disparity = split != "test" or self._disparity_key in content
            needed = [self._stack_key, *([self._disparity_key] if self._has_disparity else [])]
            for key in needed:
                if key not in content:
                    raise DatasetError(f"{path}: no array {key}, only {', '.join(content)}")
            shapes = [content[key].shape for key in needed]
            if len(shapes[0]) != 5 or shapes[0][4] != 3:
                raise DatasetError(
                    f"{path}: {self._stack_key}: expected (n, frames, H, W, 3), got {shapes[0]}"
                )
            if len(shapes) == 2 and shapes[0][0] != shapes[1][0]:
                raise DatasetError(f"{path}: {shapes[0][0]} stacks, but {shapes[1][0]} disparities")
        super().__init__([f"{split} {index}" for index in range(shapes[0][0])])

    def _load(self, index: int) -> DepthSample:
        # Opened for each sample: a handle must not be shared with worker processes.
        with _opened(self._path) as content:
            try:
                frames = content[self._stack_key][index]  # (N, H, W, 3)
                disparity = content[self._disparity_key][index] if self._has_disparity else None
            except (OSError, KeyError, RuntimeError) as error:
                raise DatasetError(f"{self._path}: sample {index} unreadable: {error}") from error
        if frames.dtype.kind == "f":  # written without a dtype, values are 0..255 all the same
            frames = frames.astype(np.float32) / np.float32(255)
        if disparity is None:
            disparity = np.zeros(frames.shape[1:3], np.float32)
        disparity = disparity.reshape(disparity.shape[-2:]).astype(np.float32)
        return depth_sample(
            frames_tensor(frames, f"{self._path}, {self._stack_key} {index}"),
            np.where(disparity > 0, disparity, np.nan),
            focus_disparities(len(frames)),
            unit="px",
            name=self.names[index],
            source=self._path,
        )


def focus_disparities(frames: int = 10) -> np.ndarray:
    """Disparities of the focal planes, (frames,) float64, pixels, falling."""
    near, far = (_BASELINE_M * _FOCAL_LENGTH_PX / distance for distance in _FOCUS_RANGE_M)
    return np.linspace(near, far, frames)


def _opened(path: Path) -> Any:
    require_package("h5py", str(path), "datasets")
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path}: unreadable or truncated: {error}") from error
