"""Areal surface texture parameters of height maps (ISO 25178-2), pixels without a height left out.

No S- or L-filter is applied: what a parameter means depends on the lateral resolution of the
focus measure and on the size of the map. The extremes Sp, Sv and Sz are those of single pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Form = Literal["none", "plane", "quadratic"]

FORMS: tuple[Form, ...] = ("none", "plane", "quadratic")
"""What is taken out by least squares first: the mean, a plane, a polynomial of second degree."""

PARAMETERS = ("Sa", "Sq", "Ssk", "Sku", "Sp", "Sv", "Sz", "Sdq", "Sdr")
"""Keys of :func:`surface_texture`."""

_Map = NDArray[np.float64]

_TERMS = {"none": 1, "plane": 3, "quadratic": 6}
_PIXELS_AT_A_TIME = 2**18


def surface_texture(
    height: NDArray[np.floating], pixel_size: float | None = None, *, form: Form = "plane"
) -> dict[str, float | None]:
    """Parameters of the surface above its form.

    Args:
        height: (H, W), NaN where unknown.
        pixel_size: side of a pixel in the unit of ``height``; without it slopes are unknown.
        form: "none" takes out the mean, "plane" the tilt as well, "quadratic" also curvature.

    Returns:
        In the unit of ``height``: the mean absolute height Sa, its root mean square Sq, highest
        peak Sp, deepest valley Sv and their sum Sz. Without unit: skewness Ssk, kurtosis Sku (both
        None of a flat surface); and by central differences, where the four neighbours of a pixel
        are known, the root mean square slope Sdq and the developed area ratio Sdr (0.01 is 1% more
        area than its projection). All None where fewer pixels are known than the form has terms.

    Raises:
        ValueError: ``height`` is not (H, W), ``form`` is unknown, ``pixel_size`` is not positive.

    Source: ISO 25178-2:2021, 4.3 and 4.5.

    Example:
        >>> surface_texture(np.array([[0.0, 2.0], [0.0, 2.0]]), form="none")["Sa"]
        1.0
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise ValueError(f"pixel_size must be positive and finite, got {pixel_size}")
    values = np.asarray(height, np.float64)
    if values.ndim != 2:
        raise ValueError(f"height must be (H, W), got shape {values.shape}")
    result: dict[str, float | None] = dict.fromkeys(PARAMETERS)
    if np.isfinite(values).sum() < _TERMS[form]:
        return result
    values = values - _form(values, form)
    known = values[np.isfinite(values)]
    deviation = math.sqrt(float(np.mean(known**2)))
    highest, lowest = float(known.max()), float(known.min())
    result |= {"Sa": float(np.abs(known).mean()), "Sq": deviation}
    result |= {"Sp": highest, "Sv": -lowest, "Sz": highest - lowest}
    if deviation > 0:
        normal = known / deviation
        result |= {"Ssk": float(np.mean(normal**3)), "Sku": float(np.mean(normal**4))}
    if pixel_size is not None and min(values.shape) > 2:
        along_x = (values[1:-1, 2:] - values[1:-1, :-2]) / (2 * pixel_size)
        along_y = (values[2:, 1:-1] - values[:-2, 1:-1]) / (2 * pixel_size)
        steepness = along_x**2 + along_y**2
        steepness = steepness[np.isfinite(steepness) & np.isfinite(values[1:-1, 1:-1])]
        if steepness.size:
            result["Sdq"] = math.sqrt(float(steepness.mean()))
            result["Sdr"] = float((np.sqrt(1 + steepness) - 1).mean())
    return result


def _form(values: _Map, form: Form) -> _Map:
    """The least squares polynomial of a map, (H, W)."""
    terms = _TERMS[form]
    moments, projections = np.zeros((terms, terms)), np.zeros(terms)
    offset = float(np.nanmean(values))  # far from zero, products would lose what matters
    for rows, basis in _bases(values.shape, terms):
        part = values[rows] - offset
        known = np.isfinite(part)
        of_known = basis[:, known]
        moments += of_known @ of_known.T
        projections += of_known @ part[known]
    # Fewer independent pixels than terms, such as those of one line: the smallest solution.
    weights = np.linalg.lstsq(moments, projections, rcond=1e-12)[0]
    result = np.empty(values.shape)
    for rows, basis in _bases(values.shape, terms):
        result[rows] = offset + np.tensordot(weights, basis, 1)
    return result


def _bases(shape: tuple[int, ...], terms: int) -> Iterator[tuple[slice, _Map]]:
    """Bands of rows, and the polynomials there, (terms, rows, W)."""
    height, width = shape
    x = np.linspace(-1, 1, width)[None]
    y = np.linspace(-1, 1, height)[:, None]
    step = max(1, _PIXELS_AT_A_TIME // width)
    for first in range(0, height, step):
        rows = slice(first, first + step)
        down = y[rows]
        polynomials = (np.ones_like(down * x), x, down, x**2, x * down, down**2)[:terms]
        yield rows, np.stack(np.broadcast_arrays(*polynomials))
