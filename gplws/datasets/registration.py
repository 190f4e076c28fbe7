"""Registration of a measured height map to the depth of a focal stack, and their fusion.

Lengths are in um. A map has its origin in the middle, x to the right and y downwards. A point X of
the stack is at U = s R X + t in the measured map, with R = [[cos, -sin], [sin, cos]], and

    height of the stack at X = measured height at U + offset + slope . X

The pixel sizes are known, up to the scale s near 1. Slope and offset are the tilt of one stage
against the other and the unknown zero of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gplws.data.focal_stack import checked_length

Map = NDArray[np.float64]
Spectrum = NDArray[np.complex128]

# Longer side of the stack's map when all shifts are tried, pixels.
_SEARCH_SIZE = 64
_ANGLE_STEP_DEG = 3.0
# Shifts that leave less of the smaller map in common are not tried.
_LEAST_OVERLAP = 0.3
# How many starts are refined.
_STARTS = 3
# Smoothing of the passes: the first covers what the search leaves open (in its pixels), each
# further one has half of it, down to the last (in pixels of the stack). The last is smoothed too,
# as depth from focus never resolves single pixels.
_FIRST_SMOOTHING = 1.5
_LAST_SMOOTHING_PX = 1.5
_ITERATIONS = 30
# Distance from the local median beyond which a pixel is left out: deviations of that distance, but
# no less than a share of the relief, for maps without noise.
_SPIKE = 6.0
_SPIKE_SHARE = 0.1
_TUKEY = 4.685  # 95% efficiency for normal errors
_DEVIATION_OF_MAD = 1.4826
# Correlation of the relief below which two maps do not show the same surface.
_LEAST_CORRELATION = 0.5


class RegistrationError(ValueError):
    """Two height maps do not match; the message says what was found."""


@dataclass(frozen=True)
class Registration:
    """Where a measured height map lies relative to a stack; formulas at the module.

    Attributes:
        rotation_deg: angle of R, turning x towards y (clockwise in the picture).
        scale: s, lengths of the measured map per length of the stack.
        shift_um: t as (x, y).
        offset_um: added to measured heights.
        slope: (along x, along y) of the plane added to measured heights, um per um.
        residual_um: standard deviation of the remaining difference, from its median absolute
            deviation.
        correlation: of the relief of both maps, -1..1, after registration.
        overlap: share of the stack's pixels that the measured map covers, 0..1.
    """

    rotation_deg: float
    scale: float
    shift_um: tuple[float, float]
    offset_um: float
    slope: tuple[float, float]
    residual_um: float
    correlation: float
    overlap: float

    def parameters(self) -> Map:
        """(7,) rotation in rad, log of the scale, shift, offset, slope."""
        return np.array(
            [
                math.radians(self.rotation_deg),
                math.log(self.scale),
                *self.shift_um,
                self.offset_um,
                *self.slope,
            ]
        )


def register_height_map(
    reference_um: NDArray[np.floating],
    measured_um: NDArray[np.floating],
    *,
    reference_pixel_um: float,
    measured_pixel_um: float,
    max_rotation_deg: float = 15.0,
    max_scale_error: float = 0.1,
) -> Registration:
    """Where a measured height map lies relative to the height map of a stack.

    First all shifts, and rotations in steps of 3 degrees, are tried on reduced maps whose planes
    were taken out, by normalised correlation of what both know. The best three are refined on the
    heights themselves: least squares over rotation, scale, shift and plane together, with weights
    that take out what does not fit (Tukey), from coarse to fine.

    Args:
        reference_um: (H, W) heights from the stack, um, NaN where unknown.
        measured_um: (h, w) measured heights, um, NaN where unknown; any size.
        reference_pixel_um, measured_pixel_um: sides of their pixels, um.
        max_rotation_deg: largest rotation, either way, to within 3 degrees; 180 for any.
        max_scale_error: how far the scale may be from 1, above 0 and below 1.

    Returns:
        The registration.

    Raises:
        RegistrationError: no placement where the relief of both correlates by at least 0.5.
        ValueError: a map is not (H, W) of at least 16 x 16 with some pixels known, or a number is
            out of range.

    Source: Padfield, "Masked object registration in the Fourier domain", IEEE TIP 21(5), 2012
    (correlation with masks); Beaton and Tukey, Technometrics 16(2), 1974 (weights).
    """
    reference_pixel = checked_length(reference_pixel_um, "reference_pixel_um")
    measured_pixel = checked_length(measured_pixel_um, "measured_pixel_um")
    if not 0 <= max_rotation_deg <= 180:
        raise ValueError(f"max_rotation_deg: expected 0..180, got {max_rotation_deg}")
    if not 0 < max_scale_error < 1:
        raise ValueError(f"max_scale_error: expected above 0, below 1, got {max_scale_error}")
    reference = _checked_map(reference_um, "reference_um")
    measured = _checked_map(measured_um, "measured_um")

    reference, measured = _despiked(reference), _despiked(measured)
    starts = _search(reference, reference_pixel, measured, measured_pixel, max_rotation_deg)

    def possible(parameters: Map) -> bool:
        turned = abs(math.remainder(parameters[0], 2 * math.pi))
        return turned <= math.radians(max_rotation_deg + _ANGLE_STEP_DEG) and (
            abs(math.exp(parameters[1]) - 1) <= max_scale_error
        )

    coarse, *finer = _smoothing_passes(max(reference.shape))
    pair = _Pair(reference, reference_pixel, measured, measured_pixel, coarse)
    refined = [pair.refine(start) for start in starts]
    scored = [(pair.correlation(best), best) for best in refined if possible(best)]
    correlation, best = max(scored, key=lambda item: item[0], default=(-1.0, starts[0]))
    if correlation >= _LEAST_CORRELATION:
        for smoothing in finer:
            pair = _Pair(reference, reference_pixel, measured, measured_pixel, smoothing)
            best = pair.refine(best)
        correlation = pair.correlation(best) if possible(best) else -1.0
    if correlation < _LEAST_CORRELATION:
        raise RegistrationError(
            "measured_um: no placement where it shows the relief of the stack (best correlation "
            f"{correlation:.2f}); check the pixel sizes, the direction of heights, and that it is "
            "not mirrored"
        )
    residual, known = pair.residual(best)
    deviation = np.abs(residual[known] - np.median(residual[known]))
    found = Registration(
        rotation_deg=math.degrees(best[0]),
        scale=math.exp(best[1]),
        shift_um=(float(best[2]), float(best[3])),
        offset_um=float(best[4]),
        slope=(float(best[5]), float(best[6])),
        residual_um=float(_DEVIATION_OF_MAD * np.median(deviation)),
        correlation=correlation,
        overlap=0.0,
    )
    shape = (reference.shape[0], reference.shape[1])
    aligned = align_height_map(
        measured_um,
        found,
        shape,
        reference_pixel_um=reference_pixel,
        measured_pixel_um=measured_pixel,
    )
    return replace(found, overlap=float(np.isfinite(aligned).mean()))


def align_height_map(
    measured_um: NDArray[np.floating],
    registration: Registration,
    shape: tuple[int, int],
    *,
    reference_pixel_um: float,
    measured_pixel_um: float,
) -> NDArray[np.float32]:
    """A measured height map in the pixels and on the height axis of the stack.

    Where the stack's pixels are the larger ones, the measured map is smoothed to their size; then
    it is sampled bilinearly. A pixel any of whose four neighbours is unknown is unknown.

    Args:
        measured_um: (h, w) measured heights, um, NaN where unknown.
        registration: from `register_height_map`.
        shape: (H, W) of the stack.
        reference_pixel_um, measured_pixel_um: sides of the pixels of stack and map, um.

    Returns:
        (H, W) float32, um, NaN where unknown.
    """
    measured = _checked_map(measured_um, "measured_um")
    ratio = reference_pixel_um / measured_pixel_um
    measured = _antialiased(measured, ratio)
    x, y = _grid(shape, reference_pixel_um)
    parameters = registration.parameters()
    u, v = _placed(parameters, x, y)
    height = _sample(measured, u, v, measured_pixel_um)
    return (height + _plane(parameters, x, y)).astype(np.float32)


class _Pair:
    """Both maps smoothed alike, for the least squares of one pass."""

    def __init__(
        self,
        reference: Map,
        reference_pixel: float,
        measured: Map,
        measured_pixel: float,
        smoothing_px: float,
    ) -> None:
        # Smoothed maps hold no more than what every second deviation shows.
        thin = (slice(None, None, max(1, int(smoothing_px / 2))),) * 2
        self.reference = _smooth(reference, smoothing_px)[thin]
        self.measured_pixel = measured_pixel
        self.measured = _smooth(measured, smoothing_px * reference_pixel / measured_pixel)
        down, right = np.gradient(self.measured, measured_pixel)
        self.gradient_u, self.gradient_v = np.asarray(right), np.asarray(down)
        self.x, self.y = (axis[thin] for axis in _grid(reference.shape, reference_pixel))
        self.field = float(max(np.abs(self.x).max(), np.abs(self.y).max()))
        self.reference_pixel = reference_pixel

    def residual(self, parameters: Map) -> tuple[Map, NDArray[np.bool_]]:
        """Placed measured height minus the stack's, (H, W), and where it is known."""
        u, v = _placed(parameters, self.x, self.y)
        height = _sample(self.measured, u, v, self.measured_pixel)
        residual = height + _plane(parameters, self.x, self.y) - self.reference
        return residual, np.isfinite(residual)

    def refine(self, start: Map) -> Map:
        """Parameters after damped Gauss-Newton steps with Tukey weights."""
        parameters = start.copy()
        residual, known = self.residual(parameters)
        if not start[4:].any() and known.any():  # no plane yet: begin with the level
            parameters[4] = -np.median(residual[known])
            residual, known = self.residual(parameters)
        damping = 1e-3
        for _ in range(_ITERATIONS):
            if known.sum() < 32:
                break
            weights = _tukey(residual[known])
            jacobian = self._jacobian(parameters, known)
            usable = np.isfinite(jacobian).all(axis=1)
            weighted = jacobian[usable] * weights[usable, None]
            normal = weighted.T @ jacobian[usable]
            right = -weighted.T @ residual[known][usable]
            trial, step = parameters, np.zeros(7)
            cost = _cost(residual[known])
            for _ in range(8):
                damped = normal + damping * np.diag(np.diag(normal).clip(1e-12))
                step = np.linalg.lstsq(damped, right, rcond=None)[0] / self._units()
                trial = parameters + step
                trial_residual, trial_known = self.residual(trial)
                if trial_known.sum() >= 0.5 * known.sum() and _cost(
                    trial_residual[trial_known]
                ) <= cost * (1 + 1e-12):
                    damping = max(damping / 5, 1e-9)
                    break
                damping *= 5
            else:
                break
            parameters, residual, known = trial, trial_residual, trial_known
            if self._moved_px(step) < 1e-4:
                break
        return parameters

    def correlation(self, parameters: Map) -> float:
        """Correlation of both reliefs, each without its plane; -1 where too little is known."""
        residual, known = self.residual(parameters)
        if known.sum() < 32:
            return -1.0
        basis = np.stack([np.ones(known.sum()), self.x[known], self.y[known]], 1)
        basis, _ = np.linalg.qr(basis)
        reference = self.reference[known]
        placed = residual[known] + reference
        reference = reference - basis @ (basis.T @ reference)
        placed = placed - basis @ (basis.T @ placed)
        norm = math.sqrt(float((reference**2).sum() * (placed**2).sum()))
        return float((reference * placed).sum() / norm) if norm > 0 else -1.0

    def _units(self) -> Map:
        """What each parameter is multiplied with so that a change of 1 moves the rim by 1 um."""
        return np.array([self.field, self.field, 1.0, 1.0, 1.0, self.field, self.field])

    def _moved_px(self, step: Map) -> float:
        return float(np.abs(step * self._units()).max()) / self.reference_pixel

    def _jacobian(self, parameters: Map, known: NDArray[np.bool_]) -> Map:
        """(M, 7) derivatives of the known residuals by the scaled parameters."""
        x, y = self.x[known], self.y[known]
        u, v = _placed(parameters, x, y)
        along_u = _sample(self.gradient_u, u, v, self.measured_pixel)
        along_v = _sample(self.gradient_v, u, v, self.measured_pixel)
        turned_u, turned_v = u - parameters[2], v - parameters[3]  # s R X
        columns = [
            along_v * turned_u - along_u * turned_v,
            along_u * turned_u + along_v * turned_v,
            along_u,
            along_v,
            np.ones_like(x),
            x,
            y,
        ]
        return np.stack(columns, 1) / self._units()


