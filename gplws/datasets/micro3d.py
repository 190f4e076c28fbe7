"""Micro 3D: stacks of a microscope with measured height maps, and sets built like it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gplws.data import DepthSample
from gplws.datasets.files import (
    DEPTH_SUFFIXES,
    DatasetError,
    DepthDataset,
    PathLike,
    depth_sample,
    existing_folder,
    load_frames,
    load_image,
    read_depth_map,
    require_file,
    subfolders,
)
from gplws.datasets.folder_stacks import read_json, read_positions
from gplws.io.readers import list_frames

# Pictures in a scene folder that are no frames.
_NOT_FRAMES = {"height.tif", "height.tiff", "valid.png", "source.png", "review.png"}


class Micro3D(DepthDataset):
    """Scenes of Micro 3D, one folder each.

    ::

        root/SCENE/1.bmp, 2.bmp, ...   frames in natural order (1, 2, 10); PNG, JPEG, TIFF too
        root/SCENE/height.tif          height map (or .npy, .pfm, .exr, .mat), NaN where unknown
        root/SCENE/valid.png           optional: 0 where the height map is not to be used
        root/SCENE/scene.json          optional: {"unit": "um", "focus_positions": [...]}

    Without ``scene.json`` heights are frame numbers. The set of the paper has 488 scenes of 20
    frames of 256 x 256 pixels, 382 for training and 106 for the test. Its published sample is one
    folder ``1.bmp`` .. ``100.bmp`` without a height map; how the height maps of the full set are
    stored is not public, so they may have to be renamed to the layout above, which is the one that
    `build_micro3d_scene` writes.

    Args:
        root: folder of the scenes, or one scene itself.
        scenes: names of those to take, in this order, or a text file with one a line, as for one
            part of a split; default: all, in natural order.
        require_heights: False accepts scenes without a height map, with no pixel valid.
        first_frame: number of the first frame in height maps without ``scene.json``; 1 for
            labels that count frames from 1.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        DatasetError: it holds no scene or not all of ``scenes``, or a scene has no or several
            height maps.

    Source: "GPLWS-Net: grouping parallelism lightweight real-time microscopic 3D shape
    reconstruction", Journal of Software, 2024, section 3.1.
    """

    def __init__(
        self,
        root: PathLike,
        scenes: PathLike | Sequence[str] | None = None,
        *,
        require_heights: bool = True,
        first_frame: int = 0,
    ) -> None:
        folder = existing_folder(root)
        folders = subfolders(folder)
        if any(_is_frame(path) for path in folder.iterdir()):
            folders = [folder]
        if not folders:
            raise DatasetError(f"{folder}: neither frames nor scene folders in it")
        if scenes is not None:
            folders = _chosen(folders, scenes, folder)
        self._first_frame = first_frame
        self._scenes = [(scene, _height_file(scene, require_heights)) for scene in folders]
        super().__init__([scene.name for scene in folders])

    def _load(self, index: int) -> DepthSample:
        scene, height_file = self._scenes[index]
        stack = load_frames(frame_files(scene))
        description = read_json(scene / "scene.json")
        if description:
            unit, positions = _calibration(description, scene / "scene.json", stack.shape[1])
        else:
            unit, positions = "frames", np.arange(stack.shape[1], dtype=np.float64)
        if height_file is None:
            height = np.full(stack.shape[2:], np.nan, np.float32)
        else:
            height = read_depth_map(height_file)
            if not description:
                height = height - np.float32(self._first_frame)
        mask = scene / "valid.png"
        valid = load_image(mask)[0].numpy() > 0 if mask.is_file() else None
        if valid is not None and valid.shape != height.shape:
            raise DatasetError(f"{mask}: expected {height.shape} pixels, got {valid.shape}")
        return depth_sample(
            stack,
            height,
            positions,
            unit=unit,
            name=scene.name,
            source=height_file or scene,
            valid=valid,
        )


def _chosen(folders: list[Path], scenes: PathLike | Sequence[str], root: Path) -> list[Path]:
    """The folders that are named, or listed in a file."""
    if isinstance(scenes, str | os.PathLike):
        listed = require_file(Path(scenes), "the list of scenes").read_text(encoding="utf-8-sig")
        scenes = [line.strip() for line in listed.splitlines() if line.strip()]
    by_name = {path.name: path for path in folders}
    missing = [name for name in scenes if name not in by_name]
    if missing:
        raise DatasetError(f"{root}: scenes: {missing[0]} is not there")
    if not scenes:
        raise DatasetError(f"{root}: scenes: none is named")
    return [by_name[name] for name in scenes]


def frame_files(scene: Path) -> list[Path]:
    """Frames of a scene in natural order.

    Raises:
        DatasetError: there are fewer than two.
    """
    try:
        found = list_frames(scene, leave_out=_NOT_FRAMES)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    if len(found) < 2:
        raise DatasetError(f"{scene}: expected at least two frames (1.bmp, ..), got {len(found)}")
    return found


def _is_frame(path: Path) -> bool:
    suffixes = (".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
    return path.stem.isdecimal() and path.suffix.lower() in suffixes


def _height_file(scene: Path, required: bool) -> Path | None:
    found = [scene / f"height{suffix}" for suffix in DEPTH_SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        raise DatasetError(f"{scene}: several height maps: {', '.join(p.name for p in found)}")
    if not found:
        return require_file(scene / "height.tif", "the height map") if required else None
    return found[0]


def _calibration(description: dict, source: Path, frames: int) -> tuple[str, np.ndarray]:
    unit = description.get("unit")
    if unit not in ("um", "frames"):
        raise DatasetError(f"{source}: unit: expected 'um' or 'frames', got {unit!r}")
    return unit, read_positions(description, "focus_positions", frames, source)
