"""FlyingThings3D and Middlebury focal stacks as published with AiFDepthNet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gplws.data import DepthSample
from gplws.datasets.files import (
    DatasetError,
    DepthDataset,
    PathLike,
    depth_sample,
    existing_folder,
    load_frames,
    load_image,
    natural_key,
    read_depth_map,
    require_file,
)

# Frames of a published stack, evenly spaced in disparity.
_FRAMES = 15
_DISPARITY_NAMES = ("disp.exr", "disp.pfm")


class _Scene(NamedTuple):
    name: str
    frames: list[Path]
    disparity: Path
    all_in_focus: Path | None


class _DisparityStacks(DepthDataset):
    """Scene folders, or a list of their files; depth is disparity in pixels."""

    def __init__(
        self, root: PathLike, list_file: PathLike | None, disparity_range: tuple[float, float]
    ) -> None:
        folder = existing_folder(root)
        if list_file is None:
            found = [path for name in _DISPARITY_NAMES for path in folder.rglob(name)]
            found.sort(key=lambda path: natural_key(str(path)))
            self._scenes = [_scene_of_folder(path) for path in found]
            if not found:
                raise DatasetError(f"{folder}: no scene with {' or '.join(_DISPARITY_NAMES)}")
        else:
            self._scenes = _listed_scenes(Path(list_file), folder)
        self._range = disparity_range
        super().__init__([scene.name for scene in self._scenes])

    def _load(self, index: int) -> DepthSample:
        scene = self._scenes[index]
        numbers = [_number(path) for path in scene.frames]
        if any(number is None for number in numbers):
            positions = np.linspace(*self._range, len(numbers))
        else:
            positions = np.array(numbers, np.float64)
        disparity = read_depth_map(scene.disparity)
        image = None if scene.all_in_focus is None else load_image(scene.all_in_focus)
        return depth_sample(
            load_frames(scene.frames),
            np.where(disparity > 0, disparity, np.nan),
            positions,
            unit="px",
            name=scene.name,
            source=scene.disparity,
            all_in_focus=image,
        )


class FlyingThings3DStacks(_DisparityStacks):
    """Focal stacks rendered from FlyingThings3D, 15 frames focused at disparities 10 to 100.

    ::

        root/.../SCENE/10.png, 16.43.png, ..   frames, called by the disparity they are focused at
        root/.../SCENE/AiF.png                 the image without blur
        root/.../SCENE/disp.exr                disparity in pixels; 0 and below: unknown
        root/train/focal_stack_path.txt        a list: 15 frames, .., the disparity map, a line each

    Pictures beside frames that are called by numbers are no frames. Where no name is a number, the
    15 pictures are taken in natural order (in the order of the list), evenly spaced between the
    disparities above.

    Args:
        root: folder of the scenes.
        list_file: the list of a split; paths in it may be those of another machine: as many of
            their last parts as possible are looked up below ``root`` and beside the list, the same
            number of first parts left out of all paths. None: every folder below ``root`` with a
            disparity map.

    Raises:
        FileNotFoundError: ``root`` or the list does not exist.
        DatasetError: no scene, or a file of the list is missing.

    Source: Wang et al., "Bridging unsupervised and supervised depth from focus via all-in-focus
    supervision", ICCV 2021, arXiv:2108.10843; lists and focus positions: the repository
    albert100121/AiFDepthNet. The archive itself was not at hand: file names are as readers of it
    use them.
    """

    def __init__(self, root: PathLike, list_file: PathLike | None = None) -> None:
        super().__init__(root, list_file, (10.0, 100.0))


class MiddleburyStacks(_DisparityStacks):
    """Focal stacks rendered from Middlebury stereo scenes, 15 frames at disparities 10 to 60.

    Layout, arguments, errors and source as of `FlyingThings3DStacks`; the list is
    ``Middlebury_path.txt``.
    """

    def __init__(self, root: PathLike, list_file: PathLike | None = None) -> None:
        super().__init__(root, list_file, (10.0, 60.0))


def _number(path: Path) -> float | None:
    try:
        value = float(path.stem)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scene_of_folder(disparity: Path) -> _Scene:
    folder = disparity.parent
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg")]
    frames = [path for path in pictures if path.stem.lower() != "aif"]
    numbered = [path for path in frames if _number(path) is not None]
    if not numbered and len(frames) != _FRAMES:
        raise DatasetError(
            f"{folder}: expected frames called by their disparity, or {_FRAMES}, got {len(frames)} "
            "with other names"
        )
    frames = numbered or frames
    if len(frames) < 2:
        raise DatasetError(f"{folder}: expected at least two frames, got {len(frames)}")
    frames.sort(key=lambda path: (_number(path) or 0.0, natural_key(path.name)))
    image = next((path for path in pictures if path.stem.lower() == "aif"), None)
    return _Scene(folder.name, frames, disparity, image)


def _listed_scenes(list_file: Path, root: Path) -> list[_Scene]:
    if not list_file.is_file():
        raise FileNotFoundError(f"list_file: no such file: {list_file}")
    scenes = []
    locate = _Locator(root, list_file.parent)
    for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), start=1):
        entries = line.split()
        if not entries:
            continue
        where = f"{list_file}, line {number}"
        if len(entries) not in (_FRAMES + 1, _FRAMES + 2):
            raise DatasetError(
                f"{where}: expected {_FRAMES} frames, perhaps an all-in-focus image, and a "
                f"disparity map, got {len(entries)} paths"
            )
        paths = [locate(entry, where) for entry in entries]
        image = paths[_FRAMES] if len(paths) == _FRAMES + 2 else None
        if image is None and (paths[-1].parent / "AiF.png").is_file():
            image = paths[-1].parent / "AiF.png"
        scenes.append(_Scene(paths[-1].parent.name, paths[:_FRAMES], paths[-1], image))
    if not scenes:
        raise DatasetError(f"{list_file}: the list is empty")
    return scenes


class _Locator:
    """Finds the files of a list that may have been written on another machine.

    The first of them decides which folder and how many of the first parts of its path stand for the
    same place; all others have the same first parts, so that no file of another scene or split is
    taken for one that is missing.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._place: tuple[list[str], Path] | None = None

    def __call__(self, entry: str, where: str) -> Path:
        parts = [part for part in entry.replace("\\", "/").split("/") if part not in ("", ".")]
        if self._place is None:
            places = ((parts[:n], folder) for n in range(len(parts)) for folder in self._folders)
            self._place = next(
                (place for place in places if place[1].joinpath(*parts[len(place[0]) :]).is_file()),
                None,
            )
        purpose = f"named in {where}"
        if self._place is None:
            return require_file(Path(entry), purpose)
        dropped, folder = self._place
        if parts[: len(dropped)] != dropped:
            raise DatasetError(
                f"{where}: {entry} does not begin with {'/'.join(dropped)}, as the paths before it"
            )
        return require_file(folder.joinpath(*parts[len(dropped) :]), purpose)
