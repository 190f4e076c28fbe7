"""A focal stack: frames, where each was focused, and how large a pixel is."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gplws.data.axes import arrange_frames
from gplws.luminance import LUMINANCE
from gplws.positions import rise_or_fall

_TENSOR_DTYPES = frozenset(
    {
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    }
)

# Floats up to here are taken for shares of full scale, some overexposed; beyond, for counts.
_LARGEST_SHARE = 2.0
# Integers of so many bits fill their dtype; wider ones only hold what had fewer bits.
_BITS_OF_CAMERAS = 16
_FEWEST_BITS = 8
# The range of a stack is that of a sample of its values, without the highest and the lowest of
# them: a hot pixel, or a division by a flat field that is nearly 0 there, says nothing of it.
_SAMPLE = 2**20
_OUTLIERS = 0.0005


@dataclass(frozen=True, eq=False)
class FocalStack:
    """Frames in focus order with their calibration; checked when it is made, never copied.

    Attributes:
        frames: (N, H, W) gray or (N, H, W, 3) RGB, N >= 2, H and W >= 1; numpy array or tensor on
            any device, in the dtype of the source (any integer or float, no bool), finite.
            bfloat16, which numpy and files do not know, becomes float32.
        focus_positions_um: (N,) float64, strictly rising or falling, read-only; um. None: unknown,
            and heights are then in frames.
        pixel_size_um: side of a square pixel on the object, um; None: unknown.
        names: one name per frame, e.g. file names, used in error messages; None: no names.
        metadata: what else the source said.
        levels: black and span of all frames: :meth:`gray` is (value - black) / span. Black is 0, or
            the lowest value where that is negative. The span is the maximum of the dtype of 8 and
            16-bit integers, and 1 for floats that need no more than 2. Wider integers and floats
            beyond are counts: the least 2^k - 1 that holds the highest one, k >= 8 for integers.
            Highest and lowest leave out one value in 2000 each; what is below black counts as
            black.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: fewer than two frames, NaN or infinite pixels, positions of the wrong length,
            not finite or not strictly monotonic, a pixel size that is not positive.

    Example:
        >>> stack = FocalStack(np.zeros((3, 4, 5), np.uint8), focus_positions_um=[0.0, 2.0, 4.0])
        >>> stack.gray(slice(0, 2)).shape
        torch.Size([3, 2, 5])
    """

    frames: np.ndarray | Tensor
    focus_positions_um: np.ndarray | None = None
    pixel_size_um: float | None = None
    names: tuple[str, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[float, float] = field(init=False)

    def __repr__(self) -> str:
        positions = self.focus_positions_um
        reach = "None" if positions is None else f"{positions[0]:g} .. {positions[-1]:g}"
        kind = str(self.frames.dtype).removeprefix("torch.")
        return (
            f"{type(self).__name__}({self.n_frames} frames of {self.height} x {self.width} pixels, "
            f"{'gray' if self.frames.ndim == 3 else 'RGB'} {kind}, focus_positions_um={reach}, "
            f"pixel_size_um={self.pixel_size_um})"
        )

    def __post_init__(self) -> None:
        _check_frames(self.frames)
        if isinstance(self.frames, Tensor) and self.frames.dtype == torch.bfloat16:
            object.__setattr__(self, "frames", self.frames.float())
        if self.names is not None:
            names = tuple(str(name) for name in self.names)
            if len(names) != self.n_frames:
                raise ValueError(
                    f"names must hold one name per frame ({self.n_frames}), got {len(names)}"
                )
            object.__setattr__(self, "names", names)
        if self.focus_positions_um is not None:
            positions = _checked_positions(self.focus_positions_um, self.n_frames)
            object.__setattr__(self, "focus_positions_um", positions)
        if self.pixel_size_um is not None:
            size = checked_length(self.pixel_size_um, "pixel_size_um")
            object.__setattr__(self, "pixel_size_um", size)
        object.__setattr__(self, "metadata", dict(self.metadata))
        object.__setattr__(self, "levels", self._levels())

    @classmethod
    def from_frames(
        cls,
        frames: np.ndarray | Tensor,
        *,
        axes: str | None = None,
        channel: int | None = None,
        z_step_um: float | None = None,
        focus_positions_um: Sequence[float] | np.ndarray | Tensor | None = None,
        pixel_size_um: float | None = None,
        names: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> FocalStack:
        """Focal stack from an array whose axes are named or unambiguous.

        Args:
            frames: array or tensor; without ``axes`` (N, H, W), (N, H, W, 1), (N, H, W, 3) or
                (N, H, W, 4) with an opaque alpha channel, which is dropped.
            axes: one letter per axis: Z or N frames, Y or H rows, X or W columns, C or S colour,
                T time, e.g. ``"TCZYX"``; axes of size 1 are dropped.
            channel: number of the one that is taken along the colour axis, from 0; default: all,
                which must be one or three.
            z_step_um: distance from one focus position to the next, um, > 0; the first is 0.
            focus_positions_um: (N,) positions in um; excludes ``z_step_um``.
            pixel_size_um: side of a pixel on the object, um.
            names: one name per frame.
            metadata: what else is known about the source.

        Returns:
            The stack; its frames are a view of ``frames``.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: as for the class, and axes that are wrong or ambiguous, both or neither of
                which is guessed; a z-step that is not positive.
        """
        if isinstance(frames, np.ma.MaskedArray):
            raise TypeError("frames must be a plain array: a mask is not used; fill what it hides")
        if not isinstance(frames, np.ndarray | Tensor):
            raise TypeError(
                f"frames must be a numpy array or a torch tensor, got {type(frames).__name__}"
            )
        arranged = arrange_frames(frames, axes, channel)
        positions = resolve_positions(arranged.shape[0], z_step_um, focus_positions_um)
        return cls(
            frames=arranged,
            focus_positions_um=positions,
            pixel_size_um=pixel_size_um,
            names=None if names is None else tuple(names),
            metadata={} if metadata is None else metadata,
        )

    @property
    def n_frames(self) -> int:
        """Number of frames N."""
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        """Number of rows H."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """Number of columns W."""
        return int(self.frames.shape[2])

    @property
    def is_color(self) -> bool:
        """Whether the frames are RGB."""
        return self.frames.ndim == 4

    def gray(
        self,
        rows: slice = slice(None),
        columns: slice = slice(None),
        levels: Tensor | None = None,
        *,
        frames: slice = slice(None),
    ) -> Tensor:
        """Luminance of a rectangle, so that large stacks are converted tile by tile.

        RGB becomes Rec. 709 luminance, and values shares of full scale by the ``levels`` of the
        stack. A pixel's value does not depend on the rectangle it is read with.

        Args:
            rows: rows to convert; all of them by default.
            columns: columns to convert; all of them by default.
            levels: (2,) float32, where the frames are, in place of those of the stack: for memory
                that was filled with other frames since.
            frames: frames to convert; all of them by default.

        Returns:
            (N, h, w) float32, contiguous and new; on the device of a tensor's frames, else on the
            CPU.

        Source: Rec. ITU-R BT.709-6, item 3.2.
        """
        part = self.frames[frames, rows, columns]
        black, span = self.levels if levels is None else levels.unbind()
        if isinstance(part, Tensor):
            gray = torch.empty(part.shape[:3], dtype=torch.float32, device=part.device)
            if self.is_color:
                _tensor_luminance(part, gray)
            else:
                gray.copy_(part)
            if part.dtype.is_signed:
                gray.sub_(black).clamp_(min=0)
            return gray.div_(span)
        values = np.empty(part.shape[:3], np.float32)
        # Frame by frame, the work space stays in the cache. Copying into float32 takes any byte
        # order, stride and read-only memory.
        for frame, out in zip(part, values, strict=True):
            if self.is_color:
                _luminance(frame, out)
            else:
                np.copyto(out, frame)
            if part.dtype.kind != "u":
                out -= np.float32(black)
                np.maximum(out, 0, out=out)
            out /= np.float32(span)
        return torch.from_numpy(values)

    def frame_label(self, index: int) -> str:
        """Frame number, with the name where there is one, for messages."""
        return f"frame {index}" + (f" ({self.names[index]})" if self.names else "")

    def _levels(self) -> tuple[float, float]:
        """Black and span of the frames, which are checked on the way."""
        limits = _limits(self.frames.dtype)
        top = 0 if limits is None else limits.max
        bits = top.bit_length()
        if limits is not None and limits.min == 0 and bits <= _BITS_OF_CAMERAS:
            return 0.0, float(top)
        if limits is None:
            self._check_finite()
        low, high = _usual_range(self.frames)
        black = min(low, 0)
        if limits is None and high - black <= _LARGEST_SHARE:
            return float(black), 1.0
        least = bits if bits <= _BITS_OF_CAMERAS else _FEWEST_BITS
        return float(black), 2.0 ** max(math.ceil(high - black).bit_length(), least) - 1.0

    def _check_finite(self) -> None:
        lows, highs = _extremes(self.frames)
        with np.errstate(over="ignore"):
            finite = np.isfinite(lows.astype(np.float32)) & np.isfinite(highs.astype(np.float32))
        if not finite.all():
            bad = np.flatnonzero(~finite)
            more = f" and {bad.size - 1} more frames" if bad.size > 1 else ""
            raise ValueError(
                f"frames must be finite in float32: {self.frame_label(int(bad[0]))}{more} "
                "has NaN or infinite pixels"
            )


def _limits(dtype: np.dtype | torch.dtype) -> np.iinfo | torch.iinfo | None:
    """Least and largest value of an integer dtype; None for floats."""
    if isinstance(dtype, torch.dtype):
        return None if dtype.is_floating_point else torch.iinfo(dtype)
    return None if dtype.kind == "f" else np.iinfo(dtype)


def _extremes(frames: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each frame of floats, (N,) each, NaN where a frame has NaN."""
    if isinstance(frames, Tensor):
        # Collected first: one synchronisation with the device instead of some per frame.
        pairs = torch.stack([torch.stack(torch.aminmax(frame)) for frame in frames.detach()])
        lows, highs = pairs.cpu().numpy().T
        return lows, highs
    with np.errstate(invalid="ignore"):
        lows, highs = np.array([(frame.min(), frame.max()) for frame in frames]).T
    return lows, highs


