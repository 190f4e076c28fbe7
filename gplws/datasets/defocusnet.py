"""FoD500: the rendered set of DefocusNet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np

from gplws.data import DepthSample
from gplws.datasets.files import (
    DatasetError,
    DepthDataset,
    PathLike,
    depth_sample,
    existing_folder,
    load_frames,
    read_depth_map,
)

# Metres, one for each frame of a stack.
FOCUS_DISTANCES_M = (0.1, 0.15, 0.3, 0.7, 1.5)
_TRAINING_SHARE = 0.8

Split = Literal["train", "test", "all"]


class FoD500(DepthDataset):
    """Stacks of five rendered frames with depth, in metres; samples are RGB.

    ::

        root/000000_01All.tif .. 000000_05All.tif   frames focused at 0.1, 0.15, 0.3, 0.7, 1.5 m
        root/000000Dpt.exr                          depth in metres in channel R; 0: unknown

    The first 80% of the stacks, 400 of 500, are for training. Depth beyond 1.5 m is in the set and
    valid; the published evaluations leave it out (``DepthSample.depth_index`` is NaN there).

    Args:
        root: the folder of all files (``fs_6`` of the published archive).
        split: "train", "test" or "all".

    Raises:
        FileNotFoundError: ``root`` does not exist.
        DatasetError: a stack has not five frames or no depth, or there is none; the message names
            the file.
        ValueError: an unknown split.

    Source: Maximov, Galim, Leal-Taixe, "Focus on Defocus: bridging the synthetic to real domain gap
    for depth estimation", CVPR 2020; layout and split: the repository dvl-tum/defocus-net. The name
    is that of Yang, Huang, Zhou, CVPR 2022.
    """

    def __init__(self, root: PathLike, split: Split = "all") -> None:
        if split not in ("train", "test", "all"):
            raise ValueError(f"split: expected 'train', 'test' or 'all', got {split!r}")
        folder = existing_folder(root)
        frames: dict[str, dict[int, Path]] = {}
        depths: dict[str, Path] = {}
        for path in folder.iterdir():
            if frame := re.fullmatch(r"(\d+)_(\d+)All\.tiff?", path.name):
                frames.setdefault(frame[1], {})[int(frame[2])] = path
            elif depth := re.fullmatch(r"(\d+)Dpt\.exr", path.name):
                depths[depth[1]] = path
        names = sorted(frames.keys() | depths.keys(), key=int)
        if not names:
            raise DatasetError(f"{folder}: no files called 000000_01All.tif and 000000Dpt.exr")
        for name in names:
            if name not in depths:
                raise DatasetError(f"{folder / f'{name}Dpt.exr'}: missing (depth of {name}_*All)")
            if len(frames.get(name, ())) != len(FOCUS_DISTANCES_M):
                raise DatasetError(
                    f"{folder / f'{name}_*All.tif'}: expected {len(FOCUS_DISTANCES_M)} frames, got "
                    f"{len(frames.get(name, ()))}"
                )
        first_test = int(len(names) * _TRAINING_SHARE)
        chosen = {"train": names[:first_test], "test": names[first_test:], "all": names}[split]
        self._frames = [[path for _, path in sorted(frames[name].items())] for name in chosen]
        self._depths = [depths[name] for name in chosen]
        super().__init__(chosen)

    def _load(self, index: int) -> DepthSample:
        depth = read_depth_map(self._depths[index])
        return depth_sample(
            load_frames(self._frames[index]),
            np.where(depth > 0, depth, np.nan),
            FOCUS_DISTANCES_M,
            unit="m",
            name=self.names[index],
            source=self._depths[index],
        )
