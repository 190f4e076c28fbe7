"""What a file holds before its axes are interpreted, and which of its images is meant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gplws.io.calibration import Calibration
from gplws.io.errors import StackReadError

_logger = logging.getLogger(__name__)

ImageChoice: TypeAlias = int | str | None
# Called with what is read and with how much there is.
Report: TypeAlias = Callable[[int, int], None]

_MOST_NAMED = 8  # in a message


@dataclass(frozen=True)
class StoredStack:
    """Pixels of a file before their axes are interpreted.

    Attributes:
        array: pixels in native byte order; lazily mapped from the file where it is uncompressed.
        axes: axes of ``array``, as far as the file names them.
        calibration: lengths from the metadata.
        single_axes: axes of size 1 that the file declares; they are not in ``array``.
    """

    array: np.ndarray
    axes: str
    calibration: Calibration
    single_axes: str = ""


@dataclass(frozen=True)
class StoredImage:
    """One of the images of a file: a scene, series or position.

    Attributes:
        name: what the file calls it; empty where it has none.
        description: its size, for messages.
        frames: how many the file declares along Z; 0 where it declares no such axis.
    """

    name: str
    description: str
    frames: int


def choose_image(
    path: Path,
    images: Sequence[StoredImage],
    wanted: ImageChoice,
    complaint: str = "holds several images",
) -> int:
    """Number of the image that is read.

    Without a wish it is the only one, or the only one that the file declares to be a stack.

    Args:
        path: the file, for messages.
        images: what it holds, in its order.
        wanted: number, from 0, or name, or the number as text; None for none.
        complaint: what is wrong where there are several.

    Raises:
        StackReadError: there is no image, or several may be meant.
        ValueError: there is no such image, or several of this name.
        TypeError: ``wanted`` is something else.
    """
    if not images:
        raise StackReadError(f"{path}: holds no image")
    listed = "; ".join(
        f"{number} {image.name!r}: {image.description}"
        if image.name
        else f"{number}: {image.description}"
        for number, image in enumerate(images[:_MOST_NAMED])
    )
    listed += "; ..." if len(images) > _MOST_NAMED else ""
    if wanted is None:
        stacks = [number for number, image in enumerate(images) if image.frames > 1]
        if len(images) == 1:
            return 0
        if len(stacks) != 1:
            raise StackReadError(
                f"{path}: {complaint}: {listed}; pass image=0 for the first of them"
            )
        _logger.info("%s: read is its only stack: %s", path, listed)
        return stacks[0]
    if isinstance(wanted, str):
        found = [number for number, image in enumerate(images) if image.name == wanted]
        if not found and wanted.isdecimal() and str(int(wanted)) == wanted:
            return choose_image(path, images, int(wanted))
        if len(found) != 1:
            raise ValueError(
                f"image={wanted!r}: {path} holds {len(found) or 'no'} images of this name: {listed}"
            )
        return found[0]
    if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer):
        raise TypeError(f"image must be a number or a name, got {type(wanted).__name__}")
    if not 0 <= wanted < len(images):
        raise ValueError(f"image={wanted}: {path} holds only {listed}")
    return int(wanted)
