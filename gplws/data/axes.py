"""Brings arrays with named axes into the order (N, H, W) or (N, H, W, 3).

Letters: Z or N frames, Y or H rows, X or W columns, C or S colour, T time. The letters I (image
series) and Q (unnamed), which TIFF readers report, count as frames where no other axis can.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

Array = TypeVar("Array", bound=np.ndarray | Tensor)

_SYNONYMS = {"N": "Z", "H": "Y", "W": "X"}
_UNNAMED = "IQ"
_KNOWN = "ZYXCST" + _UNNAMED
_MUCH_LESS = 4  # times as many rows as columns, and as many frames, make axes doubtful


def normalize_axes(axes: str, ndim: int) -> str:
    """Upper-case axes in the letters Z, Y, X, C, S, T, I, Q.

    Args:
        axes: one letter per array axis, e.g. ``"ZYX"``, ``"NHWC"`` or ``"TCZYX"``.
        ndim: number of axes of the array that ``axes`` describes.

    Returns:
        The same axes after replacing the synonyms N, H, W.

    Raises:
        TypeError: ``axes`` is not a string.
        ValueError: a letter is unknown or repeated, Y or X is missing, or the length is wrong.
    """
    if not isinstance(axes, str):
        raise TypeError(f"axes must be a string such as 'ZYX', got {type(axes).__name__}")
    letters = "".join(_SYNONYMS.get(letter, letter) for letter in axes.upper())
    unknown = sorted(set(letters) - set(_KNOWN))
    if unknown:
        raise ValueError(
            f"axes={axes!r} has unknown letters {', '.join(unknown)}; use Z or N (frames), "
            "Y or H (rows), X or W (columns), C or S (colour), T (time)"
        )
    if any(letters.count(letter) > 1 for letter in letters):
        raise ValueError(f"axes={axes!r} names an axis twice")
    if "Y" not in letters or "X" not in letters:
        raise ValueError(f"axes={axes!r} must name the rows (Y) and the columns (X)")
    if len(letters) != ndim:
        raise ValueError(f"axes={axes!r} names {len(letters)} axes, but the array has {ndim}")
    return letters


def guess_axes(shape: Sequence[int]) -> str:
    """Axes of an array without names, where only one reading makes sense.

    (N, H, W), (N, H, W, 1), (N, H, W, 3) and (N, H, W, 4) are recognised.

    Args:
        shape: shape of the array.

    Returns:
        ``"ZYX"`` or ``"ZYXS"``.

    Raises:
        ValueError: the array is one frame, or its axes are ambiguous; the message names ``axes``.
    """
    size = tuple(int(n) for n in shape)
    if len(size) == 2:
        raise ValueError(
            f"frames must hold at least 2 frames, got one image of shape {size}; "
            "a focal stack is (N, H, W) or (N, H, W, 3)"
        )
    if len(size) == 3:
        if size[-1] in (1, 3, 4):
            raise ValueError(
                f"frames of shape {size} may be one image with {size[-1]} channels or {size[0]} "
                f"frames that are {size[-1]} pixels wide; pass axes='ZYX' for the latter"
            )
        if _MUCH_LESS * size[-1] < min(size[:2]):
            raise ValueError(
                f"frames of shape {size} may be {size[-1]} frames or {size[0]} frames that are "
                f"{size[-1]} pixels wide; pass axes='YXZ' for the former, axes='ZYX' for the latter"
            )
        return "ZYX"
    if len(size) == 4:
        channels_last, channels_second = size[-1] in (1, 3, 4), size[1] in (1, 3, 4)
        if channels_last and not channels_second:
            return "ZYXS"
        if channels_second:
            raise ValueError(
                f"frames of shape {size} are ambiguous; pass axes='ZCYX' if axis 1 holds the "
                "colour channels, axes='CZYX' if axis 0 does, axes='ZYXC' if the last axis does"
            )
    raise ValueError(
        f"frames must be (N, H, W) or (N, H, W, 3), got shape {size}; "
        "pass axes, e.g. axes='TCZYX', to say what each axis is"
    )


def arrange_frames(
    array: np.ndarray | Tensor, axes: str | None, channel: int | None = None
) -> np.ndarray | Tensor:
    """View of an array as (N, H, W) or (N, H, W, 3).

    Axes of size 1 are dropped (rows and columns are kept). A fourth, constant opaque channel is
    dropped. Nothing is copied.

    Args:
        array: array or tensor of any dtype.
        axes: one letter per axis, see `normalize_axes`; None guesses, see `guess_axes`.
        channel: number of the one that is taken along the colour axis, from 0; default: all.

    Returns:
        A view of ``array``, (N, H, W) or (N, H, W, 3).

    Raises:
        ValueError: the axes do not describe a focal stack of gray or RGB frames, or have no such
            channel.
        TypeError: ``channel`` is not an integer.
    """
    shape = tuple(int(n) for n in array.shape)
    letters = guess_axes(shape) if axes is None else normalize_axes(axes, len(shape))
    if channel is not None:
        color = _channel_axis(letters, shape, channel)
        array = array[(slice(None),) * color + (channel,)]
        shape, letters = tuple(array.shape), letters[:color] + letters[color + 1 :]
    kept = [i for i, letter in enumerate(letters) if letter in "YX" or shape[i] != 1]
    named = {letters[i]: shape[i] for i in kept}
    if named.get("C") and named.get("S"):
        raise ValueError(
            f"array with axes {letters!r} and shape {shape} has two colour axes, C and S; pass "
            "channel=0 for the first along C"
        )
    frame_axis = _frame_axis(letters, named, shape)
    color_axis = next((letter for letter in "CS" if letter in named), "")
    surplus = sorted(set(named) - {frame_axis, "Y", "X", color_axis})
    if surplus:
        sizes = ", ".join(f"{letter}={named[letter]}" for letter in surplus)
        raise ValueError(
            f"array with axes {letters!r} and shape {shape} has more than frames, rows, columns "
            f"and colour ({sizes}); select one entry along these axes, e.g. "
            f"read_stack(array[0], axes={letters[1:]!r}) for the first along axis 0, or pass "
            "axes if the letters are wrong"
        )

    alpha = color_axis != "" and named[color_axis] in (2, 4)
    # Only a trailing axis or samples of one pixel (S) can be RGBA; four separate channels are not.
    separate = color_axis == "C" and letters[-1] != "C"
    if color_axis and (named[color_axis] not in (2, 3, 4) or (alpha and separate)):
        raise ValueError(
            f"array with axes {letters!r} and shape {shape} has {named[color_axis]} channels; a "
            "focal stack is gray or RGB: pass channel=0 for the first of them, or axes if another "
            "axis holds the frames"
        )
    view = array[tuple(slice(None) if i in kept else 0 for i in range(len(shape)))]
    left = [letters[i] for i in kept]
    order = [left.index(letter) for letter in (frame_axis, "Y", "X", color_axis) if letter]
    arranged = view.transpose(order) if isinstance(view, np.ndarray) else view.permute(order)
    return drop_alpha(arranged) if alpha else arranged


def _channel_axis(letters: str, shape: Sequence[int], channel: int) -> int:
    """The colour axis, which has this channel; of C and S it is C."""
    if isinstance(channel, bool) or not isinstance(channel, int | np.integer):
        raise TypeError(f"channel must be an integer, got {type(channel).__name__}")
    axis = next((letters.index(letter) for letter in "CS" if letter in letters), None)
    if axis is None:
        raise ValueError(
            f"channel={channel}: axes {letters!r} of shape {tuple(shape)} have no colour; pass "
            "axes, e.g. axes='ZCYX', if one of them counts the channels"
        )
    if not 0 <= channel < shape[axis]:
        raise ValueError(f"channel must be 0 to {shape[axis] - 1}, got {channel}")
    return axis


def drop_alpha(frames: Array, name: str = "frames") -> Array:
    """Colour or gray part of frames whose last channel is a constant opaque alpha.

    Args:
        frames: (..., 4) RGBA or (..., 2) gray and alpha.
        name: what to call the frames in messages.

    Returns:
        View (..., 3) or (...).

    Raises:
        ValueError: alpha is not constant and opaque (the dtype's maximum, or 1.0 for floats).
    """
    alpha = frames[..., -1]
    opaque = 1 if _is_floating(frames) else _integer_max(frames)
    if not bool((alpha == opaque).all()):
        raise ValueError(
            f"{name}: the alpha channel is not opaque everywhere, so the colours are not "
            "measured pixels; remove the alpha channel first"
        )
    _logger.info("%s: dropped an opaque alpha channel", name)
    return cast(Array, frames[..., :3] if frames.shape[-1] == 4 else frames[..., 0])


def _frame_axis(letters: str, named: dict[str, int], shape: tuple[int, ...]) -> str:
    """Letter of the axis that holds the frames."""
    if "Z" in named:
        return "Z"
    unnamed = [letter for letter in _UNNAMED if letter in named]
    if len(unnamed) == 1:
        return unnamed[0]
    if len(unnamed) > 1:
        raise ValueError(
            f"array with axes {letters!r} and shape {shape} does not tell which axis holds the "
            "frames; pass axes, e.g. axes='ZYX'"
        )
    others = [letter for letter in "TCS" if named.get(letter, 1) > 1]
    if "T" in others:
        fix = letters.translate(str.maketrans("TZ", "ZT"))
        raise ValueError(
            f"array with axes {letters!r} and shape {shape} has one frame per time point; if the "
            f"time axis holds the focus positions, pass axes={fix!r}"
        )
    raise ValueError(
        f"frames must hold at least 2 frames, got one: axes {letters!r}, shape {shape}"
        + ("; pass axes if another axis holds the frames" if others else "")
    )


def _is_floating(array: np.ndarray | Tensor) -> bool:
    if isinstance(array, Tensor):
        return array.dtype.is_floating_point
    return bool(np.issubdtype(array.dtype, np.floating))


def _integer_max(array: np.ndarray | Tensor) -> int:
    if isinstance(array, Tensor):
        return torch.iinfo(array.dtype).max
    return int(np.iinfo(array.dtype).max)
