"""Registration of the frames of a focal stack to each other.

Stages drift, and lenses change their magnification with focus. The focus of a pixel is then looked
for in frames that show another point there, and depth is wrong along every edge.

Positions are (x, y) of pixel centres, x along the columns, counted from 0. Neighbouring frames are
matched, as they are blurred alike, and the steps from frame to frame are joined.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gplws.data import FocalStack
from gplws.io.readers import StackSource, read_stack

AlignmentModel = Literal["translation", "similarity", "affine"]

MODELS: tuple[AlignmentModel, ...] = get_args(AlignmentModel)
"""What frames may do against each other: move; move, turn and grow; the same and shear."""

_Map = NDArray[np.float64]
_Image = NDArray[np.float32]

_logger = logging.getLogger(__name__)

_MATCHED_PIXELS = 2**20  # of a frame; larger ones are reduced, to be matched
# What is compared lies between two Gaussians, in pixels: light and vignetting change more slowly,
# noise faster. Values beyond so many deviations are hot pixels or highlights, which do not move.
_FINE_PX, _COARSE_PX, _OUTLIERS = 1.5, 4.0, 4.0
_SMALLEST_LEVEL = 48  # pixels of the shorter side, down to which frames are halved
_TURNING_LEVEL = 96  # from which on more than a translation can be told
_ITERATIONS, _PRECISION = 50, 1e-5
# Correlation of two frames of noise has a deviation of 1 / sqrt(independent values), of which the
# fine Gaussian leaves one in so many pixels.
_PIXELS_PER_VALUE, _LEAST_DEVIATIONS = 28.0, 6.0
_LEAST_CORRELATION = 0.1  # however many pixels there are: different pictures can reach 0.06
# From frame to frame: of the longer side, and relative.
_LARGEST_STEP, _LARGEST_GROWTH = 0.2, 0.2
_BLOCKS = 8  # along each side, in which texture is weighed
_LEAST_COMMON = 0.25  # of the pixels, that all frames must show
_LARGEST_SIDE = 2**15 - 2  # of images that OpenCV resamples
_OPENCV_DTYPES = ("uint8", "uint16", "int16", "float32", "float64")


class AlignmentError(ValueError):
    """Frames cannot be aligned, or an alignment does not fit the stack or cannot be read."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the scene of one frame, the reference, lies in each frame of a stack.

    Attributes:
        model: "translation", "similarity" or "affine".
        reference: number of the reference frame.
        size: (H, W) of the frames.
        transforms: (N, 2, 3) float64: what lies at (x, y) in the reference lies at
            ``transforms[n] @ (x, y, 1)`` in frame n.
        correlation: (N,) float64, of each frame with its next matched neighbour towards the
            reference; 1 for the reference.
        matched: (N,) bool, False where the two show nothing in common; the frame is then taken
            not to have moved against its neighbour.
    """

    model: AlignmentModel
    reference: int
    size: tuple[int, int]
    transforms: _Map
    correlation: _Map
    matched: NDArray[np.bool_]

    @property
    def window(self) -> tuple[int, int, int, int]:
        """First row, first column, rows and columns of what all frames show, in the reference.

        Rows and columns are 0 where there is nothing.
        """
        height, width = self.size
        sides = np.array(
            [[0, 0, 1], [width - 1, 0, 1], [0, height - 1, 1], [width - 1, height - 1, 1]]
        )
        linear = self.transforms[:, :, :2]
        corners = np.linalg.solve(
            linear, sides[:, :2].T[None] - self.transforms[:, :, 2:]
        )  # (N, 2, 4) in the reference: top left, top right, bottom left, bottom right
        x, y = corners.transpose(1, 2, 0)
        slack = 1e-6  # of numbers that were computed
        left = max(0, math.ceil(max(x[0].max(), x[2].max()) - slack))
        right = min(width - 1, math.floor(min(x[1].min(), x[3].min()) + slack))
        top = max(0, math.ceil(max(y[0].max(), y[1].max()) - slack))
        bottom = min(height - 1, math.floor(min(y[2].min(), y[3].min()) + slack))
        return top, left, max(0, bottom - top + 1), max(0, right - left + 1)

    def apply(self, stack: StackSource) -> FocalStack:
        """The stack with all frames as the reference sees them, cut to what all of them show.

        Frames are interpolated with a Lanczos kernel over 8 x 8 pixels, which leaves their
        sharpness as it is; values stay within the range of the frame.

        Args:
            stack: of N frames of ``size``, on any device; as for :func:`align_frames`.

        Returns:
            A stack of ``window``, in the same dtype, on the same device; a copy.

        Raises:
            AlignmentError: the stack has another number of frames or another size, or the frames
                have less than a quarter of their pixels in common.
        """
        focal_stack = read_stack(stack)
        found = (focal_stack.n_frames, focal_stack.height, focal_stack.width)
        expected = (len(self.transforms), *self.size)
        if found != expected:
            raise AlignmentError(
                f"the alignment is of a stack of {_shape(expected)}, the stack has {_shape(found)}"
            )
        if max(self.size) > _LARGEST_SIDE:
            raise AlignmentError(f"frames must be at most {_LARGEST_SIDE} pixels wide and high")
        top, left, height, width = self.window
        if height * width < _LEAST_COMMON * math.prod(self.size):
            raise AlignmentError(
                f"frames have {height} x {width} of {self.size[0]} x {self.size[1]} pixels in "
                "common: they moved too far, or were not matched well"
            )
        frames = focal_stack.frames
        origin = np.array([left, top], np.float64)
        moved = [
            _resampled(_on_host(frame), transform, origin, (height, width))
            for frame, transform in zip(frames, self.transforms, strict=True)
        ]
        if isinstance(frames, Tensor):
            together = torch.from_numpy(np.stack(moved)).to(frames.device)
            return replace(focal_stack, frames=together)
        return replace(focal_stack, frames=np.stack(moved))

    def to_dict(self) -> dict[str, Any]:
        """What info.json holds; plain numbers, lists and strings."""
        return {
            "model": self.model,
            "reference": self.reference,
            "size": list(self.size),
            "transforms": self.transforms.tolist(),
            "correlation": self.correlation.tolist(),
            "matched": self.matched.tolist(),
            "window": list(self.window),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Alignment:
        """The alignment that :meth:`to_dict` was called on.

        Raises:
            AlignmentError: something is missing or has the wrong form.
        """
        try:
            model = values["model"]
            if model not in MODELS:
                raise ValueError(f"unknown model {model!r}")
            transforms = np.array(values["transforms"], np.float64)
            n_frames = len(transforms)
            height, width = (int(side) for side in values["size"])
            result = cls(
                model=model,
                reference=int(values["reference"]),
                size=(height, width),
                transforms=transforms.reshape(n_frames, 2, 3),
                correlation=np.array(values["correlation"], np.float64).reshape(n_frames),
                matched=np.array(values["matched"], bool).reshape(n_frames),
            )
            growth = np.linalg.det(result.transforms[:, :, :2])
            if not (np.isfinite(transforms).all() and (growth > 0).all()):
                raise ValueError("transforms must be finite and keep their orientation")
        except (KeyError, TypeError, ValueError) as error:
            raise AlignmentError(f"no alignment of gplws: {error!r}") from error
        return result

    @classmethod
    def read(cls, path: str | Path) -> Alignment:
        """The alignment of an earlier result.

        Args:
            path: info.json of a result whose frames were aligned, its folder, or a JSON file of
                :meth:`to_dict`.

        Raises:
            FileNotFoundError: the path does not exist.
            AlignmentError: the file holds no alignment; the message names it.
        """
        path = Path(path)
        file = path / "info.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            inner = values.get("alignment", values)
            if "transforms" not in inner:
                raise AlignmentError("it holds no alignment")
            return cls.from_dict(inner)
        except (AttributeError, TypeError, ValueError) as error:  # no JSON, or another one
            raise AlignmentError(f"{file}: {error}") from error


def align_frames(
    stack: StackSource,
    model: AlignmentModel = "translation",
    *,
    progress: bool = False,
) -> Alignment:
    """How the frames of a stack moved against each other.

    Each frame is matched to its neighbour by maximising the correlation of what lies between noise
    and illumination (ECC), from coarse to fine; frames of more than a million pixels are reduced
    for it. The reference is the frame in the middle, or the nearest to it that has something in
    common with a neighbour. Where a frame has nothing in common with its neighbour, as where
    nothing is in focus, a warning is logged, it stays where that is, and the frame after it is
    matched to that.

    Args:
        stack: as for :func:`gplws.reconstruct`; see :func:`gplws.io.read_stack`.
        model: "translation" suits microscopes, whose stages drift; "similarity" also lets frames
            turn and grow, as with macro lenses that change their magnification with focus;
            "affine" is for what is left.
        progress: show a progress bar on stderr.

    Returns:
        The alignment; :meth:`Alignment.apply` uses it on this stack or on others of its kind.

    Raises:
        ValueError: ``model`` is unknown.

    Source:
        Evangelidis and Psarakis, "Parametric image alignment using enhanced correlation coefficient
        maximization", IEEE TPAMI 30(10), 2008, doi:10.1109/TPAMI.2008.113; as OpenCV has it.

    Example:
        >>> frames = np.random.default_rng(0).random((3, 1, 80, 64)).repeat(2, 1)[0]
        >>> align_frames(FocalStack(frames)).transforms.shape
        (2, 2, 3)
    """
    from tqdm import tqdm

    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    focal_stack = read_stack(stack, progress=progress)
    n_frames = focal_stack.n_frames

    @functools.lru_cache(maxsize=3)
    def levels(number: int) -> _Levels:
        return _Levels.of(focal_stack, number)

    @functools.lru_cache(maxsize=2)  # of the reference with what is beside it
    def match(here: int, there: int) -> _Step:
        return _match(levels(here), levels(there), model)

    reference = _reference_of(n_frames, match)
    transforms = np.empty((n_frames, 3, 3))
    transforms[reference] = np.eye(3)
    correlation = np.ones(n_frames)
    matched = np.ones(n_frames, bool)
    with tqdm(
        total=n_frames, initial=1, desc="align", unit="frame", leave=False, disable=not progress
    ) as bar:
        for direction, end in ((1, n_frames), (-1, -1)):
            neighbour = reference
            for number in range(reference + direction, end, direction):
                step = match(neighbour, number)
                correlation[number], matched[number] = step.correlation, step.found
                transforms[number] = step.matrix @ transforms[neighbour]
                if step.found:
                    neighbour = number
                bar.update()
    if not matched.all():
        unmatched = [focal_stack.frame_label(int(number)) for number in np.flatnonzero(~matched)]
        _logger.warning(
            "%d of %d frames have nothing in common with their neighbour and stay where it is: %s",
            len(unmatched),
            n_frames,
            ", ".join(unmatched[:5]) + (", ..." if len(unmatched) > 5 else ""),
        )
    return Alignment(
        model=model,
        reference=reference,
        size=(focal_stack.height, focal_stack.width),
        transforms=transforms[:, :2].copy(),
        correlation=correlation,
        matched=matched,
    )


def requested_alignment(align: str | Path | Alignment) -> AlignmentModel | Alignment | None:
    """What a caller asks for: None for "none", a model, or an alignment, read from its file.

    Raises:
        AlignmentError, FileNotFoundError: as for :meth:`Alignment.read`.
        TypeError: ``align`` is neither a string, nor a path, nor an alignment.
    """
    if isinstance(align, Alignment):
        return align
    if not isinstance(align, str | Path):
        raise TypeError(f"align must be a name, a path or an Alignment, got {type(align).__name__}")
    if align == "none":
        return None
    for model in MODELS:
        if align == model:
            return model
    if not Path(align).exists():
        known = ", ".join(["none", *MODELS])
        raise FileNotFoundError(f"align must be one of {known}, or a file that exists, got {align}")
    return Alignment.read(align)


def _reference_of(n_frames: int, match: Callable[[int, int], _Step]) -> int:
    """The frame nearest to the middle that matches one beside it; the middle one if none does."""
    middle = n_frames // 2
    for number in sorted(range(n_frames), key=lambda number: abs(number - middle)):
        beside = [other for other in (number + 1, number - 1) if 0 <= other < n_frames]
        if any(match(number, other).found for other in beside):
            return number
    return middle


class _Levels(NamedTuple):
    """A frame from fine to coarse, ready to be matched, and its full size (W, H)."""

    images: list[_Image]
    full_size: tuple[int, int]

    @classmethod
    def of(cls, stack: FocalStack, number: int) -> _Levels:
        import cv2

        gray = stack.gray(frames=slice(number, number + 1))[0].cpu().numpy()
        height, width = gray.shape
        scale = min(1.0, math.sqrt(_MATCHED_PIXELS / (height * width)))
        images = [gray]
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            images = [_array(cv2.resize(gray, size, interpolation=cv2.INTER_AREA))]
        while min(images[-1].shape) >= 2 * _SMALLEST_LEVEL:
            rows, columns = images[-1].shape
            half = (columns // 2, rows // 2)
            images.append(_array(cv2.resize(images[-1], half, interpolation=cv2.INTER_AREA)))
        return cls([_texture(image) for image in images], (width, height))


class _Step(NamedTuple):
    """From one frame to the next: ``matrix`` (3, 3) from pixels of the one to the other's."""

    matrix: _Map
    correlation: float
    found: bool


