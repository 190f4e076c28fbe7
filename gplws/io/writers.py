"""Writes the results of a reconstruction; never half of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from gplws.data.focal_stack import checked_length
from gplws.data.simulator import SimulatedStack
from gplws.files import new_file, new_folder_content, write_bytes
from gplws.io.arrays import as_numpy
from gplws.io.meshes import DEFAULT_MAX_FACES, MESH_FORMATS, encode_mesh, require_calibration
from gplws.io.pictures import preview_png
from gplws.io.surfaces import SURFACE_FORMATS, encode_surface, require_surface_package
from gplws.surface_texture import surface_texture

# Every file that save_reconstruction may write: overwriting removes these and no others.
RESULT_FILES = frozenset(
    {
        "height.tif",
        "depth_index.tif",
        "confidence.tif",
        "all_in_focus.png",
        "all_in_focus.tif",
        "preview.png",
        "info.json",
    }
    | {f"mesh.{kind}" for kind in MESH_FORMATS}
    | {f"height.{kind}" for kind in SURFACE_FORMATS}
)

# Likewise for save_simulation.
SIMULATION_FILES = frozenset(
    {
        "stack.tif",
        "frames/",
        "height.tif",
        "depth_index.tif",
        "all_in_focus.png",
        "info.json",
    }
)


class Reconstructed(Protocol):
    """What `save_reconstruction` needs of a result.

    Attributes:
        height: (H, W) float32, in ``units``, NaN where invalid.
        units: "um" or "frames".
        depth_index: (H, W) float32, frames, NaN where invalid.
        confidence: (H, W) float32 in 0..1; NaN where the method gives none.
        valid: (H, W) bool.
        all_in_focus: (H, W) or (H, W, 3), dtype of the source.
        pixel_size_um: side of a pixel, um, or None.
        metadata: versions, parameters and whatever else belongs into info.json.
    """

    @property
    def height(self) -> np.ndarray | Tensor: ...
    @property
    def units(self) -> str: ...
    @property
    def depth_index(self) -> np.ndarray | Tensor: ...
    @property
    def confidence(self) -> np.ndarray | Tensor: ...
    @property
    def valid(self) -> np.ndarray | Tensor: ...
    @property
    def all_in_focus(self) -> np.ndarray | Tensor: ...
    @property
    def pixel_size_um(self) -> float | None: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


def save_reconstruction(
    result: Reconstructed,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    mesh: str | Sequence[str] | None = None,
    surface: str | Sequence[str] | None = None,
    max_faces: int = DEFAULT_MAX_FACES,
) -> Path:
    """Writes a reconstruction into a folder, all of it or nothing.

    ``height.tif``, ``depth_index.tif`` and ``confidence.tif`` are 32-bit float TIFF with NaN where
    invalid (ImageJ reads the pixel size from them); ``all_in_focus.png`` has the source's 8 or 16
    bits (other dtypes: ``all_in_focus.tif``, floats in 32 bits); ``preview.png`` is the figure of
    `preview_figure`; ``info.json`` holds versions, parameters, units, statistics and the surface
    texture above the least squares plane (:mod:`gplws.surface_texture`); ``mesh.*``,
    ``height.gwy``, ``.sdf`` and ``.x3p`` are written on request.

    Args:
        result: the reconstruction; arrays or tensors.
        out_dir: folder to write; missing parents are created.
        overwrite: whether a folder with content is accepted. Its old results are replaced when
            the new ones are complete; other files in it stay.
        mesh: "ply", "stl", "glb", or several of them; see `write_mesh`.
        surface: "gwy" (Gwyddion), "sdf" (ISO 25178-71), "x3p" (ISO 25178-72), or several of them;
            see `write_surface`. The date of .sdf and .x3p is that of the result, so that the same
            result gives the same file.
        max_faces: see `write_mesh`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder has content and ``overwrite`` is False, or is a file.
        OSError: the disk is full or not writable; what was there before is unchanged.
        ValueError: a mesh or surface file is asked for without calibration, the latter without any
            known height, or arrays do not fit together.
        ModuleNotFoundError: the package that writes a surface file is not installed.
    """
    meshes, surfaces = mesh_kinds(mesh), surface_kinds(surface)
    units, pixel_size_um = result.units, result.pixel_size_um
    if units not in ("um", "frames"):
        raise ValueError(f"result.units must be 'um' or 'frames', got {units!r}")
    if meshes or surfaces:
        require_calibration(units, pixel_size_um, "a mesh" if meshes else "a surface file")
    height = as_numpy(result.height)
    valid = as_numpy(result.valid).astype(bool)
    depth_index, confidence = as_numpy(result.depth_index), as_numpy(result.confidence)
    image = as_numpy(result.all_in_focus)
    for name, array in (
        ("valid", valid),
        ("depth_index", depth_index),
        ("confidence", confidence),
        ("all_in_focus", image[..., 0] if image.ndim == 3 else image),
    ):
        if array.shape != height.shape:
            raise ValueError(f"result.{name} must be {height.shape} as height, got {array.shape}")

    folder = Path(out_dir)
    with new_folder_content(folder, RESULT_FILES, overwrite=overwrite) as part:

        def write(name: str, payload: bytes) -> None:
            write_bytes(part / name, payload)
            written.append(name)

        written: list[str] = []
        for name, array, unit in (
            ("height", height, units),
            ("depth_index", depth_index, "frames"),
            ("confidence", confidence, None),
        ):
            write(f"{name}.tif", encode_float_tiff(array, pixel_size_um, name, unit))
        write(*encode_all_in_focus(image, pixel_size_um))
        write(
            "preview.png",
            preview_png(height, image, units=units, pixel_size_um=pixel_size_um, valid=valid),
        )
        channels = {"All in focus": image, "Confidence": confidence}
        date = _date_of(result.metadata)
        for kind in surfaces:
            write(
                f"height.{kind}",
                encode_surface(kind, height, pixel_size_um, valid, images=channels, date=date),
            )
        for kind in meshes:
            write(
                f"mesh.{kind}",
                encode_mesh(kind, height, pixel_size_um, valid, texture=image, max_faces=max_faces),
            )
        info = {
            **result.metadata,
            "units": units,
            "pixel_size_um": pixel_size_um,
            "shape": list(height.shape),
            "statistics": height_statistics(height, valid),
            "surface_texture": {
                "form_removed": "plane",
                **surface_texture(
                    np.where(valid, height, np.nan), pixel_size_um if units == "um" else None
                ),
            },
            "files": sorted([*written, "info.json"]),
        }
        text = json.dumps(jsonable(info), indent=2, allow_nan=False, ensure_ascii=False)
        write("info.json", (text + "\n").encode())
    return folder


def save_simulation(
    stack: SimulatedStack,
    out_dir: str | Path,
    *,
    pixel_size_um: float,
    metadata: Mapping[str, Any] | None = None,
    frame_format: str = "tiff",
    overwrite: bool = False,
) -> Path:
    """Writes a simulated focal stack and its truth into a folder, all of it or nothing.

    The frames are ``stack.tif``, an ImageJ stack with z-step and pixel size, or ``frames/f000.png``
    and so on; ``height.tif`` (um) and ``depth_index.tif`` (frames, NaN out of the focus range) are
    the truth; ``all_in_focus.png`` is the scene without blur and noise; ``info.json`` holds focus
    positions (heights of the plane in focus, which need no ``z_direction``), z-step and
    ``z_direction`` (for use without positions), and ``metadata``. Frames tell of their distance
    only: what is reconstructed from them without positions counts from the first one, which lies
    at ``height_of_first_frame_um`` of ``info.json`` in the coordinates of ``height.tif``.

    Args:
        stack: gray frames, evenly spaced, uint8 or uint16.
        out_dir: folder to write; missing parents are created.
        pixel_size_um: side of a pixel, um.
        metadata: what else belongs into ``info.json``.
        frame_format: "tiff" or "png".
        overwrite: whether a folder with content is accepted, as in `save_reconstruction`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder has content and ``overwrite`` is False, or is a file.
        OSError: the disk is full or not writable; what was there before is unchanged.
        ValueError: an unknown format, or frames that are not gray.
        TypeError: frames of another dtype.
    """
    if frame_format not in ("tiff", "png"):
        raise ValueError(f"frame_format must be 'tiff' or 'png', got {frame_format!r}")
    frames = as_numpy(stack.frames)
    if frames.ndim != 3:
        raise ValueError(f"stack.frames must be (N, H, W), got {frames.shape}")
    if frames.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"stack.frames must be uint8 or uint16, got {frames.dtype}")
    top = int(np.iinfo(frames.dtype).max)
    image = (as_numpy(stack.all_in_focus) * top).round().astype(frames.dtype)
    positions_um = as_numpy(stack.focus_positions_um)
    z_step_um = float(np.abs(np.diff(positions_um)).mean())
    folder = Path(out_dir)
    with new_folder_content(folder, SIMULATION_FILES, overwrite=overwrite) as part:
        written = ["info.json"]

        def write(name: str, payload: bytes) -> None:
            write_bytes(part / name, payload)
            written.append(name)

        if frame_format == "tiff":
            write("stack.tif", _encode_stack(frames, pixel_size_um, z_step_um))
        else:
            (part / "frames").mkdir()
            digits = max(3, len(str(len(frames) - 1)))
            for index, frame in enumerate(frames):
                write(f"frames/f{index:0{digits}d}.png", encode_all_in_focus(frame, None)[1])
        for name, values, unit in (
            ("height", stack.height_um, "um"),
            ("depth_index", stack.depth_index, "frames"),
        ):
            payload = encode_float_tiff(as_numpy(values), pixel_size_um, name, unit)
            write(f"{name}.tif", payload)
        write(*encode_all_in_focus(image, pixel_size_um))
        info = {
            **(metadata or {}),
            "shape": list(frames.shape),
            "pixel_size_um": pixel_size_um,
            "z_step_um": z_step_um,
            "z_direction": "up" if positions_um[-1] > positions_um[0] else "down",
            "height_of_first_frame_um": positions_um[0],
            "focus_positions_um": positions_um,
            "files": sorted(written),
        }
        text = json.dumps(jsonable(info), indent=2, allow_nan=False, ensure_ascii=False)
        write_bytes(part / "info.json", (text + "\n").encode())
    return folder


def write_height_tiff(
    path: str | Path,
    height: np.ndarray,
    *,
    pixel_size_um: float | None = None,
    units: str = "um",
    overwrite: bool = False,
) -> None:
    """Writes a height map as 32-bit float TIFF; the file appears complete or not at all.

    The pixel size is stored as ImageJ does: resolution tags in pixels per um, and the unit in the
    description. NaN is kept.

    Args:
        path: file to write.
        height: (H, W), any real dtype; stored as float32.
        pixel_size_um: side of a pixel, um; None stores none.
        units: unit of the heights, "um" or "frames"; noted in the file.
        overwrite: whether an existing file is replaced.

    Raises:
        ValueError: ``height`` is not (H, W), or ``pixel_size_um`` is not positive.
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the file cannot be written; an existing one is unchanged.
    """
    with new_file(Path(path), overwrite=overwrite) as file:
        file.write(encode_float_tiff(as_numpy(height), pixel_size_um, "height", units))


def encode_float_tiff(
    values: np.ndarray, pixel_size_um: float | None, name: str, unit: str | None
) -> bytes:
    """Content of a 32-bit float TIFF file that ImageJ shows with its pixel size.

    Args:
        values: (H, W), any real dtype.
        pixel_size_um: side of a pixel, um, or None.
        name, unit: what the values are; noted in the file.

    Returns:
        The file.

    Raises:
        ValueError: ``values`` is not (H, W), or ``pixel_size_um`` is not positive.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must be (H, W) and not empty, got shape {values.shape}")
    note = name if unit is None else f"{name} in {unit}"
    return _encode_tiff(values.astype(np.float32), pixel_size_um, f"{note}; NaN: unknown")