def _usual_range(frames: np.ndarray | Tensor) -> tuple[float, float]:
    """Lowest and highest value without the outliers."""
    step = max(1, math.ceil(math.sqrt(math.prod(frames.shape) / _SAMPLE)))
    sample = frames[:, ::step, ::step]
    values = np.ravel(sample.detach().cpu().numpy() if isinstance(sample, Tensor) else sample)
    outliers = int(_OUTLIERS * values.size)
    ordered = np.partition(values, (outliers, values.size - 1 - outliers))
    return ordered[outliers].item(), ordered[-1 - outliers].item()


# In both functions products and sums are separate: a fused multiply-add would round the tails of
# vectors otherwise than their bodies, and pixels would depend on the band they are read with.


def _luminance(rgb: np.ndarray, out: np.ndarray) -> None:
    """Weighted sum over the last axis of ``rgb``, in float32."""
    channel = np.empty_like(out)
    np.copyto(out, rgb[..., 0])
    out *= np.float32(LUMINANCE[0])
    for index in (1, 2):
        np.copyto(channel, rgb[..., index])
        channel *= np.float32(LUMINANCE[index])
        out += channel


def _tensor_luminance(rgb: Tensor, out: Tensor) -> None:
    """Weighted sum over the last axis of ``rgb``, in float32."""
    channel = torch.empty_like(out)
    out.copy_(rgb[..., 0]).mul_(LUMINANCE[0])
    for index in (1, 2):
        out.add_(channel.copy_(rgb[..., index]).mul_(LUMINANCE[index]))