def _match(template: _Levels, image: _Levels, model: AlignmentModel) -> _Step:
    import cv2

    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _ITERATIONS, _PRECISION)
    step, correlation = np.eye(3), 0.0
    size = _size(template.images[-1])
    nothing = _Step(np.eye(3), 0.0, False)
    for here, there in zip(reversed(template.images), reversed(image.images), strict=True):
        step = _rescaled(step, size, _size(here))
        size = _size(here)
        turns = model != "translation" and min(size) >= _TURNING_LEVEL
        motion = cv2.MOTION_AFFINE if turns else cv2.MOTION_TRANSLATION
        everywhere = np.full(here.shape, 255, np.uint8)
        try:
            correlation, found = cv2.findTransformECC(
                here, there, step[:2].astype(np.float32), motion, criteria, everywhere, 1
            )
        except cv2.error:  # no texture, or the iterations went astray
            return nothing
        step[:2] = found
        if turns and model == "similarity":
            step = _nearest_similarity(step, here)
    step = _rescaled(step, size, template.full_size)
    values = math.prod(template.images[0].shape) / _PIXELS_PER_VALUE
    least = max(_LEAST_CORRELATION, _LEAST_DEVIATIONS / math.sqrt(values))
    if not correlation > least or not _is_plausible(step, template.full_size):
        return nothing._replace(correlation=float(correlation))
    return _Step(step, float(correlation), True)