def _smoothing_passes(size: int) -> list[float]:
    """Deviations in pixels of the stack, falling, for maps whose longer side is ``size``."""
    passes = [_LAST_SMOOTHING_PX]
    first = _FIRST_SMOOTHING * max(2.0, size / _SEARCH_SIZE)
    while passes[0] < first or len(passes) < 3:
        passes.insert(0, 2 * passes[0])
    return passes


def _search(
    reference: Map,
    reference_pixel: float,
    measured: Map,
    measured_pixel: float,
    max_rotation: float,
) -> list[Map]:
    """Starts (7,) for the refinement, best first: rotations and shifts of highest correlation."""
    pixel = reference_pixel * max(1.0, max(reference.shape) / _SEARCH_SIZE)
    extent = [size * reference_pixel for size in reference.shape]
    shape = (round(extent[0] / pixel), round(extent[1] / pixel))
    reduced = _antialiased(reference, pixel / reference_pixel)
    fixed = _relief(_resampled(reduced, reference_pixel, shape, pixel, 0.0))
    diagonal = math.hypot(*measured.shape) * measured_pixel
    side = math.ceil(diagonal / pixel) + 2
    smoothed = _antialiased(measured, pixel / measured_pixel)
    size = [-(-(length + side) // 32) * 32 for length in shape]  # transforms fast
    fixed_spectra = _spectra(fixed, size)
    count = math.floor(max_rotation / _ANGLE_STEP_DEG)
    candidates = []
    for turn in range(-count, count + 1):
        angle = math.radians(turn * _ANGLE_STEP_DEG)
        moving = _relief(_resampled(smoothed, measured_pixel, (side, side), pixel, angle))
        score, (row, column) = _best_shift(fixed_spectra, _spectra(moving, size), shape)
        # Pixel y + k of the stack lies on pixel y of the turned map; both count from the middle.
        along_x = pixel * ((shape[1] - 1) / 2 - (side - 1) / 2 - column)
        along_y = pixel * ((shape[0] - 1) / 2 - (side - 1) / 2 - row)
        cosine, sine = math.cos(angle), math.sin(angle)
        shift = (cosine * along_x - sine * along_y, sine * along_x + cosine * along_y)
        candidates.append((score, np.array([angle, 0.0, *shift, 0.0, 0.0, 0.0])))
    candidates.sort(key=lambda candidate: -candidate[0])
    return [start for _, start in candidates[:_STARTS]]


class _Spectra(NamedTuple):
    """Fourier transforms of a map with unknown pixels, zero-padded."""

    size: list[int]
    known: int
    mask: Spectrum
    values: Spectrum
    squares: Spectrum


def _spectra(values: Map, size: list[int]) -> _Spectra:
    mask, filled = np.isfinite(values), np.nan_to_num(values)
    transformed = [np.fft.rfft2(v, size) for v in (mask.astype(np.float64), filled, filled**2)]
    return _Spectra(size, int(mask.sum()), *transformed)


def _best_shift(
    fixed: _Spectra, moving: _Spectra, shape: tuple[int, int]
) -> tuple[float, tuple[int, int]]:
    """Highest correlation over all shifts k of fixed(y + k) against moving(y), and that k.

    ``shape`` is that of the fixed map.
    """

    def correlate(first: Spectrum, second: Spectrum) -> Map:
        return np.fft.irfft2(first * second.conj(), fixed.size)

    count = correlate(fixed.mask, moving.mask).round()
    safe = np.maximum(count, 1)
    sum_a, sum_b = correlate(fixed.values, moving.mask), correlate(fixed.mask, moving.values)
    covariance = correlate(fixed.values, moving.values) - sum_a * sum_b / safe
    spread_a = np.maximum(correlate(fixed.squares, moving.mask) - sum_a**2 / safe, 0)
    spread_b = np.maximum(correlate(fixed.mask, moving.squares) - sum_b**2 / safe, 0)
    spread = np.sqrt(spread_a * spread_b)
    enough = count >= _LEAST_OVERLAP * min(fixed.known, moving.known)
    usable = enough & (spread > 1e-6 * spread.max())
    score = np.where(usable, covariance / np.maximum(spread, 1e-300), -1.0)
    place = np.unravel_index(int(score.argmax()), score.shape)
    row, column = (
        int(k) - length if k >= part else int(k)
        for k, length, part in zip(place, fixed.size, shape, strict=True)
    )
    return float(score[place]), (row, column)


def _relief(values: Map) -> Map:
    """Detail of a map without its plane and large bends, NaN where unknown."""
    return _smooth(values, 1.0) - _smooth(values, max(values.shape) / 8)


def _resampled(
    values: Map, pixel: float, shape: tuple[int, int], new_pixel: float, angle: float
) -> Map:
    """The map turned about its middle, with other pixels."""
    x, y = _grid(shape, new_pixel)
    u, v = _placed(np.array([angle, 0, 0, 0, 0, 0, 0.0]), x, y)
    return _sample(values, u, v, pixel)


def _antialiased(values: Map, ratio: float) -> Map:
    """Smoothed for pixels that are ``ratio`` times as large; what is unknown stays unknown."""
    if ratio <= 1:
        return values
    return np.where(np.isfinite(values), _smooth(values, 0.4 * math.sqrt(ratio**2 - 1)), np.nan)


def _smooth(values: Map, sigma_px: float) -> Map:
    """Gaussian mean of what is known; NaN where less than half of the weight is known."""
    import cv2

    known = np.isfinite(values)

    def blurred(image: Map) -> Map:
        border = cv2.BORDER_REPLICATE
        return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma_px, borderType=border), np.float64)

    weight = blurred(known.astype(np.float64))
    total = blurred(np.where(known, values, 0.0))
    # The known pixels' centre of weight is off the pixel beside holes, which bends slopes there.
    return np.where(known & (weight > 0.5), total / np.maximum(weight, 1e-9), np.nan)


