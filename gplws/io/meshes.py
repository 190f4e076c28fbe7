"""Height maps as triangle meshes: PLY, STL, GLB."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
from torch import Tensor

from gplws.data.focal_stack import checked_length
from gplws.files import kind_of, new_file
from gplws.io.arrays import as_numpy
from gplws.io.pictures import display_uint8

_logger = logging.getLogger(__name__)

MESH_FORMATS = ("ply", "stl", "glb")
DEFAULT_MAX_FACES = 2_000_000


def write_mesh(
    path: str | Path,
    height_um: np.ndarray | Tensor,
    pixel_size_um: float | None,
    valid: np.ndarray | Tensor | None = None,
    *,
    texture: np.ndarray | Tensor | None = None,
    units: str = "um",
    max_faces: int = DEFAULT_MAX_FACES,
    overwrite: bool = False,
) -> None:
    """Writes a height map as triangle mesh; the file appears complete or not at all.

    Vertices are in um: x to the right, y up in the picture (its bottom row is y = 0, its top row
    has the largest y), z = height. Normals point to +z. Pixels without a height leave holes. GLB
    viewers take the numbers for metres.

    Args:
        path: file ending in .ply, .stl or .glb (all binary).
        height_um: (H, W) float, um, NaN where unknown; H, W >= 2.
        pixel_size_um: side of a pixel, um.
        valid: (H, W) bool; False leaves a hole.
        texture: (H, W) or (H, W, 3) image for the colours of the vertices, not for STL.
        units: unit of the heights; anything but ``"um"`` is refused.
        max_faces: larger grids keep every second, third, ... row and column.
        overwrite: whether an existing file is replaced.

    Raises:
        ValueError: heights are in frames, the pixel size is unknown, shapes differ, the suffix is
            unknown, or no triangle is left.
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the file cannot be written; an existing one is unchanged.
    """
    target = Path(path)
    kind = kind_of(target, MESH_FORMATS)
    with new_file(target, overwrite=overwrite) as file:
        mesh = encode_mesh(
            kind,
            height_um,
            pixel_size_um,
            valid,
            texture=texture,
            units=units,
            max_faces=max_faces,
        )
        file.write(mesh)


def encode_mesh(
    kind: str,
    height_um: np.ndarray | Tensor,
    pixel_size_um: float | None,
    valid: np.ndarray | Tensor | None = None,
    *,
    texture: np.ndarray | Tensor | None = None,
    units: str = "um",
    max_faces: int = DEFAULT_MAX_FACES,
) -> bytes:
    """Content of the file that `write_mesh` writes; ``kind`` is "ply", "stl" or "glb"."""
    import trimesh

    size = require_calibration(units, pixel_size_um)
    height_um = as_numpy(height_um)
    valid = None if valid is None else as_numpy(valid)
    texture = None if texture is None else as_numpy(texture)
    vertices, faces, rows, columns = triangulate(height_um, size, valid, max_faces=max_faces)
    colors = None
    if texture is not None and kind != "stl":
        if texture.shape[:2] != height_um.shape or texture.ndim not in (2, 3):
            raise ValueError(
                f"texture must be {height_um.shape} or {(*height_um.shape, 3)}, "
                f"got shape {texture.shape}"
            )
        colors = display_uint8(texture)[rows, columns]
        if colors.ndim == 1:
            colors = np.repeat(colors[:, None], 3, axis=1)
        if kind == "glb":
            colors = _linear_light(colors)
    mesh = trimesh.Trimesh(vertices=vertices, faces=faces, vertex_colors=colors, process=False)
    data = mesh.export(file_type=kind)
    return data if isinstance(data, bytes) else str(data).encode()


def require_calibration(units: str, pixel_size_um: float | None, what: str = "a mesh") -> float:
    """Pixel size of a mesh, or of another file with lengths, in um.

    Raises:
        ValueError: heights are not in um, or the pixel size is unknown.
    """
    if units != "um":
        raise ValueError(
            f"{what} needs heights in um, got {units!r}: pass z_step_um or focus_positions_um"
        )
    if pixel_size_um is None:
        raise ValueError(f"{what} needs the size of a pixel: pass pixel_size_um")
    return checked_length(pixel_size_um, "pixel_size_um")


def require_max_faces(max_faces: int) -> None:
    """Raise ValueError where not even one pair of triangles is allowed."""
    if max_faces < 2:
        raise ValueError(f"max_faces must be at least 2, got {max_faces}")


def known_heights(height_um: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """(H, W) bool: heights that are finite and, where that is told, valid.

    Raises:
        ValueError: ``valid`` has another shape.
    """
    known = np.isfinite(height_um)
    if valid is not None:
        if valid.shape != height_um.shape:
            raise ValueError(f"valid must have shape {height_um.shape}, got {valid.shape}")
        known &= valid.astype(bool)
    return known


def triangulate(
    height_um: np.ndarray,
    pixel_size_um: float,
    valid: np.ndarray | None = None,
    *,
    max_faces: int = DEFAULT_MAX_FACES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Triangles between neighbouring pixels with known heights.

    Args:
        height_um: (H, W) float, um, NaN where unknown.
        pixel_size_um: side of a pixel, um.
        valid: (H, W) bool; False counts as unknown.
        max_faces: the grid is thinned until it has no more triangles than this.

    Returns:
        vertices: (V, 3) float64, um, see `write_mesh` for the axes.
        faces: (F, 3) int64, counterclockwise seen from +z.
        rows, columns: (V,) int64, pixel of each vertex.

    Raises:
        ValueError: shapes are wrong, or no triangle is left.
    """
    if height_um.ndim != 2 or min(height_um.shape) < 2:
        raise ValueError(f"height_um must be (H, W) with H, W >= 2, got shape {height_um.shape}")
    require_max_faces(max_faces)
    known = known_heights(height_um, valid)
    step = _stride(height_um.shape, max_faces)
    if step > 1:
        _logger.warning(
            "mesh: every %d. row and column of %d x %d pixels kept to stay below %d faces "
            "(max_faces)",
            step,
            height_um.shape[1],
            height_um.shape[0],
            max_faces,
        )
    known = known[::step, ::step]
    number = np.arange(known.size).reshape(known.shape)
    top_left, top_right = number[:-1, :-1], number[:-1, 1:]
    bottom_left, bottom_right = number[1:, :-1], number[1:, 1:]
    faces = np.concatenate(
        [
            np.stack([top_left, bottom_left, top_right], axis=-1).reshape(-1, 3),
            np.stack([top_right, bottom_left, bottom_right], axis=-1).reshape(-1, 3),
        ]
    )
    faces = faces[known.ravel()[faces].all(axis=1)]
    if len(faces) == 0:
        raise ValueError("no triangle is left: the height map has no three valid neighbours")
    used = np.zeros(known.size, bool)
    used[faces] = True
    renumber = np.cumsum(used) - 1
    rows, columns = (index * step for index in np.divmod(np.flatnonzero(used), known.shape[1]))
    vertices = np.stack(
        [
            columns * pixel_size_um,
            (height_um.shape[0] - 1 - rows) * pixel_size_um,
            height_um[rows, columns],
        ],
        axis=1,
    )
    return vertices, renumber[faces], rows, columns


def _stride(shape: tuple[int, ...], max_faces: int) -> int:
    step = 1
    while 2 * math.prod((n - 1) // step for n in shape) > max_faces:
        step += 1
    return step


def _linear_light(colors: np.ndarray) -> np.ndarray:
    """sRGB values as linear light, which glTF 2.0 demands of vertex colours (section 3.7.2.1)."""
    levels = np.arange(256) / 255.0
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return (linear * 255 + 0.5).astype(np.uint8)[colors]