def _is_plausible(step: _Map, size: tuple[int, int]) -> bool:
    corners = np.array([[x, y, 1.0] for x in (0, size[0] - 1) for y in (0, size[1] - 1)]).T
    moved = np.abs((step @ corners - corners)[:2]).max()
    growth = np.linalg.svd(step[:2, :2], compute_uv=False)
    limits = math.log1p(_LARGEST_GROWTH)
    return bool(
        moved <= _LARGEST_STEP * max(size)
        and growth.min() > 0
        and np.abs(np.log(growth)).max() <= limits
    )


def _rescaled(step: _Map, size: tuple[int, int], other: tuple[int, int]) -> _Map:
    """A step between images of ``size`` (W, H) as one between the same images of another size.

    Both sizes cover the same area; position x of one is s (x + 1/2) - 1/2 of the other.
    """
    x, y = (new / old for new, old in zip(other, size, strict=True))
    to_other = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
    return np.asarray(to_other @ step @ np.linalg.inv(to_other))


def _nearest_similarity(step: _Map, texture: _Image) -> _Map:
    """The similarity closest to an affine step where an image has texture.

    Points as complex numbers: least squares of ``target = turn * point + shift``.
    """
    import cv2

    height, width = texture.shape
    energy = cv2.resize(texture * texture, (_BLOCKS, _BLOCKS), interpolation=cv2.INTER_AREA)
    weight = np.asarray(energy, np.float64) / np.sum(energy, dtype=np.float64)
    x = (np.arange(_BLOCKS) + 0.5) * width / _BLOCKS - 0.5
    y = (np.arange(_BLOCKS) + 0.5) * height / _BLOCKS - 0.5
    grid_x, grid_y = np.meshgrid(x, y)
    moved_x, moved_y, _ = step @ np.stack([grid_x.ravel(), grid_y.ravel(), np.ones(grid_x.size)])
    point, target = (grid_x + 1j * grid_y).ravel(), moved_x + 1j * moved_y
    share = weight.ravel()
    middle, moved_middle = share @ point, share @ target
    away = point - middle
    turn = (share @ (away.conj() * (target - moved_middle))) / (share @ np.abs(away) ** 2)
    shift = moved_middle - turn * middle
    return np.array(
        [[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag], [0, 0, 1]]
    )


