"""Files of microscopes: Zeiss CZI, Leica LIF, Nikon ND2, and OME-Zarr, each read by a package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gplws.io.calibration import Calibration, square_pixel, um_per_unit, usable_length
from gplws.io.errors import DECODE_ERRORS, StackReadError
from gplws.io.packages import require_package
from gplws.io.stored import ImageChoice, Report, StoredImage, StoredStack, choose_image

_logger = logging.getLogger(__name__)


class _Content(NamedTuple):
    """An open file.

    Attributes:
        images: what it holds.
        read: gives pixels and axes of an image by its number.
        lengths: what the file says of them.
    """

    images: list[StoredImage]
    read: Callable[[int, Report], tuple[np.ndarray, str]]
    lengths: Callable[[int], Calibration]


_PACKAGES = {".czi": "pylibCZIrw", ".lif": "liffile", ".nd2": "nd2", ".zarr": "zarr"}
MICROSCOPE_SUFFIXES = frozenset(_PACKAGES)

# Any of these makes a folder one of Zarr, versions 2 and 3.
_ZARR_METADATA = (".zattrs", ".zgroup", ".zarray", "zarr.json")


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a Zarr group or array."""
    return any((folder / name).is_file() for name in _ZARR_METADATA)


def read_microscope_stack(path: Path, progress: Report, image: ImageChoice = None) -> StoredStack:
    """An image of a file of a microscope, with the lengths that it says of itself.

    Args:
        path: .czi, .lif or .nd2 file, or a Zarr folder.
        progress: called with (planes read, planes in all).
        image: number or name of the image (scene, series, position), see `choose_image`.

    Returns:
        Pixels, axes and calibration.

    Raises:
        StackReadError: the file is damaged or unsupported, or several images may be meant.
        ValueError: there is no such image.
        ModuleNotFoundError: the package that reads the format is not installed.
    """
    suffix = ".zarr" if path.is_dir() else path.suffix.lower()
    require_package(_PACKAGES[suffix], f"a {suffix} file", "io")
    with ExitStack() as files:
        with _naming(path):
            content = files.enter_context(_OPENERS[suffix](path))
        number = choose_image(path, content.images, image)
        with _naming(path):
            array, axes = content.read(number, progress)
        try:
            calibration = content.lengths(number)
        except Exception as error:  # frames are worth more than what is said of them
            _logger.warning("%s: lengths cannot be read (%s): calibration unknown", path, error)
            calibration = Calibration()
    _warn_of_blank_frames(path, array, axes.upper())
    return StoredStack(array, axes, calibration)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the packages become one that names the file."""
    try:
        yield
    except StackReadError:
        raise
    except DECODE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise StackReadError(f"{path}: unreadable or truncated: {reason}") from error


def _warn_of_blank_frames(path: Path, array: np.ndarray, axes: str) -> None:
    """The packages give zeros for what a file should hold and does not."""
    if "Z" not in axes:
        return
    frames = np.moveaxis(array, axes.index("Z"), 0)
    blank = [number for number, frame in enumerate(frames) if not frame.any()]
    if blank:
        _logger.warning(
            "%s: nothing but zeros in frame %s: not recorded, or the file is incomplete",
            path,
            ", ".join(map(str, blank[:8])) + (", ..." if len(blank) > 8 else ""),
        )


def _described(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


@contextmanager
def _open_czi(path: Path) -> Iterator[_Content]:
    from pylibCZIrw import czi

    with czi.open_czi(str(path)) as file:
        starts = {axis: int(first) for axis, (first, _) in file.total_bounding_box.items()}
        counts = {axis: int(n) for axis, (_, n) in file.total_bounding_box.items()}
        planes = {axis: counts.get(axis, 1) for axis in "TCZ"}
        others = {a: n for a, n in counts.items() if a not in "TCZYXSM" and n > 1}
        if others:
            raise StackReadError(
                f"{path}: has axes beyond time, channel and focus ({_described(others)}); "
                "export the focal stack alone"
            )
        scenes = dict(file.scenes_bounding_rectangle) or {None: file.total_bounding_rectangle}
        images = [
            StoredImage(
                "" if scene is None else f"scene {scene}",
                _described({**planes, "Y": box.h, "X": box.w}),
                planes["Z"],
            )
            for scene, box in scenes.items()
        ]

        def read(number: int, progress: Report) -> tuple[np.ndarray, str]:
            scene = list(scenes)[number]
            array = None
            for done, index in enumerate(np.ndindex(*planes.values()), start=1):
                place = {a: starts.get(a, 0) + k for a, k in zip(planes, index, strict=True)}
                pixels = file.read(plane=place, scene=scene)[..., ::-1]  # of three: BGR
                if array is None:
                    array = np.empty((*planes.values(), *pixels.shape), pixels.dtype)
                if pixels.shape != array.shape[3:] or pixels.dtype != array.dtype:
                    raise StackReadError(f"{path}: its channels differ in size or type of pixel")
                array[index] = pixels
                progress(done, array.size // pixels.size)
            assert array is not None
            return array, "TCZYXS"

        yield _Content(images, read, lambda number: _czi_calibration(file.metadata, str(path)))


def _czi_calibration(metadata: Mapping[str, Any], name: str) -> Calibration:
    """Lengths from the scaling of a CZI file, which is in metres; zero stands for unknown."""
    entry: Any = metadata
    for key in ("ImageDocument", "Metadata", "Scaling", "Items", "Distance"):
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    lengths: dict[str, float | None] = {}
    for distance in [entry] if isinstance(entry, Mapping) else entry or []:
        axis, value = distance.get("@Id"), distance.get("Value")
        if axis in ("X", "Y", "Z") and value not in (None, "", "0"):
            lengths[axis] = usable_length(value, 1e6, f"scaling of {axis}", name)
    return Calibration(
        square_pixel(lengths.get("X"), lengths.get("Y"), name), lengths.get("Z"), source="CZI"
    )


@contextmanager
def _open_lif(path: Path) -> Iterator[_Content]:
    from liffile import LifFile

    with LifFile(path) as file:
        series = list(file.images)
        images = [
            StoredImage(one.path, _described(one.sizes), one.sizes.get("Z", 0)) for one in series
        ]

        def read(number: int, progress: Report) -> tuple[np.ndarray, str]:
            one = series[number]
            array = one.asarray()
            progress(1, 1)
            return array, "".join(axis if len(axis) == 1 else "Q" for axis in one.sizes)

        yield _Content(images, read, lambda number: _lif_calibration(series[number], str(path)))


def _lif_calibration(image: Any, name: str) -> Calibration:
    """Lengths of a LIF image; the sign of its z-step is that of a drive, not of the focus."""
    steps = {axis: _step(image.coords.get(axis), _lif_unit(image, axis), name) for axis in "XYZ"}
    z_step = steps["Z"]
    if z_step is not None and z_step < 0:
        _logger.warning(
            "%s: its z positions fall from frame to frame, and frames are taken to climb; pass "
            "z_direction='down' if the first one shows the top",
            name,
        )
        z_step = -z_step
    return Calibration(square_pixel(steps["X"], steps["Y"], name), z_step, source="LIF")


def _lif_unit(image: Any, axis: str) -> str | None:
    dimensions = image.xml_element.iterfind("./Data/Image/ImageDescription/Dimensions/*")
    number = {"X": "1", "Y": "2", "Z": "3"}[axis]
    return next((d.get("Unit") for d in dimensions if d.get("DimID") == number), None)


def _step(positions: np.ndarray | None, unit: str | None, name: str) -> float | None:
    """Distance from one of evenly spaced positions to the next, um; below zero where they fall."""
    scale = um_per_unit(unit)
    if positions is None or len(positions) < 2 or scale is None:
        return None
    step = float(positions[-1] - positions[0]) / (len(positions) - 1)
    length = usable_length(abs(step), scale, "distance", name)
    return None if length is None else float(np.copysign(length, step))


@contextmanager
def _open_nd2(path: Path) -> Iterator[_Content]:
    import nd2

    with nd2.ND2File(path) as file:
        sizes = dict(file.sizes)
        loops: dict[str, Any] = {loop.type: loop for loop in file.experiment}
        count = sizes.pop("P", 1)
        points = loops["XYPosLoop"].parameters.points if "XYPosLoop" in loops else []
        names = [point.name or "" for point in points] if len(points) == count else [""] * count
        images = [StoredImage(name, _described(sizes), sizes.get("Z", 0)) for name in names]

        def read(number: int, progress: Report) -> tuple[np.ndarray, str]:
            planes = [
                index
                for index, place in enumerate(file.loop_indices or ({},))
                if place.get("P", 0) == number
            ]
            frames = []
            for done, index in enumerate(planes, start=1):
                frames.append(file.read_frame(index))
                progress(done, len(planes))
            array = np.stack(frames).reshape(tuple(sizes.values()))
            return array, "".join(sizes)

        yield _Content(images, read, lambda number: _nd2_calibration(file, loops, str(path)))


def _nd2_calibration(file: Any, loops: Mapping[str, Any], name: str) -> Calibration:
    """Lengths of an ND2 file; the direction of the focus where its z loop says it."""
    z_step = positions = None
    if "ZStackLoop" in loops and loops["ZStackLoop"].parameters.stepUm:
        loop = loops["ZStackLoop"]
        z_step = usable_length(abs(loop.parameters.stepUm), 1.0, "z-step", name)
        if z_step is not None and not loop.parameters.bottomToTop:
            positions = tuple(0.0 - z_step * number for number in range(loop.count))
    pixel_size = None
    try:
        volume = file.metadata.channels[0].volume
        if all(volume.axesCalibrated[:2]):
            x, y, _ = (usable_length(v, 1.0, "pixel size", name) for v in volume.axesCalibration)
            pixel_size = square_pixel(x, y, name)
    except Exception as error:  # the package fails on channels without a fluorescent probe
        _logger.warning("%s: pixel size unknown: %s", name, error)
    return Calibration(pixel_size, z_step, positions, source="ND2")


@contextmanager
def _open_zarr(path: Path) -> Iterator[_Content]:
    import zarr

    root = zarr.open(path, mode="r")
    if isinstance(root, zarr.Array):
        found = [("", root, "Q" * root.ndim, Calibration())]
    else:
        found = [_zarr_image(path, group) for group in _zarr_groups(path, root)]
    images = [
        StoredImage(
            name,
            _described(dict(zip(axes, array.shape, strict=True))) if name else str(array.shape),
            array.shape[axes.index("Z")] if "Z" in axes else 0,
        )
        for name, array, axes, _ in found
    ]

    def read(number: int, progress: Report) -> tuple[np.ndarray, str]:
        _, array, axes, _ = found[number]
        axis = axes.find("Z") if "Z" in axes else 0
        # Whole chunks: none is decoded twice.
        length, step = array.shape[axis], array.chunks[axis]
        pixels = np.empty(array.shape, array.dtype.newbyteorder("="))
        for start in range(0, length, step):
            part = (slice(None),) * axis + (slice(start, min(start + step, length)),)
            pixels[part] = array[part]
            progress(min(start + step, length), length)
        return pixels, axes

    yield _Content(images, read, lambda number: found[number][3])


def _zarr_groups(path: Path, root: Any) -> Iterable[Any]:
    """Groups of images: the root itself, or the numbered ones of a collection."""
    ome = _ome_attributes(root)
    if "multiscales" in ome:
        return [root]
    if "plate" in ome or "well" in ome:
        raise StackReadError(
            f"{path}: is a plate or a well of many images; pass the folder of one, such as "
            f"{path.name}/A/1/0"
        )
    numbered = sorted((name for name, _ in root.groups() if name.isdigit()), key=int)
    groups = [root[name] for name in numbered if "multiscales" in _ome_attributes(root[name])]
    if not groups:
        raise StackReadError(f"{path}: is a Zarr group without an OME image (multiscales)")
    return groups


def _ome_attributes(group: Any) -> Mapping[str, Any]:
    attributes = dict(group.attrs)
    nested = attributes.get("ome", attributes)  # since version 0.5
    return nested if isinstance(nested, Mapping) else {}


def _zarr_image(path: Path, group: Any) -> tuple[str, Any, str, Calibration]:
    """Name, full resolution, axes and lengths of an OME image."""
    image = _ome_attributes(group)["multiscales"][0]
    finest = image["datasets"][0]
    array = group[finest["path"]]
    # Axes are named since version 0.3, and have units since 0.4.
    axes = [
        axis if isinstance(axis, Mapping) else {"name": axis}
        for axis in image.get("axes", "tczyx"[-array.ndim :])
    ]
    scale = np.ones(array.ndim)
    for transform in (
        *finest.get("coordinateTransformations", ()),
        *image.get("coordinateTransformations", ()),
    ):
        if transform.get("type") == "scale":
            scale = scale * np.asarray(transform["scale"], np.float64)
    letters = "".join(str(axis["name"]).upper()[:1] for axis in axes)
    lengths: dict[str, float | None] = {}
    for letter, axis, factor in zip(letters, axes, scale, strict=True):
        unit = um_per_unit(axis.get("unit"))
        if letter in "XYZ" and unit is not None:
            lengths[letter] = usable_length(factor, unit, f"scale of {letter}", str(path))
    calibration = Calibration(
        square_pixel(lengths.get("X"), lengths.get("Y"), str(path)),
        lengths.get("Z"),
        source="OME-Zarr",
    )
    return image.get("name") or group.basename or "0", array, letters, calibration


_OPENERS: dict[str, Callable[[Path], AbstractContextManager[_Content]]] = {
    ".czi": _open_czi,
    ".lif": _open_lif,
    ".nd2": _open_nd2,
    ".zarr": _open_zarr,
}