def encode_all_in_focus(image: np.ndarray, pixel_size_um: float | None) -> tuple[str, bytes]:
    """File name and content for an all-in-focus image in the depth of its dtype.

    Args:
        image: (H, W) or (H, W, 3) RGB; uint8 and uint16 become PNG, other integers TIFF of the
            same dtype, floats 32-bit TIFF.
        pixel_size_um: side of a pixel, um, or None; stored in TIFF only.

    Returns:
        ``"all_in_focus.png"`` or ``"all_in_focus.tif"``, and the file.
    """
    if image.dtype in (np.uint8, np.uint16):
        import cv2

        bgr = image[..., ::-1] if image.ndim == 3 else image
        done, data = cv2.imencode(".png", np.ascontiguousarray(bgr))
        if not done:
            raise ValueError(f"all_in_focus of shape {image.shape} cannot be encoded as PNG")
        return "all_in_focus.png", data.tobytes()
    if image.dtype.kind == "f":
        image = image.astype(np.float32)
    return "all_in_focus.tif", _encode_tiff(image, pixel_size_um, "all in focus")


def mesh_kinds(mesh: str | Sequence[str] | None) -> tuple[str, ...]:
    """Formats of meshes, each once: "ply", "stl", "glb".

    Raises:
        ValueError: another format.
    """
    return _kinds("mesh", mesh, MESH_FORMATS)