def resolve_positions(
    n_frames: int,
    z_step_um: float | None,
    focus_positions_um: Sequence[float] | np.ndarray | Tensor | None,
) -> np.ndarray | None:
    """Focus positions from a step or from explicit positions.

    Args:
        n_frames: number of frames N.
        z_step_um: distance between frames, um, > 0.
        focus_positions_um: (N,) positions, um.

    Returns:
        (N,) float64 in um, or None if neither is given.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: both are given, or one is out of range, see `FocalStack`.
    """
    if focus_positions_um is not None:
        if z_step_um is not None:
            raise ValueError("z_step_um and focus_positions_um exclude each other; pass only one")
        return _checked_positions(focus_positions_um, n_frames)
    if z_step_um is None:
        return None
    if isinstance(z_step_um, numbers.Real) and -math.inf < z_step_um < 0:
        raise ValueError(
            f"z_step_um must be positive (um), got {z_step_um}; where the plane in focus sinks "
            "from frame to frame, z_direction='down' says so"
        )
    return checked_length(z_step_um, "z_step_um") * np.arange(n_frames, dtype=np.float64)


def checked_length(value: float, name: str) -> float:
    """A positive finite length as float.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: ``value`` is not positive and finite; the message names ``name``.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in um, got {type(value).__name__}")
    length = float(value)
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"{name} must be positive and finite (um), got {length}")
    return length


def _checked_positions(
    positions: Sequence[float] | np.ndarray | Tensor, n_frames: int
) -> np.ndarray:
    values = positions.detach().cpu().numpy() if isinstance(positions, Tensor) else positions
    try:
        checked = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"focus_positions_um must hold numbers in um: {error}") from error
    if checked.shape != (n_frames,):
        raise ValueError(
            f"focus_positions_um must have shape ({n_frames},), one position per frame, "
            f"got {checked.shape}"
        )
    if not np.isfinite(checked).all():
        index = int(np.flatnonzero(~np.isfinite(checked))[0])
        raise ValueError(f"focus_positions_um must be finite, got {checked[index]} at {index}")
    steps = np.diff(checked)
    wrong = steps <= 0 if checked[-1] > checked[0] else steps >= 0
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ValueError(
            "focus_positions_um must rise or fall strictly from frame to frame, got "
            f"{checked[index]} at {index} followed by {checked[index + 1]}"
        )
    # What is searched counts in float32 from the first.
    if not rise_or_fall((checked - checked[0]).astype(np.float32)):
        raise ValueError(
            "focus_positions_um must have steps that float32 tells apart within their range, got "
            f"{np.abs(steps).min():g} within {abs(checked[-1] - checked[0]):g}"
        )
    checked.setflags(write=False)
    return checked


def _check_frames(frames: object) -> None:
    if isinstance(frames, np.ndarray):
        if frames.dtype.kind not in "iuf" or frames.dtype.itemsize > 8:
            raise TypeError(
                f"frames must be integers or floats of at most 64 bits, got dtype {frames.dtype}"
            )
    elif isinstance(frames, Tensor):
        if frames.dtype not in _TENSOR_DTYPES:
            raise TypeError(f"frames must be integers or floats, got dtype {frames.dtype}")
    else:
        raise TypeError(
            f"frames must be a numpy array or a torch tensor, got {type(frames).__name__}"
        )
    shape = tuple(frames.shape)
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
        raise ValueError(
            f"frames must be (N, H, W) or (N, H, W, 3), got shape {shape}; "
            "FocalStack.from_frames(frames, axes=...) takes other orders"
        )
    if shape[0] < 2:
        raise ValueError(f"frames must hold at least 2 frames, got {shape[0]} (shape {shape})")
    if shape[1] < 1 or shape[2] < 1:
        raise ValueError(f"frames must have at least one row and one column, got shape {shape}")
