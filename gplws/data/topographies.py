"""Measured surfaces and pictures from files, made ready to be drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gplws.data.randomness import Draw
from gplws.data.surfaces import Shape, Surface, unit_range

TOPOGRAPHY_SUFFIXES = (".npz", ".npy", ".tif", ".tiff", ".png")
TEXTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

_BAND = 64  # rows of a map that are worked on at a time


@dataclass(frozen=True, eq=False)
class Topography:
    """A measured surface without holes.

    Attributes:
        height_um: (H, W) float32, finite; um, or arbitrary where the source has no unit.
        pixel_size_um: (row pitch, column pitch), um; None where the source does not say.
        name: for messages.
    """

    height_um: Tensor
    pixel_size_um: tuple[float, float] | None
    name: str

    def resampled(self, pixel_size_um: float) -> Tensor:
        """Heights on square pixels of another size, (H, W).

        Raises:
            ValueError: the pitch is unknown, or less than 8 x 8 pixels are left.
        """
        if self.pixel_size_um is None:
            raise ValueError(f"{self.name}: its pixel size is unknown, so it cannot be resampled")
        rows, columns = (
            round(n * pitch / pixel_size_um)
            for n, pitch in zip(self.height_um.shape, self.pixel_size_um, strict=True)
        )
        if min(rows, columns) < 8:
            raise ValueError(
                f"{self.name}: {rows} x {columns} pixels of {pixel_size_um} um; expected at least "
                "8 x 8, use smaller pixels"
            )
        return _resized(self.height_um, (rows, columns))


def read_topography(path: str | Path, *, level: int = 1) -> Topography:
    """A height map from a file: holes filled, form removed.

    Reads ``.npz`` with ``h_um`` and optionally ``valid``, ``dx_um`` and ``dy_um``; ``.npy``; float
    or integer TIFF and PNG (one channel). NaN counts as a hole.

    Args:
        path: the file.
        level: form to subtract: 0 nothing but the mean, 1 a plane, 2 a quadratic surface.

    Raises:
        ValueError: not a height map, damaged, a pitch that is not positive, or fewer than half of
            its points are valid; the message names the file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    heights, valid, pitch = _read_heights(path)
    if heights.ndim != 2 or min(heights.shape) < 8:
        raise ValueError(f"{path}: expected a height map of 8 x 8 or more, got {heights.shape}")
    valid &= np.isfinite(heights)
    if valid.mean() < 0.5:
        raise ValueError(f"{path}: only {100 * valid.mean():.0f}% of the heights are valid")
    height = torch.from_numpy(fill_holes(level_heights(heights, valid, level), valid))
    return Topography(height.float(), pitch, path.name)


def read_topographies(paths: Iterable[str | Path], *, level: int = 1) -> list[Topography]:
    """All height maps of some files and folders, sorted by path; see `read_topography`."""
    return [
        read_topography(path, level=level)
        for path in _files(paths, TOPOGRAPHY_SUFFIXES, "topographies")
    ]


def read_textures(paths: Iterable[str | Path]) -> list[Tensor]:
    """Pictures of some files and folders, sorted by path.

    Returns:
        One (3, H, W) tensor in 0..1 for each.

    Raises:
        ValueError: a file that is not a picture.
        FileNotFoundError: no such file, or a folder without any.
    """
    import cv2

    pictures = []
    for path in _files(paths, TEXTURE_SUFFIXES, "textures"):
        picture = _decoded(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        if picture is None or picture.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"{path}: expected a picture of 8 or 16 bits")
        scale = 255 if picture.dtype == np.uint8 else 65535
        rgb = np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1), np.float32) / scale
        pictures.append(torch.from_numpy(rgb))
    return pictures