def _despiked(values: Map) -> Map:
    """The map without pixels that stand far out of the median of their 5 x 5 neighbours.

    Smoothing would spread them over pixels that the weights then could not tell from the others.
    """
    import cv2

    known = np.isfinite(values)
    filled = np.where(known, values, np.median(values[known])).astype(np.float32)
    for _ in range(2):  # the second time, what is unknown has the median of its neighbours
        median = cv2.medianBlur(filled, 5)
        filled = np.where(known, filled, median)
    away = values - median
    low, high = np.percentile(values[known], (5, 95))
    limit = max(_SPIKE * _scale(away[known]), _SPIKE_SHARE * float(high - low))
    return np.where(known & (np.abs(away) <= limit), values, np.nan)


def _grid(shape: tuple[int, ...], pixel: float) -> tuple[Map, Map]:
    """x and y of the pixels, (H, W) each, um from the middle."""
    y = (np.arange(shape[0]) - (shape[0] - 1) / 2) * pixel
    x = (np.arange(shape[1]) - (shape[1] - 1) / 2) * pixel
    grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
    return grid_x, grid_y


def _placed(parameters: Map, x: Map, y: Map) -> tuple[Map, Map]:
    """Where points of the stack are in the measured map, um."""
    scale = math.exp(parameters[1])
    cosine, sine = scale * math.cos(parameters[0]), scale * math.sin(parameters[0])
    return cosine * x - sine * y + parameters[2], sine * x + cosine * y + parameters[3]