def surface_kinds(surface: str | Sequence[str] | None) -> tuple[str, ...]:
    """Formats of surface files, each once: "gwy", "sdf", "x3p".

    Raises:
        ValueError: another format.
        ModuleNotFoundError: the package that writes one of them is not installed.
    """
    kinds = _kinds("surface", surface, SURFACE_FORMATS)
    for kind in kinds:
        require_surface_package(kind)
    return kinds


def _kinds(name: str, asked: str | Sequence[str] | None, formats: Sequence[str]) -> tuple[str, ...]:
    kinds = () if asked is None else (asked,) if isinstance(asked, str) else tuple(asked)
    normalized = tuple(dict.fromkeys(str(kind).lower().removeprefix(".") for kind in kinds))
    unknown = [kind for kind in normalized if kind not in formats]
    if unknown:
        raise ValueError(f"{name} must be among {', '.join(formats)}, got {unknown[0]!r}")
    return normalized


def _date_of(metadata: Mapping[str, Any]) -> datetime | None:
    """When a result was made, if its metadata say that."""
    try:
        return datetime.fromisoformat(str(metadata.get("date")))
    except ValueError:
        return None


def height_statistics(height: np.ndarray, valid: np.ndarray) -> dict[str, float | int | None]:
    """Share of valid pixels, and minimum, maximum, mean and deviation of their heights.

    Args:
        height: (H, W) float.
        valid: (H, W) bool; heights that are not finite never count.

    Returns:
        Numbers in the unit of ``height``; None where no pixel is valid.
    """
    known = height[valid & np.isfinite(height)].astype(np.float64)
    stats: dict[str, float | int | None] = {
        "valid_pixels": int(known.size),
        "valid_share": known.size / height.size,
    }
    empty = known.size == 0
    for name in ("min", "max", "mean", "std"):
        stats[f"height_{name}"] = None if empty else float(getattr(known, name)())
    return stats