def level_heights(heights: np.ndarray, valid: np.ndarray, degree: int) -> np.ndarray:
    """Heights minus the polynomial surface that fits their valid points best.

    Args:
        heights: (H, W).
        valid: (H, W) bool; the others do not count and come out as they are, minus the surface.
        degree: 0 mean, 1 plane, 2 quadratic.

    Raises:
        ValueError: another degree.
    """
    if degree not in (0, 1, 2):
        raise ValueError(f"level: expected 0, 1 or 2, got {degree}")
    powers = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
    # From -1 to 1 where heights are known: over the whole map the terms of a patch were all alike.
    y = _from_minus_1_to_1(np.any(valid, 1))[:, None]
    x = _from_minus_1_to_1(np.any(valid, 0))[None]
    bands = [slice(first, first + _BAND) for first in range(0, len(heights), _BAND)]

    def terms(rows: slice) -> np.ndarray:
        return np.stack([y[rows] ** i * x**j for i, j in powers])

    # Normal equations, band by band: the terms of all points would be several times the map.
    offset = heights.mean(where=valid, dtype=np.float64) if valid.any() else 0.0
    moments, projections = np.zeros((len(powers), len(powers))), np.zeros(len(powers))
    for rows in bands:
        basis = terms(rows)[:, valid[rows]]
        moments += basis @ basis.T
        projections += basis @ (heights[rows][valid[rows]] - offset)
    # Fewer points than terms, or points of one line: the smallest solution.
    solution = np.linalg.lstsq(moments, projections, rcond=1e-12)[0]
    surfaces = [np.tensordot(solution, terms(rows), 1) for rows in bands]
    return heights - (offset + np.concatenate(surfaces))


def _from_minus_1_to_1(known: np.ndarray) -> np.ndarray:
    """Coordinates of an axis (n,) that are -1 and 1 at the first and the last place known."""
    places = np.flatnonzero(known)
    if not places.size:
        return np.zeros(known.size)
    middle, half = (places[0] + places[-1]) / 2, max((places[-1] - places[0]) / 2, 0.5)
    return (np.arange(known.size) - middle) / half