def _plane(parameters: Map, x: Map, y: Map) -> Map:
    return parameters[4] + parameters[5] * x + parameters[6] * y


def _sample(values: Map, u: Map, v: Map, pixel: float) -> Map:
    """Bilinear values at points in um from the middle; NaN outside and beside NaN."""
    height, width = values.shape
    column, row = u / pixel + (width - 1) / 2, v / pixel + (height - 1) / 2
    inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
    left = np.clip(np.floor(column), 0, width - 2).astype(np.int64)
    top = np.clip(np.floor(row), 0, height - 2).astype(np.int64)
    right_share, bottom_share = column - left, row - top
    upper = values[top, left] * (1 - right_share) + values[top, left + 1] * right_share
    lower = values[top + 1, left] * (1 - right_share) + values[top + 1, left + 1] * right_share
    return np.where(inside, upper * (1 - bottom_share) + lower * bottom_share, np.nan)


def _scale(residual: Map) -> float:
    spread = _DEVIATION_OF_MAD * float(np.median(np.abs(residual - np.median(residual))))
    return max(spread, 1e-9)


def _tukey(residual: Map) -> Map:
    ratio = residual / (_TUKEY * _scale(residual))
    return np.where(np.abs(ratio) < 1, (1 - ratio**2) ** 2, 0.0)


def _cost(residual: Map) -> float:
    """Mean absolute residual without its largest fifth: what a step has to lower."""
    magnitude = np.abs(residual)
    kept = max(1, int(0.8 * magnitude.size))
    return float(np.partition(magnitude, kept - 1)[:kept].mean())


def _checked_map(values: NDArray[np.floating], name: str) -> Map:
    array = np.asarray(values)
    if array.ndim != 2 or min(array.shape) < 16 or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{name}: expected heights (H, W), at least 16 x 16, got {array.shape} {array.dtype}"
        )
    heights = array.astype(np.float64)
    if np.isfinite(heights).sum() < 64:
        raise ValueError(f"{name}: expected at least 64 known pixels")
    return np.where(np.isfinite(heights), heights, np.nan)
