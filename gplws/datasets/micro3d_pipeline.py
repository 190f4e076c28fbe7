"""Builds scenes like those of Micro 3D: a focal stack with a height map fused from two sources.

The stack gives depth at every textured pixel, coarsely; an instrument that scans point by point
(a confocal or laser microscope) gives exact heights, in a place, pixel size and tilt of its own,
with holes at steep walls. The measured map is registered to the depth of the stack, the two are
fused, and a scene folder is written that `Micro3D` reads.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from io import BytesIO
from os import PathLike as OsPath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gplws.data import FocalStack
from gplws.data.focal_stack import checked_length
from gplws.datasets.files import read_depth_map
from gplws.datasets.registration import Registration, align_height_map, register_height_map
from gplws.files import new_folder_content, require_free_folder, write_bytes
from gplws.io.pictures import display_uint8, robust_limits
from gplws.io.readers import StackSource, read_stack
from gplws.io.writers import encode_float_tiff, jsonable
from gplws.reconstruct import Reconstruction, reconstruct

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

# Values of the source map.
UNKNOWN, FROM_STACK, MEASURED = 0, 1, 2

_RESULTS = ("height.tif", "valid.png", "source.png", "review.png", "scene.json")
_MISSING = "#d9d9d9"


@dataclass(frozen=True, eq=False)
class FusedHeights:
    """A height map from two sources.

    Attributes:
        height_um: (H, W) float32, NaN where neither source knows.
        valid: (H, W) bool.
        source: (H, W) uint8: 0 unknown, 1 from the stack, 2 measured.
    """

    height_um: NDArray[np.float32]
    valid: NDArray[np.bool_]
    source: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Micro3DScene:
    """What `build_micro3d_scene` made.

    Attributes:
        folder: the scene folder.
        fused: the height map with its mask and sources.
        aligned_um: (H, W) float32, the measured map where it was registered to, NaN elsewhere.
        stack_um: (H, W) float32, heights from the stack alone, NaN where invalid.
        registration: where the measured map lies.
    """

    folder: Path
    fused: FusedHeights
    aligned_um: NDArray[np.float32]
    stack_um: NDArray[np.float32]
    registration: Registration


def fuse_heights(
    stack_um: NDArray[np.floating],
    aligned_um: NDArray[np.floating],
    *,
    confidence: NDArray[np.floating] | None = None,
    least_confidence: float = 0.0,
) -> FusedHeights:
    """Measured heights where there are any, those of the stack elsewhere.

    Args:
        stack_um: (H, W) heights from the stack, um, NaN where unknown.
        aligned_um: (H, W) measured heights, registered to the stack, um, NaN where unknown.
        confidence: (H, W) of the heights from the stack, 0..1.
        least_confidence: heights from the stack below it are left out.

    Returns:
        The fused map.

    Raises:
        ValueError: shapes that differ, or ``least_confidence`` outside 0..1 or without
            ``confidence``.
    """
    if stack_um.ndim != 2 or aligned_um.shape != stack_um.shape:
        raise ValueError(
            f"aligned_um: expected {stack_um.shape} as stack_um, got {aligned_um.shape}"
        )
    if not 0 <= least_confidence <= 1:
        raise ValueError(f"least_confidence: expected 0..1, got {least_confidence}")
    usable = np.isfinite(stack_um)
    if confidence is not None:
        if confidence.shape != stack_um.shape:
            raise ValueError(f"confidence: expected {stack_um.shape}, got {confidence.shape}")
        usable &= confidence >= least_confidence
    elif least_confidence > 0:
        raise ValueError("least_confidence: needs confidence")
    measured = np.isfinite(aligned_um)
    source = np.where(measured, MEASURED, np.where(usable, FROM_STACK, UNKNOWN)).astype(np.uint8)
    height = np.where(measured, aligned_um, np.where(usable, stack_um, np.nan))
    return FusedHeights(height.astype(np.float32), source != UNKNOWN, source)


def build_micro3d_scene(
    stack: StackSource,
    measured_um: NDArray[np.floating] | str | OsPath[str],
    out_dir: str | OsPath[str],
    *,
    measured_pixel_um: float,
    pixel_size_um: float | None = None,
    z_step_um: float | None = None,
    focus_positions_um: NDArray[np.floating] | list[float] | None = None,
    z_direction: Literal["up", "down"] = "up",
    method: str = "auto",
    max_rotation_deg: float = 15.0,
    least_confidence: float = 0.0,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> Micro3DScene:
    """A scene folder from a focal stack and a measured height map of the same place.

    1. Initial depth: `gplws.reconstruct` of the stack.
    2. Registration of the measured map to it: `register_height_map`.
    3. Fusion: `fuse_heights`.
    4. The folder, complete or not at all: the frames as ``1.bmp``, ``2.bmp``, .. (``.tif`` where
       they have more than 8 bits; floats in 0..1), ``height.tif`` in um, ``valid.png``,
       ``source.png`` (0 unknown, 127 from the stack, 255 measured), ``scene.json`` (calibration,
       registration, shares) and ``review.png`` for the eye, which has the last word.

    Args:
        stack: anything that `gplws.io.read_stack` reads.
        measured_um: (h, w) measured heights, um, up is positive, NaN where unknown; or a file, see
            `read_depth_map`.
        out_dir: folder of the scene; missing parents are created.
        measured_pixel_um: side of a pixel of the measured map, um.
        pixel_size_um: side of a pixel of the stack on the object, um; default: its metadata.
        z_step_um: distance between frames, um; default: the metadata.
        focus_positions_um: (N,) focus positions, um; excludes ``z_step_um``.
        z_direction: "down" if the first frame shows the top; for positions see
            `gplws.reconstruct`.
        method: of the initial depth, see `gplws.reconstruct`.
        max_rotation_deg: see `register_height_map`.
        least_confidence: heights from the stack below it are left out of the fusion, 0..1.
        device: of the initial depth, see `gplws.reconstruct`.
        overwrite: whether a folder with content is accepted; an old scene in it is replaced.
        progress: show on stderr which of the steps is under way.

    Returns:
        The scene, as it was written.

    Raises:
        ValueError: the pixel size or focus positions are unknown, or an argument is out of range.
        RegistrationError: the measured map does not show the surface of the stack.
        DatasetError: the measured file is damaged.
        FileExistsError: the folder has content and ``overwrite`` is False.
        OSError: the folder cannot be written; nothing was changed.
    """
    require_free_folder(Path(out_dir), overwrite=overwrite)
    focal_stack = read_stack(
        stack,
        z_step_um=z_step_um,
        focus_positions_um=focus_positions_um,
        pixel_size_um=pixel_size_um,
    )
    pixel, positions = focal_stack.pixel_size_um, focal_stack.focus_positions_um
    if pixel is None:
        raise ValueError("pixel_size_um: the stack does not say it; pass it")
    if positions is None:
        raise ValueError("z_step_um: the stack does not say its focus positions; pass them")
    measured_pixel = checked_length(measured_pixel_um, "measured_pixel_um")
    if isinstance(measured_um, np.ndarray):
        measured: NDArray[np.floating] = measured_um
    else:
        measured = read_depth_map(Path(measured_um))

    with tqdm(total=3, unit="step", disable=not progress, leave=False) as bar:
        bar.set_description("gplws: depth from the stack")
        found = reconstruct(
            focal_stack, z_direction=z_direction, method=method, device=device, progress=progress
        )
        stack_um, confidence = np.asarray(found.height), np.asarray(found.confidence)
        bar.update()
        bar.set_description("gplws: registration")
        registration = register_height_map(
            stack_um,
            measured,
            reference_pixel_um=pixel,
            measured_pixel_um=measured_pixel,
            max_rotation_deg=max_rotation_deg,
        )
        bar.update()
        bar.set_description("gplws: fusion")
        aligned = align_height_map(
            measured,
            registration,
            (focal_stack.height, focal_stack.width),
            reference_pixel_um=pixel,
            measured_pixel_um=measured_pixel,
        )
        fused = fuse_heights(
            stack_um, aligned, confidence=confidence, least_confidence=least_confidence
        )
        scene = Micro3DScene(Path(out_dir), fused, aligned, stack_um, registration)
        sign = 1.0 if z_direction == "up" else -1.0
        information = {
            "unit": "um",
            "focus_positions": (sign * positions).tolist(),
            "pixel_size_um": pixel,
            "measured_pixel_um": measured_pixel,
            "registration": asdict(registration),
            "share_measured": float((fused.source == MEASURED).mean()),
            "share_from_stack": float((fused.source == FROM_STACK).mean()),
            "method": found.metadata["method"],
            "versions": found.metadata["versions"],
        }
        _write(scene, focal_stack, found, information, overwrite)
        bar.update()
    return scene


def review_figure(scene: Micro3DScene, all_in_focus: np.ndarray, pixel_size_um: float) -> Figure:
    """Six pictures to judge a scene by: both sources, their difference and what became of them.

    Args:
        scene: the scene.
        all_in_focus: (H, W) or (H, W, 3) image, any dtype.
        pixel_size_um: side of a pixel, um.

    Returns:
        A matplotlib figure with an Agg canvas; no global state of matplotlib is touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = scene.stack_um.shape
    figure = Figure(figsize=(12, 1.2 + 7.4 * min(max(height / width, 0.5), 1.5)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    extent = (0.0, width * pixel_size_um, height * pixel_size_um, 0.0)
    low, high = robust_limits(scene.fused.height_um)
    difference = scene.aligned_um - scene.stack_um
    known = np.isfinite(difference)
    spread = float(np.percentile(np.abs(difference[known]), 95)) if known.any() else 1.0
    image = display_uint8(all_in_focus)
    options: dict[str, Any] = {"extent": extent, "interpolation": "nearest"}
    axes[0, 0].imshow(image, cmap="gray", vmin=0, vmax=255, **options)
    for axis, values in (
        (axes[0, 1], scene.stack_um),
        (axes[0, 2], scene.aligned_um),
        (axes[1, 0], scene.fused.height_um),
    ):
        shown = axis.imshow(values, cmap="viridis", vmin=low, vmax=high, **options)
        figure.colorbar(shown, ax=axis, label="height (µm)", fraction=0.046)
    axes[1, 1].imshow(scene.fused.source, cmap="viridis", vmin=0, vmax=2, **options)
    limits = {"vmin": -max(spread, 1e-6), "vmax": max(spread, 1e-6)}
    shown = axes[1, 2].imshow(difference, cmap="RdBu", **limits, **options)
    figure.colorbar(shown, ax=axes[1, 2], label="µm", fraction=0.046)
    share = float((scene.fused.source == MEASURED).mean())
    titles = (
        "All in focus",
        "From the stack",
        "Measured, registered",
        "Fused",
        f"Source: measured {share:.0%} (yellow), stack (green)",
        "Measured - stack",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_facecolor(_MISSING)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("µm", fontsize=8)
    place = scene.registration
    figure.suptitle(
        f"{scene.folder.name}: rotation {place.rotation_deg:.2f}°, scale {place.scale:.4f}, shift "
        f"({place.shift_um[0]:.1f}, {place.shift_um[1]:.1f}) µm, slope ({place.slope[0]:.4f}, "
        f"{place.slope[1]:.4f}), residual {place.residual_um:.2f} µm, correlation "
        f"{place.correlation:.3f}",
        fontsize=10,
    )
    figure.tight_layout()
    return figure


def _write(
    scene: Micro3DScene,
    stack: FocalStack,
    found: Reconstruction,
    information: dict[str, Any],
    overwrite: bool,
) -> None:
    pixel = stack.pixel_size_um
    assert pixel is not None
    with new_folder_content(scene.folder, _replaced(scene.folder), overwrite=overwrite) as part:
        for number, frame in enumerate(np.asarray(stack.frames), start=1):
            if frame.dtype.kind == "f":  # those of a data set lie in 0..1
                black, span = stack.levels
                frame = np.clip((frame.astype(np.float32) - black) / span, 0, 1)
            suffix, payload = _encode_frame(frame)
            write_bytes(part / f"{number}{suffix}", payload)
        fused = scene.fused
        write_bytes(part / "height.tif", encode_float_tiff(fused.height_um, pixel, "height", "um"))
        write_bytes(part / "valid.png", _encode_picture(fused.valid * np.uint8(255), "PNG"))
        shades = np.array([0, 127, 255], np.uint8)[fused.source]
        write_bytes(part / "source.png", _encode_picture(shades, "PNG"))
        picture = BytesIO()
        review_figure(scene, np.asarray(found.all_in_focus), pixel).savefig(picture, format="png")
        write_bytes(part / "review.png", picture.getvalue())
        text = json.dumps(jsonable(information), indent=2, allow_nan=False)
        write_bytes(part / "scene.json", (text + "\n").encode())


def _replaced(folder: Path) -> set[str]:
    """Files of an old scene in the folder, its frames too: it may have had more of them."""
    present = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    frames = {name for name in present if re.fullmatch(r"\d+\.(bmp|tif)", name)}
    return frames | set(_RESULTS)


def _encode_frame(frame: np.ndarray) -> tuple[str, bytes]:
    if frame.dtype == np.uint8:
        return ".bmp", _encode_picture(frame, "BMP")
    import tifffile

    buffer = BytesIO()
    tifffile.imwrite(buffer, frame, photometric="rgb" if frame.ndim == 3 else "minisblack")
    return ".tif", buffer.getvalue()


def _encode_picture(pixels: np.ndarray, kind: str) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format=kind)
    return buffer.getvalue()