def fill_holes(heights: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Heights (H, W) whose invalid points continue their surroundings smoothly.

    Each hole is filled from ever coarser means of the valid points, the finest that reaches it.

    Raises:
        ValueError: no point is valid.
    """
    if not valid.any():
        raise ValueError("valid: expected at least one valid point")
    if valid.all():
        return heights.astype(np.float64)
    weight = torch.from_numpy(valid.astype(np.float64))[None, None]
    known = torch.from_numpy(np.where(valid, heights, 0.0))[None, None]
    size = (heights.shape[0], heights.shape[1])
    levels = []
    while True:
        levels.append((known, weight))
        if max(weight.shape[-2:]) == 1:
            break
        known, weight = (F.avg_pool2d(part, 2, ceil_mode=True) for part in (known, weight))
    filled = levels[-1][0] / levels[-1][1].clamp(min=1e-300)
    for known, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, known.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, known / weight.clamp(min=1e-300), coarse)
    return filled.view(size).numpy()


def draw_topography(topography: Topography, shape: Shape, draw: Draw) -> Surface:
    """A random part of a measured surface, turned, mirrored and zoomed; heights scaled to 0..1."""
    height = draw_part(topography.height_um[None], shape, draw)[0]
    # A handful of outliers of the instrument must not flatten all the rest.
    flat = height.flatten()
    low, high = (float(torch.quantile(flat, share)) for share in (0.001, 0.999))
    height = unit_range(height.clamp(low, high))
    return Surface(height, (height > float(height.median())).float())


def draw_part(image: Tensor, shape: Shape, draw: Draw) -> Tensor:
    """A random part of ``image`` (C, H, W), turned, mirrored and zoomed to ``shape``.

    Borders are mirrored where the part reaches beyond them. Zooming out averages, so that no detail
    is aliased.
    """
    rows, columns = image.shape[-2:]
    # Pixels of the image per pixel of the result: a finer scale only as far as there is detail.
    most = min(rows / shape[0], columns / shape[1])
    zoom = draw.log_uniform(0.5, max(0.5001, min(most, 4.0)))
    angle = draw.angle()
    mirror = -1.0 if draw.chance(0.5) else 1.0
    place = [
        draw.uniform(0.5 * n * zoom, size - 0.5 * n * zoom) if n * zoom < size else size / 2
        for n, size in zip(shape, (rows, columns), strict=True)
    ]
    shrink = int(zoom) if zoom >= 2 else 1
    source = image.to(draw.device)[None]
    if shrink > 1:
        source = F.avg_pool2d(source, shrink)
    y = torch.arange(shape[0], dtype=torch.float32, device=draw.device) - (shape[0] - 1) / 2
    x = mirror * (
        torch.arange(shape[1], dtype=torch.float32, device=draw.device) - (shape[1] - 1) / 2
    )
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    down = place[0] + cos * y[:, None] + sin * x[None]
    right = place[1] - sin * y[:, None] + cos * x[None]
    grid = torch.stack([2 * right / columns - 1, 2 * down / rows - 1], -1)[None]
    part = F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
    return part[0]


def _read_heights(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, float] | None]:
    """Heights, where they are valid, and the pitch of rows and columns."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() not in TOPOGRAPHY_SUFFIXES:
        raise ValueError(f"{path}: expected one of {', '.join(TOPOGRAPHY_SUFFIXES)}")
    try:
        arrays = _arrays(path)
    except Exception as error:  # each library has its own kinds for damaged files
        raise ValueError(f"{path}: no readable height map: {error}") from error
    heights = arrays["h_um"]
    valid = arrays.get("valid", np.ones(heights.shape, bool)).astype(bool)
    if valid.shape != heights.shape:
        raise ValueError(f"{path}: valid is {valid.shape}, h_um is {heights.shape}")
    return heights, valid, _pitch(path, arrays)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of `read_topography` that a file holds; ``h_um`` is float64, and always there."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        with np.load(path) as data:
            if "h_um" not in data:
                raise ValueError(f"expected an array h_um, got {', '.join(data.files)}")
            heights = data["h_um"].astype(np.float64)
            others = {name: data[name] for name in ("valid", "dx_um", "dy_um") if name in data}
        return {"h_um": heights, **others}
    if suffix == ".npy":
        heights = np.load(path)
    elif suffix == ".png":
        import cv2

        heights = _decoded(path, cv2.IMREAD_UNCHANGED)
        if heights is None:
            raise ValueError("OpenCV finds no picture in it")
    else:
        import tifffile

        heights = tifffile.imread(path)
    heights = np.asarray(heights)
    if heights.ndim == 3 and heights.shape[-1] in (3, 4):
        red, green, blue = np.moveaxis(heights[..., :3], -1, 0)
        if not (np.array_equal(red, green) and np.array_equal(green, blue)):
            raise ValueError("expected one value a pixel, got a colour picture")
        heights = red  # a gray picture that was saved as RGB
    return {"h_um": heights.squeeze().astype(np.float64)}


def _pitch(path: Path, arrays: dict[str, np.ndarray]) -> tuple[float, float] | None:
    """Pitch of rows and columns, um, one alone that of both; None where the file does not say."""
    if not arrays.keys() & {"dx_um", "dy_um"}:
        return None
    pitch = {}
    for name, other in (("dx_um", "dy_um"), ("dy_um", "dx_um")):
        value = arrays[name if name in arrays else other]
        if value.size != 1 or value.dtype.kind not in "iuf" or not 0 < value.item() < math.inf:
            raise ValueError(f"{path}: {name}: expected one positive number, got {value}")
        pitch[name] = float(value.item())
    return pitch["dy_um"], pitch["dx_um"]


def _decoded(path: Path, flags: int) -> np.ndarray | None:
    """The picture in a file, None where there is none."""
    import cv2

    data = np.frombuffer(path.read_bytes(), np.uint8)
    return cv2.imdecode(data, flags) if data.size else None  # OpenCV raises where there is no byte


def _files(paths: Iterable[str | Path], suffixes: Sequence[str], what: str) -> list[Path]:
    if isinstance(paths, str | Path):
        paths = [paths]
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            if not inside:
                raise FileNotFoundError(f"{path}: no {what} in it ({', '.join(suffixes)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    return found


def _resized(height: Tensor, shape: Shape) -> Tensor:
    """Heights (H, W) on another grid, averaged where it is coarser."""
    return F.interpolate(height[None, None], shape, mode="bilinear", antialias=True)[0, 0]