def jsonable(value: Any) -> Any:
    """The value in types of strict JSON: numbers that are not finite become None.

    Dataclasses and mappings become objects, arrays and tensors lists, everything unknown its text.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        value = as_numpy(value)
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    return str(value)


def _encode_tiff(values: np.ndarray, pixel_size_um: float | None, note: str) -> bytes:
    import tifffile

    options: dict[str, Any] = {}
    metadata: dict[str, Any] = {"Info": note}
    if pixel_size_um is not None:
        per_um = 1.0 / checked_length(pixel_size_um, "pixel_size_um")
        options["resolution"] = (per_um, per_um)
        metadata |= {"unit": "um", "pixel_size_um": pixel_size_um}
    # The ImageJ layout knows no colour beyond 8 bits, few dtypes, and no files beyond 4 GiB.
    if values.ndim == 2 and values.dtype == np.float32 and values.nbytes < 2**32 - 2**25:
        options |= {"imagej": True, "metadata": metadata}
    else:
        options["description"] = note
        if pixel_size_um is not None:
            options["resolution"] = (1e4 * per_um, 1e4 * per_um)
            options["resolutionunit"] = "CENTIMETER"
    buffer = BytesIO()
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, values, photometric=photometric, **options)
    return buffer.getvalue()


def _encode_stack(frames: np.ndarray, pixel_size_um: float, z_step_um: float) -> bytes:
    """ImageJ TIFF of (N, H, W) frames, with the units that `read_stack` reads back."""
    import tifffile

    per_um = 1.0 / checked_length(pixel_size_um, "pixel_size_um")
    buffer = BytesIO()
    tifffile.imwrite(
        buffer,
        frames,
        imagej=True,
        resolution=(per_um, per_um),
        metadata={
            "axes": "ZYX",
            "spacing": z_step_um,
            "unit": "um",
            "pixel_size_um": pixel_size_um,  # a resolution of 1 means nothing to readers
        },
        photometric="minisblack",
    )
    return buffer.getvalue()
