"""Areal surface texture parameters of height maps (ISO 25178-2), pixels without a height left out.

No S- or L-filter is applied: what a parameter means depends on the lateral resolution of the
focus measure and on the size of the map. The extremes Sp, Sv and Sz are those of single pixels.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gplws.data.topographies import level_heights

Form = Literal["none", "plane", "quadratic"]
"""What is taken out by least squares first: the mean, a plane, a polynomial of second degree."""

PARAMETERS = ("Sa", "Sq", "Ssk", "Sku", "Sp", "Sv", "Sz", "Sdq", "Sdr")
"""Keys of :func:`surface_texture`."""


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
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise ValueError(f"pixel_size must be positive and finite, got {pixel_size}")
    values = np.asarray(height, np.float64)
    if values.ndim != 2:
        raise ValueError(f"height must be (H, W), got shape {values.shape}")
    result: dict[str, float | None] = dict.fromkeys(PARAMETERS)
    degree = get_args(Form).index(form)
    is_known = np.isfinite(values)
    if is_known.sum() < (degree + 1) * (degree + 2) // 2:
        return result
    # What is left of a flat surface.
    digits = np.finfo(np.result_type(np.asarray(height).dtype, np.float32)).eps
    rounding = digits * float(np.abs(values[is_known]).max())
    values = level_heights(values, is_known, degree)
    known = values[is_known]
    deviation = math.sqrt(float(np.mean(known**2)))
    highest, lowest = float(known.max()), float(known.min())
    result |= {"Sa": float(np.abs(known).mean()), "Sq": deviation}
    result |= {"Sp": highest, "Sv": -lowest, "Sz": highest - lowest}
    if deviation > rounding:
        normal = known / deviation
        result |= {"Ssk": float(np.mean(normal**3)), "Sku": float(np.mean(normal**4))}
    if pixel_size is not None and min(values.shape) > 2:
        along_x = (values[1:-1, 2:] - values[1:-1, :-2]) / (2 * pixel_size)
        along_y = (values[2:, 1:-1] - values[:-2, 1:-1]) / (2 * pixel_size)
        steepness = along_x**2 + along_y**2
        steepness = steepness[np.isfinite(steepness) & is_known[1:-1, 1:-1]]
        if steepness.size:
            result["Sdq"] = math.sqrt(float(steepness.mean()))
            result["Sdr"] = float((np.sqrt(1 + steepness) - 1).mean())
    return result
