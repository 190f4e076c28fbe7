"""Focal stacks rendered from Middlebury stereo scenes: a sharp image with its disparity."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from gplws.data import DepthSample
from gplws.data.simulator import render_focal_stack
from gplws.datasets.files import (
    DatasetError,
    DepthDataset,
    PathLike,
    depth_sample,
    existing_folder,
    load_image,
    read_arrays,
    read_depth_map,
    require_file,
    subfolders,
)

# The renderer's optics: with them one um of height blurs by _RADIUS_PER_UM pixels of 1 um, and the
# diffraction limit stays far below a pixel, as in a photograph.
_NUMERICAL_APERTURE = 0.5
_RADIUS_PER_UM = math.tan(math.asin(_NUMERICAL_APERTURE))
_WAVELENGTH_UM = 0.05


class MiddleburyPairs(DepthDataset):
    """Focal stacks of stereo scenes; depth is disparity in pixels, greater is nearer.

    ::

        root/SCENE/image.png   the left image
        root/SCENE/disp.npz    disp_px (H, W) float32, valid (H, W) bool
        or
        root/SCENE/im0.png, disp0.pfm   as of 2014; infinite: unknown

    A thin lens blurs a point by a disk whose radius is proportional to the difference between its
    disparity and that of the focal plane. So disparity takes the part of height in
    `gplws.data.render_focal_stack`, which also lets near things occlude what is behind them. Where
    the disparity is unknown, the scene is filled with the farther of the nearest known pixels to
    the left and right (unknown is mostly what the other view does not see, so background), and is
    not valid. Rendering takes seconds; the result is the same each time.

    Args:
        root: folder of the scenes, or one scene.
        frames: number of focus positions, evenly spaced over the disparities of the scene.
        max_blur_px: radius of the blur disk over the whole range of disparities.
        max_size: longer side of the rendered images, pixels; larger scenes are shrunk with their
            disparities. None: as they are.
        noise_electrons: electrons at full scale, for photon noise; None: no noise.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        DatasetError: no scene, or one without disparity.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        root: PathLike,
        *,
        frames: int = 15,
        max_blur_px: float = 8.0,
        max_size: int | None = 480,
        noise_electrons: float | None = None,
    ) -> None:
        if frames < 2:
            raise ValueError(f"frames: expected at least 2, got {frames}")
        if not 0 < max_blur_px < math.inf:
            raise ValueError(f"max_blur_px: expected a positive number, got {max_blur_px}")
        if max_size is not None and max_size < 16:
            raise ValueError(f"max_size: expected at least 16 or None, got {max_size}")
        folder = existing_folder(root)
        scenes = [path for path in (folder, *subfolders(folder)) if _files(path) is not None]
        if not scenes:
            raise DatasetError(f"{folder}: no scene with image.png and disp.npz (or im0, disp0)")
        self._scenes = scenes
        self._frames, self._max_blur_px = frames, max_blur_px
        self._max_size, self._noise = max_size, noise_electrons
        super().__init__([scene.name for scene in scenes])

    def _load(self, index: int) -> DepthSample:
        files = _files(self._scenes[index])
        assert files is not None
        image_file, disparity_file = files
        image = load_image(image_file).movedim(0, 2).numpy()  # (H, W, C)
        disparity = _read_disparity(require_file(disparity_file, "the disparity"))
        if disparity.shape != image.shape[:2]:
            raise DatasetError(
                f"{disparity_file}: expected {image.shape[:2]} pixels as {image_file.name}, got "
                f"{disparity.shape}"
            )
        image, disparity = _shrunk(image, disparity, self._max_size)
        known = np.isfinite(disparity)
        if not known.any():
            raise DatasetError(f"{disparity_file}: no pixel is valid")
        low, high = float(disparity[known].min()), float(disparity[known].max())
        if low == high:
            high = low + 1.0
        um_per_px = self._max_blur_px / _RADIUS_PER_UM / (high - low)
        positions = torch.linspace(low, high, self._frames)
        rendered = render_focal_stack(
            torch.from_numpy((fill_unknown(disparity) - low) * um_per_px).float(),
            torch.from_numpy(image[..., 0] if image.shape[2] == 1 else image),
            (positions - low) * um_per_px,
            pixel_size_um=1.0,
            numerical_aperture=_NUMERICAL_APERTURE,
            wavelength_um=_WAVELENGTH_UM,
            full_well_electrons=self._noise,
            bit_depth=None,
        )
        frames = rendered.frames  # (N, H, W) or (N, H, W, 3)
        return depth_sample(
            (frames[None] if frames.dim() == 3 else frames.movedim(3, 0)).contiguous(),
            disparity,
            positions,
            unit="px",
            name=self.names[index],
            source=disparity_file,
            all_in_focus=torch.from_numpy(image).movedim(2, 0).contiguous(),
        )


def fill_unknown(disparity: np.ndarray) -> np.ndarray:
    """Disparity with every gap of a row closed by the smaller of its two ends.

    Rows without any known pixel take the values of the nearest row that has some.

    Args:
        disparity: (H, W) float, NaN where unknown; at least one pixel is known.

    Returns:
        (H, W) float32 without NaN.
    """
    known = np.isfinite(disparity)
    columns = np.arange(disparity.shape[1])
    left = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    right = np.minimum.accumulate(np.where(known, columns, len(columns))[:, ::-1], axis=1)[:, ::-1]
    rows = np.arange(disparity.shape[0])[:, None]
    far = np.float32(np.inf)
    from_left = np.where(left >= 0, disparity[rows, left.clip(0)], far)
    from_right = np.where(
        right < len(columns), disparity[rows, right.clip(max=len(columns) - 1)], far
    )
    filled = np.minimum(from_left, from_right)
    with_some = np.flatnonzero(known.any(axis=1))
    nearest = with_some[np.abs(rows - with_some).argmin(axis=1)]
    return filled[nearest].astype(np.float32)


def _files(scene: Path) -> tuple[Path, Path] | None:
    for image, disparity in (("image.png", "disp.npz"), ("im0.png", "disp0.pfm")):
        if (scene / image).is_file():
            return scene / image, scene / disparity
    return None


def _read_disparity(path: Path) -> np.ndarray:
    """Disparity (H, W) float32, NaN where unknown."""
    if path.suffix == ".pfm":
        values = read_depth_map(path)
        return np.where(np.isfinite(values), values, np.float32(np.nan))
    values, valid = read_arrays(path, "disp_px", "valid")
    if values.ndim != 2 or valid.shape != values.shape:
        raise DatasetError(f"{path}: disp_px {values.shape} and valid {valid.shape} do not fit")
    usable = valid.astype(bool) & np.isfinite(values)
    return np.where(usable, values, np.nan).astype(np.float32)


def _shrunk(
    image: np.ndarray, disparity: np.ndarray, max_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    height, width = disparity.shape
    if max_size is None or max(height, width) <= max_size:
        return image, disparity
    import cv2

    factor = max_size / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    small = small[..., None] if small.ndim == 2 else small
    # Averaging disparities would invent depths between an edge's two sides.
    nearest = cv2.resize(disparity, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return small.clip(0, 1), nearest * np.float32(size[0] / width)