def _texture(image: _Image) -> _Image:
    """What is neither noise nor illumination, without outliers."""
    import cv2

    fine, coarse = (cv2.GaussianBlur(image, (0, 0), sigma) for sigma in (_FINE_PX, _COARSE_PX))
    texture = _array(fine) - _array(coarse)
    limit = _OUTLIERS * float(texture.std())
    return np.clip(texture, -limit, limit)


def _on_host(frame: np.ndarray | Tensor) -> np.ndarray:
    """A frame as an array that OpenCV reads: contiguous, in the byte order of this machine."""
    values = frame.detach().cpu().numpy() if isinstance(frame, Tensor) else frame
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _resampled(
    frame: np.ndarray, transform: _Map, origin: _Map, shape: tuple[int, int]
) -> np.ndarray:
    """(h, w) or (h, w, 3) of the dtype of ``frame``: what lies at ``transform`` of each pixel."""
    import cv2

    from_window = transform.copy()
    from_window[:, 2] += transform[:, :2] @ origin
    whole = np.round(from_window)
    if np.abs(from_window - whole).max() < 1e-6:  # nothing to interpolate
        from_window = whole
    height, width = shape
    values = frame if frame.dtype.name in _OPENCV_DTYPES else frame.astype(np.float64)
    flags = cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP
    border = cv2.BORDER_REPLICATE
    moved = np.asarray(
        cv2.warpAffine(values, from_window, (width, height), flags=flags, borderMode=border)
    )
    if values is not frame and frame.dtype.kind != "f":
        moved = moved.round()
    # The kernel overshoots at edges.
    return moved.clip(frame.min(), frame.max()).astype(frame.dtype)


def _size(image: _Image) -> tuple[int, int]:
    return image.shape[1], image.shape[0]


def _array(image: Any) -> _Image:
    return np.asarray(image, np.float32)


def _shape(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))
